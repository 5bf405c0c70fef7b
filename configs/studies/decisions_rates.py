"""The step size of each algorithm on the world with decisions, tuned with the same budget, for
configs/studies/decisions.py.

Hardware: 2 CPU cores, 8 GB. Command:
    appo-jax study --config configs/studies/decisions_rates.py --jobs 2
"""

from pathlib import Path

from appo_jax.config_io import load_config, with_fields
from appo_jax.study.definition import Study

base = load_config(Path(__file__).parents[1] / "decisions.py")
# ARPO draws half of its budget at once, as in its paper.
ALGORITHMS = {
    "appo": {},
    "appo_all": {"algorithm": "appo_all"},
    "grpo": {"algorithm": "grpo"},
    "arpo": {"algorithm": "arpo", "rollout.num_initial": 8},
}
RATES = {"rate_05": 5e-5, "rate_1": 1e-4, "rate_2": 2e-4}

study = Study(
    out="runs/studies/decisions_rates",
    arms={
        f"{algorithm}_{rate}": with_fields(base, fields | {"optimizer.learning_rate": value})
        for algorithm, fields in ALGORITHMS.items()
        for rate, value in RATES.items()
    },
    seeds=(100, 101),  # not those of the study
    max_sampled_tokens=50_000,
    cold_starts=("runs/cold/decisions-0", "runs/cold/decisions-1"),
)
