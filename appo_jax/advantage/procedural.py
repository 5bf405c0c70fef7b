"""Scaling of the base advantage: by the future value (eq. 7), and by the entropy (AEPO)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from appo_jax.config import AdvantageConfig


def procedural_advantage(
    base: Float[Array, "#R #T"], future: Float[Array, "R T"], config: AdvantageConfig
) -> Float[Array, "R T"]:
    """A = A_base · (1 + b · clip(Ω)), `[R, T]`, from base `[R, T]` or `[R, 1]` and future values Ω `[R, T]`.

    With `scaling = plain` A = A_base · clip(Ω) (FIPO, arXiv 2603.19835). A constant for the gradient.
    """
    future = jnp.clip(future, config.clip_low, config.clip_high)
    scale = future if config.scaling == "plain" else 1.0 + config.future_weight * future
    return jax.lax.stop_gradient(base * scale)


def scaled_by_entropy(
    advantages: Float[np.ndarray, "R T"],
    entropies: Float[np.ndarray, "R T"],
    mask: Bool[np.ndarray, "R T"],
    weight: float,
) -> Float[np.ndarray, "R T"]:
    """A · (1 + α · Z(H)), `[R, T]` (AEPO, arXiv 2510.14545), with α = `weight` and Z over the tokens of `mask`.

    If H has no spread, Z is 0. The official code computes Z over a micro-batch; here it is over all tokens of `mask`.
    """
    known = entropies[mask].astype(np.float64)
    std = known.std() if known.size else 0.0
    z = (entropies - known.mean()) / std if std > 0 else np.zeros_like(advantages)
    return np.where(mask, advantages * (1.0 + weight * z), advantages).astype(np.float32)
