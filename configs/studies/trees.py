"""The tree shapes of the paper's tables, on the embedded world: N initial rollouts, B branch points, L loops, budget M.

Hardware: 2 CPU cores, 4 GB. Command:
    appo-jax study --config configs/studies/trees.py --jobs 2 [--arms n8_b1 ...] [--seeds 0 1 ...]
"""

import dataclasses
from pathlib import Path

from appo_jax.config_io import load_config
from appo_jax.study.definition import Study

base = load_config(Path(__file__).parents[1] / "shared" / "study.py")


def shape(num_initial, num_branch_points, num_loops, budget):
    return dataclasses.replace(
        base,
        rollout=dataclasses.replace(base.rollout, num_initial=num_initial, budget=budget),
        branching=dataclasses.replace(base.branching, num_branch_points=num_branch_points, num_loops=num_loops),
    )


study = Study(
    out="runs/trees",
    arms={
        "n4_b3": shape(4, 3, 1, 16),
        "n8_b1": shape(8, 1, 1, 16),
        "n2_b7": shape(2, 7, 1, 16),
        "n2_b3": shape(2, 3, 1, 8),
        "n1_b3": shape(1, 3, 1, 4),
        "n2_b1": shape(2, 1, 1, 4),
        # The paper's three rows with several loops, as its text reads them: N roots, B branch points a rollout.
        "n1_b2_l3": shape(1, 2, 3, 16),
        "n1_b4_l2": shape(1, 4, 2, 16),
        "n3_b1_l2": shape(3, 1, 2, 16),  # a third loop draws the last four
        # The same rows as its appendix counts them, M = B·(N+1)^L: N and B change places.
        "n2_b1_l3": shape(2, 1, 3, 16),
        "n4_b1_l2": shape(4, 1, 2, 16),
        "n1_b3_l2": shape(1, 3, 2, 16),
    },
    seeds=(0, 1, 2),
    max_sampled_tokens=40_000,
)
