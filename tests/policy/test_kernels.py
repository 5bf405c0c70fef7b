"""The TPU's attention kernel, interpreted on the CPU, against attention written out in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from appo_jax.policy.kernels import causal_attention, splash_attention


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, segments: np.ndarray) -> np.ndarray:
    R, T, H, E = q.shape
    out = np.zeros((R, T, H, E))
    for r, t, h in np.ndindex(R, T, H):
        kv = h * k.shape[2] // H
        seen = [s for s in range(t + 1) if segments[r, s] == segments[r, t]]
        scores = k[r, seen, kv] @ q[r, t, h] / np.sqrt(E)
        p = np.exp(scores - scores.max())
        out[r, t, h] = p @ v[r, seen, kv] / p.sum()
    return out


def inputs(T: int, H: int, K: int, E: int) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(T)
    q, k, v = (rng.normal(size=(2, T, heads, E)) for heads in (H, K, K))
    return q, k, v, np.sort(rng.integers(0, 3, (2, T)), axis=-1)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("T", [70, 128, 150])  # less than a block, one block, and a block that is partly padding
def test_splash_attention(T: int, packed: bool) -> None:
    q, k, v, segments = inputs(T, 4, 2, 16)
    expected = attention(q, k, v, segments if packed else np.zeros_like(segments))
    ids = jnp.asarray(segments) if packed else None
    found = splash_attention(*(jnp.asarray(x, jnp.float32) for x in (q, k, v)), ids, interpret=True)
    assert np.abs(np.asarray(found) - expected).max() < 1e-5
    plain = causal_attention(*(jnp.asarray(x, jnp.float32) for x in (q, k, v)), ids)
    assert np.abs(np.asarray(plain) - expected).max() < 1e-5


def test_gradients_of_splash_attention() -> None:
    q, k, v, segments = (jnp.asarray(x) for x in inputs(140, 4, 2, 16))
    weights = jnp.asarray(np.random.default_rng(0).normal(size=q.shape), jnp.float32)

    def loss(attend, q, k, v):
        return (attend(q, k, v) * weights).sum()

    qkv = [x.astype(jnp.float32) for x in (q, k, v)]
    found = jax.grad(lambda *x: loss(lambda *y: splash_attention(*y, segments, interpret=True), *x), (0, 1, 2))(*qkv)
    expected = jax.grad(lambda *x: loss(lambda *y: causal_attention(*y, segments), *x), (0, 1, 2))(*qkv)
    for a, b in zip(found, expected, strict=True):
        assert np.abs(np.asarray(a) - np.asarray(b)).max() < 1e-4
