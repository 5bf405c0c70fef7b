"""Future-aware scaling of the base advantage (eq. 7)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

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
