"""GRPO and the baselines that change its loss or its advantage alone, on the embedded world.

Hardware: 2 CPU cores, 4 GB. Command:
    appo-jax study --config configs/studies/variants.py --jobs 2 [--arms fipo ...] [--seeds 0 1 ...]
"""

import dataclasses
from pathlib import Path

from appo_jax.config_io import load_config
from appo_jax.study.plan import Study

quickstart = load_config(Path(__file__).parents[1] / "quickstart.py")
base = dataclasses.replace(
    quickstart,
    eval=dataclasses.replace(quickstart.eval, every=2),
    # GRPO's kind trains on all 16 rollouts of a prompt: in small parts, whose activations stay in a core's cache.
    optimizer=dataclasses.replace(quickstart.optimizer, micro_batch=8),
)

study = Study(
    out="runs/variants",
    arms={name: dataclasses.replace(base, algorithm=name) for name in ("grpo", "gigpo", "gppo", "cispo", "fipo")},
    seeds=(0, 1, 2),
    max_sampled_tokens=40_000,
)
