"""Fields that have no effect on a run because of the values of other fields. Points that differ only in them have the same runs.

Only fields that certainly have no effect are named. tests/sweep/test_unused.py compares this with the scores and the advantages
themselves.
"""

from __future__ import annotations

import dataclasses
from typing import get_args

from appo_jax.algorithms import make_algorithm
from appo_jax.config import BranchingConfig, Config
from appo_jax.config.method import TurnRule


def unused(config: Config) -> set[str]:
    """The dotted names of the fields without effect on a run of `config`."""
    algorithm = make_algorithm(config)
    branching, advantage = algorithm.branching, algorithm.advantage
    # Ω is 1 everywhere if π_old draws the branches.
    scores_future = algorithm.branches_later and branching.score not in ("entropy", *get_args(TurnRule))
    names = set[str]()
    if not algorithm.branches:
        names |= {f"branching.{field.name}" for field in dataclasses.fields(BranchingConfig)} | {"rollout.num_initial"}
    if not scores_future:
        names |= {"branching.clip_low", "branching.clip_high"}
    if branching.score != "product" or not scores_future:
        names.add("branching.gate")
    if branching.score != "additive":
        names |= {"branching.entropy_weight", "branching.future_weight"}
    if not algorithm.uses_future:
        names |= {"advantage.clip_low", "advantage.clip_high", "advantage.max_ratio"}
    if advantage.scaling == "plain":
        names.add("advantage.future_weight")
    if not algorithm.keeps_reference:
        names |= {"loss.kl_estimator", "loss.kl_in", "loss.max_k3"}
    # Both values Ω, that of the score and that of the advantage, have this half-life.
    names.discard("branching.tau")
    if not (scores_future or algorithm.uses_future):
        names.add("branching.tau")
    return names
