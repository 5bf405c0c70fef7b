"""Masked reductions and the discounted suffix sum: the only home of division.

Every reduction runs over the last axis and defines its degenerate cases: an empty mask gives 0, one member has
variance 0, and a z-score over zero variance is 0 everywhere.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def masked_mean(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean of `x [..., T]` where `mask`, `[...]`; 0 for an empty mask."""
    return jnp.where(mask, x, 0.0).sum(-1) / jnp.maximum(mask.sum(-1), 1)


def masked_std(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Population standard deviation of `x [..., T]` where `mask`, `[...]`; 0 for fewer than two members."""
    centred = x - masked_mean(x, mask)[..., None]
    return jnp.sqrt(masked_mean(jnp.square(centred), mask))


def is_constant(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Whether all masked members of `x [..., T]` are the same number, bit for bit, `[...]`. True for an empty mask."""
    return jnp.where(mask, x, jnp.inf).min(-1) >= jnp.where(mask, x, -jnp.inf).max(-1)


def masked_zscore(x: jax.Array, mask: jax.Array) -> jax.Array:
    """`(x − mean) / std` over the masked members, 0 outside the mask and wherever the variance is 0.

    Constancy is judged on the numbers themselves: the rounding of a mean over equal numbers must not become a score.
    """
    std = masked_std(x, mask)[..., None]
    degenerate = is_constant(x, mask)[..., None] | (std == 0)
    z = (x - masked_mean(x, mask)[..., None]) / jnp.where(degenerate, 1.0, std)
    return jnp.where(mask & ~degenerate, z, 0.0)


def discounted_suffix_sum(x: jax.Array, mask: jax.Array, gamma: float) -> jax.Array:
    """`y_i = Σ_{j ≥ i} γ^{d(i, j)} x_j` over masked j, where d counts the masked positions from i to j. `[..., T]`.

    Unmasked positions neither contribute nor lengthen the distance; y there is the value of the next masked position.
    Linear in T: one associative scan over the affine maps `y ← x + γ y` (the identity where unmasked).
    """
    decay = jnp.where(mask, gamma, 1.0).astype(jnp.float32)
    value = jnp.where(mask, x, 0.0).astype(jnp.float32)

    def compose(later: tuple, earlier: tuple) -> tuple:
        return later[0] * earlier[0], earlier[1] + earlier[0] * later[1]

    return jax.lax.associative_scan(compose, (decay, value), reverse=True, axis=x.ndim - 1)[1]
