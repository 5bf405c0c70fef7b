"""Advantages of whole rollouts from groups of rewards (eq. 6). Host side, float64: a few numbers per prompt.

A NaN is a rollout without a reward (its reward function failed): no group counts it, and its own advantage is 0.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

Std = Literal["population", "sample"]  # `advantage.std`
EQUAL = 1e-9  # rewards no further apart are the same reward: what rounding added must not become an advantage


def without_spread(rewards: np.ndarray) -> bool:
    """Whether a group's rewards are all the same."""
    rewards = rewards[~np.isnan(rewards)]
    return rewards.size == 0 or bool(rewards.max() - rewards.min() <= EQUAL)


def spread(group: np.ndarray, std: Std) -> float:
    """Standard deviation of a group with a spread: of the population, or of a sample plus 1e-6 (official code's GRPO)."""
    return float(group.std()) if std == "population" else float(group.std(ddof=1)) + 1e-6


def zscores(rewards: np.ndarray, group: np.ndarray, std: Std) -> np.ndarray:
    """`(R − mean(group)) / std(group)` for each R of `rewards`.

    Over a group without spread the quotient is 0/0 for the group's own value, which counts as 0, and undefined (NaN) for
    any other; so it is over an empty group.
    """
    group = group[~np.isnan(group)]
    if group.size == 0:
        return np.full(rewards.shape, np.nan)
    if without_spread(group):
        return np.where(np.abs(rewards - group[0]) <= EQUAL, 0.0, np.nan)  # no comparison holds for a NaN
    return (rewards - group.mean()) / spread(group, std)


def dual_group(initial: np.ndarray, branches: np.ndarray, std: Std) -> np.ndarray:
    """Eq. 6: the average of R_n's z-scores within the initial and within the branch group, `[N]`.

    A group for which the z-score is undefined is left out of the average; with none left the advantage is 0.
    """
    scores = np.stack([zscores(initial, initial, std), zscores(initial, branches, std)])
    defined = ~np.isnan(scores)
    return np.where(defined, scores, 0.0).sum(0) / np.maximum(defined.sum(0), 1)


def own_zscores(rewards: np.ndarray, std: Std) -> np.ndarray:
    """Each reward's z-score within all of them; 0 for a group without spread."""
    return np.nan_to_num(zscores(rewards, rewards, std))
