"""The sweep of quickstart.py on TPU slices, which share /mnt/shared: each worker takes trials from its folder there.

Hardware: slices of one chip (TPU_TYPE=v6e-1), as many as TPU_WORKERS says. Commands, the first where /mnt/shared is mounted:
    appo-jax data world --config configs/quickstart.py --data /mnt/shared/world --policy.tokenizer /mnt/shared/world/tokenizer.model
    launch/sweep.sh --config configs/sweeps/slices.py
"""

import dataclasses
from pathlib import Path

from appo_jax.config_io import with_fields
from appo_jax.sweep.definition import load_sweep

sweep = load_sweep(Path(__file__).parent / "quickstart.py")
base = with_fields(
    sweep.base, {"data.path": "/mnt/shared/world", "policy.tokenizer": "/mnt/shared/world/tokenizer.model"}
)
sweep = dataclasses.replace(sweep, out="/mnt/shared/sweeps/quickstart", base=base)
