"""Log-probabilities and entropies of given tokens, without ever holding `[T, V]` logits of a whole batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from appo_jax.policy.constraints import ROWS, constrain, row_shards

LOGITS_BYTES = 128 * 2**20  # float32 logits held at once


def log_prob_and_entropy(logits: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Log-probability of `tokens` `[...]` and entropy (nats) of the distribution, from float32 logits `[..., V]`."""
    log_z = jax.nn.logsumexp(logits, axis=-1)
    log_prob = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0] - log_z
    # Σ p·logit with p = 0 where the logit is −inf (a truncated vocabulary).
    p = jnp.exp(logits - log_z[..., None])
    expected = jnp.where(p > 0, p * logits, 0.0).sum(-1)
    return log_prob, log_z - expected


def token_log_probs(
    hidden: jax.Array, unembedding: jax.Array, tokens: jax.Array, temperature: float
) -> tuple[jax.Array, jax.Array]:
    """Log-probability and entropy of every token of a batch, aligned with the tokens.

    hidden `[R, T, D]`, unembedding `[V, D]`, tokens `[R, T]`. Returns two float32 `[R, T]`; index t speaks of token t,
    drawn from the hidden state at t−1; index 0 is 0. Runs over chunks of tokens, and recomputes each chunk's logits in
    the backward pass. On a mesh every device takes chunks of its own rows.
    """
    R, T, D = hidden.shape
    V = unembedding.shape[0]
    shards = row_shards(R)
    own = (shards,) if shards > 1 else ()  # an axis for the devices, when there are several
    count = R * (T - 1) // shards
    chunk = max(1, min(count, LOGITS_BYTES // (4 * V)))
    chunks = -(-count // chunk)
    chunk = -(-count // chunks)

    def chunked(x: jax.Array, *rest: int) -> jax.Array:  # [R, T - 1, …] -> [chunks, (shards,) chunk, …]
        x = x.reshape(*own, count, *rest)
        x = jnp.pad(x, [(0, 0)] * len(own) + [(0, chunks * chunk - count)] + [(0, 0)] * len(rest))
        return jnp.moveaxis(x.reshape(*own, chunks, chunk, *rest), len(own), 0)

    states, targets = chunked(hidden[:, :-1], D), chunked(tokens[:, 1:])
    weights = constrain(unembedding.astype(hidden.dtype), "tensor")

    @jax.checkpoint
    def one_chunk(states: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = jnp.einsum("...td,vd->...tv", states, weights, preferred_element_type=jnp.float32)
        logits = constrain(logits, *[ROWS] * len(own), None, "tensor")
        return log_prob_and_entropy(logits / temperature, targets)

    log_probs, entropies = jax.lax.map(lambda x: one_chunk(*x), (states, targets))

    def aligned(x: jax.Array) -> jax.Array:
        x = jnp.moveaxis(x, 0, len(own)).reshape(*own, -1)[..., :count]
        return jnp.pad(x.reshape(R, T - 1), ((0, 0), (1, 0)))

    return aligned(log_probs), aligned(entropies)
