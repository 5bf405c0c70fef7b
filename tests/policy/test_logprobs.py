"""Log-probabilities and entropies of tokens: against float64 numpy, in any number of chunks, in bounded memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from appo_jax.policy import logprobs
from appo_jax.policy.logprobs import token_log_probs

R, T, D, V = 3, 11, 8, 50


def inputs() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.normal(size=(R, T, D)), rng.normal(size=(V, D)), rng.integers(0, V, (R, T))


@pytest.mark.parametrize("at_once", [1, 3, 8, 100])  # positions of each row: chunks of 1, 2, 8 and all 11
def test_every_token_is_scored_from_the_state_before_it(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr(logprobs, "LOGITS_BYTES", 4 * R * V * at_once)
    hidden, unembedding, tokens = inputs()
    log_probs, entropies = token_log_probs(*(jnp.asarray(x) for x in (hidden, unembedding, tokens)), temperature=0.7)
    logits = hidden @ unembedding.T / 0.7
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    for r, t in np.ndindex(R, T):
        expected = np.log(p[r, t - 1, tokens[r, t]]) if t else 0
        assert log_probs[r, t] == pytest.approx(expected, abs=1e-5)
        assert entropies[r, t] == pytest.approx(-(p[r, t - 1] * np.log(p[r, t - 1])).sum() if t else 0, abs=1e-5)


def test_gradients_do_not_depend_on_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, unembedding, tokens = (jnp.asarray(x) for x in inputs())

    def loss(hidden: jax.Array, unembedding: jax.Array) -> jax.Array:
        log_probs, entropies = token_log_probs(hidden, unembedding, tokens, 0.7)
        return (log_probs**2 + entropies).sum()

    whole = jax.grad(loss, (0, 1))(hidden, unembedding)
    monkeypatch.setattr(logprobs, "LOGITS_BYTES", 4 * R * V * 4)
    for a, b in zip(jax.grad(loss, (0, 1))(hidden, unembedding), whole, strict=True):
        assert np.abs(a - b).max() < 1e-4


def test_memory_at_full_size() -> None:
    """One row of 4096 tokens over Qwen's vocabulary (Qwen2.5-0.5B: width 896): [T, V] alone would be 2.5 GB."""
    shapes = (1, 4096, 896), (151936, 896)
    hidden, unembedding = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    tokens = jax.ShapeDtypeStruct((1, 4096), jnp.int32)

    def log_probs(hidden: jax.Array, unembedding: jax.Array, tokens: jax.Array) -> jax.Array:
        return token_log_probs(hidden, unembedding, tokens, 1.0)[0]

    memory = jax.jit(log_probs).lower(hidden, unembedding, tokens).compile().memory_analysis()
    assert memory.argument_size_in_bytes > 4 * 151936 * 896
    assert memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes < 1.5e9
    backward = jax.jit(jax.grad(lambda *x: log_probs(*x).sum(), (0, 1)))
    assert backward.lower(hidden, unembedding, tokens).compile().memory_analysis().temp_size_in_bytes < 1.5e9
