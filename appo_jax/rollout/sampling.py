"""One draw per row from a distribution over the vocabulary, with two random numbers instead of one per token."""

from __future__ import annotations

import jax
import jax.numpy as jnp

BLOCK = 256


def truncate(logits: jax.Array, top_k: int, top_p: float) -> jax.Array:
    """Logits `[W, V]` with everything outside the top-k and the top-p nucleus at −inf (0 and 1.0: off).

    The nucleus is the smallest set of most probable tokens whose mass reaches `top_p`; ties with its last token stay.
    """
    if top_k > 0:
        kth = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits >= kth, logits, -jnp.inf)
    if top_p < 1.0:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        before = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1) - jax.nn.softmax(ordered, axis=-1)
        last = jnp.where(before < top_p, ordered, jnp.inf).min(-1, keepdims=True)
        logits = jnp.where(logits >= last, logits, -jnp.inf)
    return logits


def inverse_cdf(logits: jax.Array, uniforms: jax.Array) -> jax.Array:
    """Draw a token id per row of `logits [W, V]` from two uniforms in [0, 1), `[W, 2]`; int32 `[W]`.

    The first picks a block of the vocabulary by its mass, the second a token within the block. Both search the first
    place where a cumulative sum exceeds u times its end, so a token of probability 0 is never drawn.
    """
    W, V = logits.shape
    blocks = -(-V // BLOCK)
    mass = jnp.exp(logits - logits.max(-1, keepdims=True))
    mass = jnp.pad(mass, ((0, 0), (0, blocks * BLOCK - V))).reshape(W, blocks, BLOCK)

    def search(weights: jax.Array, u: jax.Array) -> jax.Array:
        cumulative = jnp.cumsum(weights, axis=-1)
        return (cumulative <= (u * cumulative[:, -1])[:, None]).sum(-1)

    block = search(mass.sum(-1), uniforms[:, 0])
    inside = jnp.take_along_axis(mass, block[:, None, None], axis=1)[:, 0]
    return (block * BLOCK + search(inside, uniforms[:, 1])).astype(jnp.int32)
