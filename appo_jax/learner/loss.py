"""The clipped policy-gradient loss (eq. 8). All normalisation is in the weights of tokens, so micro-batches are summed."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32

from appo_jax.config import LossConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Terms:
    """The inputs of the loss for each token. All have one shape, `[R, T]` of rollouts or that of packed rows. All but `later` are
    float32."""

    weights: Any  # weight of the token in the loss; 0 outside the loss mask
    advantages: Any
    old_log_probs: Any
    ref_log_probs: Any = None  # given if the loss has a KL term
    surrogate_weights: Any = None  # weights of the surrogate; None: `weights`
    kl_weights: Any = None  # weights of the KL term; None: `weights`
    counts: Any = None  # how many rollouts share a packed token; None: 1 where the weight is positive
    later: Any = None  # of rollouts, bool: whether π_θ drew the token, and not π_old. None: π_old drew all of them


def token_weights(
    loss_mask: Bool[np.ndarray, "R T"], budget: int, num_prompts: int, aggregation: str
) -> Float32[np.ndarray, "R T"]:
    """Weight of each token in the loss, float32 `[R, T]`, from the mini-batch's `loss_mask [R, T]`.

    paper: 1/(P·M) · 1/|H_n| (eq. 8, averaged over prompts); token_mean: 1 / (number of tokens); seq_mean: the mean over
    rollouts of the mean over tokens; constant: 1 / (R·T).
    """
    lengths = loss_mask.sum(-1, keepdims=True)
    per_sequence = loss_mask / np.maximum(lengths, 1)
    if aggregation == "paper":
        weights = per_sequence / (num_prompts * budget)
    elif aggregation == "token_mean":
        weights = loss_mask / max(1, int(lengths.sum()))
    elif aggregation == "seq_mean":
        weights = per_sequence / max(1, int((lengths > 0).sum()))
    else:  # constant
        weights = loss_mask / loss_mask.size
    return weights.astype(np.float32)


def without_dual_clipped(
    loss_mask: Bool[np.ndarray, "R T"],
    log_ratio: Float[np.ndarray, "R T"],
    advantages: Float[np.ndarray, "R T"],
    config: LossConfig,
) -> Bool[np.ndarray, "R T"]:
    """`loss_mask [R, T]` without the rollouts that have more than `max_dual_clipped` dual-clipped tokens (official code).

    log_ratio: log π_θ − log π_old, `[R, T]`. A token is dual-clipped if A < 0 and ρ > c.
    """
    if config.max_log_ratio:
        log_ratio = np.clip(log_ratio, -config.max_log_ratio, config.max_log_ratio)
    dual = loss_mask & (advantages < 0) & (log_ratio > np.log(config.dual_clip))
    return loss_mask & (dual.sum(-1, keepdims=True) <= config.max_dual_clipped)


def kl_estimate(
    log_probs: Float[Array, "*S"], ref_log_probs: Float[Array, "*S"], estimator: str, max_k3: float = 0.0
) -> Float[Array, "*S"]:
    """Per-token estimate (k1, k2 or k3 of r = π_ref/π_θ) of KL(π_θ‖π_ref) from tokens that π_θ drew. Any shape.

    k3 is cut off at `max_k3` (official code: 10) and has no gradient beyond it; 0: not cut off.
    """
    log_r = ref_log_probs - log_probs
    if estimator == "k1":
        return -log_r
    if estimator == "k2":
        return 0.5 * jnp.square(log_r)
    if max_k3:  # without the inner minimum, exp would overflow and its gradient 0 · inf would be NaN
        return jnp.minimum(jnp.exp(jnp.minimum(log_r, 80.0)) - log_r - 1.0, max_k3)
    return jnp.exp(log_r) - log_r - 1.0


def surrogate(
    log_ratio: Float[Array, "*S"], log_probs: Float[Array, "*S"], advantages: Float[Array, "*S"], config: LossConfig
) -> Float[Array, "*S"]:
    """The objective of each token before KL and entropy, from log ρ and A; all of one shape.

    clip (eq. 8): min(ρA, clip(ρ)A). gppo: the same value, but a clipped token has the gradient clip(ρ)·A·∇log π instead
    of 0. gppo_high: as gppo for tokens clipped at the upper end only. cispo: sg(clip(ρ))·A·log π. With a dual clip, the
    objective of tokens with A < 0 is at least c·A.
    """
    ratio = jnp.exp(log_ratio)
    clipped = jnp.clip(ratio, 1.0 - config.clip_low, 1.0 + config.clip_high)
    if config.surrogate == "cispo":
        return jax.lax.stop_gradient(clipped) * advantages * log_probs
    if config.surrogate in ("gppo", "gppo_high"):
        # exp(…) has the value 1 and the gradient ∇log π. ρ/sg(ρ) would be 0/0 where ρ underflows.
        kept = jax.lax.stop_gradient(clipped) * jnp.exp(log_ratio - jax.lax.stop_gradient(log_ratio))
        high = ratio > 1.0 + config.clip_high
        clipped = kept if config.surrogate == "gppo" else jnp.where(high, kept, clipped)
    value = jnp.minimum(ratio * advantages, clipped * advantages)
    if config.dual_clip:
        value = jnp.where(advantages < 0, jnp.maximum(value, config.dual_clip * advantages), value)
    return value


def policy_loss(
    log_probs: Float[Array | np.ndarray, "*S"],
    entropies: Float[Array | np.ndarray, "*S"] | None,
    batch: Terms,
    config: LossConfig,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """−Σ (w·surrogate − β·w_KL·KL + entropy_weight·w·H), and sums over tokens for the metrics.

    log_probs and entropies (used by the entropy bonus) are those of π_θ at the tokens of `batch`, with gradients, in its
    shape or one that broadcasts to it. Only tokens with a positive weight count. `surrogate_weights` and `kl_weights` replace
    the weights of the surrogate and of the KL term if the batch has them.
    """
    on = batch.weights > 0
    log_ratio = jnp.where(on, log_probs - batch.old_log_probs, 0.0)
    if config.max_log_ratio:
        log_ratio = jnp.clip(log_ratio, -config.max_log_ratio, config.max_log_ratio)
    advantages, log_probs = jnp.where(on, batch.advantages, 0.0), jnp.where(on, log_probs, 0.0)
    ratio = jnp.exp(log_ratio)
    low, high = ratio < 1.0 - config.clip_low, ratio > 1.0 + config.clip_high
    outside = low & (advantages < 0) | high & (advantages > 0)
    if config.surrogate == "cispo":  # it bounds every weight, whatever the sign of A
        outside = (low | high) & (advantages != 0)
    counts = on.astype(ratio.dtype) if batch.counts is None else batch.counts
    metrics = {
        "tokens": counts.sum(),
        "clip_fraction": (counts * outside).sum(),
        "kl_old_new": (counts * (ratio - log_ratio - 1.0)).sum(),  # k3 estimate of KL(old‖new)
    }
    if config.dual_clip:
        metrics["dual_clip_fraction"] = (counts * ((advantages < 0) & (ratio > config.dual_clip))).sum()
    weights = batch.weights if batch.surrogate_weights is None else batch.surrogate_weights
    objective = weights * surrogate(log_ratio, log_probs, advantages, config)
    if batch.ref_log_probs is not None and config.kl_weight and config.kl_in != "reward":
        ref_log_probs = jnp.where(on, batch.ref_log_probs, 0.0)
        kl = kl_estimate(log_probs, ref_log_probs, config.kl_estimator, config.max_k3)
        objective -= config.kl_weight * (batch.weights if batch.kl_weights is None else batch.kl_weights) * kl
    if entropies is not None and config.entropy_weight:
        objective += config.entropy_weight * batch.weights * jnp.where(on, entropies, 0.0)
    return -objective.sum(), jax.lax.stop_gradient(metrics)


def sampler_correction(
    old_log_probs: Float[np.ndarray, "*S"], sampler_log_probs: Float[np.ndarray, "*S"], cap: float
) -> Float[np.ndarray, "*S"]:
    """min(π_old/π_sampler, cap) of each token: truncated importance weights for rounding that differs in the sampler."""
    # The cap is applied before exp, so that exp does not overflow.
    return np.exp(np.minimum(old_log_probs - sampler_log_probs, np.log(cap)))
