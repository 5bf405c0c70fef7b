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
from appo_jax.rollout.shapes import PackedShape
from appo_jax.types import Tree

ByTree: TypeAlias = Sequence[Sequence[np.ndarray]]
"""For each tree, for each of its rollouts: one value per token, `[T]` with T the rollout's length."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """The results of score passes for a mini-batch's tokens. Each tree has at least the rollouts that are trained on."""

    old_log_probs: ByTree
    """log π_old: under the policy that drew the tokens."""
    log_probs: ByTree | None = None
    """log π_θ: under the current policy. None if neither Ω nor the number of dual-clipped tokens is used."""
    ref_log_probs: ByTree | None = None
    """log π_ref, for a loss with a KL term."""
    penalties: ByTree | None = None
    """Subtracted from the reward at each token; given for all rollouts."""
    entropies: ByTree | None = None
    """Under π_θ, for advantages that are scaled by the entropy."""


def make_terms(
    trees: Sequence[Tree], measured: Measured, algorithm: Algorithm, length: int
) -> tuple[Terms, list[np.ndarray]]:
    """The terms of the loss, `[R, T]` with T = `length`, and A_base at the sampled tokens of each trained rollout.

    R is the number of rollouts that the algorithm trains on if no branch is missing, so that missing ones change no shape. The
    rows that are left have the weight 0.

    `trees`: the rollouts of P prompts with their rewards; initial rollouts come first. Weights follow the normalisation of
    eq. 8. The weights of rollouts without a reward are 0, and with `loss.mask_truncated` those of truncated rollouts.
    """
    loss = algorithm.loss
    rollouts = [rollout for tree in trees for rollout in algorithm.trained(tree)]
    rows = len(trees) * algorithm.trained_per_prompt
    every_sampled = scoring.padded([rollout.sampled for rollout in rollouts], rows, length)

    def padded(by_tree: ByTree) -> np.ndarray:
        values = [np.asarray(x, np.float32) for xs in by_tree for x in algorithm.trained(xs)]
        return scoring.padded(values, rows, length)

    base = padded(base_advantages(trees, measured.penalties, algorithm.advantage))
    old = padded(measured.old_log_probs)
    new = old if measured.log_probs is None else padded(measured.log_probs)
    future = scoring.by_future(
        new, old, every_sampled, tau=algorithm.branching.tau, max_ratio=algorithm.advantage.max_ratio,
        max_log_ratio=loss.max_log_ratio,
    )  # fmt: skip
    loss_mask = every_sampled.copy()
    left_out = [i for i, r in enumerate(rollouts) if np.isnan(r.reward) or (loss.mask_truncated and r.truncated)]
    loss_mask[left_out] = False
    correction = np.ones_like(old)
    if loss.sampler_cap:
        drawn = padded([[rollout.log_probs for rollout in tree] for tree in trees])
        correction = np.where(loss_mask, sampler_correction(old, drawn, loss.sampler_cap), 0.0)

    def weights(mask: np.ndarray, aggregation: str) -> np.ndarray:
        return token_weights(mask, algorithm.budget, len(trees), aggregation) * correction

    kept = without_dual_clipped(loss_mask, new - old, base, loss) if algorithm.drops_dual_clipped else loss_mask
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
        surrogate_weights=weights(kept, loss.aggregation) if algorithm.drops_dual_clipped else None,
        kl_weights=weights(loss_mask, "seq_mean") if algorithm.adds_kl else None,
        later=_drawn_later(trees, algorithm, length) if algorithm.trains_later_branches else None,
    )
    return terms, [base[i][every_sampled[i]] for i in range(len(rollouts))]


def _drawn_later(trees: Sequence[Tree], algorithm: Algorithm, length: int) -> np.ndarray:
    """True at the tokens that branches drew, which are later than the initial rollouts: `[R, T]` as in `make_terms`."""
    of_branch = [[np.full(rollout.length, not rollout.is_initial) for rollout in tree] for tree in trees]
    first = [tree[: algorithm.initial] for tree in of_branch]
    branches = [tree[algorithm.initial :] for tree in of_branch]
    by_tree = scoring.of_drawers(trees, first, branches)
    rows = len(trees) * algorithm.trained_per_prompt
    return scoring.padded([x for xs in by_tree for x in algorithm.trained(xs)], rows, length)


def make_batch(tokens: Sequence[np.ndarray], terms: Terms, shape: PackedShape) -> TrainBatch:
    """Pack rollouts (`tokens`: `[t]` each) and their `terms [R, T]` into micro-batches of rows of this shape.

    The batch's shape depends on R and T only, the maximal number and length of rollouts; how many micro-batches are used
    depends on the rollouts, on their lengths and on what they share.
    """
    packing = pack(tokens, shape.length, shape.rows)
    parts = shape.max_passes(*terms.weights.shape)
    rows, packed = (cut(x, shape.rows, parts) for x in (packing.rows, _packed(terms, packing)))
    return TrainBatch(rows, packed, np.int32(len(packing.rows.tokens) // shape.rows))


def cut(tree: Any, at_once: int, parts: int) -> Any:
    """Cut arrays `[…, R, T]` into `[parts, …, at_once, T]`. Parts that no row reaches are zero."""

    def cut_array(x: np.ndarray) -> np.ndarray:
        out = np.zeros((parts, *x.shape[:-2], at_once, x.shape[-1]), x.dtype)
        for part, first in zip(out, range(0, x.shape[-2], at_once), strict=False):
            part[...] = x[..., first : first + at_once, :]
        return out

    return jax.tree.map(cut_array, tree)


def terms_per_token(later_branches: bool) -> int:
    """C, the number of terms of a packed token: for both signs of A; with branches that π_θ drew, for both drawers (`_packed`)."""
    return 4 if later_branches else 2


def _packed(terms: Terms, packing: Packing) -> Terms:
    """Move the terms `[R, T]` of rollouts to the slots of packed rows that predict their tokens, `[C, R, T]`.

    A token that several rollouts share has one advantage per rollout, and one log ρ if one policy drew it for all of them. Every
    surrogate is |A| times its value at the sign of A. So the rollouts with A ≥ 0 become one term (index 0) and those with A < 0
    another (index 1). If branches that π_θ drew are trained on, they may repeat their parent's tokens with another log ρ: what
    π_θ drew has terms of its own (2 and 3). C is 2 or 4. A term has the sum of its rollouts' weights and the weighted mean of
    their advantages. This changes neither the loss nor its gradient. It changes the clip fraction: where a rollout with A = 0
    shares a token with one that has A > 0, both count as clipped if that one is.
    """
    rollout = np.concatenate([np.full(len(slots), i) for i, slots in enumerate(packing.slots)])
    token = np.concatenate([np.arange(1, len(slots) + 1) for slots in packing.slots])
    slot, row = np.concatenate(packing.slots), packing.row[rollout]
    on = terms.weights[rollout, token] > 0
    rollout, token, slot, row = rollout[on], token[on], slot[on], row[on]
    advantages = terms.advantages[rollout, token]
    term, num_terms = (advantages < 0).astype(int), terms_per_token(terms.later is not None)
    if terms.later is not None:
        term += 2 * terms.later[rollout, token]
    at = term, row, slot

    def added(values: np.ndarray) -> np.ndarray:
        # float64: the value of an unshared token is not rounded
        out = np.zeros((num_terms, *packing.rows.tokens.shape))
        np.add.at(out, at, values)
        return out

    def mean(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
        return added(weights * values) / np.maximum(added(weights), np.finfo(float).tiny)

    def summed(values: np.ndarray | None) -> np.ndarray | None:
        return None if values is None else added(values[rollout, token]).astype(np.float32)

    def averaged(values: np.ndarray | None) -> np.ndarray | None:
        return None if values is None else mean(values[rollout, token], ones).astype(np.float32)

    ones = np.ones(len(slot))
    counts = added(ones)
    deciding = terms.weights if terms.surrogate_weights is None else terms.surrogate_weights
    weights = deciding[rollout, token].astype(float)
    # If all weights of a token's rollouts are 0, A does not enter the loss; the metrics still use its sign.
    means = np.where(added(weights) > 0, mean(advantages, weights), mean(advantages, ones))
    return Terms(
        weights=summed(terms.weights),
        advantages=means.astype(np.float32),
        old_log_probs=averaged(terms.old_log_probs),
        ref_log_probs=averaged(terms.ref_log_probs),
        surrogate_weights=summed(terms.surrogate_weights),
        kl_weights=summed(terms.kl_weights),
        counts=counts.astype(np.float32),
    )
