"""A TPU kernel for attention over caches that reads only the part of a cache that queries see.

A cache is as long as the longest rollout may be, and most of it is usually empty. The time of decoding is the time to read
memory. The kernel reads a cache in blocks of keys, up to the last block that any query of the row sees. Index maps over
prefetched lengths choose the blocks: if the index does not change from one grid step to the next, nothing is fetched.

The queries of an appended tool result are taken in blocks, each of which reads the cache. Their logits never leave the chip.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from appo_jax.policy.splash import LANES

SUBLANES = 16  # rows of a bfloat16 tile: queries are padded to a multiple of it, or of a block
MAX_KEYS = 512  # in a block
MAX_BLOCK_BYTES = 512 * 1024  # of a block's keys; on-chip memory holds two blocks of keys and two of values
MAX_QUERIES = 1024  # in a block, of all key/value heads of a device: they and their results lie in on-chip memory


def seen_keys(
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    seen: jax.Array,
    *,
    name: str = "seen_keys",
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One part of a softmax over caches of ragged lengths.

    q `[N, K, M, E]`, already scaled; keys and values `[N, K, T, E]`; seen `[N, M]` int32: a query sees the first `seen` keys.
    Returns float32: the unnormalised output `[N, K, M, E]`, the largest logit q·k and the sum of exponentials, both `[N, K, M, 1]`.
    For a query that sees no key, output and sum are 0 and the logit is the lowest float32. `name`: the call's name in the
    compiled program. `interpret` runs the kernel without a TPU.
    """
    N, K, M, E = q.shape
    T = keys.shape[2]
    parts = query_blocks(K, M)
    rows = -(-M // parts // SUBLANES) * SUBLANES  # in a block of queries
    padding = parts * rows - M
    q = jnp.pad(q, ((0, 0), (0, 0), (0, padding), (0, 0)))
    seen = jnp.pad(seen.astype(jnp.int32), ((0, 0), (0, padding)))
    block = block_of(K, T, E, keys.dtype.itemsize)
    # [N * parts]: how many blocks of its cache row a block of queries reads
    needed = jnp.maximum(-(-seen.reshape(N * parts, rows).max(-1) // block), 1)

    def cache(n: jax.Array, m: jax.Array, t: jax.Array, needed: jax.Array) -> tuple[jax.Array | int, ...]:
        # After the needed blocks the index stays, so nothing is fetched.
        return n, 0, jnp.minimum(t, needed[n * parts + m] - 1), 0

    def queries(n: jax.Array, m: jax.Array, t: jax.Array, needed: jax.Array) -> tuple[jax.Array | int, ...]:
        return n, 0, m, 0

    out, top, total = pl.pallas_call(
        functools.partial(_kernel, block=block, length=T, parts=parts),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(N, parts, pl.cdiv(T, block)),
            in_specs=[
                pl.BlockSpec((1, rows, 1), lambda n, m, t, needed: (n, m, 0)),
                pl.BlockSpec((1, K, rows, E), queries),
                pl.BlockSpec((1, K, block, E), cache),
                pl.BlockSpec((1, K, block, E), cache),
            ],
            out_specs=[pl.BlockSpec((1, K, rows, width), queries) for width in (E, 1, 1)],
        ),
        out_shape=[jax.ShapeDtypeStruct((N, K, parts * rows, width), jnp.float32) for width in (E, 1, 1)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
        name=name,
    )(needed, seen[..., None], q, keys, values)
    return out[:, :, :M], top[:, :, :M], total[:, :, :M]


def query_blocks(heads: int, queries: int) -> int:
    """The number of blocks into which the queries of a row are cut, each of which reads the row's cache."""
    per_head = max(1, MAX_QUERIES // heads // SUBLANES) * SUBLANES
    return -(-queries // per_head)


def block_of(heads: int, length: int, width: int, itemsize: int) -> int:
    """The number of keys in a block: a power of two that is a multiple of LANES, or all keys of a shorter cache."""
    max_keys = min(MAX_KEYS, max(LANES, MAX_BLOCK_BYTES // (heads * width * itemsize)))
    return min(length, 2 ** (max_keys.bit_length() - 1))


def _kernel(
    needed: jax.Array, seen_ref: jax.Array, q_ref: jax.Array, k_ref: jax.Array, v_ref: jax.Array, out_ref: jax.Array,
    top_ref: jax.Array, sum_ref: jax.Array, *, block: int, length: int, parts: int,
) -> None:  # fmt: skip
    """Process one block of keys for one block of a row's queries. The outputs stay in on-chip memory until the last block of
    keys."""
    n, m, t = (pl.program_id(axis) for axis in range(3))

    @pl.when(t == 0)
    def begin() -> None:
        out_ref[...] = jnp.zeros_like(out_ref)
        sum_ref[...] = jnp.zeros_like(sum_ref)
        top_ref[...] = jnp.full_like(top_ref, jnp.finfo(jnp.float32).min)

    @pl.when(t < needed[n * parts + m])
    def add_block() -> None:
        seen = seen_ref[0]  # [M, 1]
        first = t * block
        index = first + jax.lax.broadcasted_iota(jnp.int32, (1, block), 1)
        # Beyond the cache's end a block holds arbitrary values. They may be NaN, and 0 · NaN is NaN, so they are replaced.
        real = first + jax.lax.broadcasted_iota(jnp.int32, (block, 1), 0) < length
        for head in range(q_ref.shape[1]):
            by_width = (((1,), (1,)), ((), ()))
            logits = jax.lax.dot_general(q_ref[0, head], k_ref[0, head], by_width, preferred_element_type=jnp.float32)
            logits = jnp.where(index < seen, logits, -jnp.inf)
            top = top_ref[0, head]
            higher = jnp.maximum(top, logits.max(-1, keepdims=True))
            weights, scale = jnp.exp(logits - higher), jnp.exp(top - higher)
            v = v_ref[0, head]
            v = v if length % block == 0 else jnp.where(real, v, jnp.zeros_like(v))
            added = jnp.dot(weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
            out_ref[0, head] = out_ref[0, head] * scale + added
            sum_ref[0, head] = sum_ref[0, head] * scale + weights.sum(-1, keepdims=True)
            top_ref[0, head] = higher
