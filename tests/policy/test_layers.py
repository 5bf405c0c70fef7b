"""Neither rematerialisation nor running the layers as a loop changes any number."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from appo_jax.config import Architecture, Remat
from appo_jax.policy import attention
from appo_jax.policy.parameters import Params, init_params, transposed
from appo_jax.policy.score import positions
from appo_jax.policy.transformer import LayerPass, hidden_states, rotations

FAMILIES = {
    "qwen2": Architecture(96, 32, 3, 4, 2, 8, 48, family="qwen2"),
    "qwen3": Architecture(96, 32, 3, 4, 2, 8, 48, family="qwen3", tie_embeddings=False),
    "llama": Architecture(96, 32, 3, 4, 2, 8, 48),
}
TOKENS = np.random.default_rng(0).integers(0, 96, (2, 13))
WEIGHTS = np.random.default_rng(1).normal(size=(2, 13, 32)) / 26


def passes(family: str, remat: Remat, scan: bool) -> tuple[Any, Params]:
    """Hidden states and caches of every layer, and the gradients of a weighted sum of the states."""
    arch = FAMILIES[family]

    @jax.jit
    @jax.grad
    def backward(params: Params) -> jax.Array:
        return (WEIGHTS * run(params, attention.causal)[0]).sum()

    def run(params: Params, attend: attention.Attend) -> Any:
        return hidden_states(
            params, arch, TOKENS, rotations(positions(TOKENS), arch), attend, LayerPass(jnp.float32, remat, scan)
        )

    params = init_params(arch, 0)
    return jax.jit(run, static_argnums=1)(params, attention.causal), backward(params)


@pytest.mark.parametrize(
    ("family", "remat", "scan"),
    [
        ("qwen3", "layers", False), ("qwen3", "matmuls", False), ("qwen3", "layers", True),
        ("qwen2", "none", True), ("qwen3", "none", True), ("llama", "none", True),
    ],
)  # fmt: skip
def test_only_time_and_memory_change(family: str, remat: Remat, scan: bool) -> None:
    (found, found_grads), (expected, grads) = passes(family, remat, scan), passes(family, "none", False)
    assert len(found[1]) == len(expected[1]) == 3
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=0)
    for a, b in zip(jax.tree.leaves(found_grads), jax.tree.leaves(grads), strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=0)
    assert min(np.abs(x).max() for x in jax.tree.leaves(grads["layers"])) > 1e-4


@pytest.mark.parametrize("scan", [False, True])
def test_norm_scales_with_two_axes_stay_in_float32(scan: bool) -> None:
    """Without eps, the queries after their norm have the root mean square of the scale. 1.0039 in bfloat16 would be 1."""
    arch = dataclasses.replace(FAMILIES["qwen3"], num_layers=1, norm_eps=1e-12)
    params = init_params(arch, 0)
    params["layers"][0]["q_norm"] = jnp.full((arch.num_heads, arch.head_dim), 1.0039)

    def queries(_: None, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        return q, q

    how = LayerPass(jnp.bfloat16, scan=scan)
    _, (q,) = hidden_states(params, arch, TOKENS, rotations(positions(TOKENS), arch), queries, how)
    assert np.sqrt(np.square(np.float64(q)).mean()) == pytest.approx(1.0039, abs=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_turned_matrices_are_the_same_policy(family: str) -> None:
    arch = FAMILIES[family]

    @jax.jit
    def run(params: Params) -> Any:
        return hidden_states(params, arch, TOKENS, rotations(positions(TOKENS), arch), attention.causal)

    params = init_params(arch, 0)
    copy = transposed(params)
    assert copy["layers"][0]["o"].shape == (arch.width, arch.num_heads, arch.head_dim)
    for a, b in zip(jax.tree.leaves(run(copy)), jax.tree.leaves(run(params)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=0)
