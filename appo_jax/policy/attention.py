"""How queries meet keys: causal over a whole rollout, or a tree row over its shared prefix and its own suffix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from appo_jax.policy.constraints import ROWS, constrain, merged
from appo_jax.policy.kernels import causal_attention

# (layer, q [..., H, E], k [..., K, E], v [..., K, E]) -> (output [..., H, E], what the layer keeps, e.g. its cache)
Attend = Callable[[int, jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]
# Keys [..., K, E, T] and values [..., K, T, E] of one layer: as the two matrix products of a decode step read them.
LayerCache = tuple[jax.Array, jax.Array]


def causal(layer: int, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, LayerCache]:
    """Causal attention over right-padded rows. q `[R, T, H, E]`, k and v `[R, T, K, E]`.

    Padding needs no mask: it stands to the right of every real token. Keeps the layer's cache.
    """
    return causal_attention(q, k, v), (k.transpose(0, 2, 3, 1), v.swapaxes(1, 2))


def causal_no_cache(layer: int, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, None]:
    """`causal` for training, where nothing is kept."""
    return causal_attention(q, k, v), None


def packed(segments: jax.Array) -> Attend:
    """Causal attention within the segments of packed rows, `segments [R, T]`. Keeps nothing."""

    def attend(layer: int, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, None]:
        return causal_attention(q, k, v, segments), None

    return attend


class Places(NamedTuple):
    """Who continues which prefix: W rows at places in `[R, C]`."""

    of_row: jax.Array | np.ndarray  # [W, 2] int32: slot r and column c of a row; r = R for a row that sits nowhere
    members: jax.Array | np.ndarray  # [R, C] int32: the row at a place; W where there is none


def tree(
    q: jax.Array, prefix: LayerCache, suffix: LayerCache, places: Places, prefix_length: jax.Array, cached: jax.Array
) -> jax.Array:
    """Attention of Q new tokens per row over the row's part of a shared prefix and over its own suffix.

    q `[W, Q, H, E]`; prefix keys `[R, K, E, T]` and values `[R, K, T, E]`, read once for the rows that share them; suffix
    keys `[W, K, E, S]` and values `[W, K, S, E]`, the Q new tokens already written. A row sees prefix positions below
    `prefix_length [W]` and, for its i-th new token, suffix slots up to `cached + i` (`cached [W]` counts the slots before
    the new tokens). One softmax joins the two parts. Returns `[W, Q, H, E]`.
    """
    W, Q, H, E = q.shape
    R, K, T, _ = prefix[1].shape
    S, G, C = suffix[1].shape[2], H // K, places.members.shape[1]
    q = (q * E**-0.5).reshape(W, Q, K, G, E)
    by_place = q.at[places.members].get(mode="fill", fill_value=0)  # [R, C, Q, K, G, E]
    by_place = constrain(by_place, ROWS, None, None, "tensor")
    seen = prefix_length.at[places.members].get(mode="fill", fill_value=0)
    see_prefix = (jnp.arange(T) < seen[..., None])[:, None, :, None, None]  # [R, 1, C, 1, 1, T]
    see_suffix = jnp.arange(S) <= (cached[:, None] + jnp.arange(Q))[..., None]  # [W, Q, S]
    # Flat batches of small matrix products: the one form that is fast on every backend.
    on_prefix = _part(by_place.transpose(0, 3, 1, 2, 4, 5), prefix, see_prefix, (*merged(R, K), C * Q * G))
    on_suffix = _part(q.swapaxes(1, 2), suffix, see_suffix[:, None, :, None], (*merged(W, K), Q * G))
    r, c = places.of_row[:, 0], places.of_row[:, 1]
    out_p, top_p, sum_p = (x.transpose(0, 2, 3, 1, 4, 5)[r, c] for x in on_prefix)
    out_s, top_s, sum_s = (x.swapaxes(1, 2) for x in on_suffix)
    # A row always sees its own new token, so top_s is finite.
    top = jnp.maximum(top_p, top_s)
    scale_p, scale_s = jnp.exp(top_p - top), jnp.exp(top_s - top)
    out = (out_p * scale_p + out_s * scale_s) / (sum_p * scale_p + sum_s * scale_s)
    return out.astype(q.dtype).reshape(W, Q, H, E)


def _part(
    q: jax.Array, cache: LayerCache, see: jax.Array, flat: tuple[int, ...]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One part of a softmax: unnormalised output `[..., E]`, maximum and sum `[..., 1]`, all float32.

    q `[..., E]` in any layout that `flat` (batch axes, then queries) folds; see `[..., keys]` broadcasts against it.
    """
    keys, values = (x.reshape(*flat[:-1], *x.shape[-2:]) for x in cache)
    E = q.shape[-1]
    scores = jnp.einsum("...qe,...et->...qt", q.reshape(*flat, E), keys, preferred_element_type=jnp.float32)
    scores = jnp.where(see, scores.reshape(*q.shape[:-1], -1), -jnp.inf)
    top = jnp.maximum(scores.max(-1, keepdims=True), jnp.finfo(jnp.float32).min)  # finite where nothing is seen
    weights = jnp.exp(scores - top)
    out = jnp.einsum(
        "...qt,...te->...qe", weights.reshape(*flat, -1).astype(values.dtype), values,
        preferred_element_type=jnp.float32,
    )  # fmt: skip
    return out.reshape(q.shape), top, weights.sum(-1, keepdims=True)
