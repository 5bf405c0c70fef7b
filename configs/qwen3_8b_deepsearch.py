r"""APPO of Qwen3-8B on deep search, with web search and python.

Source: arXiv 2606.12384, deep search. 5 epochs over hard_search_1k.parquet: 41 steps.
Hardware: TPU v5p:2x4x4 (32 chips): 42 of 96 GiB each, as planned. The paper used 8 H100.
Expected: GAIA average 42.7 (GRPO 32.0, ARPO 38.8).
The weights are those of a cold start: SFT on tool-use traces, lr 7e-6, batch 128, weight decay 0.1, 3 epochs, length 4096.

    appo-jax plan --config configs/qwen3_8b_deepsearch.py --topology v5p:2x4x4
    TPU_ENV=SERPER_API_KEY launch/run.sh --config configs/qwen3_8b_deepsearch.py --run-dir /mnt/shared/runs/qwen3_8b_deepsearch \
        --policy.path /mnt/shared/qwen3_8b_sft --data /mnt/shared/appo_rl/hard_search_1k.parquet
"""

import dataclasses
from pathlib import Path

from appo_jax.config import Architecture, DataConfig, MeshConfig, PolicyConfig, SearchToolConfig
from appo_jax.config_io import load_config

paper = load_config(Path(__file__).parent / "shared" / "paper.py")
architecture = Architecture(
    vocab_size=151936, width=4096, num_layers=36, num_heads=32, num_kv_heads=8, head_dim=128, mlp_width=12288,
    rope_theta=1e6, norm_eps=1e-6, tie_embeddings=False, family="qwen3",
)  # fmt: skip
# The key is read from SERPER_API_KEY.
search = SearchToolConfig(
    url="https://google.serper.dev/search", provider="serper", top_k=10, cache="artifacts/search.sqlite"
)
config = dataclasses.replace(
    paper,
    run_dir="runs/qwen3_8b_deepsearch",
    steps=41,
    policy=PolicyConfig(path="artifacts/qwen3_8b_sft", architecture=architecture),  # after the cold start
    data=DataConfig(source="appo_rl", path="artifacts/appo_rl/hard_search_1k.parquet"),
    tools=dataclasses.replace(paper.tools, search=search),
    rollout=dataclasses.replace(
        paper.rollout,
        max_response_tokens=8192,
        max_result_tokens=1024,
        max_tool_calls=10,
        decode_rows=512,  # all initial rollouts of a step at once
    ),
    mesh=MeshConfig(data=4, fsdp=1, tensor=8),
)
