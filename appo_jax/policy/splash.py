"""Attention over whole rows on a TPU: jax's splash kernel, which never holds the `[T, T]` logits."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from appo_jax.policy.constraints import ROWS, divided
from appo_jax.policy.kernels import visible

LANES = 128  # of a TPU's registers: splash attention needs row lengths and head widths that are multiples of this
BLOCKS = (512, 256, 128)  # sizes of a splash block in tokens; the largest that divides the row's length is used


def splash_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, ends: jax.Array | None = None, *, interpret: bool = False
) -> jax.Array:
    """`kernels.packed_attention` (without `ends`: `causal_attention`). Each device runs it on its rows and heads.

    Rows are padded on the right to multiples of LANES; no real token sees the padding. Heads are padded with zeros to a multiple
    of LANES. `interpret` runs the kernel without a TPU.
    """
    T, E = q.shape[1], q.shape[-1]
    q = q * jnp.asarray(E**-0.5, q.dtype)
    rows, lanes = -T % LANES, -E % LANES
    q, k, v = (jnp.pad(x, ((0, 0), (0, rows), (0, 0), (0, lanes))).swapaxes(1, 2) for x in (q, k, v))
    arguments = [q, k, v]
    if ends is not None:
        padding_ends = jnp.broadcast_to(jnp.arange(T + 1, T + rows + 1), (len(ends), rows))  # padding sees only itself
        arguments.append(jnp.concatenate([ends, padding_ends], axis=1))
    attend = functools.partial(_causal if ends is None else _packed, interpret=interpret)
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty:
        # Heads are split in whole groups: each device gets key/value heads with all of their query heads.
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
    """Causal attention of one device's rows and heads: q `[R, H, T, E]`, k and v `[R, K, T, E]`."""
    heads, length = q.shape[1:3]
    mask = splash.MultiHeadMask([splash.CausalMask((length, length))] * heads)
    kernel = splash.make_splash_mha_single_device(mask, block_sizes=_sizes(length), interpret=interpret)
    return jax.vmap(kernel)(q, k, v)


def _packed(q: jax.Array, k: jax.Array, v: jax.Array, ends: jax.Array, *, interpret: bool) -> jax.Array:
    """`_causal` with `ends [R, T]`. Each row's mask is made once for all heads; blocks that it hides completely are skipped."""
    K, length = k.shape[1:3]

    def of_row(x: tuple[jax.Array, ...]) -> jax.Array:
        q, k, v, ends = x
        mask = visible(ends[None])
        kernel = splash.make_splash_mha_single_device(mask, block_sizes=_sizes(length), interpret=interpret)
        # jax converts this flag to an array, which is traced here, and then uses it in a Python `if`.
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
