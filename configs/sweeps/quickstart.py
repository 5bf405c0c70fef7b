"""A first sweep: the half-life τ, the clip of Ω and b on the embedded world, two seeds a trial.

Hardware: 2 CPU cores, 4 GB. Command:
    appo-jax sweep --config configs/sweeps/quickstart.py --jobs 2
Interrupted or killed, the same command goes on. It ends in runs/sweeps/quickstart/sweep.md, sweep.png and best.json.
"""

from pathlib import Path

from appo_jax.config_io import load_config, with_fields
from appo_jax.sweep.definition import Sweep

sweep = Sweep(
    out="runs/sweeps/quickstart",
    # a run has few steps, and the objective is the accuracy on the way
    base=with_fields(load_config(Path(__file__).parents[1] / "quickstart.py"), {"eval.every": 1}),
    space={
        "branching.tau": (8.0, 32.0, 128.0),
        "branching.clip_high": (1.1, 1.2, 1.5),
        "advantage.future_weight": (0.0, 0.5, 1.0),
    },
    seeds=(0, 1),
    max_sampled_tokens=20_000,
)
