"""The clipped policy-gradient loss (eq. 8). All normalisation lives in per-token weights, so micro-batches just add up."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from appo_jax.config import LossConfig


def token_weights(loss_mask: np.ndarray, budget: int, num_prompts: int, aggregation: str) -> np.ndarray:
    """Weight of each token in the loss, float32 `[R, T]`, from the mini-batch's `loss_mask [R, T]`.

    paper: 1/(P·M) · 1/|H_n| (eq. 8, averaged over prompts); token_mean: one over the number of tokens; seq_mean: mean over
    rollouts of the mean over tokens; constant: one over rollouts times T.
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


def kl_estimate(log_probs: jax.Array, ref_log_probs: jax.Array, estimator: str) -> jax.Array:
    """Per-token estimate of KL(π_θ‖π_ref) from tokens that π_θ drew, any shape; k1, k2 or k3, with r = π_ref/π_θ."""
    log_r = ref_log_probs - log_probs
    if estimator == "k1":
        return -log_r
    if estimator == "k2":
        return 0.5 * jnp.square(log_r)
    return jnp.exp(log_r) - log_r - 1.0


def surrogate(log_ratio: jax.Array, log_probs: jax.Array, advantages: jax.Array, config: LossConfig) -> jax.Array:
    """The objective of each token before KL and entropy, from log ρ and A; all `[R, T]`.

    clip (eq. 8): min(ρA, clip(ρ)A). gppo has its value; where the clip decides, its gradient is clip(ρ)·A·∇log π instead
    of 0. cispo: sg(clip(ρ))·A·log π. With a dual clip, tokens of A < 0 get at least c·A.
    """
    ratio = jnp.exp(log_ratio)
    clipped = jnp.clip(ratio, 1.0 - config.clip_low, 1.0 + config.clip_high)
    if config.surrogate == "cispo":
        return jax.lax.stop_gradient(clipped) * advantages * log_probs
    if config.surrogate == "gppo":
        # A factor of value 1 and gradient ∇log π; ρ/sg(ρ) would be 0/0 where ρ underflows.
        clipped = jax.lax.stop_gradient(clipped) * jnp.exp(log_ratio - jax.lax.stop_gradient(log_ratio))
    value = jnp.minimum(ratio * advantages, clipped * advantages)
    if config.dual_clip:
        value = jnp.where(advantages < 0, jnp.maximum(value, config.dual_clip * advantages), value)
    return value


def policy_loss(
    log_probs: jax.Array,
    old_log_probs: jax.Array,
    ref_log_probs: jax.Array | None,
    advantages: jax.Array,
    weights: jax.Array,
    config: LossConfig,
    entropies: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """−Σ w · (surrogate − β·KL + entropy_weight·H), and sums over tokens for the metrics. All arrays `[R, T]`.

    Only tokens with a positive weight count. `ref_log_probs` are needed for the KL term, `entropies` (with their
    gradient) for the bonus.
    """
    on = weights > 0
    log_ratio = jnp.where(on, log_probs - old_log_probs, 0.0)
    advantages = jnp.where(on, advantages, 0.0)
    ratio = jnp.exp(log_ratio)
    outside = (ratio < 1.0 - config.clip_low) & (advantages < 0) | (ratio > 1.0 + config.clip_high) & (advantages > 0)
    metrics = {
        "tokens": on.sum(),
        "clip_fraction": (on & outside).sum(),
        "kl_old_new": jnp.where(on, jnp.exp(log_ratio) - log_ratio - 1.0, 0.0).sum(),  # k3 estimate of KL(old‖new)
    }
    kept = on
    if config.max_ratio:
        kept &= ratio <= config.max_ratio
    if config.dual_clip:
        dual = on & (advantages < 0) & (ratio > config.dual_clip)
        metrics["dual_clip_fraction"] = dual.sum()
        if config.max_dual_clipped >= 0:
            kept &= dual.sum(-1, keepdims=True) <= config.max_dual_clipped
    # Tokens that are left out stay in the normalisation: the weights were fixed before the ratios were known.
    log_ratio, log_probs = jnp.where(kept, log_ratio, 0.0), jnp.where(kept, log_probs, 0.0)
    objective = surrogate(log_ratio, log_probs, advantages, config)
    if ref_log_probs is not None and config.kl_weight and config.kl_in == "loss":
        objective -= config.kl_weight * kl_estimate(log_probs, jnp.where(kept, ref_log_probs, 0.0), config.kl_estimator)
    if entropies is not None and config.entropy_weight:
        objective += config.entropy_weight * jnp.where(kept, entropies, 0.0)
    return -(jnp.where(kept, weights, 0.0) * objective).sum(), jax.lax.stop_gradient(metrics)


def sampler_correction(old_log_probs: np.ndarray, sampler_log_probs: np.ndarray, cap: float) -> np.ndarray:
    """min(π_old/π_sampler, cap) of each token: truncated importance weights for what the sampler computes otherwise."""
    # The exponent is capped before it is taken: no overflow.
    return np.exp(np.minimum(old_log_probs - sampler_log_probs, np.log(cap)))
