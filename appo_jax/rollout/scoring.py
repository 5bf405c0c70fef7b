"""What policies say of finished rollouts: log-probabilities tree by tree, and the future value Ω."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

from appo_jax.branching.score import future_value
from appo_jax.policy.parameters import Params
from appo_jax.rollout.sampler import Sampler
from appo_jax.types import Rollout, Tree

by_future = jax.jit(future_value, static_argnames=("tau", "max_ratio", "max_log_ratio"))


def log_probs(sampler: Sampler, params: Params, trees: Sequence[Tree]) -> list[list[np.ndarray]]:
    """Log-probabilities `[T]` of every rollout's tokens under a policy, by tree."""
    scored = iter(sampler.score(params, [rollout for tree in trees for rollout in tree]).log_probs)
    return [[next(scored) for _ in tree] for tree in trees]


def inherit(rollout: Rollout, by_node: Sequence[np.ndarray], own: np.ndarray) -> np.ndarray:
    """`own [T]`, with the parent's numbers (in `by_node`) at the tokens that a branch has from its parent."""
    if rollout.parent is None or rollout.fork is None:
        return own
    return np.concatenate([by_node[rollout.parent][: rollout.fork], own[rollout.fork :]])


def padded(values: Sequence[np.ndarray], rows: int, length: int) -> np.ndarray:
    """Arrays `[t]` of one dtype as `[rows, length]`, with zeros (False) after each and in the rows that are left."""
    out = np.zeros((rows, length), values[0].dtype)
    for row, value in enumerate(values):
        out[row, : len(value)] = value
    return out
