"""The paper's claims on the world with decisions: APPO, its ablations, and other algorithms, at equal sampled tokens.

Step sizes and clips: the best of each in configs/studies/decisions_rates.py; the ablations have APPO's.
Hardware: 2 CPU cores, 8 GB. Command:
    appo-jax study --config configs/studies/decisions.py --jobs 2 [--arms appo arpo ...] [--seeds 0 1 ...]
Interrupted, the same command goes on. It ends in runs/studies/decisions/study.md, study.json and study.png.
"""

from pathlib import Path

from appo_jax.config_io import load_config, with_fields
from appo_jax.study.plan import Study

base = load_config(Path(__file__).parents[1] / "decisions.py")


def arm(**fields):
    """The base with other fields; `__` stands for the dot of a name."""
    return with_fields(base, {name.replace("__", "."): value for name, value in fields.items()})


study = Study(
    out="runs/studies/decisions",
    arms={
        "appo": base,
        "grpo": arm(algorithm="grpo"),
        "arpo": arm(algorithm="arpo", rollout__num_initial=8),  # half of the budget at once, as in its paper
        "entropy": arm(branching__score="entropy"),  # BS → entropy
        "without_a_fut": arm(advantage__future_weight=0.0),
        "without_dual_groups": arm(advantage__base="joint"),
        "appo_all": arm(algorithm="appo_all"),  # branches are trained on as well: ours
    },
    seeds=tuple(range(10)),
    max_sampled_tokens=50_000,
    cold_starts=("runs/cold/decisions-0", "runs/cold/decisions-1"),
)
