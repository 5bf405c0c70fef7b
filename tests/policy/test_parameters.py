"""The parameter table against other sources: gguf's name map, transformers' shapes, Muon's matrices."""

from __future__ import annotations

import dataclasses

import gguf
import jax
import numpy as np
import pytest

from appo_jax.config import Architecture, OptimizerConfig, SFTConfig
from appo_jax.learner.optimizer import sft_optimizer
from appo_jax.policy.parameters import FAMILIES, abstract_params, init_params, parameters
from appo_jax.policy.sharding import RULES

ARCHITECTURES = {
    name: Architecture(96, 32, 3, 4, 2, 8, 48, tie_embeddings=name != "qwen3", family=name) for name in FAMILIES
}


@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_gguf_names_are_those_of_the_gguf_library(tie_embeddings: bool) -> None:
    """Those of llama: the only GGUF file that is read holds a model of this family."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 3)
    for path, row in parameters(dataclasses.replace(ARCHITECTURES["llama"], tie_embeddings=tie_embeddings)):
        layer = f"model.layers.{path[1]}." if path[0] == "layers" else ""
        block = f"blk.{path[1]}." if path[0] == "layers" else ""
        assert names.get_name(f"{layer}{row.hf}") == f"{block}{row.gguf}", path


@pytest.mark.parametrize("family", FAMILIES)
def test_no_two_parameters_have_the_same_name_in_a_file(family: str) -> None:
    """Else two rows would read one tensor: a row of other families that this family has by mistake."""
    layer = [row for path, row in parameters(ARCHITECTURES[family]) if path[:2] == ("layers", 0)]
    names = [(row.hf, row.suffix) for row in layer]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("family", FAMILIES)
def test_random_parameters(family: str) -> None:
    arch = ARCHITECTURES[family]
    params = init_params(arch, 0)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(
        lambda x: (x.shape, x.dtype), abstract_params(arch)
    )
    # A weakly typed parameter would be another program at the second step.
    assert not any(x.weak_type for x in jax.tree.leaves(params))
    flat = {path: np.asarray(_at(params, path)) for path, _ in parameters(arch)}
    assert len(flat) == len(jax.tree.leaves(params))
    # Standard deviations by hand: 1/√fan-in, for what is added to the residual stream 1/√(fan-in · 2 · 3 layers).
    expected = {
        "embed": 32, "q": 32, "k": 32, "v": 32, "o": 32 * 6, "gate": 32, "up": 32, "down": 48 * 6, "unembed": 32,
    }  # fmt: skip
    for path, array in flat.items():
        name = path[-1]
        if str(name).endswith("norm"):
            assert (array == 1).all()
        elif str(name).endswith("bias"):
            assert (array == 0).all()
        else:
            error_of_std = 4 / np.sqrt(2 * array.size)
            assert np.std(array) * np.sqrt(expected[str(name)]) == pytest.approx(1, abs=error_of_std), path
    random = [array.ravel()[:8].tobytes() for array in flat.values() if np.std(array) > 0]
    assert len(set(random)) == len(random)  # no two parameters share their random numbers


@pytest.mark.parametrize("family", FAMILIES)
def test_muon_moves_the_matrices_of_layers_alone(family: str) -> None:
    """A step of the cold start's Muon from a random gradient has equal singular values on each matrix, `[in, out]`."""
    arch = ARCHITECTURES[family]
    params = jax.tree.map(lambda x: x * 0.0, init_params(arch, 0))
    keys = iter(jax.random.split(jax.random.key(1), 200))
    grads = jax.tree.map(lambda x: jax.random.normal(next(keys), x.shape), params)
    config = SFTConfig(steps=10, optimizer="muon", learning_rate=1.0, warmup_fraction=0.0)
    optimizer = sft_optimizer(config, OptimizerConfig(max_grad_norm=1e9))
    state = optimizer.init(params)
    for _ in range(2):  # the rate of the first step of a warm-up is 0
        updates, state = optimizer.update(grads, state, params)
    inputs = {"q": 1, "k": 1, "v": 1, "o": 2, "gate": 1, "up": 1, "down": 1}  # by hand
    flat = updates["layers"][1]
    for name, update in flat.items():
        if name in inputs:
            rows = int(np.prod(update.shape[: inputs[name]]))
            singular = np.linalg.svd(np.asarray(update).reshape(rows, -1), compute_uv=False)
            # Five Newton-Schulz steps bring all but the smallest to between 0.68 and 1.14.
            assert np.quantile(singular, 0.1) > 0.55 * singular.max(), name
        else:
            np.testing.assert_allclose(np.abs(update), np.abs(update).max(), rtol=1e-3)  # Adam: the gradient's sign
    np.testing.assert_allclose(np.abs(updates["embed"]), np.abs(updates["embed"]).max(), rtol=1e-3)


def test_every_axis_has_a_meaning() -> None:
    for arch in ARCHITECTURES.values():
        for path, row in parameters(arch):
            assert len(row.shape(arch)) == len(row.axes)
            split = [RULES["train"].get(letter) for letter in row.axes]
            used = [name for name in split if name]
            assert len(used) == len(set(used)), path  # no two axes of an array on one mesh axis


def _at(tree, path):
    for key in path:
        tree = tree[key]
    return tree
