"""Future-aware scaling of the base advantage (eq. 7)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from appo_jax.config import AdvantageConfig


def procedural_advantage(base: jax.Array, future: jax.Array, config: AdvantageConfig) -> jax.Array:
    """A = A_base · (1 + b · clip(Ω)), `[R, T]`, from base `[R]` and future values Ω `[R, T]`. A constant for the gradient."""
    future = jnp.clip(future, config.clip_low, config.clip_high)
    return jax.lax.stop_gradient(base[:, None] * (1.0 + config.future_weight * future))
