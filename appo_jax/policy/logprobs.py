"""Log-probabilities and entropies of given tokens, without ever holding `[T, V]` logits of a whole batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from appo_jax.config import Architecture
from appo_jax.policy.constraints import ROWS, constrain, parts
from appo_jax.policy.transformer import unembed

LOGITS_BYTES = 128 * 2**20  # float32 logits held at once


def log_prob_and_entropy(
    logits: Float32[Array, "*R V"], tokens: Int[Array, "*R"]
) -> tuple[Float32[Array, "*R"], Float32[Array, "*R"]]:
    """Log-probability of `tokens` `[...]` and entropy (nats) of the distribution, from float32 logits `[..., V]`."""
    log_z = jax.nn.logsumexp(logits, axis=-1)
    log_prob = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0] - log_z
    # log_z − Σ p·logit would cancel: its terms are much larger than their difference. Where p = 0 the logit may be −inf (a
    # truncated vocabulary).
    log_p = logits - log_z[..., None]
    p = jnp.exp(log_p)
    return log_prob, -jnp.where(p > 0, p * log_p, 0.0).sum(-1)


def token_log_probs(
    hidden: Float[Array, "R T D"], unembedding: Float[Array, "V D"], targets: Int[Array, "R T"], temperature: float,
    arch: Architecture | None = None,
) -> tuple[Float32[Array, "R T"], Float32[Array, "R T"]]:  # fmt: skip
    """Log-probability of the target token, and entropy, at every position of a batch.

    hidden `[R, T, D]`, unembedding `[V, D]`, targets `[R, T]`; `arch`: see `unembed`. Returns two float32 `[R, T]`. It runs over
    chunks of positions, with all rows in each chunk, and recomputes a chunk's logits in the backward pass.
    """
    R, T, _ = hidden.shape
    chunk = positions_at_once(R, T, unembedding.shape[0])
    chunks = -(-T // chunk)

    def chunked(x: jax.Array) -> jax.Array:  # [R, T, …] -> [chunks, R, chunk, …]
        x = jnp.pad(x, [(0, 0), (0, chunks * chunk - T)] + [(0, 0)] * (x.ndim - 2))
        return x.reshape(R, chunks, chunk, *x.shape[2:]).swapaxes(0, 1)

    weights = constrain(unembedding.astype(hidden.dtype), "tensor")

    @jax.checkpoint
    def one_chunk(states: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = unembed(states, weights, arch)
        return log_prob_and_entropy(constrain(logits, ROWS, None, "tensor") / temperature, targets)

    log_probs, entropies = jax.lax.map(lambda x: one_chunk(*x), (chunked(hidden), chunked(targets)))

    def joined(x: jax.Array) -> jax.Array:
        return x.swapaxes(0, 1).reshape(R, -1)[:, :T]

    return joined(log_probs), joined(entropies)


def positions_at_once(rows: int, length: int, vocab: int) -> int:
    """The number of positions of a chunk, whose logits for all `rows` rows take at most LOGITS_BYTES on a device: all, or the
    largest power of two, or half of it if that pads the last chunk less.

    A TPU's arrays are tiled in powers of two. Other chunk sizes cost copies, and minutes of compilation.
    """
    on_device = (rows // parts(rows, ROWS)) * (vocab // parts(vocab, "tensor"))
    max_positions = max(1, LOGITS_BYTES // (4 * on_device))
    if max_positions >= length:
        return length
    largest = 2 ** (max_positions.bit_length() - 1)
    return min(largest, max(1, largest // 2), key=lambda n: -(-length // n) * n)
