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


def policy_loss(
    log_probs: jax.Array,
    old_log_probs: jax.Array,
    ref_log_probs: jax.Array | None,
    advantages: jax.Array,
    weights: jax.Array,
    config: LossConfig,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """−Σ w · (min(ρA, clip(ρ)A) − β·KL), and weighted sums for the metrics. All arrays `[R, T]`.

    Only tokens with a positive weight count. KL is the k3 estimator against `ref_log_probs`.
    """
    on = weights > 0
    log_ratio = jnp.where(on, log_probs - old_log_probs, 0.0)
    ratio = jnp.exp(log_ratio)
    clipped = jnp.clip(ratio, 1.0 - config.clip_low, 1.0 + config.clip_high)
    surrogate = jnp.minimum(ratio * advantages, clipped * advantages)
    if ref_log_probs is not None and config.kl_weight > 0:
        to_ref = jnp.where(on, ref_log_probs - log_probs, 0.0)
        surrogate -= config.kl_weight * (jnp.exp(to_ref) - to_ref - 1.0)
    count = on.sum()
    metrics = {
        "tokens": count,
        "clip_fraction": (on & (clipped * advantages < ratio * advantages)).sum(),
        "kl_old_new": jnp.where(on, jnp.exp(log_ratio) - log_ratio - 1.0, 0.0).sum(),  # k3 estimate of KL(old‖new)
    }
    return -(weights * surrogate).sum(), jax.lax.stop_gradient(metrics)
