"""The embedded world, on two CPU cores in minutes: cold start and APPO of a policy of 2.6 M parameters.

Hardware: 2 CPU cores, 4 GB. Command: make demo, or
    appo-jax data world --config configs/quickstart.py && appo-jax train --config configs/quickstart.py
"""

from appo_jax.config import (
    Architecture,
    BranchingConfig,
    Config,
    DataConfig,
    EvalConfig,
    OptimizerConfig,
    PolicyConfig,
    PythonToolConfig,
    RewardConfig,
    RolloutConfig,
    SearchToolConfig,
    SFTConfig,
    ToolsConfig,
)

config = Config(
    run_dir="runs/quickstart",
    steps=26,
    prompts_per_step=16,
    prompts_per_minibatch=8,
    checkpoint_every=10,
    policy=PolicyConfig(
        architecture=Architecture(
            vocab_size=1152, width=256, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=64, mlp_width=768,
            family="qwen3",
        ),
        tokenizer="artifacts/world/tokenizer.model",
    ),
    data=DataConfig(source="world", path="artifacts/world"),
    tools=ToolsConfig(
        # The policy writes arithmetic in a generated world; on machines without bubblewrap limits are enough for it.
        python=PythonToolConfig(isolation="process", preload=("math",), timeout=2.0),
        search=SearchToolConfig(top_k=1),
    ),
    reward=RewardConfig(tool_bonus=0.0),  # most questions need one tool, so no bonus is given for using both
    rollout=RolloutConfig(
        num_initial=4, budget=16, max_prompt_tokens=24, max_response_tokens=112, max_result_tokens=48, max_tool_calls=5,
        decode_rows=64, max_seconds=60,
    ),
    branching=BranchingConfig(num_branch_points=3),
    optimizer=OptimizerConfig(learning_rate=2e-4, b2=0.98),
    sft=SFTConfig(steps=300, batch_size=16, max_tokens=144, optimizer="muon", learning_rate=0.03, weight_decay=0.1),
    eval=EvalConfig(num_prompts=192),
)  # fmt: skip
