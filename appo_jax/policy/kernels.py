"""Attention over whole rows, by the fastest kernel that the platform has and that supports the shapes.

TPU: splash attention, which never holds the `[T, T]` logits. GPU: cuDNN's flash attention for causal rows. All other cases:
plain XLA, in blocks of queries. All compute the same function.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from appo_jax.policy.constraints import ROWS, divided, platform

LANES = 128  # of a TPU's registers: splash attention needs row lengths and head widths that are multiples of this
BLOCKS = (512, 256, 128)  # sizes of a splash block in tokens; the largest that divides the row's length is used
# Plain XLA computes blocks of BLOCK_QUERIES queries, at most MAX_PARTS of a row. A block leaves out the keys after it: for long
# rows that is nearly half of the work. With more blocks, programs take longer to compile. Heads come first, so that no array of
# logits is transposed: with `dot_product_attention`, the layers of SmolLM2's shape take a tenth longer on a CPU.
BLOCK_QUERIES, MAX_PARTS = 128, 8


def causal_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Causal attention. q `[R, T, H, E]`, k and v `[R, T, K, E]`. Returns `[R, T, H, E]`."""
    where = platform()
    if where == "tpu":
        return splash_attention(q, k, v)
    # cuDNN supports half precision and head widths up to 128 that are multiples of 8.
    cudnn = where in ("gpu", "cuda") and q.dtype.itemsize == 2 and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128
    if cudnn:
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")
    return packed_attention(q, k, v, jnp.full(q.shape[:2], q.shape[1]))


def packed_attention(q: jax.Array, k: jax.Array, v: jax.Array, ends: jax.Array) -> jax.Array:
    """`causal_attention` in which key t is seen only by queries before `ends[t]`. `ends [R, T]` int32, with ends[t] > t."""
    if platform() == "tpu":
        return splash_attention(q, k, v, ends)
    (R, T, H, E), K = q.shape, k.shape[2]
    G = H // K
    q = (q * E**-0.5).reshape(R, T, K, G, E).transpose(0, 2, 3, 1, 4)
    k, v, mask = k.transpose(0, 2, 3, 1), v.swapaxes(1, 2), visible(ends)
    size = max(BLOCK_QUERIES, -(-T // MAX_PARTS))

    def block(first: int) -> jax.Array:
        end = min(first + size, T)
        queries = q[..., first:end, :].reshape(R, K, -1, E)
        seen = jnp.tile(mask[:, first:end, :end], (1, G, 1))[:, None]
        logits = jnp.einsum("rkqe,rket->rkqt", queries, k[..., :end], preferred_element_type=jnp.float32)
        logits = jnp.where(seen, logits, -jnp.inf)
        weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True)))  # a query sees its own key
        values = v[:, :, :end]
        out = jnp.einsum("rkqt,rkte->rkqe", weights.astype(v.dtype), values)
        return (out / weights.sum(-1, keepdims=True)).astype(v.dtype).reshape(R, K, G, -1, E)

    out = jnp.concatenate([block(first) for first in range(0, T, size)], axis=3)
    return out.transpose(0, 3, 1, 2, 4).reshape(R, T, H, E)


def visible(ends: jax.Array) -> jax.Array:
    """`[R, T, T]` bool: whether a query (second axis) sees a key (third axis)."""
    index = jnp.arange(ends.shape[-1])
    return (index[:, None] >= index) & (index[:, None] < ends[:, None])


def splash_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, ends: jax.Array | None = None, *, interpret: bool = False
) -> jax.Array:
    """`packed_attention` (without `ends`: `causal_attention`) by jax's splash kernel. Each device runs it on its rows and heads.

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
