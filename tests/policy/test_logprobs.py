"""Log-probabilities and entropies of given tokens: against the oracle, in any number of chunks, in bounded memory."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from appo_jax.policy import logprobs

R, T, D, V = 3, 8, 5, 11


@pytest.mark.parametrize(
    ("length", "limit", "chunk"),
    [(300, 300, 300), (384, 341, 128), (768, 682, 256), (5120, 700, 512), (1000, 600, 512), (1000, 127, 64), (9, 1, 1)],
)
def test_a_chunk_pads_little(monkeypatch, length, limit, chunk):
    """A chunk holds at most `limit` positions: all, or the better of two powers of two."""
    monkeypatch.setattr(logprobs, "LOGITS_BYTES", 4 * V * limit)
    assert logprobs.positions_at_once(1, length, V) == chunk


@pytest.mark.parametrize("at_once", [T, 3, 1])  # positions of each row: one chunk; several with padding; one by one
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_token_log_probs_are_the_oracles(monkeypatch, at_once, temperature):
    monkeypatch.setattr(logprobs, "LOGITS_BYTES", 4 * R * V * at_once)
    rng = np.random.default_rng(0)
    hidden, unembedding = rng.normal(size=(R, T, D)).astype(np.float32), rng.normal(size=(V, D)).astype(np.float32)
    tokens = rng.integers(0, V, (R, T + 1))  # each asks the state before it; the first asks none
    targets = tokens[:, 1:]
    log_probs, entropies = logprobs.token_log_probs(*map(jnp.asarray, (hidden, unembedding, targets)), temperature)
    every = [False] + [True] * T
    for r in range(R):
        logits = hidden[r].astype(float) @ unembedding.T.astype(float)
        expected = oracle.log_probs_and_entropies(logits, tokens[r], every, temperature)
        np.testing.assert_allclose(log_probs[r], expected[0][1:], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(entropies[r], expected[1][1:], rtol=1e-4, atol=1e-5)

    weights = rng.normal(size=(2, R, T)).astype(np.float32)

    def total(hidden):
        both = logprobs.token_log_probs(hidden, *map(jnp.asarray, (unembedding, targets)), temperature)
        return sum((w * x).sum() for w, x in zip(weights, both, strict=True))

    def plain(hidden):
        log_p = jax.nn.log_softmax(hidden @ unembedding.T / temperature)
        own = jnp.take_along_axis(log_p, targets[..., None], -1)[..., 0]
        return (weights[0] * own).sum() - (weights[1] * (jnp.exp(log_p) * log_p).sum(-1)).sum()

    np.testing.assert_allclose(jax.grad(total)(hidden), jax.grad(plain)(hidden), rtol=1e-3, atol=1e-4)


def test_a_token_without_probability_adds_nothing_to_the_entropy():
    logits = jnp.array([[0.0, -jnp.inf, 0.0]])
    with jax.debug_nans(True):
        log_prob, entropy = jax.jit(logprobs.log_prob_and_entropy)(logits, jnp.array([2]))
    np.testing.assert_allclose([log_prob[0], entropy[0]], [-np.log(2), np.log(2)], rtol=1e-6)


def test_memory_at_full_size() -> None:
    """One row of 4096 tokens over Qwen's vocabulary (Qwen2.5-0.5B: width 896): [T, V] alone would be 2.5 GB."""
    shapes = (1, 4096, 896), (151936, 896)
    hidden, unembedding = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    tokens = jax.ShapeDtypeStruct((1, 4096), jnp.int32)

    def log_probs(hidden: jax.Array, unembedding: jax.Array, tokens: jax.Array) -> jax.Array:
        return logprobs.token_log_probs(hidden, unembedding, tokens, 1.0)[0]

    memory = jax.jit(log_probs).lower(hidden, unembedding, tokens).compile().memory_analysis()
    assert memory.argument_size_in_bytes > 4 * 151936 * 896
    assert memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes < 1.5e9
    backward = jax.jit(jax.grad(lambda *x: log_probs(*x).sum(), (0, 1)))
    assert backward.lower(hidden, unembedding, tokens).compile().memory_analysis().temp_size_in_bytes < 1.5e9
