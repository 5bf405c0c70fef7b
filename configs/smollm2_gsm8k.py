"""A real pretrained policy on real questions: SmolLM2-135M-Instruct on GSM8K with the python tool.

Sized for two CPU cores: it demonstrates the method on a real model, which is too small for a result. Memory: under 14 GB.

    appo-jax convert smollm2 --out artifacts/smollm2
    appo-jax train --config configs/smollm2_gsm8k.py --data DIR_OF_GSM8K --steps 2
"""

from appo_jax.config import (
    BranchingConfig,
    Config,
    DataConfig,
    EvalConfig,
    OptimizerConfig,
    PolicyConfig,
    PythonToolConfig,
    RewardConfig,
    RolloutConfig,
    SFTConfig,
    ToolsConfig,
)

config = Config(
    run_dir="runs/smollm2_gsm8k",
    steps=20,
    prompts_per_step=2,
    prompts_per_minibatch=1,
    checkpoint_every=1,
    policy=PolicyConfig(path="artifacts/smollm2"),
    data=DataConfig(source="gsm8k"),
    tools=ToolsConfig(enabled=("python",), python=PythonToolConfig(preload=("math",))),
    reward=RewardConfig(tool_bonus=0.0),  # there is one tool, so a bonus for using every tool would reward nothing
    rollout=RolloutConfig(
        num_initial=4, budget=8, max_prompt_tokens=352, max_response_tokens=256, max_result_tokens=32, max_tool_calls=8,
        decode_rows=32, max_seconds=300,
    ),
    branching=BranchingConfig(num_branch_points=1),
    optimizer=OptimizerConfig(learning_rate=2e-6, micro_batch=2),
    # A dozen batches of traces is enough to teach the call format to an instruction-tuned model.
    sft=SFTConfig(steps=12, batch_size=8, max_tokens=384, learning_rate=1e-4, micro_batch=2),
    eval=EvalConfig(num_prompts=16),
)  # fmt: skip
