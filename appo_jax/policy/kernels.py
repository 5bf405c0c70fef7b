"""Causal attention over whole rows, by the fastest kernel that the platform has and the shapes allow.

TPU: splash attention, which never holds the `[T, T]` scores. GPU: cuDNN's flash attention. Elsewhere, and where a kernel
does not apply, plain XLA. All compute the same function.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from appo_jax.policy.constraints import ROWS, divided, platform

LANES = 128  # splash attention works on multiples of this many tokens, and wants heads of this width
BLOCKS = (512, 256, 128)  # tokens of a splash block; the largest that divides the row


def causal_attention(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None = None) -> jax.Array:
    """Causal attention, within the segments of packed rows where there are some.

    q `[R, T, H, E]`, k and v `[R, T, K, E]`, segments `[R, T]` int32. Returns `[R, T, H, E]`.
    """
    where = platform()
    if where == "tpu":
        return splash_attention(q, k, v, segments)
    if segments is not None:
        same = segments[:, None, :, None] == segments[:, None, None, :]
        return jax.nn.dot_product_attention(q, k, v, mask=same, is_causal=True)
    # cuDNN: half precision, and heads of at most 128 in multiples of 8.
    cudnn = where in ("gpu", "cuda") and q.dtype.itemsize == 2 and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn" if cudnn else None)


def splash_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None = None, *, interpret: bool = False
) -> jax.Array:
    """`causal_attention` by jax's splash attention kernel, each device of a mesh on its own rows and heads.

    Rows are padded to whole blocks on the right, where causality hides the padding, and heads to whole lanes with zeros.
    `interpret` runs it without a TPU.
    """
    T, E = q.shape[1], q.shape[-1]
    q = q * jnp.asarray(E**-0.5, q.dtype)
    rows, lanes = -T % LANES, -E % LANES
    q, k, v = (jnp.pad(x, ((0, 0), (0, rows), (0, 0), (0, lanes))).swapaxes(1, 2) for x in (q, k, v))
    ids = jnp.zeros(q.shape[:1] + q.shape[2:3], jnp.int32)
    if segments is not None:
        ids = jnp.pad(segments.astype(jnp.int32), ((0, 0), (0, rows)))
    attend = functools.partial(_splash, interpret=interpret)
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty:
        # Heads are split by whole groups: as many query heads go with a key/value head on every device.
        heads, of_ids = divided(k.shape, ROWS, "tensor"), divided(ids.shape, ROWS)
        attend = jax.shard_map(attend, in_specs=(heads, heads, heads, of_ids), out_specs=heads, check_vma=False)
    return attend(q, k, v, ids).swapaxes(1, 2)[:, :T, :, :E]


def _splash(q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array, *, interpret: bool) -> jax.Array:
    """q `[R, H, T, E]`, k and v `[R, K, T, E]`, ids `[R, T]`: the rows and heads of one device."""
    heads, length = q.shape[1:3]
    block = next(block for block in BLOCKS if length % block == 0)
    sizes = splash.BlockSizes(
        block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block
    )
    mask = splash.MultiHeadMask([splash.CausalMask((length, length))] * heads)
    kernel = splash.make_splash_mha_single_device(mask, block_sizes=sizes, interpret=interpret)
    return jax.vmap(lambda q, k, v, ids: kernel(q, k, v, splash.SegmentIds(ids, ids)))(q, k, v, ids)
