"""A real pretrained policy on HotpotQA, with a search tool over the paragraphs of its questions: SmolLM2-135M-Instruct.

Sized for two CPU cores. docs/results.md has what it reaches, with the commands. `data.path` is the file whose questions become
traces of the cold start, `data.held_out` the other one; the tool searches the paragraphs of both.

    appo-jax convert smollm2 --out artifacts/smollm2
    appo-jax sft --config configs/smollm2_hotpotqa.py --data DIR_OF_HOTPOTQA
"""

from appo_jax.config import (
    BranchingConfig,
    Config,
    DataConfig,
    EvalConfig,
    OptimizerConfig,
    PolicyConfig,
    RewardConfig,
    RolloutConfig,
    SearchToolConfig,
    SFTConfig,
    ToolsConfig,
)

config = Config(
    run_dir="runs/smollm2_hotpotqa",
    steps=20,
    prompts_per_step=2,
    prompts_per_minibatch=1,
    checkpoint_every=1,
    policy=PolicyConfig(path="artifacts/smollm2"),
    data=DataConfig(source="hotpotqa"),
    # One page an answer: pages have about 130 tokens, and a question needs two of them.
    tools=ToolsConfig(enabled=("search",), search=SearchToolConfig(top_k=1)),
    reward=RewardConfig(tool_bonus=0.0),  # there is one tool, so a bonus for using every tool would reward nothing
    rollout=RolloutConfig(
        num_initial=4, budget=8, max_prompt_tokens=256, max_response_tokens=768, max_result_tokens=256, max_tool_calls=4,
        decode_rows=32, max_seconds=300,
    ),
    branching=BranchingConfig(num_branch_points=1),
    optimizer=OptimizerConfig(learning_rate=2e-6, micro_batch=2),
    sft=SFTConfig(steps=12, batch_size=8, max_tokens=768, learning_rate=1e-4, micro_batch=2),
    eval=EvalConfig(num_prompts=16),
)  # fmt: skip
