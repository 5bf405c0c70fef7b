r"""APPO of Llama-3.1-8B-Instruct on mathematics and multi-hop questions, with python and search.

Source: arXiv 2606.12384, computational and knowledge-intensive reasoning. 2 epochs over train_10k.parquet: 156 steps.
Hardware: TPU v6e:4x8 (32 chips): 20.5 of 31.25 GiB each, as planned. The paper used 8 H100.
Expected: average over ten sets 57.4 (GRPO 51.1, ARPO 55.3).
The weights are those of a cold start: SFT on tool-use traces, lr 7e-6, batch 128, weight decay 0.1, 3 epochs, length 4096.

    appo-jax plan --config configs/llama3_1_8b_reasoning.py --topology v6e:4x8
    launch/run.sh --config configs/llama3_1_8b_reasoning.py --run-dir /mnt/shared/runs/llama3_1_8b_reasoning \
        --policy.path /mnt/shared/llama3_1_8b_sft --data /mnt/shared/appo_rl --tools.search.url http://10.0.0.3:8000/retrieve
"""

import dataclasses
from pathlib import Path

from appo_jax.config import Architecture, DataConfig, MeshConfig, PolicyConfig, RopeScaling, SearchToolConfig
from appo_jax.config_io import load_config

paper = load_config(Path(__file__).parent / "shared" / "paper.py")
architecture = Architecture(
    vocab_size=128256, width=4096, num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128, mlp_width=14336,
    rope_theta=5e5, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192), norm_eps=1e-5, tie_embeddings=False,
)  # fmt: skip
# Any server of Search-R1's retriever protocol over Wikipedia.
search = SearchToolConfig(
    url="http://127.0.0.1:8000/retrieve", top_k=10, allow_private=True, cache="artifacts/search.sqlite"
)
config = dataclasses.replace(
    paper,
    run_dir="runs/llama3_1_8b_reasoning",
    steps=156,
    policy=PolicyConfig(path="artifacts/llama3_1_8b_sft", architecture=architecture),  # after the cold start
    data=DataConfig(source="appo_rl", path="artifacts/appo_rl"),
    tools=dataclasses.replace(paper.tools, search=search),
    rollout=dataclasses.replace(paper.rollout, decode_rows=512),  # all initial rollouts of a step at once
    mesh=MeshConfig(data=2, fsdp=4, tensor=4),
)
