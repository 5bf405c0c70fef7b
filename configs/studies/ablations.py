"""The paper's ablations on the embedded world: what each part of APPO is worth.

Hardware: 2 CPU cores, 4 GB. Command:
    appo-jax study --config configs/studies/ablations.py --jobs 2 [--arms entropy ...] [--seeds 0 1 ...]
"""

import dataclasses
from pathlib import Path

from appo_jax.config_io import load_config
from appo_jax.study.definition import Study

base = load_config(Path(__file__).parents[1] / "shared" / "study.py")


def branching(**fields):
    return dataclasses.replace(base, branching=dataclasses.replace(base.branching, **fields))


def advantage(**fields):
    return dataclasses.replace(base, advantage=dataclasses.replace(base.advantage, **fields))


study = Study(
    out="runs/ablations",
    arms={
        "appo": base,
        "entropy": branching(score="entropy"),  # BS → entropy
        "future": branching(score="future"),  # BS → future value only
        "additive": branching(score="additive"),
        "without_a_fut": advantage(future_weight=0.0),
        "without_dual_groups": advantage(base="joint"),  # rollouts of both policies in one group
        "init_group_only": advantage(base="init_only"),  # the branches' rewards go unused: not an ablation of the paper
        # points where paper and official code differ
        "shared_prefix": advantage(base="shared_prefix"),
        "pooled": branching(allocation="pooled"),
        "proportional": branching(allocation="proportional"),
        "literal_gate": branching(gate="literal"),
        "once_per_step": branching(refresh="step"),
    },
    seeds=(0, 1, 2),
    max_sampled_tokens=40_000,
)
