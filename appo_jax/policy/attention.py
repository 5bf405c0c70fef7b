"""How queries meet keys: causal over a whole rollout, or a tree row over its shared prefix and its own suffix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# (layer, q [..., H, E], k [..., K, E], v [..., K, E]) -> (output [..., H, E], what the layer keeps, e.g. its cache)
Attend = Callable[[int, jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]
LayerCache = tuple[jax.Array, jax.Array]  # keys and values of one layer


def causal(layer: int, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, LayerCache]:
    """Causal attention over right-padded rows. q `[R, T, H, E]`, k and v `[R, T, K, E]`.

    Padding needs no mask: it stands to the right of every real token. Keeps keys and values as `[R, K, T, E]`, the
    layout that decoding reads.
    """
    out = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    return out, (k.swapaxes(1, 2), v.swapaxes(1, 2))


def causal_no_cache(layer: int, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, None]:
    """`causal` for training, where nothing is kept."""
    return jax.nn.dot_product_attention(q, k, v, is_causal=True), None


def packed(segments: jax.Array) -> Attend:
    """Causal attention within the segments of packed rows, `segments [R, T]`. Keeps nothing."""
    same = segments[:, None, :, None] == segments[:, None, None, :]

    def attend(layer: int, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, None]:
        return jax.nn.dot_product_attention(q, k, v, mask=same, is_causal=True), None

    return attend


def tree(
    q: jax.Array, prefix: LayerCache, suffix: LayerCache, prefix_length: jax.Array, cached: jax.Array
) -> jax.Array:
    """Attention of Q new tokens per row over the row's part of a shared prefix and over its own suffix.

    q `[R, C, Q, H, E]`; prefix keys and values `[R, K, T, E]`, read once for the C rows that share them; suffix keys and
    values `[R, C, K, S, E]`, the Q new tokens already written. A row sees prefix positions below `prefix_length`
    `[R, C]` and, for its i-th new token, suffix slots up to `cached + i` (`cached [R, C]` counts the slots before the new
    tokens). One softmax joins the two parts. Returns `[R, C, Q, H, E]`.
    """
    R, C, Q, H, E = q.shape
    (pk, pv), (sk, sv) = prefix, suffix
    K, T, S = pk.shape[1], pk.shape[2], sk.shape[3]
    q = (q * E**-0.5).reshape(R, C, Q, K, H // K, E)
    on_prefix = jnp.einsum("rcqkge,rkte->rkcqgt", q, pk, preferred_element_type=jnp.float32)
    on_suffix = jnp.einsum("rcqkge,rckse->rkcqgs", q, sk, preferred_element_type=jnp.float32)
    see_prefix = jnp.arange(T) < prefix_length[..., None]  # [R, C, T]
    see_suffix = jnp.arange(S) <= (cached[..., None] + jnp.arange(Q))[..., None]  # [R, C, Q, S]
    on_prefix = jnp.where(see_prefix[:, None, :, None, None, :], on_prefix, -jnp.inf)
    on_suffix = jnp.where(see_suffix[:, None, :, :, None, :], on_suffix, -jnp.inf)
    # A row always sees its own new token, so the maximum is finite.
    top = jnp.maximum(on_prefix.max(-1), on_suffix.max(-1))[..., None]
    on_prefix, on_suffix = jnp.exp(on_prefix - top), jnp.exp(on_suffix - top)
    total = on_prefix.sum(-1) + on_suffix.sum(-1)  # [R, K, C, Q, G]
    out = jnp.einsum("rkcqgt,rkte->rkcqge", on_prefix.astype(pv.dtype), pv, preferred_element_type=jnp.float32)
    out += jnp.einsum("rkcqgs,rckse->rkcqge", on_suffix.astype(sv.dtype), sv, preferred_element_type=jnp.float32)
    out = (out / total[..., None]).astype(q.dtype)
    return jnp.einsum("rkcqge->rcqkge", out).reshape(R, C, Q, H, E)
