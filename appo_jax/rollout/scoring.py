"""Scores finished rollouts under policies: log-probabilities tree by tree, and the future value Ω."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

from appo_jax.branching.score import future_value
from appo_jax.policy.parameters import Params
from appo_jax.rollout.sampler import Sampler
from appo_jax.types import Rollout, Tree

by_future = jax.jit(future_value, static_argnames=("tau", "max_ratio", "max_log_ratio"))


def log_probs(
    sampler: Sampler, params: Params, trees: Sequence[Tree], per_tree: int | None = None
) -> list[list[np.ndarray]]:
    """Log-probabilities `[T]` of every rollout's tokens under a policy, by tree. `per_tree`: see `scores`."""
    return scores(sampler, params, trees, per_tree)[0]


def scores(
    sampler: Sampler, params: Params, trees: Sequence[Tree], per_tree: int | None = None
) -> tuple[list[list[np.ndarray]], list[list[np.ndarray]]]:
    """Log-probabilities and entropies `[T]` of every rollout's tokens under a policy, by tree.

    `per_tree`: the number of a tree's rollouts if none is missing, so that missing branches change no shape; None: none is.
    """
    rollouts = [rollout for tree in trees for rollout in tree]
    if not rollouts:  # such as the branches of an algorithm that draws none
        return [[] for _ in trees], [[] for _ in trees]
    scored = sampler.score(params, rollouts, None if per_tree is None else len(trees) * per_tree)
    log_probs, entropies = iter(scored.log_probs), iter(scored.entropies)
    return [[next(log_probs) for _ in tree] for tree in trees], [[next(entropies) for _ in tree] for tree in trees]


def of_drawers(
    trees: Sequence[Tree], known: Sequence[Sequence[np.ndarray]], later: Sequence[Sequence[np.ndarray]]
) -> list[list[np.ndarray]]:
    """Log-probabilities of every rollout's tokens under the policies that drew them, by tree.

    `known`: those of each tree's first rollouts. `later`: those of the other rollouts, which are branches, under the policy that
    drew their tokens from the fork on. Before the fork, a branch has its parent's log-probabilities.
    """
    by_tree = [list(first) for first in known]
    for tree, values, scored in zip(trees, by_tree, later, strict=True):
        for rollout, log_probs_of_rollout in zip(tree[len(values) :], scored, strict=True):
            values.append(inherit(rollout, values, log_probs_of_rollout))
    return by_tree


def inherit(rollout: Rollout, by_node: Sequence[np.ndarray], values: np.ndarray) -> np.ndarray:
    """`values [T]`, but with the parent's values (in `by_node`) at the tokens that a branch inherits."""
    if rollout.parent is None or rollout.fork is None:
        return values
    return np.concatenate([by_node[rollout.parent][: rollout.fork], values[rollout.fork :]])


def padded(values: Sequence[np.ndarray], rows: int, length: int) -> np.ndarray:
    """Arrays `[t]` of one dtype as `[rows, length]`, with zeros (False) after each and in the rows that are left."""
    out = np.zeros((rows, length), values[0].dtype)
    for row, value in enumerate(values):
        out[row, : len(value)] = value
    return out
