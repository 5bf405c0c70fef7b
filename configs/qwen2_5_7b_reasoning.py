"""APPO of Qwen2.5-7B-Instruct on mathematics and multi-hop questions, with python and search.

Source: arXiv 2606.12384, computational and knowledge-intensive reasoning. 2 epochs over train_10k.parquet: 156 steps.
Hardware: TPU v5e:8x8 (64 chips): 11.4 of 15.75 GiB each, as planned. The paper used 8 H100.
Expected: average over ten sets 62.2 (GRPO 56.5, ARPO 58.3); five QA sets 58.1.
The weights are those of a cold start: SFT on tool-use traces, lr 7e-6, batch 128, weight decay 0.1, 3 epochs, length 4096.

    appo-jax plan --config configs/qwen2_5_7b_reasoning.py --topology v5e:8x8
    launch/run.sh --config configs/qwen2_5_7b_reasoning.py --run-dir /mnt/shared/runs/qwen2_5_7b_reasoning
"""

from appo_jax.config import (
    Architecture,
    BranchingConfig,
    Config,
    DataConfig,
    EvalConfig,
    MeshConfig,
    OptimizerConfig,
    PolicyConfig,
    RolloutConfig,
    SearchToolConfig,
    ToolsConfig,
)

config = Config(
    run_dir="runs/qwen2_5_7b_reasoning",
    steps=156,
    prompts_per_step=128,
    prompts_per_minibatch=16,
    checkpoint_every=1,  # a step takes minutes, and a pod on spot capacity is given about 30 s to end
    stop_grace_seconds=20,
    policy=PolicyConfig(
        path="artifacts/qwen2_5_7b_sft",  # after the cold start
        architecture=Architecture(
            vocab_size=152064, width=3584, num_layers=28, num_heads=28, num_kv_heads=4, head_dim=128, mlp_width=18944,
            rope_theta=1e6, norm_eps=1e-6, tie_embeddings=False, family="qwen2",
        ),
    ),
    data=DataConfig(source="appo_rl", path="artifacts/appo_rl"),
    tools=ToolsConfig(
        max_concurrency=64,
        # Any server of Search-R1's retriever protocol over Wikipedia.
        search=SearchToolConfig(
            url="http://127.0.0.1:8000/retrieve", top_k=10, allow_private=True, cache="artifacts/search.sqlite"
        ),
    ),
    rollout=RolloutConfig(
        num_initial=4, budget=16, max_prompt_tokens=1024, max_response_tokens=4096, max_result_tokens=512,
        max_tool_calls=6, decode_rows=192, max_seconds=1800,
    ),
    branching=BranchingConfig(num_branch_points=3, tau=32.0, clip_low=1.0, clip_high=1.2),
    optimizer=OptimizerConfig(learning_rate=1e-6, micro_batch=16, remat="layers"),
    eval=EvalConfig(every=20),
    mesh=MeshConfig(fsdp=16, tensor=4),
)  # fmt: skip
