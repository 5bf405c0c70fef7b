"""Advantages of rollouts from groups of rewards (eq. 6). On the host, in float64: a few numbers per prompt. A reward of
NaN means that the reward function failed: groups leave that rollout out, and its advantage is 0.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Float64

from appo_jax.config import Std

EQUAL = 1e-9  # rewards that differ by less are equal: rounding must not become an advantage


def without_spread(rewards: Float64[np.ndarray, " N"]) -> bool:
    """Whether a group's rewards are all the same."""
    rewards = rewards[~np.isnan(rewards)]
    return rewards.size == 0 or bool(rewards.max() - rewards.min() <= EQUAL)


def spread(group: Float[np.ndarray, " G"], std: Std) -> float:
    """Standard deviation of a group whose rewards differ: the population's, or a sample's plus 1e-6 (official code's
    GRPO)."""
    return float(group.std()) if std == "population" else float(group.std(ddof=1)) + 1e-6


def zscores(
    rewards: Float64[np.ndarray, " N"], group: Float64[np.ndarray, " G"], std: Std
) -> Float64[np.ndarray, " N"]:
    """`(R − mean(group)) / std(group)` for each R of `rewards`.

    Where all rewards of the group are equal, R gets 0 if it equals them and NaN (undefined) if it does not. An empty
    group gives NaN.
    """
    group = group[~np.isnan(group)]
    if group.size == 0:
        return np.full(rewards.shape, np.nan)
    if without_spread(group):
        return np.where(np.abs(rewards - group[0]) <= EQUAL, 0.0, np.nan)  # comparisons with NaN are false
    return (rewards - group.mean()) / spread(group, std)


def dual_group(
    rewards: Float64[np.ndarray, " R"],
    initial: Float64[np.ndarray, " N"],
    branches: Float64[np.ndarray, " B"],
    std: Std,
) -> Float64[np.ndarray, " R"]:
    """Eq. 6: the average of each reward's z-scores within the initial and within the branch group, `[R]`.

    A group for which the z-score is undefined is left out of the average; with none left the advantage is 0.
    """
    both = np.stack([zscores(rewards, initial, std), zscores(rewards, branches, std)])
    defined = ~np.isnan(both)
    return np.where(defined, both, 0.0).sum(0) / np.maximum(defined.sum(0), 1)


def zscores_within(rewards: Float64[np.ndarray, " N"], std: Std) -> Float64[np.ndarray, " N"]:
    """Z-score of each reward among all of them; 0 where all are equal."""
    return np.nan_to_num(zscores(rewards, rewards, std))
