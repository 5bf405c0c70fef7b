"""LoRA: new adapters change nothing; gradients are those of the factored model; merged, factored and peft's form agree."""

from __future__ import annotations

import dataclasses
import json
import math
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file, save_file

from appo_jax.config import Architecture, LoRAConfig, LossConfig
from appo_jax.errors import WeightsError
from appo_jax.learner.batch import make_batch
from appo_jax.learner.loss import Terms
from appo_jax.learner.step import StepSpec, TrainState, gradients, make_train_step
from appo_jax.policy import attention, weights
from appo_jax.policy.adapters import abstract_adapters, frozen, init_adapters, merged, save_adapters, with_adapters
from appo_jax.policy.architecture import read_architecture
from appo_jax.policy.parameters import KeyPath, Parameter, Params, adapted, adapters, build, init_params, transposed
from appo_jax.policy.score import positions
from appo_jax.policy.transformer import hidden_states, rotations, unembedding
from appo_jax.rollout.shapes import PackedShape

GOLDEN = Path(__file__).parent.parent / "golden"
make = runpy.run_path(str(GOLDEN / "make_golden.py"))
PLAIN = Architecture(23, 16, 2, 4, 2, 6, 24, tie_embeddings=False)
LORA = LoRAConfig(rank=3, alpha=5.0, base_dtype="float32")
ARCH = adapted(PLAIN, LORA)
TOKENS = np.random.default_rng(0).integers(0, 23, (2, 9))


def random_adapters(arch: Architecture, seed: int = 0) -> Params:
    """Both parts of every adapter as random numbers of size 0.3."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), jnp.float32), abstract_adapters(arch))


def logits_of(params: Params, arch: Architecture, tokens: np.ndarray = TOKENS) -> np.ndarray:
    @jax.jit
    def run(params: Params) -> jax.Array:
        rotation = rotations(positions(jnp.asarray(tokens)), arch)
        return hidden_states(params, arch, tokens, rotation, attention.causal)[0] @ unembedding(params).T

    with jax.default_matmul_precision("highest"):
        return np.asarray(run(params))


def oracle_logits(base: Params, own: Params, tokens: np.ndarray) -> np.ndarray:
    """Float64 logits `[T, V]` of one row: the factored model written from its equations (Llama's, arXiv 2106.09685 sec. 4.1)."""
    f = lambda x: np.asarray(x, np.float64)  # noqa: E731
    E, G, T = PLAIN.head_dim, PLAIN.num_heads // PLAIN.num_kv_heads, len(tokens)

    def norm(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + PLAIN.norm_eps) * f(scale)

    angle = np.arange(T)[:, None] * PLAIN.rope_theta ** (-np.arange(0, E, 2) / E)
    turn = np.exp(1j * angle)[:, None]

    def rotate(x: np.ndarray) -> np.ndarray:
        z = (x[..., : E // 2] + 1j * x[..., E // 2 :]) * turn
        return np.concatenate([z.real, z.imag], -1)

    x = f(base["embed"])[tokens]
    for i in range(PLAIN.num_layers):
        w, a = base["layers"][i], own["layers"][i]

        def product(h: np.ndarray, name: str) -> np.ndarray:
            W, A, B = f(w[name]), f(a[f"{name}_a"]), f(a[f"{name}_b"])  # noqa: B023
            size = h.shape[-1]
            low = h @ A.reshape(size, -1)
            return h @ W.reshape(size, -1) + LORA.alpha / LORA.rank * (low @ B.reshape(LORA.rank, -1))

        h = norm(x, w["attn_norm"])
        q, k, v = (product(h, name).reshape(T, -1, E) for name in "qkv")
        q, k, v = rotate(q), np.repeat(rotate(k), G, 1), np.repeat(v, G, 1)
        scores = np.einsum("the,she->hts", q, k) / math.sqrt(E)
        scores = np.where(np.tril(np.ones((T, T), bool)), scores, -np.inf)
        weights_ = np.exp(scores - scores.max(-1, keepdims=True))
        out = np.einsum("hts,she->the", weights_ / weights_.sum(-1, keepdims=True), v)
        x = x + product(out.reshape(T, -1), "o")
        h = norm(x, w["mlp_norm"])
        gate = product(h, "gate")
        x = x + product(gate / (1 + np.exp(-gate)) * product(h, "up"), "down")
    return norm(x, base["norm"]) @ f(base["unembed"])


def test_adapters_that_begin_add_nothing() -> None:
    base = init_params(PLAIN, 0)
    policy = with_adapters(base, init_adapters(ARCH, 0))
    np.testing.assert_array_equal(logits_of(policy, ARCH), logits_of(base, PLAIN))
    np.testing.assert_array_equal(logits_of(transposed(policy), ARCH), logits_of(transposed(base), PLAIN))


def test_factored_merged_and_oracle_are_one_policy() -> None:
    base, own = init_params(PLAIN, 0), random_adapters(ARCH)
    expected = np.stack([oracle_logits(base, own, row) for row in TOKENS])
    plain = logits_of(base, PLAIN)
    assert np.abs(expected - plain).max() > 1  # the adapters matter
    policy = with_adapters(base, own)
    for found in (
        logits_of(policy, ARCH),
        logits_of(transposed(policy), ARCH),
        logits_of(merged(base, own, ARCH), PLAIN),
    ):
        np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)


def test_gradients_are_finite_differences_of_the_factored_model() -> None:
    """The gradient of −Σ w·log p over tokens, along a random direction in each adapter's A and B. The frozen weights have none."""
    base, own = init_params(PLAIN, 0), random_adapters(ARCH)
    rng = np.random.default_rng(1)
    tokens_weights = rng.uniform(0.1, 1.0, TOKENS.shape) * (np.arange(TOKENS.shape[1]) > 1)
    ones = np.ones(TOKENS.shape, np.float32)
    batch = make_batch(
        list(TOKENS), Terms(tokens_weights.astype(np.float32), ones, ones), PackedShape(2, TOKENS.shape[1] - 1)
    )
    spec = StepSpec(ARCH, None, 1.0, jnp.float32)
    _, grads, _ = jax.jit(gradients, static_argnames="spec")(own, batch, spec, base)
    assert jax.tree.structure(grads) == jax.tree.structure(own)

    def loss(own: Params) -> float:
        total = 0.0
        for row, weight in zip(TOKENS, tokens_weights, strict=True):
            logits = oracle_logits(base, own, row)
            top = logits.max(-1, keepdims=True)
            log_p = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
            total -= float((weight[1:] * log_p[np.arange(len(row) - 1), row[1:]]).sum())
        return total

    h = 1e-5
    for name in (f"{target}_{part}" for target in LORA.targets for part in "ab"):
        direction = rng.normal(size=own["layers"][1][name].shape)

        def moved(step: float) -> Params:
            layer = own["layers"][1] | {name: np.asarray(own["layers"][1][name], np.float64) + step * direction}  # noqa: B023
            return own | {"layers": own["layers"] | {1: layer}}

        slope = (loss(moved(h)) - loss(moved(-h))) / (2 * h)
        found = float((np.asarray(grads["layers"][1][name], np.float64) * direction).sum())
        assert found == pytest.approx(slope, rel=1e-3, abs=1e-4), name
        assert abs(slope) > 1e-3, name


def test_a_step_moves_the_adapters_alone() -> None:
    """The frozen weights are not part of the state. They are a separate argument, which is not donated."""
    base = frozen(init_params(PLAIN, 0), dataclasses.replace(ARCH, lora=LoRAConfig(rank=3)))
    assert base["embed"].dtype == jnp.bfloat16
    assert base["norm"].dtype == jnp.float32
    ones = np.ones(TOKENS.shape, np.float32)
    mask = ones * (np.arange(TOKENS.shape[1]) > 0)
    batch = make_batch(list(TOKENS), Terms(mask / TOKENS.size, ones, 0 * ones), PackedShape(1, TOKENS.shape[1] - 1))
    optimizer = optax.adam(0.1)
    step = make_train_step(optimizer, StepSpec(ARCH, LossConfig(), 1.0, jnp.float32))
    own = init_adapters(ARCH, 0)
    before = jax.tree.map(np.asarray, own)
    state = TrainState(own, optimizer.init(own))
    for _ in range(3):
        state, _ = step(state, batch, base)
    moved = jax.tree.map(lambda a, b: bool((np.asarray(a) != b).any()), state.params, before)
    assert all(jax.tree.leaves(moved))
    assert not base["embed"].is_deleted()
    assert step._cache_size() == 1


@pytest.mark.parametrize(("seed", "family"), list(enumerate(make["ADAPTED"])))
def test_peft_computes_the_same(tmp_path: Path, seed: int, family: str) -> None:
    """peft's logits, from golden arrays (tests/golden/make_golden.py): we write exactly the folder that peft loaded."""
    config = make["tiny_config"](family, seed)
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(make["tiny_weights"](config, seed), tmp_path / "model.safetensors")
    settings, tensors = make["tiny_adapter"](config, make["tiny_weights"](config, seed))
    lora = LoRAConfig(rank=settings["r"], alpha=settings["lora_alpha"], targets=("q", "k", "o", "up", "down"))
    arch, base = adapted(read_architecture(tmp_path), lora), weights.load(tmp_path)
    own = build(adapters(arch), lambda path, row: jnp.asarray(tensors[peft_name(path, row)].T.reshape(row.shape(arch))))

    logits = logits_of(with_adapters(base, own), arch, make["tiny_tokens"](config, seed))
    with np.load(GOLDEN / "golden.npz") as golden:
        expected, plain = golden[f"adapted/{family}"], golden[f"logits/{family}"]
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)
    assert np.abs(expected - plain).max() > 0.5  # the adapter matters

    save_adapters(tmp_path / "adapter", own, arch, None)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text()) == settings
    written = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert written.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(written[name], tensor)
    with pytest.raises(WeightsError, match="not empty"):
        save_adapters(tmp_path / "adapter", own, arch, None)


def peft_name(path: KeyPath, row: Parameter) -> str:
    return f"base_model.model.model.layers.{path[1]}.{row.hf}.weight"
