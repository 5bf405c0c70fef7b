"""test_sharding.py runs this in a separate process with eight CPU devices."""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

from appo_jax.checkpoint import Checkpointer
from appo_jax.config import Architecture, LoRAConfig, LossConfig, MeshConfig, OptimizerConfig, SFTConfig
from appo_jax.learner.batch import make_batch
from appo_jax.learner.loss import Terms, token_weights
from appo_jax.learner.optimizer import sft_optimizer
from appo_jax.learner.step import StepSpec, TrainBatch, TrainState, init_state, make_train_step
from appo_jax.policy import weights
from appo_jax.policy.adapters import abstract_adapters, frozen, with_adapters
from appo_jax.policy.packing import pack
from appo_jax.policy.parameters import Params, adapted, init_params
from appo_jax.policy.score import score
from appo_jax.policy.sharding import (
    annotate,
    batch_shardings,
    generating,
    generating_architecture,
    make_mesh,
    param_shardings,
    place,
    state_shardings,
    use_mesh,
)  # fmt: skip
from appo_jax.rollout.shapes import PackedShape

FAMILIES = {
    "qwen2": Architecture(96, 32, 2, 4, 2, 8, 48, family="qwen2"),
    "qwen3": Architecture(96, 32, 2, 4, 2, 8, 48, family="qwen3", tie_embeddings=False),
    "llama": Architecture(96, 32, 2, 4, 2, 8, 48),
}
MESHES = {"8x1": (8, 1, 1), "4x2": (4, 2, 1), "2x2x2": (2, 2, 2)}
# Each mesh with another family, and the hardest mesh with all of them.
PAIRS = [("8x1", "qwen2"), ("4x2", "llama"), ("2x2x2", "qwen2"), ("2x2x2", "qwen3"), ("2x2x2", "llama")]
ROWS, T = 16, 21
FLOAT32 = jnp.dtype("float32")


def mesh_of(name: str) -> Mesh:
    return make_mesh(MeshConfig(*MESHES[name]))


def texts() -> list[np.ndarray]:
    """Texts of eight to T tokens. The texts of an even row and of the next row begin alike."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 96, (ROWS, T))
    tokens[1::2, :6] = tokens[::2, :6]
    return [row[: rng.integers(8, T + 1)] for row in tokens]


def batch(at_once: int) -> TrainBatch:
    """Weights with a sum of 1, as in a run's batches. With weights of 1 per token, gradients of 15 would be rounded by 1e-5."""
    rng = np.random.default_rng(1)
    mask = np.array([(rng.random(T) < 0.7) & (np.arange(T) < len(text)) for text in texts()])
    mask[:, 0] = False
    old = np.repeat(rng.normal(-4.5, 0.2, (ROWS // 2, T)), 2, 0)  # of shared tokens it is the same
    terms = Terms(
        token_weights(mask, 1, ROWS, "token_mean"),
        rng.normal(size=mask.shape).astype(np.float32),
        old.astype(np.float32),
    )
    return make_batch(texts(), terms, PackedShape(at_once, T - 1))


def sgd_step(family: str):
    """A step at rate 1 without momentum, which subtracts the gradient from the parameters."""
    spec = StepSpec(FAMILIES[family], LossConfig(), 0.7, FLOAT32)
    return make_train_step(optax.sgd(1.0), spec), optax.sgd(1.0)


@functools.cache
def on_one_device(family: str) -> tuple[Params, dict[str, float]]:
    """New parameters and metrics of the whole batch's step, without a mesh."""
    step, optimizer = sgd_step(family)
    params = init_params(FAMILIES[family], 0)
    state, metrics = step(TrainState(params, optimizer.init(params)), batch(ROWS))
    return jax.tree.map(np.asarray, state.params), {k: float(v) for k, v in metrics.items()}


def largest_difference(a: Params, b: Params) -> float:
    return max(jax.tree.leaves(jax.tree.map(lambda x, y: float(np.abs(np.asarray(x) - y).max()), a, b)))


@pytest.mark.parametrize(("name", "family", "micro_batch"), [*((*p, 0) for p in PAIRS), ("2x2x2", "qwen3", 8)])
def test_a_step_is_that_of_one_device(name: str, family: str, micro_batch: int) -> None:
    """Loss and gradients, with and without accumulation. The state keeps its sharding, and the program is compiled once."""
    expected, metrics = on_one_device(family)
    mesh, arch = mesh_of(name), FAMILIES[family]
    with use_mesh(mesh):
        step, optimizer = sgd_step(family)
        parts = batch(micro_batch or ROWS)
        parts = place(parts, batch_shardings(parts, mesh), mesh)
        state = init_state(init_params(arch, 0), optimizer, arch, mesh)
        layout = jax.tree.map(lambda x: x.sharding, state)
        state, found = step(state, parts)
        assert largest_difference(state.params, expected) < 1e-5
        assert found.keys() == metrics.keys()
        for key, value in metrics.items():
            assert float(found[key]) == pytest.approx(value, abs=1e-5), key
        assert jax.tree.map(lambda x: x.sharding, state) == layout
        step(state, parts)
        assert step._cache_size() == 1


@pytest.mark.parametrize(("shape", "dtype"), [((2, 2, 2), "float32"), ((1, 2, 4), "bfloat16")])
def test_adapters_are_those_of_one_device(shape: tuple[int, int, int], dtype: str) -> None:
    """A step's loss and gradients, and the policy in the generating layout, which repeats heads on the second mesh."""
    arch = adapted(FAMILIES["qwen2"], LoRAConfig(rank=3, alpha=3.0, base_dtype=dtype))
    rng = np.random.default_rng(0)
    start = jax.tree.map(lambda x: 0.1 * rng.normal(size=x.shape).astype(np.float32), abstract_adapters(arch))
    spec, optimizer = StepSpec(arch, LossConfig(), 0.7, FLOAT32), optax.sgd(1.0)
    step = make_train_step(optimizer, spec)

    def run(mesh: Mesh) -> tuple[Params, dict[str, float], np.ndarray]:
        own = jax.tree.map(jnp.array, start)
        base = place(frozen(init_params(arch, 0), arch), param_shardings(arch, mesh, "train"), mesh)
        state = init_state(own, optimizer, arch, mesh)
        policy = generating(with_adapters(base, state.params), mesh, FLOAT32).params
        generating_arch = generating_architecture(arch, mesh)
        scored = score(policy, pack(texts(), T - 1, 8).rows, arch=generating_arch, temperature=1.0, dtype=FLOAT32)
        log_probs = np.asarray(scored.log_probs)
        parts = batch(8)
        state, metrics = step(state, place(parts, batch_shardings(parts, mesh), mesh), base)
        return jax.tree.map(np.asarray, state.params), {k: float(v) for k, v in metrics.items()}, log_probs

    expected = run(make_mesh(MeshConfig(), jax.devices()[:1]))
    mesh = make_mesh(MeshConfig(*shape))
    with use_mesh(mesh):
        found = run(mesh)
    assert largest_difference(found[0], expected[0]) < 1e-5
    assert found[1] == pytest.approx(expected[1], abs=1e-5)
    np.testing.assert_allclose(found[2], expected[2], atol=1e-5)


@pytest.mark.parametrize("name", MESHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_loaded_bit_for_bit(tmp_path: Path, name: str, family: str) -> None:
    arch, mesh = FAMILIES[family], mesh_of(name)
    params = init_params(arch, 3)
    weights.save(tmp_path / "hf", params, arch, max_shard_bytes=20_000)
    for layout in ("train", "generate"):
        shardings = param_shardings(arch, mesh, layout)
        loaded = weights.load(tmp_path / "hf", shardings)
        assert jax.tree.map(lambda x: x.sharding, loaded) == shardings
        assert jax.tree.all(jax.tree.map(lambda x, y: np.array_equal(np.asarray(x), np.asarray(y)), loaded, params))
    weights.save(tmp_path / "again", loaded, arch, max_shard_bytes=20_000)
    for file in (tmp_path / "hf").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


def test_random_parameters_are_drawn_where_they_lie() -> None:
    """The same bits as on one device; each device makes only its part."""
    arch, mesh = FAMILIES["llama"], make_mesh(MeshConfig(1, 8, 1))
    params = init_params(arch, 0, param_shardings(arch, mesh, "train"))
    for array, expected in zip(jax.tree.leaves(params), jax.tree.leaves(init_params(arch, 0)), strict=True):
        assert [shard.data.size for shard in array.addressable_shards] == [array.size // 8] * 8
        assert np.array_equal(np.asarray(array), np.asarray(expected))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_generating_parameters_are_the_same_policy(dtype: str) -> None:
    arch, mesh = FAMILIES["qwen3"], mesh_of("2x2x2")
    with use_mesh(mesh):
        params = place(init_params(arch, 0), param_shardings(arch, mesh, "train"), mesh)
        moved = generating(params, mesh, jnp.dtype(dtype)).params
        assert jax.tree.map(lambda x: x.sharding, moved) == param_shardings(arch, mesh, "generate")
        assert generating(moved, mesh, jnp.dtype(dtype)).params is moved
        rows = pack(texts(), T - 1, 8).rows
        before, after = (score(p, rows, arch=arch, temperature=1.0, dtype=jnp.dtype(dtype)) for p in (params, moved))
        assert np.abs(np.asarray(before.log_probs) - np.asarray(after.log_probs)).max() < 1e-5


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_checkpoint_of_one_mesh_is_restored_into_another(tmp_path: Path, kind: str) -> None:
    arch, first, second = FAMILIES["qwen3"], mesh_of("4x2"), mesh_of("2x2x2")
    optimizer = sft_optimizer(SFTConfig(steps=5, optimizer=kind), OptimizerConfig())
    with use_mesh(first):
        state = init_state(init_params(arch, 0), optimizer, arch, first)
        # What the optimizer keeps is split like the parameter it is for.
        whole = sum(x.nbytes for x in jax.tree.leaves(state))
        split = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state))
        assert split < 0.6 * whole
        checkpointer = Checkpointer(tmp_path, keep=1)
        checkpointer.save(1, state, {}, None)
        checkpointer.wait()
    with use_mesh(second):
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
        shardings = state_shardings(abstract, arch, second)
        restored = checkpointer.restore_latest(annotate(abstract, shardings, second), None)
        checkpointer.close()
        assert restored is not None
        assert jax.tree.map(lambda x: x.sharding, restored[1]) == shardings
        assert jax.tree.all(jax.tree.map(lambda x, y: np.array_equal(np.asarray(x), np.asarray(y)), restored[1], state))
