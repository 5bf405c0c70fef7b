"""A run's checkpoint becomes a Hugging Face folder that holds the same policy."""

from __future__ import annotations

import json
import runpy
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from appo_jax.checkpoint import Checkpointer
from appo_jax.cli import main
from appo_jax.config import Config, LoRAConfig, OptimizerConfig, PolicyConfig
from appo_jax.config_io import save_config
from appo_jax.digests import identity
from appo_jax.errors import CheckpointError
from appo_jax.export import export_adapters, export_run, newest_params
from appo_jax.learner.optimizer import rl_optimizer
from appo_jax.learner.step import TrainState
from appo_jax.policy import weights
from appo_jax.policy.adapters import frozen, init_adapters
from appo_jax.policy.architecture import architecture_of, read_architecture
from appo_jax.policy.parameters import Params
from appo_jax.text.export import tokenizer_files
from appo_jax.text.tokenizer import load_tokenizer, vocabulary

GOLDEN = Path(__file__).parent / "golden"
make = runpy.run_path(str(GOLDEN / "make_golden.py"))


def write_policy(folder: Path) -> list[str]:
    """A small Qwen3 with a tokenizer, as transformers saves it; returns the names of its tensors."""
    folder.mkdir(parents=True)
    config, tensors = make["tiny_config"]("qwen3", 0), make["tiny_weights"](make["tiny_config"]("qwen3", 0), 0)
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": 2, "max_position_embeddings": 512}))
    save_file(tensors, folder / "model.safetensors")
    shutil.copyfile(GOLDEN / "tokenizer.json", folder / "tokenizer.json")
    template = (GOLDEN / "templates" / "chatml.jinja").read_text()
    special = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    return sorted(tensors)


def write_run(run: Path, policy: Path) -> None:
    run.mkdir()
    save_config(Config(policy=PolicyConfig(path=str(policy))), run / "config.json")


def save_checkpoints(folder: Path, params: Params, steps: int) -> None:
    """Step s holds the parameters times s."""
    optimizer = rl_optimizer(OptimizerConfig())
    checkpointer = Checkpointer(folder, keep=2)
    meta = {"tokenizer": vocabulary(load_tokenizer(folder.parents[2] / "policy"))}
    for step in range(1, steps + 1):
        scaled = jax.tree.map(lambda x: x * step, params)  # noqa: B023
        checkpointer.save(step, TrainState(scaled, optimizer.init(scaled)), meta, None)
    checkpointer.close()


def test_the_newest_checkpoint_is_exported(tmp_path: Path) -> None:
    policy, run, out = tmp_path / "policy", tmp_path / "run", tmp_path / "out"
    names = write_policy(policy)
    write_run(run, policy)
    params = weights.load(policy)
    save_checkpoints(run / "checkpoints" / "sft", params, 1)
    assert export_run(run, tmp_path / "cold").startswith("step 1 of")  # before RL has a checkpoint
    save_checkpoints(run / "checkpoints" / "rl", params, 3)
    assert main(["convert", str(run), "--out", str(out)]) == 0

    where, second = newest_params(run, step=2)
    assert where.startswith("step 2 of ")
    with pytest.raises(CheckpointError, match="rl: no step 7; it has 2, 3"):
        newest_params(run, step=7)
    for found, expected in ((weights.load(out), 3), (second, 2), (weights.load(tmp_path / "cold"), 1)):
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(params), strict=True):
            np.testing.assert_array_equal(a, expected * b)
    with safe_open(out / "model.safetensors", "np") as tensors:
        assert sorted(tensors.keys()) == names
    assert read_architecture(out) == read_architecture(policy)
    assert json.loads((out / "config.json").read_text())["max_position_embeddings"] == 512
    ends = list(load_tokenizer(policy).eos_ids)
    assert len(ends) == 2  # the tokenizer's, and the one that its config.json declares
    for name in ("config.json", "generation_config.json"):
        assert json.loads((out / name).read_text())["eos_token_id"] == ends
    assert (out / "tokenizer_config.json").read_bytes() == (policy / "tokenizer_config.json").read_bytes()
    assert (out / "tokenizer.json").read_bytes() == (policy / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("base_dtype", ["float32", "bfloat16"])
def test_adapters_of_a_policy_from_a_folder_name_it(
    base_dtype: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From any other folder, and only if its weights are those under which the adapters were trained. Those are not the float32
    weights of the folder if they were rounded to bfloat16: then the rounded ones are written."""
    policy, run = tmp_path / "policy", tmp_path / "run"
    write_policy(policy)
    monkeypatch.chdir(tmp_path)
    config = Config(policy=PolicyConfig(path="policy", lora=LoRAConfig(rank=2, base_dtype=base_dtype)))
    run.mkdir()
    save_config(config, run / "config.json")
    arch = architecture_of(config.policy)
    own = init_adapters(arch, 0)
    checkpointer = Checkpointer(run / "checkpoints" / "rl", keep=1)
    base_id = identity(frozen(weights.load(policy), arch))
    meta = {"base": base_id, "tokenizer": vocabulary(load_tokenizer(policy))}
    checkpointer.save(1, TrainState(own, rl_optimizer(OptimizerConfig()).init(own)), meta, None)
    checkpointer.close()
    export_adapters(run, tmp_path / "out")
    rounded = base_dtype == "bfloat16"
    base = tmp_path / "out" / "base" if rounded else policy
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", *(["base"] if rounded else []),
    ]  # fmt: skip
    q, written = (weights.load(folder)["layers"][0]["q"] for folder in (policy, base))
    np.testing.assert_array_equal(written, q.astype(base_dtype).astype(np.float32))

    changed = weights.load(policy)
    changed["embed"] += 1
    files = tokenizer_files(policy)
    shutil.rmtree(policy)
    weights.save(policy, changed, arch, files=files)
    with pytest.raises(CheckpointError, match="frozen weights of its adapters are gone"):
        export_adapters(run, tmp_path / "other")


def test_an_empty_folder_is_filled_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be a mount point, or the working directory."""
    policy, run, out = tmp_path / "policy", tmp_path / "run", tmp_path / "out"
    write_policy(policy)
    write_run(run, policy)
    params = weights.load(policy)
    save_checkpoints(run / "checkpoints" / "sft", params, 1)
    out.mkdir()
    inode = out.stat().st_ino
    monkeypatch.chdir(out)
    assert main(["convert", str(run), "--out", "."]) == 0
    assert out.stat().st_ino == inode
    jax.tree.map(np.testing.assert_array_equal, weights.load(out), params)
    assert not list(tmp_path.glob("*.partial"))


def test_what_cannot_be_exported_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policy, run = tmp_path / "policy", tmp_path / "run"
    write_policy(policy)
    write_run(run, policy)
    with pytest.raises(CheckpointError, match="run: no checkpoint under checkpoints/rl or checkpoints/sft"):
        export_run(run, tmp_path / "out")
    other = weights.load(policy)
    other["layers"][0]["q"] = other["layers"][0]["q"][:, :1]  # of another architecture
    save_checkpoints(run / "checkpoints" / "rl", other, 1)
    with pytest.raises(CheckpointError, match=r"params\.layers\.0\.q: float32\[.*in the checkpoint, float32"):
        export_run(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert main(["convert", str(tmp_path / "nothing"), "--out", str(tmp_path / "out")]) == 2
    assert "expected smollm2, or the directory of a run" in capsys.readouterr().err
