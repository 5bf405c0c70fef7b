"""Each algorithm's own step size and clip on the world with decisions, with the same budget for each: the study tunes nothing
else. configs/studies/decisions.py takes the best of each.

Hardware: 2 CPU cores, 8 GB. Command:
    appo-jax study --config configs/studies/decisions_rates.py --jobs 2
"""

from pathlib import Path

from appo_jax.config_io import load_config, with_fields
from appo_jax.study.plan import Study

base = load_config(Path(__file__).parents[1] / "decisions.py")
# ARPO draws half of its budget at once, as in its paper.
ALGORITHMS = {
    "appo": {},
    "appo_all": {"algorithm": "appo_all"},
    "grpo": {"algorithm": "grpo"},
    "arpo": {"algorithm": "arpo", "rollout.num_initial": 8},
}
POINTS = {
    "rate_05": {"optimizer.learning_rate": 5e-5},
    "rate_1": {"optimizer.learning_rate": 1e-4},
    "rate_2": {"optimizer.learning_rate": 2e-4},
    "clip": {"optimizer.learning_rate": 2e-4, "loss.clip_low": 0.4, "loss.clip_high": 0.4},
}

study = Study(
    out="runs/studies/decisions_rates",
    arms={
        f"{name}_{point}": with_fields(base, fields | values)
        for name, fields in ALGORITHMS.items()
        for point, values in POINTS.items()
    },
    seeds=(100, 101),  # not those of the study
    max_sampled_tokens=60_000,
    cold_starts=("runs/cold/decisions-0", "runs/cold/decisions-1"),
)
