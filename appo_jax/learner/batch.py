"""From a mini-batch's rollouts to the arrays of the loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from appo_jax.advantage.base import base_advantages
from appo_jax.advantage.procedural import procedural_advantage
from appo_jax.algorithms import Algorithm
from appo_jax.learner.loss import TrainBatch, sampler_correction, token_weights, without_dual_clipped
from appo_jax.rollout.batch import Batch
from appo_jax.rollout.scoring import by_future
from appo_jax.types import Rollout

ByTree: TypeAlias = Sequence[Sequence[np.ndarray]]
"""By tree, by rollout: a value for each token, `[T]` of the rollout's own length."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """What score passes say of the tokens that a mini-batch trains on; of each tree the trained rollouts, or more."""

    old_log_probs: ByTree
    """log π_old: under the policy that drew them."""
    log_probs: ByTree | None = None
    """log π_θ: under the policy as it is now. None where neither Ω nor the number of dual-clipped tokens is used."""
    ref_log_probs: ByTree | None = None
    """log π_ref, for a loss with a KL term."""
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

    def padded(by_tree: ByTree) -> np.ndarray:
        out = np.zeros((len(rollouts), length), np.float32)
        values = (x for xs in by_tree for x in algorithm.trained(xs))
        for row, x in zip(out, values, strict=True):
            row[: len(x)] = x
        return out

    base = padded(base_advantages(trees, measured.penalties, algorithm.advantage))
    old = padded(measured.old_log_probs)
    new = old if measured.log_probs is None else padded(measured.log_probs)
    future = by_future(
        new, old, batch.sampled, tau=algorithm.branching.tau, max_ratio=algorithm.advantage.max_ratio,
        max_log_ratio=loss.max_log_ratio,
    )  # fmt: skip
    loss_mask = batch.sampled.copy()
    if loss.mask_truncated:
        loss_mask[[rollout.truncated for rollout in rollouts]] = False
    correction = np.ones_like(old)
    if loss.sampler_cap:
        drawn = padded([[rollout.log_probs for rollout in tree] for tree in trees])
        correction = np.where(loss_mask, sampler_correction(old, drawn, loss.sampler_cap), 0.0)

    def weights(mask: np.ndarray, aggregation: str) -> jax.Array:
        return jnp.asarray(token_weights(mask, algorithm.budget, len(trees), aggregation) * correction)

    dropping, beside = loss.max_dual_clipped >= 0, algorithm.scores_reference and loss.kl_in == "outside"
    kept = without_dual_clipped(loss_mask, new - old, base, loss) if dropping else loss_mask
    arrays = TrainBatch(
        tokens=jnp.asarray(batch.tokens),
        weights=weights(loss_mask, loss.aggregation),
        advantages=procedural_advantage(jnp.asarray(base), future, algorithm.advantage),
        old_log_probs=jnp.asarray(old),
        ref_log_probs=None if measured.ref_log_probs is None else jnp.asarray(padded(measured.ref_log_probs)),
        surrogate_weights=weights(kept, loss.aggregation) if dropping else None,
        kl_weights=weights(loss_mask, "seq_mean") if beside else None,
    )
    return arrays, [row[sampled] for row, sampled in zip(base, batch.sampled, strict=True)]
