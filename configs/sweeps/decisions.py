"""Which fields of the method matter on the world with decisions: τ, the clip of Ω in the score, b and B, every combination.

Hardware: 2 CPU cores, 8 GB. Command:
    appo-jax sweep --config configs/sweeps/decisions.py --jobs 2
Interrupted or killed, the same command goes on. It ends in runs/sweeps/decisions/sweep.md, sweep.png and best.json.
"""

from pathlib import Path

from appo_jax.config_io import load_config
from appo_jax.sweep.definition import Sweep

sweep = Sweep(
    out="runs/sweeps/decisions",
    base=load_config(Path(__file__).parents[1] / "decisions.py"),
    space={
        "branching.tau": (8.0, 128.0),
        "branching.clip_high": (1.2, 2.0),
        "advantage.future_weight": (0.0, 1.0),
        "branching.num_branch_points": (1, 3),  # 1: two loops, until M = 16 is used
    },
    seeds=(0, 1),
    max_sampled_tokens=50_000,
    cold_starts=("runs/cold/decisions-0", "runs/cold/decisions-1"),
)
