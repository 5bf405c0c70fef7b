"""Attention: causal over prompts, over packed rows, and of tree rows over a shared prefix and a row's own suffix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from appo_jax.policy.constraints import ROWS, constrain, merged, platform
from appo_jax.policy.kernels import causal_attention, packed_attention

# (the layer's caches, q [..., H, E], k [..., K, E], v [..., K, E]) -> (output [..., H, E], the layer's new cache or None)
Attend = Callable[[Any, jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]
# Keys [..., K, E, T] and values [..., K, T, E] of one layer: the order in which the matrix products of a decode step read them.
LayerCache = tuple[jax.Array, jax.Array]


def causal(_: None, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, LayerCache]:
    """Causal attention over right-padded rows. q `[R, T, H, E]`, k and v `[R, T, K, E]`.

    Padding needs no mask, because it stands to the right of every real token. Also returns the layer's cache.
    """
    return causal_attention(q, k, v), (k.transpose(0, 2, 3, 1), v.swapaxes(1, 2))


def packed(ends: jax.Array, keep: bool) -> Attend:
    """Attention over packed rows, in which a token sees the earlier tokens of its own text. `ends [R, T]`: see `score.Rows`.

    `keep`: also return the layer's cache, as `causal` does; training does not need it.
    """

    def attend(_: None, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, LayerCache | None]:
        return packed_attention(q, k, v, ends), (k.transpose(0, 2, 3, 1), v.swapaxes(1, 2)) if keep else None

    return attend


# A prefix in blocks of positions, as `cut` makes them.
Blocks = list[LayerCache]


def laid_out(caches: Any) -> Any:
    """Split the rows and heads of caches, or of prefixes in blocks, over the mesh."""
    return jax.tree.map(lambda x: constrain(x, ROWS, "tensor"), caches)


# On a CPU, decoding reads a cache in blocks of BLOCK keys; a long cache is read in MAX_BLOCKS larger blocks.
BLOCK = 64
MAX_BLOCKS = 8


def _size(length: int) -> int:
    """The number of keys in a block of a cache of this length.

    Off the CPU, one block holds all keys: with two loops in each of 28 layers, the TPU compiler took minutes for a decode
    step.
    """
    return min(length, max(BLOCK, -(-length // MAX_BLOCKS))) if platform() == "cpu" else length


def cut(cache: LayerCache) -> Blocks:
    """Cut a prefix into the blocks in which it is held and in which `tree` reads it.

    If it were held as one array, each block would be copied out at every step, which costs more than its matrix product.
    """
    length = cache[1].shape[2]
    starts = range(0, length, _size(length))
    ends = [*starts[1:], length]
    return [(cache[0][..., i:j], cache[1][..., i:j, :]) for i, j in zip(starts, ends, strict=True)]


def slot_length(prefix: Blocks) -> int:
    """T, the number of positions in a prefix slot."""
    return sum(values.shape[2] for _, values in prefix)


class Places(NamedTuple):
    """Which row continues which prefix: W rows have places in `[R, C]`.

    On a mesh, a row continues a prefix of its own device. W and R are then the numbers of rows and slots on one device, and
    indices count from the device's first row and slot.
    """

    of_row: jax.Array | np.ndarray  # [W, 2] int32: slot r and column c of a row; r = R for a row without a place
    members: jax.Array | np.ndarray  # [R, C] int32: the row at a place; W for an empty place


def tree(
    q: jax.Array, prefix: Blocks, suffix: LayerCache, places: Places, prefix_length: jax.Array, cached: jax.Array,
    interpret: bool = False,
) -> jax.Array:  # fmt: skip
    """Attention of Q new tokens per row over the row's part of a shared prefix and over its own suffix.

    q `[W, Q, H, E]`; prefix: blocks of keys `[R, K, E, T]` and values `[R, K, T, E]`, read once for all rows that share them;
    suffix: keys `[W, K, E, S]` and values `[W, K, S, E]`, which already hold the Q new tokens. A row sees prefix positions
    below `prefix_length [W]`; its i-th new token sees suffix slots up to `cached + i` (`cached [W]`: the number of slots before
    the new tokens). One softmax joins the two parts. Returns `[W, Q, H, E]`.

    On a TPU, a kernel computes the parts and reads only the blocks of a cache that hold seen keys (seen_keys.py). `interpret`
    runs that kernel without a TPU.
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
    if platform() == "tpu" or interpret:
        on_prefix = _seen_part(by_place, prefix[0], seen_prefix, SEEN_PREFIX, interpret)
        on_suffix = _seen_part(by_row, suffix, seen_suffix, SEEN_SUFFIX, interpret)
    else:  # flat batches of small matrix products: only this form is fast on every backend
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


# Names of the kernel's calls in a compiled program. `plan` finds them by name, and computes the bytes that they read from the
# rollouts' lengths.
SEEN_PREFIX, SEEN_SUFFIX = "seen_prefix", "seen_suffix"

Part = tuple[jax.Array, jax.Array, jax.Array]  # of a softmax: unnormalised output [..., E], maximum and sum [..., 1]


def _seen_part(q: jax.Array, cache: LayerCache, seen: jax.Array, name: str, interpret: bool) -> Part:
    """`_part` by the TPU kernel. q `[N, K, …, E]`; seen `[N, 1, …, 1]`. Off the CPU, a prefix is one block."""
    from appo_jax.policy.seen_keys import seen_keys  # only here: see kernels.py

    lead = q.shape[:-1]
    N, K, *queries = lead
    seen = jnp.broadcast_to(seen[:, 0], (N, *queries, 1)).reshape(N, -1)
    # The TPU compiler gives keys the same memory layout as values, so that a new key is written as one piece. Therefore this
    # transposition copies nothing.
    keys, values = cache[0].swapaxes(-1, -2), cache[1]
    part = seen_keys(q.reshape(N, K, -1, q.shape[-1]), keys, values, seen, name=name, interpret=interpret)
    out, top, total = (x.reshape(*lead, -1) for x in part)
    return out, top, total


def _part(q: jax.Array, cache: LayerCache | Blocks, seen: jax.Array, flat: tuple[int, ...]) -> Part:
    """One part of a softmax in float32, over a prefix in blocks or over a suffix, which is one array.

    q `[..., E]` is reshaped to `[*flat, E]`; `flat` holds the batch axes, then the number of queries. seen `[..., 1]` broadcasts
    against q: a query sees the first `seen` keys. Keys are read block by block, up to the last block that any query sees, so
    the unused part of a cache costs nothing. A block that a query does not see does not change any bit of its result.
    """
    E, lead = q.shape[-1], q.shape[:-1]
    q, seen = q.reshape(*flat, E), jnp.broadcast_to(seen, (*lead, 1)).reshape(*flat, 1)
    max_seen = seen.max()

    def add_block(block: LayerCache, first: jax.Array | int, fresh: jax.Array | int, part: Part) -> Part:
        """Add a block of keys that begins at position `first` to `part`. Keys before position `fresh` are left out."""
        out, top, total = part
        k, v = (x.reshape(*flat[:-1], *x.shape[-2:]) for x in block)
        index = first + jnp.arange(k.shape[-1])
        logits = jnp.einsum("...qe,...et->...qt", q, k, preferred_element_type=jnp.float32)
        logits = jnp.where((index >= fresh) & (index < seen), logits, -jnp.inf)
        higher = jnp.maximum(top, logits.max(-1, keepdims=True))
        weights, scale = jnp.exp(logits - higher), jnp.exp(top - higher)
        added = jnp.einsum("...qt,...te->...qe", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return out * scale + added, higher, total * scale + weights.sum(-1, keepdims=True)

    # A finite maximum, also for a query that sees no key.
    part: Part = jnp.zeros((*flat, E)), jnp.full((*flat, 1), jnp.finfo(jnp.float32).min), jnp.zeros((*flat, 1))
    if isinstance(cache, list):
        part, first = add_block(cache[0], 0, 0, part), cache[0][1].shape[2]
        for block in cache[1:]:
            part = jax.lax.cond(
                first < max_seen, lambda p, b, i=first: add_block(b, i, i, p), lambda p, _: p, part, block
            )  # fmt: skip
            first += block[1].shape[2]
    elif (size := _size(T := cache[1].shape[2])) == T:
        part = add_block(cache, 0, 0, part)
    else:

        def add_ith_block(i: jax.Array, part: Part) -> Part:
            first = jnp.minimum(i * size, T - size)  # the last block overlaps the block before it
            k, v = (jax.lax.dynamic_slice_in_dim(x, first, size, axis) for x, axis in zip(cache, (-1, -2), strict=True))
            return add_block((k, v), first, i * size, part)

        part = jax.lax.fori_loop(
            0,
            -(-T // size),
            lambda i, part: jax.lax.cond(i * size < max_seen, add_ith_block, lambda _, part: part, i, part),
            part,
        )
    out, top, total = (x.reshape(*lead, -1) for x in part)
    return out, top, total
