"""A run that trains adapters: resumed bit for bit, sampled as it is scored, exported whole and as adapters."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from appo_jax.cli import main
from appo_jax.components import build, initial_params
from appo_jax.config import Config, LoRAConfig
from appo_jax.config_io import load_config, save_config
from appo_jax.errors import CheckpointError
from appo_jax.export import newest_params
from appo_jax.policy import weights
from appo_jax.policy.adapters import abstract_adapters, merged, with_adapters
from appo_jax.rollout.scoring import log_probs
from appo_jax.text.tokenizer import load_tokenizer
from appo_jax.train import _require_same_origin, train
from appo_jax.train_step import Trainer


def run_of(tiny: Config, folder: Path) -> Path:
    lora = LoRAConfig(rank=2, targets=("q", "v", "down"))
    policy = dataclasses.replace(tiny.policy, lora=lora)
    optimizer = dataclasses.replace(tiny.optimizer, learning_rate=1e-2)
    # No reward differs from another; the base is the reference.
    loss = dataclasses.replace(tiny.loss, entropy_weight=0.1, kl_weight=0.01)
    config = dataclasses.replace(tiny, policy=policy, optimizer=optimizer, loss=loss, run_dir=str(folder))
    train(dataclasses.replace(config, keep_checkpoints=2))
    return folder


def test_a_run_is_resumed_and_exported(tiny: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, parts = run_of(tiny, tmp_path / "whole"), tmp_path / "parts"
    shutil.copytree(whole, parts)
    shutil.rmtree(parts / "checkpoints" / "rl" / "2")
    before = newest_params(parts)[1]
    run_of(tiny, parts)
    (_, expected), (where, found) = newest_params(whole), newest_params(parts)
    assert where.startswith("step 2 of")
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), found, before)
    assert changed["layers"][0] == {name: name in ("q", "v", "down") for name in changed["layers"][0]}
    assert not changed["embed"]

    assert main(["convert", str(whole), "--out", str(tmp_path / "adapter"), "--adapter"]) == 0
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == 6
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_mode & 0o777 == 0o644
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    scale = settings["lora_alpha"] / settings["r"]
    name = "base_model.model.model.layers.0.self_attn.v_proj.lora_{}.weight"
    added = scale * tensors[name.format("B")] @ tensors[name.format("A")]  # [out, in], as peft adds it
    _, base = newest_params(run_without_rl(whole, tmp_path / "start"))
    weight, merged_weight = (
        np.asarray(params["layers"][0]["v"]).reshape(len(added.T), -1) for params in (base, expected)
    )
    np.testing.assert_allclose(merged_weight, weight.astype(jnp.bfloat16).astype(np.float32) + added.T, atol=1e-6)
    # The adapters belong to the weights of the cold start, which stand beside them.
    assert settings["base_model_name_or_path"] == str(tmp_path / "adapter" / "base")
    beside = weights.load(tmp_path / "adapter" / "base", dtype=jnp.float32)
    norms = ("attn_norm", "mlp_norm", "q_norm", "k_norm", "norm")
    jax.tree_util.tree_map_with_path(
        lambda path, a, b: np.testing.assert_array_equal(
            a, b if path[-1].key in norms else b.astype(jnp.bfloat16).astype(np.float32)
        ),
        beside,
        base,
    )

    shutil.rmtree(parts / "checkpoints" / "sft")
    config = load_config(parts / "config.json")
    save_config(dataclasses.replace(config, seed=1), parts / "config.json")  # other weights to begin with
    with pytest.raises(CheckpointError, match="frozen weights of its adapters are gone"):
        newest_params(parts)
    plain = tmp_path / "plain"
    plain.mkdir()
    save_config(tiny, plain / "config.json")
    assert main(["convert", str(plain), "--out", str(tmp_path / "none"), "--adapter"]) == 2
    assert "has no policy.lora" in capsys.readouterr().err


def run_without_rl(run: Path, copy: Path) -> Path:
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "checkpoints" / "rl")
    return copy


def test_what_is_sampled_is_what_is_scored(tiny: Config) -> None:
    """With adapters that change the policy, the sampler's log-probabilities equal those of the score pass up to rounding."""
    config = dataclasses.replace(tiny, policy=dataclasses.replace(tiny.policy, lora=LoRAConfig(rank=2, alpha=2.0)))
    with build(config) as c:
        base, rng = initial_params(config, c.arch, c.mesh), np.random.default_rng(0)
        own = jax.tree.map(lambda x: 0.2 * rng.normal(size=x.shape).astype(np.float32), abstract_adapters(c.arch))
        policy = with_adapters(base, own)
        trees = c.sampler.initial(policy, c.train[:2], 2, (0, 0))
        scored, plain = (log_probs(c.sampler, params, trees) for params in (policy, base))
        whole = log_probs(c.sampler, merged(base, own, c.arch), trees)
    for tree, *by in zip(trees, scored, plain, whole, strict=True):
        for rollout, a, b, m in zip(tree, *by, strict=True):
            sampled = rollout.sampled
            np.testing.assert_allclose(rollout.log_probs[sampled], a[sampled], atol=1e-5)
            np.testing.assert_allclose(m[sampled], a[sampled], atol=1e-5)
            assert np.abs(a[sampled] - b[sampled]).max() > 0.1


def test_what_a_run_began_with_is_compared_when_it_goes_on(
    tiny: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rest: Any = {"sampled_tokens": 0, "wall_s": 0.0, "record": {}, "accuracies": {}}  # of a checkpoint
    tokenizer = load_tokenizer(tiny.policy.tokenizer)

    def origin(base: float | None, reference: float | None, dtype: str = "float32") -> dict[str, Any]:
        base, reference = (None if x is None else {"w": jnp.full(3, x)} for x in (base, reference))
        parts: Any = SimpleNamespace(dtype=jnp.dtype(dtype), tokenizer=tokenizer)
        return rest | Trainer(parts, None, None, None, base if reference is None else reference, base).origin

    assert origin(None, None)["reference"] == origin(1.0, None)["reference"] == ""  # with adapters, π_ref is the base
    assert origin(None, 1.0) == origin(None, 1.0)
    _require_same_origin(origin(None, 1.0), origin(None, 1.0), tmp_path)
    with pytest.raises(
        CheckpointError, match=r"rl: its KL is from another π_ref .*init_from or .*sft has changed since"
    ):
        _require_same_origin(origin(None, 1.0), origin(None, 2.0), tmp_path)
    with pytest.raises(CheckpointError, match="its adapters were trained with other frozen weights"):
        _require_same_origin(origin(1.0, None), origin(2.0, None), tmp_path)
    assert not caplog.text
    _require_same_origin(origin(None, 1.0, "bfloat16"), origin(None, 1.0), tmp_path)
    assert "the run was computed in bfloat16 and goes on in float32" in caplog.text
