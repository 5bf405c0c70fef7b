"""The TPU's attention kernel, interpreted on the CPU, against attention written out in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from appo_jax.policy.kernels import causal_attention, packed_attention
from appo_jax.policy.splash import splash_attention


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, ends: np.ndarray) -> np.ndarray:
    R, T, H, E = q.shape
    out = np.zeros((R, T, H, E))
    for r, t, h in np.ndindex(R, T, H):
        kv = h * k.shape[2] // H
        seen = [s for s in range(t + 1) if t < ends[r, s]]
        scores = k[r, seen, kv] @ q[r, t, h] / np.sqrt(E)
        p = np.exp(scores - scores.max())
        out[r, t, h] = p @ v[r, seen, kv] / p.sum()
    return out


def inputs(T: int, H: int, K: int, E: int) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(T)
    q, k, v = (rng.normal(size=(2, T, heads, E)) for heads in (H, K, K))
    # Trees depth first: a slot's parent is one of the slots that lead to the one before it, or there is none.
    parents = np.full((2, T), -1)
    for row in parents:
        for t in range(1, T):
            row[t] = t - 1
            while row[t] >= 0 and rng.random() < 0.2:
                row[t] = row[row[t]]
    ends = np.tile(np.arange(1, T + 1), (2, 1))
    for r, t in np.ndindex(2, T):
        above = parents[r, t]
        while above >= 0:
            ends[r, above], above = t + 1, parents[r, above]
    return q, k, v, ends


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("T", [70, 128, 150])  # less than a block, one block, and a block that is partly padding
def test_splash_attention(T: int, packed: bool) -> None:
    q, k, v, ends = inputs(T, 4, 2, 16)
    expected = attention(q, k, v, ends if packed else np.full_like(ends, T))
    arrays = [jnp.asarray(x, jnp.float32) for x in (q, k, v)] + ([jnp.asarray(ends, jnp.int32)] if packed else [])
    found = splash_attention(*arrays, interpret=True)
    assert np.abs(np.asarray(found) - expected).max() < 1e-5
    plain = (packed_attention if packed else causal_attention)(*arrays)
    assert np.abs(np.asarray(plain) - expected).max() < 1e-5


def test_gradients_of_splash_attention() -> None:
    q, k, v, ends = (jnp.asarray(x) for x in inputs(140, 4, 2, 16))
    weights = jnp.asarray(np.random.default_rng(0).normal(size=q.shape), jnp.float32)

    def loss(attend, q, k, v):
        return (attend(q, k, v) * weights).sum()

    qkv = [x.astype(jnp.float32) for x in (q, k, v)]
    found = jax.grad(
        lambda *x: loss(lambda *y: splash_attention(*y, ends.astype(jnp.int32), interpret=True), *x), (0, 1, 2)
    )(*qkv)
    expected = jax.grad(lambda *x: loss(lambda *y: packed_attention(*y, ends), *x), (0, 1, 2))(*qkv)
    for a, b in zip(found, expected, strict=True):
        assert np.abs(np.asarray(a) - np.asarray(b)).max() < 1e-4
