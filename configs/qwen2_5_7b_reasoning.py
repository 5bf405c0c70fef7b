r"""APPO of Qwen2.5-7B-Instruct on mathematics and multi-hop questions, with python and search.

Source: arXiv 2606.12384, computational and knowledge-intensive reasoning. 2 epochs over train_10k.parquet: 156 steps.
Hardware: TPU v5e:8x8 (64 chips): 9.5 of 15.75 GiB each, as planned. The paper used 8 H100.
Expected: average over ten sets 62.2 (GRPO 56.5, ARPO 58.3); five QA sets 58.1.
The weights are those of a cold start: SFT on tool-use traces, lr 7e-6, batch 128, weight decay 0.1, 3 epochs, length 4096.

    appo-jax plan --config configs/qwen2_5_7b_reasoning.py --topology v5e:8x8
    launch/run.sh --config configs/qwen2_5_7b_reasoning.py --run-dir /mnt/shared/runs/qwen2_5_7b_reasoning \
        --policy.path /mnt/shared/qwen2_5_7b_sft --data /mnt/shared/appo_rl --tools.search.url http://10.0.0.3:8000/retrieve
"""

import dataclasses
from pathlib import Path

from appo_jax.config import Architecture, DataConfig, MeshConfig, PolicyConfig, SearchToolConfig
from appo_jax.config_io import load_config

paper = load_config(Path(__file__).parent / "shared" / "paper.py")
architecture = Architecture(
    vocab_size=152064, width=3584, num_layers=28, num_heads=28, num_kv_heads=4, head_dim=128, mlp_width=18944,
    rope_theta=1e6, norm_eps=1e-6, tie_embeddings=False, family="qwen2",
)  # fmt: skip
# Any server of Search-R1's retriever protocol over Wikipedia.
search = SearchToolConfig(
    url="http://127.0.0.1:8000/retrieve", top_k=10, allow_private=True, cache="artifacts/search.sqlite"
)
config = dataclasses.replace(
    paper,
    run_dir="runs/qwen2_5_7b_reasoning",
    steps=156,
    policy=PolicyConfig(path="artifacts/qwen2_5_7b_sft", architecture=architecture),  # after the cold start
    data=DataConfig(source="appo_rl", path="artifacts/appo_rl"),
    tools=dataclasses.replace(paper.tools, search=search),
    rollout=dataclasses.replace(paper.rollout, decode_rows=512),  # all initial rollouts of a step at once
    mesh=MeshConfig(data=2, fsdp=8, tensor=4),
)
