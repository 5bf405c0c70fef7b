"""What the four runs of the paper share (arXiv 2606.12384): batches, trees, optimizer, and the room of a reasoning rollout.

It does not train by itself: the files in configs/ add the policy, its questions, the search and the mesh.
"""

from appo_jax.config import BranchingConfig, Config, EvalConfig, OptimizerConfig, RolloutConfig, SFTConfig, ToolsConfig

config = Config(
    prompts_per_step=128,
    prompts_per_minibatch=16,
    checkpoint_every=1,  # a step takes minutes, and a pod on spot capacity is given about 30 s to end
    stop_grace_seconds=20,
    tools=ToolsConfig(max_concurrency=64),
    rollout=RolloutConfig(
        num_initial=4, budget=16, max_prompt_tokens=1024, max_response_tokens=4096, max_result_tokens=512,
        max_tool_calls=6, decode_rows=192, max_seconds=1800,
    ),
    branching=BranchingConfig(num_branch_points=3, tau=32.0, clip_low=1.0, clip_high=1.2),
    sft=SFTConfig(checkpoint_every=25),  # about two minutes
    optimizer=OptimizerConfig(learning_rate=1e-6, micro_batch=16, remat="layers"),
    eval=EvalConfig(every=20),
)  # fmt: skip
