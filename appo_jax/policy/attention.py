"""How queries meet keys: causal over a prompt, over packed rows, or a tree row over its shared prefix and its own suffix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from appo_jax.policy.constraints import ROWS, constrain, merged, platform
from appo_jax.policy.kernels import causal_attention, packed_attention
from appo_jax.policy.seen_keys import MAX_QUERIES, seen_keys

# (the layer's caches, q [..., H, E], k [..., K, E], v [..., K, E]) -> (output [..., H, E], what the layer keeps)
Attend = Callable[[Any, jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]
# Keys [..., K, E, T] and values [..., K, T, E] of one layer: as the two matrix products of a decode step read them.
LayerCache = tuple[jax.Array, jax.Array]


def causal(_: None, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, LayerCache]:
    """Causal attention over right-padded rows. q `[R, T, H, E]`, k and v `[R, T, K, E]`.

    Padding needs no mask: it stands to the right of every real token. Keeps the layer's cache.
    """
    return causal_attention(q, k, v), (k.transpose(0, 2, 3, 1), v.swapaxes(1, 2))


def packed(ends: jax.Array, keep: bool) -> Attend:
    """Attention over packed rows: a token sees those of its own text. `ends [R, T]` as of `score.Rows`.

    `keep`: the layer's cache, as `causal` does; training keeps nothing.
    """

    def attend(_: None, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, LayerCache | None]:
        return packed_attention(q, k, v, ends), (k.transpose(0, 2, 3, 1), v.swapaxes(1, 2)) if keep else None

    return attend


# A prefix cut along its positions, `cut`.
Blocks = list[LayerCache]


def laid_out(caches: Any) -> Any:
    """Caches, or prefixes in blocks, with their rows and heads split over the mesh."""
    return jax.tree.map(lambda x: constrain(x, ROWS, "tensor"), caches)


# On a CPU, decoding meets a cache's keys in blocks of this many, or in MOST_BLOCKS blocks where that would be more of them.
BLOCK = 64
MOST_BLOCKS = 8


def _size(length: int) -> int:
    """How many keys of a cache make a block.

    All of them but on a CPU: with two loops in each of 28 layers, the decode step took the TPU compiler minutes.
    """
    return min(length, max(BLOCK, -(-length // MOST_BLOCKS))) if platform() == "cpu" else length


def cut(cache: LayerCache) -> Blocks:
    """A prefix as the blocks in which `tree` meets it, and in which it is held.

    A block that is taken out of the whole is copied at every step, which costs more than to multiply it.
    """
    length = cache[1].shape[2]
    starts = range(0, length, _size(length))
    ends = [*starts[1:], length]
    return [(cache[0][..., i:j], cache[1][..., i:j, :]) for i, j in zip(starts, ends, strict=True)]


def room(prefix: Blocks) -> int:
    """T of a prefix slot."""
    return sum(values.shape[2] for _, values in prefix)


class Places(NamedTuple):
    """Who continues which prefix: W rows at places in `[R, C]`.

    On a mesh a row sits on a prefix of its own device, which counts rows and slots from its first: W and R are a device's.
    """

    of_row: jax.Array | np.ndarray  # [W, 2] int32: slot r and column c of a row; r = R for a row that sits nowhere
    members: jax.Array | np.ndarray  # [R, C] int32: the row at a place; W where there is none


def tree(
    q: jax.Array, prefix: Blocks, suffix: LayerCache, places: Places, prefix_length: jax.Array, cached: jax.Array,
    interpret: bool = False,
) -> jax.Array:  # fmt: skip
    """Attention of Q new tokens per row over the row's part of a shared prefix and over its own suffix.

    q `[W, Q, H, E]`; prefix: blocks of keys `[R, K, E, T]` and values `[R, K, T, E]`, read once for the rows that share them;
    suffix keys `[W, K, E, S]` and values `[W, K, S, E]`, the Q new tokens already written. A row sees prefix positions below
    `prefix_length [W]` and, for its i-th new token, suffix slots up to `cached + i` (`cached [W]` counts the slots before
    the new tokens). One softmax joins the two parts. Returns `[W, Q, H, E]`.

    On a TPU a decode step's parts are computed by a kernel that reads no more of a cache than is seen (seen_keys.py);
    `interpret` runs it without a TPU.
    """
    W, Q, H, E = q.shape
    R, K = prefix[0][1].shape[:2]
    G, C = H // K, places.members.shape[1]
    q = (q * E**-0.5).reshape(W, Q, K, G, E)
    by_place = q.at[places.members].get(mode="fill", fill_value=0)  # [R, C, Q, K, G, E]
    seen = prefix_length.at[places.members].get(mode="fill", fill_value=0)
    seen_prefix = seen[:, None, :, None, None, None]  # [R, 1, C, 1, 1, 1]
    seen_suffix = (cached[:, None] + 1 + jnp.arange(Q))[:, None, :, None, None]  # [W, 1, Q, 1, 1]
    by_place, by_row = by_place.transpose(0, 3, 1, 2, 4, 5), q.swapaxes(1, 2)
    if (platform() == "tpu" or interpret) and C * Q * G <= MAX_QUERIES:
        on_prefix = _seen_part(by_place, prefix[0], seen_prefix, SEEN_PREFIX, interpret)
        on_suffix = _seen_part(by_row, suffix, seen_suffix, SEEN_SUFFIX, interpret)
    else:  # flat batches of small matrix products: the one form that is fast on every backend
        on_prefix = _part(by_place, prefix, seen_prefix, (*merged(R, K), C * Q * G))
        on_suffix = _part(by_row, suffix, seen_suffix, (*merged(W, K), Q * G))
    r, c = places.of_row[:, 0], places.of_row[:, 1]
    out_p, top_p, sum_p = (x.transpose(0, 2, 3, 1, 4, 5)[r, c] for x in on_prefix)
    out_s, top_s, sum_s = (x.swapaxes(1, 2) for x in on_suffix)
    # A row always sees its own new token, so top_s is finite.
    top = jnp.maximum(top_p, top_s)
    scale_p, scale_s = jnp.exp(top_p - top), jnp.exp(top_s - top)
    out = (out_p * scale_p + out_s * scale_s) / (sum_p * scale_p + sum_s * scale_s)
    return out.astype(q.dtype).reshape(W, Q, H, E)


# Names of the kernel's calls in a compiled program: `plan` counts what they read by the rollouts' lengths.
SEEN_PREFIX, SEEN_SUFFIX = "seen_prefix", "seen_suffix"

Part = tuple[jax.Array, jax.Array, jax.Array]  # of a softmax: unnormalised output [..., E], maximum and sum [..., 1]


def _seen_part(q: jax.Array, cache: LayerCache, seen: jax.Array, name: str, interpret: bool) -> Part:
    """`_part` by the TPU's kernel. q `[N, K, …, E]`; seen `[N, 1, …, 1]`. Off the CPU a prefix is one block."""
    lead = q.shape[:-1]
    N, K, *queries = lead
    seen = jnp.broadcast_to(seen[:, 0], (N, *queries, 1)).reshape(N, -1)
    # The TPU compiler lays keys out as values, into which a new key is written as one piece: this turns nothing.
    keys, values = cache[0].swapaxes(-1, -2), cache[1]
    part = seen_keys(q.reshape(N, K, -1, q.shape[-1]), keys, values, seen, name=name, interpret=interpret)
    out, top, total = (x.reshape(*lead, -1) for x in part)
    return out, top, total


def _part(q: jax.Array, cache: LayerCache | Blocks, seen: jax.Array, flat: tuple[int, ...]) -> Part:
    """One part of a softmax, all float32, over a prefix in blocks or over a suffix, which is whole.

    q `[..., E]` in any layout that `flat` (batch axes, then queries) folds; seen `[..., 1]` broadcasts against it: how many
    of the first keys a query sees. Keys are met a block at a time, up to the last block that any query sees: a cache's empty
    room costs nothing. A block that a query does not see leaves its numbers as they are, to the last bit.
    """
    E, lead = q.shape[-1], q.shape[:-1]
    q, seen = q.reshape(*flat, E), jnp.broadcast_to(seen, (*lead, 1)).reshape(*flat, 1)
    most = seen.max()

    def meet(block: LayerCache, first: jax.Array | int, fresh: jax.Array | int, part: Part) -> Part:
        """Join the keys from position `first` on, but for those below `fresh`."""
        out, top, total = part
        k, v = (x.reshape(*flat[:-1], *x.shape[-2:]) for x in block)
        index = first + jnp.arange(k.shape[-1])
        scores = jnp.einsum("...qe,...et->...qt", q, k, preferred_element_type=jnp.float32)
        scores = jnp.where((index >= fresh) & (index < seen), scores, -jnp.inf)
        higher = jnp.maximum(top, scores.max(-1, keepdims=True))
        weights, scale = jnp.exp(scores - higher), jnp.exp(top - higher)
        met = jnp.einsum("...qt,...te->...qe", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return out * scale + met, higher, total * scale + weights.sum(-1, keepdims=True)

    # The maximum is finite where nothing is seen.
    part: Part = jnp.zeros((*flat, E)), jnp.full((*flat, 1), jnp.finfo(jnp.float32).min), jnp.zeros((*flat, 1))
    if isinstance(cache, list):
        part, first = meet(cache[0], 0, 0, part), cache[0][1].shape[2]
        for block in cache[1:]:
            part = jax.lax.cond(
                first < most, lambda p, b, i=first: meet(b, i, i, p), lambda p, _: p, part, block
            )  # fmt: skip
            first += block[1].shape[2]
    elif (size := _size(T := cache[1].shape[2])) == T:
        part = meet(cache, 0, 0, part)
    else:

        def meet_part(i: jax.Array, part: Part) -> Part:
            first = jnp.minimum(i * size, T - size)  # the last block reaches back into the one before
            k, v = (jax.lax.dynamic_slice_in_dim(x, first, size, axis) for x, axis in zip(cache, (-1, -2), strict=True))
            return meet((k, v), first, i * size, part)

        part = jax.lax.fori_loop(
            0,
            -(-T // size),
            lambda i, part: jax.lax.cond(i * size < most, meet_part, lambda _, part: part, i, part),
            part,
        )
    out, top, total = (x.reshape(*lead, -1) for x in part)
    return out, top, total
