"""What the studies share: the quickstart, evaluated during training."""

import dataclasses
from pathlib import Path

from appo_jax.config_io import load_config

quickstart = load_config(Path(__file__).parents[1] / "quickstart.py")
config = dataclasses.replace(
    quickstart,
    eval=dataclasses.replace(quickstart.eval, every=2),
    # GRPO's kind trains on all 16 rollouts of a prompt: in small parts, whose activations stay in a core's cache.
    optimizer=dataclasses.replace(quickstart.optimizer, micro_batch=8),
)
