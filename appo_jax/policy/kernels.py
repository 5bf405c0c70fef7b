"""Attention over whole rows, by the fastest kernel that the platform has and that supports the shapes.

TPU: splash attention, which never holds the `[T, T]` logits. GPU: cuDNN's flash attention for causal rows. All other cases:
plain XLA, in blocks of queries. All compute the same function.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from appo_jax.policy.constraints import platform

# Plain XLA computes blocks of BLOCK_QUERIES queries, at most MAX_PARTS of a row. A block leaves out the keys after it: for long
# rows that is nearly half of the work. With more blocks, programs take longer to compile. Heads come first, so that no array of
# logits is transposed: with `dot_product_attention`, the layers of SmolLM2's shape take a tenth longer on a CPU.
BLOCK_QUERIES, MAX_PARTS = 128, 8


def causal_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Causal attention. q `[R, T, H, E]`, k and v `[R, T, K, E]`. Returns `[R, T, H, E]`."""
    where = platform()
    if where == "tpu":
        # Not imported above, because Pallas for TPUs takes a fifth of the time in which a run starts.
        from appo_jax.policy.splash import splash_attention

        return splash_attention(q, k, v)
    # cuDNN supports half precision and head widths up to 128 that are multiples of 8.
    cudnn = where in ("gpu", "cuda") and q.dtype.itemsize == 2 and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128
    if cudnn:
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")
    return packed_attention(q, k, v, jnp.full(q.shape[:2], q.shape[1]))


def packed_attention(q: jax.Array, k: jax.Array, v: jax.Array, ends: jax.Array) -> jax.Array:
    """`causal_attention` in which key t is seen only by queries before `ends[t]`. `ends [R, T]` int32, with ends[t] > t."""
    if platform() == "tpu":
        from appo_jax.policy.splash import splash_attention

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
