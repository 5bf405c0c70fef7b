"""APPO and five baselines on the embedded world, at an equal budget of sampled tokens, from the same cold start for each seed.

Hardware: 2 CPU cores, 4 GB. Command:
    appo-jax study --config configs/studies/study.py --jobs 2 [--arms appo grpo ...] [--seeds 0 1 ...]
If it is interrupted, the same command continues it. It ends in runs/study/study.md and study.png.
variants.py has the other baselines.
"""

import dataclasses
from pathlib import Path

from appo_jax.config_io import load_config
from appo_jax.study.definition import Study

base = load_config(Path(__file__).parents[1] / "shared" / "study.py")
base = dataclasses.replace(base, eval=dataclasses.replace(base.eval, every=1))
arpo = dataclasses.replace(base.rollout, num_initial=8)  # half of the budget at once, as in its paper

study = Study(
    out="runs/study",
    arms={
        "appo": base,
        "grpo": dataclasses.replace(base, algorithm="grpo"),
        "arpo": dataclasses.replace(base, algorithm="arpo", rollout=arpo),
        "tree_grpo": dataclasses.replace(base, algorithm="tree_grpo"),
        "dapo": dataclasses.replace(base, algorithm="dapo"),
        "reinforce_pp": dataclasses.replace(base, algorithm="reinforce_pp"),
    },
    seeds=(0, 1, 2, 3, 4),
    # Most runs reach their plateau by 20,000 tokens. A much larger budget would only compare plateaus.
    max_sampled_tokens=40_000,
)
