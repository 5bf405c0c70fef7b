"""A TPU kernel for decoding: queries over the keys that they see, and no others read.

A cache has room for the longest rollout; most of it is empty most of the time, and decoding is bound by what it reads. The
kernel goes through a cache in blocks of keys and reads those up to the last one that any query of the row sees. The blocks are
chosen by index maps over prefetched lengths: where the index stays as it is, nothing is fetched.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
SUBLANES = 16  # of a tile of bfloat16: queries come in multiples of it
MAX_KEYS = 512  # of a block
MAX_BLOCK_BYTES = 512 * 1024  # of a block of keys; as many of values, and both twice, are in the chip's own memory
MAX_QUERIES = 256  # of one row and key/value head


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

    q `[N, K, M, E]`, already scaled; keys and values `[N, K, T, E]`; seen `[N, M]` int32: how many of the first keys
    a query sees. Returns float32: the unnormalised output `[N, K, M, E]`, the largest score and the sum `[N, K, M, 1]`; of a
    query that sees nothing, zeros and the least number. `name` names it in the compiled program; `interpret` runs it without
    a TPU.
    """
    N, K, M, E = q.shape
    T = keys.shape[2]
    rows = -M % SUBLANES
    q = jnp.pad(q, ((0, 0), (0, 0), (0, rows), (0, 0)))
    seen = jnp.pad(seen.astype(jnp.int32), ((0, 0), (0, rows)))
    block = block_of(K, T, E, keys.dtype.itemsize)
    needed = jnp.maximum(-(-seen.max(-1) // block), 1)  # blocks that a row of the cache is read of

    def cache(n: jax.Array, t: jax.Array, needed: jax.Array) -> tuple[jax.Array | int, ...]:
        return n, 0, jnp.minimum(t, needed[n] - 1), 0  # beyond those needed the last block stays

    def row(n: jax.Array, t: jax.Array, needed: jax.Array) -> tuple[jax.Array | int, ...]:
        return n, 0, 0, 0

    of_row = [pl.BlockSpec((1, K, M + rows, width), row) for width in (E, 1, 1)]
    out, top, total = pl.pallas_call(
        functools.partial(_kernel, block=block, length=T),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(N, pl.cdiv(T, block)),
            in_specs=[
                pl.BlockSpec((1, M + rows, 1), lambda n, t, needed: (n, 0, 0)),
                pl.BlockSpec((1, K, M + rows, E), row),
                pl.BlockSpec((1, K, block, E), cache),
                pl.BlockSpec((1, K, block, E), cache),
            ],
            out_specs=of_row,
        ),
        out_shape=[jax.ShapeDtypeStruct((N, K, M + rows, width), jnp.float32) for width in (E, 1, 1)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name=name,
    )(needed, seen[..., None], q, keys, values)
    return out[:, :, :M], top[:, :, :M], total[:, :, :M]


def block_of(heads: int, length: int, width: int, itemsize: int) -> int:
    """Keys of a block: a power of two of whole lanes, or all keys where they are fewer."""
    most = min(MAX_KEYS, max(LANES, MAX_BLOCK_BYTES // (heads * width * itemsize)))
    return min(length, 2 ** (most.bit_length() - 1))


def _kernel(
    needed: jax.Array, seen_ref: jax.Array, q_ref: jax.Array, k_ref: jax.Array, v_ref: jax.Array, out_ref: jax.Array,
    top_ref: jax.Array, sum_ref: jax.Array, *, block: int, length: int,
) -> None:  # fmt: skip
    """One block of keys of one row: the outputs stay in the chip's memory until the row's last block."""
    n, t = pl.program_id(0), pl.program_id(1)

    @pl.when(t == 0)
    def begin() -> None:
        out_ref[...] = jnp.zeros_like(out_ref)
        sum_ref[...] = jnp.zeros_like(sum_ref)
        top_ref[...] = jnp.full_like(top_ref, jnp.finfo(jnp.float32).min)

    @pl.when(t < needed[n])
    def meet() -> None:
        seen = seen_ref[0]  # [M, 1]
        first = t * block
        index = first + jax.lax.broadcasted_iota(jnp.int32, (1, block), 1)
        # Beyond the cache's end a block holds anything, NaN too; a weight of 0 would not be enough.
        real = first + jax.lax.broadcasted_iota(jnp.int32, (block, 1), 0) < length
        for head in range(q_ref.shape[1]):
            by_width = (((1,), (1,)), ((), ()))
            scores = jax.lax.dot_general(q_ref[0, head], k_ref[0, head], by_width, preferred_element_type=jnp.float32)
            scores = jnp.where(index < seen, scores, -jnp.inf)
            top = top_ref[0, head]
            higher = jnp.maximum(top, scores.max(-1, keepdims=True))
            weights, scale = jnp.exp(scores - higher), jnp.exp(top - higher)
            v = v_ref[0, head]
            v = v if length % block == 0 else jnp.where(real, v, jnp.zeros_like(v))
            met = jnp.dot(weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
            out_ref[0, head] = out_ref[0, head] * scale + met
            sum_ref[0, head] = sum_ref[0, head] * scale + weights.sum(-1, keepdims=True)
            top_ref[0, head] = higher
