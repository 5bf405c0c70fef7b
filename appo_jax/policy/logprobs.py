"""Log-probabilities and entropies of given tokens, without ever holding `[T, V]` logits of a whole batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp

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
    the backward pass.
    """
    R, T, D = hidden.shape
    V = unembedding.shape[0]
    states, targets = hidden[:, :-1].reshape(-1, D), tokens[:, 1:].reshape(-1)
    count = states.shape[0]
    chunk = max(1, min(count, LOGITS_BYTES // (4 * V)))
    chunks = -(-count // chunk)
    chunk = -(-count // chunks)
    states = jnp.pad(states, ((0, chunks * chunk - count), (0, 0))).reshape(chunks, chunk, D)
    targets = jnp.pad(targets, (0, chunks * chunk - count)).reshape(chunks, chunk)
    weights = unembedding.astype(hidden.dtype)

    @jax.checkpoint
    def one_chunk(states: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = jnp.einsum("td,vd->tv", states, weights, preferred_element_type=jnp.float32)
        return log_prob_and_entropy(logits / temperature, targets)

    log_probs, entropies = jax.lax.map(lambda x: one_chunk(*x), (states, targets))

    def aligned(x: jax.Array) -> jax.Array:
        return jnp.pad(x.reshape(-1)[:count].reshape(R, T - 1), ((0, 0), (1, 0)))

    return aligned(log_probs), aligned(entropies)
