"""APPO of Llama-3.1-8B-Instruct on mathematics and multi-hop questions, with python and search.

Source: arXiv 2606.12384, computational and knowledge-intensive reasoning. 2 epochs over train_10k.parquet: 156 steps.
Hardware: TPU v6e:4x8 (32 chips): 28.8 of 31.25 GiB each, as planned. The paper used 8 H100.
Expected: average over ten sets 57.4 (GRPO 51.1, ARPO 55.3).
The weights are those of a cold start: SFT on tool-use traces, lr 7e-6, batch 128, weight decay 0.1, 3 epochs, length 4096.

    appo-jax plan --config configs/llama3_1_8b_reasoning.py --topology v6e:4x8
    launch/run.sh --config configs/llama3_1_8b_reasoning.py --run-dir /mnt/shared/runs/llama3_1_8b_reasoning
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
    RopeScaling,
    SearchToolConfig,
    ToolsConfig,
)

config = Config(
    run_dir="runs/llama3_1_8b_reasoning",
    steps=156,
    prompts_per_step=128,
    prompts_per_minibatch=16,
    checkpoint_every=1,  # a step takes minutes, and a pod on spot capacity is given about 30 s to end
    stop_grace_seconds=20,
    policy=PolicyConfig(
        path="artifacts/llama3_1_8b_sft",  # after the cold start
        architecture=Architecture(
            vocab_size=128256, width=4096, num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128, mlp_width=14336,
            rope_theta=5e5, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192), norm_eps=1e-5, tie_embeddings=False,
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
    mesh=MeshConfig(fsdp=16, tensor=2),
)  # fmt: skip
