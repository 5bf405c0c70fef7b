"""APPO of Qwen3-14B on deep search, with web search and python.

Source: arXiv 2606.12384, deep search. 5 epochs over hard_search_1k.parquet: 41 steps.
Hardware: TPU v5p:4x4x4 (64 chips): 30 of 96 GiB each, as planned. The paper used 16 H100.
Expected: GAIA average 46.6 (GRPO 36.9, ARPO 43.7).
The weights are those of a cold start: SFT on tool-use traces, lr 7e-6, batch 128, weight decay 0.1, 3 epochs, length 4096.

    appo-jax plan --config configs/qwen3_14b_deepsearch.py --topology v5p:4x4x4
    launch/run.sh --config configs/qwen3_14b_deepsearch.py --run-dir /mnt/shared/runs/qwen3_14b_deepsearch
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
    run_dir="runs/qwen3_14b_deepsearch",
    steps=41,
    prompts_per_step=128,
    prompts_per_minibatch=16,
    checkpoint_every=1,  # a step takes minutes, and a pod on spot capacity is given about 30 s to end
    stop_grace_seconds=20,
    policy=PolicyConfig(
        path="artifacts/qwen3_14b_sft",  # after the cold start
        architecture=Architecture(
            vocab_size=151936, width=5120, num_layers=40, num_heads=40, num_kv_heads=8, head_dim=128, mlp_width=17408,
            rope_theta=1e6, norm_eps=1e-6, tie_embeddings=False, family="qwen3",
        ),
    ),
    data=DataConfig(source="appo_rl", path="artifacts/appo_rl/hard_search_1k.parquet"),
    tools=ToolsConfig(
        max_concurrency=64,
        # The key is read from SERPER_API_KEY.
        search=SearchToolConfig(
            url="https://google.serper.dev/search", provider="serper", top_k=10, cache="artifacts/search.sqlite"
        ),
    ),
    rollout=RolloutConfig(
        num_initial=4, budget=16, max_prompt_tokens=1024, max_response_tokens=8192, max_result_tokens=1024,
        max_tool_calls=10, decode_rows=192, max_seconds=1800,
    ),
    branching=BranchingConfig(num_branch_points=3, tau=32.0, clip_low=1.0, clip_high=1.2),
    optimizer=OptimizerConfig(learning_rate=1e-6, micro_batch=16, remat="layers"),
    eval=EvalConfig(every=20),
    mesh=MeshConfig(fsdp=16, tensor=4),
)  # fmt: skip
