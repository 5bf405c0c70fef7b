"""From a mini-batch's rollouts to the arrays of the loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from appo_jax.advantage.base import base_advantages
from appo_jax.advantage.procedural import procedural_advantage, scaled_by_entropy
from appo_jax.algorithms import Algorithm
from appo_jax.learner.loss import Terms, sampler_correction, token_weights, without_dual_clipped
from appo_jax.learner.step import TrainBatch
from appo_jax.policy.packing import Packing, pack
from appo_jax.rollout import scoring
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
    entropies: ByTree | None = None
    """Under π_θ, for advantages that are scaled by them."""


def make_terms(
    trees: Sequence[Sequence[Rollout]], measured: Measured, algorithm: Algorithm, length: int
) -> tuple[Terms, list[np.ndarray]]:
    """What the loss knows of a mini-batch, `[R, T]` with T = `length`, and A_base at the sampled tokens of its R rollouts.

    `trees`: P prompts' rollouts with their rewards, initial ones first. Weights follow eq. 8's normalisation; truncated
    rollouts have none with `loss.mask_truncated`.
    """
    loss = algorithm.loss
    rollouts = [rollout for tree in trees for rollout in algorithm.trained(tree)]
    every_sampled = scoring.padded([rollout.sampled for rollout in rollouts], len(rollouts), length)

    def padded(by_tree: ByTree) -> np.ndarray:
        values = [np.asarray(x, np.float32) for xs in by_tree for x in algorithm.trained(xs)]
        return scoring.padded(values, len(rollouts), length)

    base = padded(base_advantages(trees, measured.penalties, algorithm.advantage))
    old = padded(measured.old_log_probs)
    new = old if measured.log_probs is None else padded(measured.log_probs)
    future = scoring.by_future(
        new, old, every_sampled, tau=algorithm.branching.tau, max_ratio=algorithm.advantage.max_ratio,
        max_log_ratio=loss.max_log_ratio,
    )  # fmt: skip
    loss_mask = every_sampled.copy()
    if loss.mask_truncated:
        loss_mask[[rollout.truncated for rollout in rollouts]] = False
    correction = np.ones_like(old)
    if loss.sampler_cap:
        drawn = padded([[rollout.log_probs for rollout in tree] for tree in trees])
        correction = np.where(loss_mask, sampler_correction(old, drawn, loss.sampler_cap), 0.0)

    def weights(mask: np.ndarray, aggregation: str) -> np.ndarray:
        return token_weights(mask, algorithm.budget, len(trees), aggregation) * correction

    dropping, beside = loss.max_dual_clipped >= 0, algorithm.scores_reference and loss.kl_in == "outside"
    kept = without_dual_clipped(loss_mask, new - old, base, loss) if dropping else loss_mask
    advantages = np.asarray(procedural_advantage(jnp.asarray(base), future, algorithm.advantage))
    if algorithm.advantage.entropy_weight:
        assert measured.entropies is not None
        advantages = scaled_by_entropy(
            advantages, padded(measured.entropies), loss_mask, algorithm.advantage.entropy_weight
        )
    terms = Terms(
        weights=weights(loss_mask, loss.aggregation),
        advantages=advantages,
        old_log_probs=old,
        ref_log_probs=None if measured.ref_log_probs is None else padded(measured.ref_log_probs),
        surrogate_weights=weights(kept, loss.aggregation) if dropping else None,
        kl_weights=weights(loss_mask, "seq_mean") if beside else None,
    )
    return terms, [row[sampled] for row, sampled in zip(base, every_sampled, strict=True)]


def make_batch(tokens: Sequence[np.ndarray], terms: Terms, length: int, at_once: int) -> TrainBatch:
    """Rollouts of `tokens [t]` each, and their `terms [R, T]`, in packed rows of `length` slots, `at_once` rows to a micro-batch.

    Its shape follows from the number of rollouts. How much of it is used depends on how long they are and what they share.
    """
    packing = pack(tokens, length, at_once)
    parts = -(-len(tokens) // at_once)
    rows, packed = (cut(x, at_once, parts) for x in (packing.rows, _packed(terms, packing)))
    return TrainBatch(rows, packed, np.int32(len(packing.rows.tokens) // at_once))


def cut(tree: Any, at_once: int, parts: int) -> Any:
    """Arrays `[…, R, T]` as `[parts, …, at_once, T]`, with zeros in the parts that are left."""

    def one(x: np.ndarray) -> np.ndarray:
        out = np.zeros((parts, *x.shape[:-2], at_once, x.shape[-1]), x.dtype)
        for part, first in zip(out, range(0, x.shape[-2], at_once), strict=False):
            part[...] = x[..., first : first + at_once, :]
        return out

    return jax.tree.map(one, tree)


def _packed(terms: Terms, packing: Packing) -> Terms:
    """Terms `[R, T]` of rollouts as those of the slots that predict their tokens, `[2, R, T]` of packed rows.

    A token that several rollouts share has one log ρ and an advantage from each of them. Every surrogate is |A| times its value
    for the sign of A. So the rollouts of one sign become one term, of their weights' sum and the weighted mean of A: index 0
    for A ≥ 0, 1 for A < 0. The loss and its gradient stay what they were; of the metrics, a rollout of A = 0 counts as clipped
    where one of A > 0 that shares the token does.
    """
    rollout = np.concatenate([np.full(len(slots), i) for i, slots in enumerate(packing.slots)])
    token = np.concatenate([np.arange(1, len(slots) + 1) for slots in packing.slots])
    slot, row = np.concatenate(packing.slots), packing.row[rollout]
    on = terms.weights[rollout, token] > 0
    rollout, token, slot, row = rollout[on], token[on], slot[on], row[on]
    advantages = terms.advantages[rollout, token]
    at = (advantages < 0).astype(int), row, slot

    def added(values: np.ndarray) -> np.ndarray:
        out = np.zeros((2, *packing.rows.tokens.shape))  # float64: what one rollout has alone stays as it is
        np.add.at(out, at, values)
        return out

    def mean(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
        return added(weights * values) / np.maximum(added(weights), np.finfo(float).tiny)

    def of(values: np.ndarray | None) -> np.ndarray | None:
        return None if values is None else added(values[rollout, token]).astype(np.float32)

    def same(values: np.ndarray | None) -> np.ndarray | None:
        return None if values is None else mean(values[rollout, token], ones).astype(np.float32)

    ones = np.ones(len(slot))
    counts = added(ones)
    deciding = terms.weights if terms.surrogate_weights is None else terms.surrogate_weights
    weights = deciding[rollout, token].astype(float)
    # Where no rollout of a token has a weight, A is in no term; its sign still counts in the metrics.
    means = np.where(added(weights) > 0, mean(advantages, weights), mean(advantages, ones))
    return Terms(
        weights=of(terms.weights),
        advantages=means.astype(np.float32),
        old_log_probs=same(terms.old_log_probs),
        ref_log_probs=same(terms.ref_log_probs),
        surrogate_weights=of(terms.surrogate_weights),
        kl_weights=of(terms.kl_weights),
        counts=counts.astype(np.float32),
    )
