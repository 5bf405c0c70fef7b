"""From a mini-batch's rollouts to the arrays of the loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TypeAlias

import jax.numpy as jnp
import numpy as np

from appo_jax.advantage.base import base_advantages
from appo_jax.advantage.procedural import procedural_advantage
from appo_jax.algorithms import Algorithm
from appo_jax.learner.loss import sampler_correction, token_weights
from appo_jax.learner.step import TrainBatch
from appo_jax.rollout.batch import Batch
from appo_jax.types import Rollout

ByTree: TypeAlias = Sequence[Sequence[np.ndarray]]
"""By tree, by rollout: a value for each token, `[T]` of the rollout's own length."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """What score passes say of the tokens that a mini-batch trains on; of each tree the trained rollouts, or more."""

    old_log_probs: ByTree
    """log π_old: under the policy that drew them."""
    ref_log_probs: ByTree | None = None
    """log π_ref, for a loss with a KL term."""
    future_values: ByTree | None = None
    """Ω; None where the advantage does not use it."""
    penalties: ByTree | None = None
    """Taken off the reward, token by token; of all rollouts."""


def make_batch(
    trees: Sequence[Sequence[Rollout]], measured: Measured, algorithm: Algorithm, length: int
) -> tuple[TrainBatch, list[np.ndarray]]:
    """The mini-batch of the loss, `[R, T]` with T = `length`, and A_base at the sampled tokens of each of its R rollouts.

    `trees`: P prompts' rollouts with their rewards, initial ones first. Weights follow eq. 8's normalisation; truncated
    rollouts have none with `loss.mask_truncated`.
    """
    loss = algorithm.loss
    rollouts = [rollout for tree in trees for rollout in algorithm.trained(tree)]
    batch = Batch.of(rollouts, len(rollouts), length)

    def padded(by_tree: ByTree, fill: float = 0.0) -> np.ndarray:
        out = np.full((len(rollouts), length), fill, np.float32)
        values = (x for xs in by_tree for x in algorithm.trained(xs))
        for row, x in zip(out, values, strict=True):
            row[: len(x)] = x
        return out

    base = padded(base_advantages(trees, measured.penalties, algorithm.advantage))
    future = np.ones_like(base) if measured.future_values is None else padded(measured.future_values, 1.0)
    old = padded(measured.old_log_probs)
    loss_mask = batch.sampled.copy()
    if loss.mask_truncated:
        loss_mask[[rollout.truncated for rollout in rollouts]] = False
    weights = token_weights(loss_mask, algorithm.budget, len(trees), loss.aggregation)
    if loss.sampler_cap:
        drawn = padded([[rollout.log_probs for rollout in tree] for tree in trees])
        weights *= np.where(loss_mask, sampler_correction(old, drawn, loss.sampler_cap), 0.0)
    advantages = procedural_advantage(jnp.asarray(base), jnp.asarray(future), algorithm.advantage)
    ref = None if measured.ref_log_probs is None else jnp.asarray(padded(measured.ref_log_probs))
    arrays = TrainBatch(jnp.asarray(batch.tokens), jnp.asarray(weights), advantages, jnp.asarray(old), ref)
    return arrays, [row[sampled] for row, sampled in zip(base, batch.sampled, strict=True)]
