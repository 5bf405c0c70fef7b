"""Advantages of whole rollouts from groups of rewards (eq. 6). Host side, float64: a few numbers per prompt."""

from __future__ import annotations

import numpy as np

from appo_jax.config import AdvantageConfig


def zscores(rewards: np.ndarray, group: np.ndarray) -> np.ndarray | None:
    """`(R − mean(group)) / std(group)` for each R of `rewards`, population std.

    Over a group without spread the quotient is 0/0 for the group's own value, which counts as 0, and undefined (NaN) for
    any other. None for an empty group.
    """
    if group.size == 0:
        return None
    centred = rewards - group.mean()
    if group.max() == group.min():
        return np.where(rewards == group[0], 0.0, np.nan)
    return centred / group.std()


def dual_group(initial: np.ndarray, branches: np.ndarray) -> np.ndarray:
    """Eq. 6: the average of R_n's z-scores within the initial and within the branch group, `[N]`.

    A group for which the z-score is undefined is left out of the average; with none left the advantage is 0.
    """
    scores = [z for group in (initial, branches) if (z := zscores(initial, group)) is not None]
    stacked = np.stack(scores)
    defined = ~np.isnan(stacked)
    return np.where(defined, stacked, 0.0).sum(0) / np.maximum(defined.sum(0), 1)


def base_advantage(
    initial: np.ndarray, branches: np.ndarray, config: AdvantageConfig
) -> np.ndarray:
    """A_base `[N]` of one prompt's initial rollouts from the rewards of its initial `[N]` and branched rollouts."""
    if config.base == "paper":
        return dual_group(initial, branches)
    if config.base == "joint":
        return np.nan_to_num(zscores(initial, np.concatenate([initial, branches])))
    return np.nan_to_num(zscores(initial, initial))  # init_only, and GRPO
