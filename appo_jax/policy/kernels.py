"""Attention over whole rows, by the fastest kernel that the platform has and the shapes allow.

TPU: splash attention, which never holds the `[T, T]` scores. GPU: cuDNN's flash attention for causal rows. Elsewhere, and where
a kernel does not apply, plain XLA. All compute the same function.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from appo_jax.policy.constraints import ROWS, divided, platform

LANES = 128  # splash attention works on multiples of this many tokens, and wants heads of this width
BLOCKS = (512, 256, 128)  # tokens of a splash block; the largest that divides the row


def causal_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Causal attention. q `[R, T, H, E]`, k and v `[R, T, K, E]`. Returns `[R, T, H, E]`."""
    where = platform()
    if where == "tpu":
        return splash_attention(q, k, v)
    # cuDNN: half precision, and heads of at most 128 in multiples of 8.
    cudnn = where in ("gpu", "cuda") and q.dtype.itemsize == 2 and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn" if cudnn else None)


def packed_attention(q: jax.Array, k: jax.Array, v: jax.Array, ends: jax.Array) -> jax.Array:
    """`causal_attention` in which a key is seen only by the queries before its end: `ends [R, T]` int32, each above its index."""
    if platform() == "tpu":
        return splash_attention(q, k, v, ends)
    return jax.nn.dot_product_attention(q, k, v, mask=visible(ends)[:, None])


def visible(ends: jax.Array) -> jax.Array:
    """`[R, T, T]` bool: which queries (second axis) see which keys."""
    index = jnp.arange(ends.shape[-1])
    return (index[:, None] >= index) & (index[:, None] < ends[:, None])


def splash_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, ends: jax.Array | None = None, *, interpret: bool = False
) -> jax.Array:
    """`packed_attention` (without `ends`: `causal_attention`) by jax's splash kernel, each device on its own rows and heads.

    Rows are padded to whole blocks on the right, where nothing sees the padding, and heads to whole lanes with zeros.
    `interpret` runs it without a TPU.
    """
    T, E = q.shape[1], q.shape[-1]
    q = q * jnp.asarray(E**-0.5, q.dtype)
    rows, lanes = -T % LANES, -E % LANES
    q, k, v = (jnp.pad(x, ((0, 0), (0, rows), (0, 0), (0, lanes))).swapaxes(1, 2) for x in (q, k, v))
    arguments = [q, k, v]
    if ends is not None:
        own = jnp.broadcast_to(jnp.arange(T + 1, T + rows + 1), (len(ends), rows))  # padding sees itself
        arguments.append(jnp.concatenate([ends, own], axis=1))
    attend = functools.partial(_causal if ends is None else _packed, interpret=interpret)
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty:
        # Heads are split by whole groups: as many query heads go with a key/value head on every device.
        heads = divided(k.shape, ROWS, "tensor")
        specs = tuple(heads if x.ndim == 4 else divided(x.shape, ROWS) for x in arguments)
        attend = jax.shard_map(attend, in_specs=specs, out_specs=heads, check_vma=False)
    return attend(*arguments).swapaxes(1, 2)[:, :T, :, :E]


def _sizes(length: int) -> splash.BlockSizes:
    block = next(block for block in BLOCKS if length % block == 0)
    return splash.BlockSizes(
        block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block
    )


def _causal(q: jax.Array, k: jax.Array, v: jax.Array, *, interpret: bool) -> jax.Array:
    """q `[R, H, T, E]`, k and v `[R, K, T, E]`: the rows and heads of one device."""
    heads, length = q.shape[1:3]
    mask = splash.MultiHeadMask([splash.CausalMask((length, length))] * heads)
    kernel = splash.make_splash_mha_single_device(mask, block_sizes=_sizes(length), interpret=interpret)
    return jax.vmap(kernel)(q, k, v)


def _packed(q: jax.Array, k: jax.Array, v: jax.Array, ends: jax.Array, *, interpret: bool) -> jax.Array:
    """`_causal` with `ends [R, T]`. Each row has a mask of its own, made once for all heads; blocks that it hides are skipped."""
    K, length = k.shape[1:3]

    def of_row(x: tuple[jax.Array, ...]) -> jax.Array:
        q, k, v, ends = x
        mask = visible(ends[None])
        kernel = splash.make_splash_mha_single_device(mask, block_sizes=_sizes(length), interpret=interpret)
        # jax makes an array of this flag and then asks for its truth.
        kernel.fwd_mask_info = kernel.fwd_mask_info._replace(is_dynamic_mask=True)

        def of_group(
            q: jax.Array, k: jax.Array, v: jax.Array
        ) -> jax.Array:  # query heads [G, T, E] of a key/value head
            def of_head(q: jax.Array) -> jax.Array:
                out: jax.Array = kernel(q[None], k[None], v[None])
                return out[0]

            return jax.vmap(of_head)(q)

        return jax.vmap(of_group)(q.reshape(K, -1, *q.shape[1:]), k, v).reshape(q.shape)

    return jax.lax.map(of_row, (q, k, v, ends))
