"""Measures Theorem 1: the variance of A_base over repeated draws of the branches, for each rule of allocating the budget.

The initial rollouts and the scores of their positions are fixed. The branches of a prompt are drawn many times, and each draw
gives every initial rollout an A_base (eq. 6). The variance over the draws is the noise that the branches add.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from math import inf
from typing import Literal

import numpy as np

from appo_jax.advantage.groups import dual_group
from appo_jax.branching.select import select
from appo_jax.config import BranchingConfig
from appo_jax.influence.ranking import Interval, Ranked, mean_over_questions
from appo_jax.rollout.sampler import Branch
from appo_jax.types import Rollout

ALLOCATIONS: tuple[Literal["per_rollout", "proportional"], ...] = ("per_rollout", "proportional")


@dataclasses.dataclass(frozen=True)
class Scatter:
    """The results of both allocations on the same prompts."""

    variance: Mapping[str, Interval]
    """By allocation: the variance of A_base over the draws, averaged over a question's initial rollouts, then over questions."""
    difference: Interval
    """proportional minus per_rollout, paired by rollout."""


def advantage_scatter(
    rollouts: Sequence[Rollout], ranked: Sequence[Ranked], config: BranchingConfig, num_initial: int, budget: int, draws: int,
    draw_branches: Callable[[Sequence[Sequence[Branch]], int], Sequence[Sequence[Rollout]]],
) -> Scatter:  # fmt: skip
    """The variance of A_base when branches are placed by the Branching Score (`ranked[i].scores["product"]`).

    rollouts: finished initial rollouts with rewards, `num_initial` of each prompt in turn. budget: M. draws: how often the
    branches of a prompt are drawn under each allocation; at least 2. draw_branches: draws the branches of each rollout and
    gives them rewards; its number separates the random draws of one call from those of the other.
    """
    variances: dict[str, list[Sequence[float]]] = {}  # by allocation: those of each prompt's initial rollouts
    for number, allocation in enumerate(ALLOCATIONS):
        branches: list[list[Branch]] = [[] for _ in rollouts]
        for first in range(0, len(rollouts), num_initial):
            some = ranked[first : first + num_initial]
            points = select(
                [r.scores["product"] for r in some], [r.preferred["product"] for r in some], [r.valid for r in some],
                [r.sampled for r in some], budget - num_initial, dataclasses.replace(config, allocation=allocation),
            )  # fmt: skip
            for draw in range(draws):
                for at, (n, position) in enumerate(points):
                    cut = position + config.include_token
                    branches[first + n].append(Branch(cut, num_initial + draw * len(points) + at, 1))
        drawn = draw_branches(branches, number)
        variances[allocation] = [
            _variances(rollouts[first : first + num_initial], drawn[first : first + num_initial], draws)
            for first in range(0, len(rollouts), num_initial)
        ]
    pairs = [
        np.subtract(b, a).tolist() for a, b in zip(variances["per_rollout"], variances["proportional"], strict=True)
    ]
    questions = [ranked[first].question for first in range(0, len(rollouts), num_initial)]
    return Scatter(
        {name: mean_over_questions(values, questions, (0.0, inf)) for name, values in variances.items()},
        mean_over_questions(pairs, questions),
    )


def _variances(initial: Sequence[Rollout], drawn: Sequence[Sequence[Rollout]], draws: int) -> list[float]:
    """For one prompt's initial rollouts that have a reward, the variance of A_base over the draws."""
    first = np.array([r.reward for r in initial if not np.isnan(r.reward)])
    branches = sorted((r for some in drawn for r in some), key=lambda r: r.node)
    rewards = np.array([r.reward for r in branches]).reshape(draws, -1)
    return np.var([dual_group(first, first, of_draw, "population") for of_draw in rewards], axis=0, ddof=1).tolist()
