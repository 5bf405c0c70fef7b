"""GRPO and the baselines that change its loss or its advantage alone, on the embedded world.

Hardware: 2 CPU cores, 4 GB. Command:
    appo-jax study --config configs/studies/variants.py --jobs 2 [--arms fipo ...] [--seeds 0 1 ...]
"""

import dataclasses
from pathlib import Path

from appo_jax.config_io import load_config
from appo_jax.study.definition import Study

base = load_config(Path(__file__).parents[1] / "shared" / "study.py")

study = Study(
    out="runs/variants",
    arms={name: dataclasses.replace(base, algorithm=name) for name in ("grpo", "gigpo", "gppo", "cispo", "fipo")},
    seeds=(0, 1, 2),
    max_sampled_tokens=40_000,
)
