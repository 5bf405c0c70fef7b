"""`appo-jax checkpoints`: lists, verifies and copies checkpoints, and removes broken ones."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from appo_jax.archive import copy, entries, prune, verified
from appo_jax.checkpoint import Checkpointer
from appo_jax.errors import CheckpointError


def state(step):
    return {
        "params": {"w": jnp.arange(300.0) * step},
        "opt_state": (jnp.int32(step), {"m": jnp.ones((4, 5), jnp.bfloat16)}),
    }


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    run = tmp_path_factory.mktemp("archive") / "run"
    checkpointer = Checkpointer(run / "checkpoints/rl", keep=3)
    for step in (2, 4, 10):
        checkpointer.save(step, state(step), {}, None)
    checkpointer.close()
    checkpointer = Checkpointer(run / "checkpoints/sft", keep=1)
    checkpointer.save(7, state(7), {}, None)
    checkpointer.close()
    (run / "config.json").write_text('{"run_dir": "runs/first", "seed": 3}')
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    return run


@pytest.fixture
def run(pristine, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(pristine, run)
    (run / "checkpoints/rl/refused_6").mkdir()
    (run / "checkpoints/rl/12.orbax-checkpoint-tmp-3").mkdir()
    (run / "checkpoints/rl/notes.txt").write_text("mine")
    return run


def test_everything_is_listed_by_its_kind(run):
    assert [(entry.path.name, entry.kind) for entry in entries(run)] == [
        ("7", "checkpoint"), ("2", "checkpoint"), ("4", "checkpoint"), ("10", "checkpoint"),
        ("12.orbax-checkpoint-tmp-3", "half-written"),
        ("notes.txt", "stray"), ("refused_6", "refused"),
    ]  # fmt: skip
    assert "rl/10" in entries(run)[3].line()


def test_what_is_broken_is_found_by_reading(run):
    (data,) = [p for p in (run / "checkpoints/rl/4/state").rglob("d/*") if p.stat().st_size > 200][:1]
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 4
    data.write_bytes(content)
    words = {entry.path.name: word for entry, word in verified(run)}
    assert words["2"] == words["10"] == "sound"
    assert words["4"] != "sound"


def test_checkpoints_are_verified_where_no_accelerator_is_free(run):
    """There is none here; and no memory for a whole checkpoint at once is needed."""
    command = [sys.executable, "-m", "appo_jax", "checkpoints", str(run), "--verify"]
    done = subprocess.run(
        command, env=os.environ | {"JAX_PLATFORMS": "tpu,cpu"}, text=True, capture_output=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("sound") == 4


def test_a_run_may_be_named_from_where_one_stands(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert {word for _, word in verified(Path("run"))} == {"sound"}
    assert copy(Path("run"), Path("out")).name == "10"


def test_pruning_keeps_what_is_good_and_what_is_not_ours(run):
    assert [entry.path.name for entry in prune(run)] == ["12.orbax-checkpoint-tmp-3", "refused_6"]
    assert [entry.path.name for entry in entries(run)] == ["7", "2", "4", "10", "notes.txt"]


def test_a_run_that_is_being_written_is_not_pruned(run):
    with (run / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(CheckpointError, match="a process is writing this run"):
            prune(run)
    assert len(entries(run)) == 7


def test_the_newest_sound_checkpoint_is_copied(run, tmp_path):
    shutil.rmtree(run / "checkpoints/rl/10/state")
    assert copy(run, tmp_path / "out").name == "4"
    assert json.loads((tmp_path / "out/config.json").read_text()) == {"run_dir": str(tmp_path / "out"), "seed": 3}
    assert (tmp_path / "out/metrics.jsonl").read_text() == '{"step": 1}\n'
    assert {word for _, word in verified(tmp_path / "out")} == {"sound"}
    assert [entry.path.name for entry in entries(tmp_path / "out")] == ["7", "4"]
    checkpointer = Checkpointer(tmp_path / "out/checkpoints/rl", keep=3)
    step, back, _ = checkpointer.restore_latest(state(1), None)
    checkpointer.close()
    assert step == 4
    jax.tree.map(np.testing.assert_array_equal, back, state(4))
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        copy(run, tmp_path / "out")
