"""`appo-jax checkpoints`: lists, verifies and copies checkpoints, and removes broken ones."""

import fcntl
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from appo_jax import checkpoint_read
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
    for name in ("removed_1", "removed_backup", "refused_by_me"):
        (run / "checkpoints/rl" / name).mkdir()
    for stray in ("notes.txt", "refused_notes.txt", "²"):
        (run / "checkpoints/rl" / stray).write_text("mine")
    return run


def test_everything_is_listed_by_its_kind(run):
    assert [(entry.path.name, entry.kind) for entry in entries(run)] == [
        ("7", "checkpoint"), ("2", "checkpoint"), ("4", "checkpoint"), ("10", "checkpoint"),
        ("12.orbax-checkpoint-tmp-3", "half-written"), ("notes.txt", "stray"), ("refused_6", "refused"),
        ("refused_by_me", "stray"), ("refused_notes.txt", "stray"), ("removed_1", "half-removed"), ("removed_backup", "stray"),
        ("²", "stray"),
    ]  # fmt: skip
    assert "rl/10" in entries(run)[3].line()
    assert entries(run)[5].line().endswith("not written by a run, which leaves it alone")


def test_a_run_that_is_being_written_can_be_listed(run):
    """Folders vanish while their sizes are added up."""
    ended = threading.Event()

    def write() -> None:
        while not ended.is_set():
            for i in range(20):
                (run / f"checkpoints/rl/2/new/{i}/d").mkdir(parents=True)
            shutil.rmtree(run / "checkpoints/rl/2/new")

    thread = threading.Thread(target=write)
    thread.start()
    try:
        for _ in range(100):
            assert [entry.size > 1000 for entry in entries(run) if entry.kind == "checkpoint"] == [True] * 4
    finally:
        ended.set()
        thread.join()


def test_what_is_broken_is_found_by_reading(run, monkeypatch):
    (data,) = [p for p in (run / "checkpoints/rl/4/state").rglob("d/*") if p.stat().st_size > 200][:1]
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 4
    data.write_bytes(content)
    (run / "checkpoints/rl/2/meta/metadata").unlink()
    (run / "checkpoints/rl/2/meta/metadata").symlink_to("/proc/self/mem")  # a page that the system does not give (EIO)
    monkeypatch.setattr(checkpoint_read, "READ_AGAIN_S", ())
    words = {entry.path.name: word for entry, word in verified(run)}
    assert words["10"] == "sound"
    assert words["4"] not in ("", "sound")
    assert words["2"] == "cannot be read: Input/output error"
    assert words["notes.txt"] == ""


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
    assert {word for entry, word in verified(Path("run")) if entry.kind == "checkpoint"} == {"sound"}
    assert copy(Path("run"), Path("out")).name == "10"


def test_pruning_keeps_what_is_good_and_what_is_not_ours(run):
    assert [entry.path.name for entry in prune(run)] == ["12.orbax-checkpoint-tmp-3", "refused_6", "removed_1"]
    assert [entry.path.name for entry in entries(run)] == [
        "7", "2", "4", "10", "notes.txt", "refused_by_me", "refused_notes.txt", "removed_backup", "²",
    ]  # fmt: skip


def test_a_folder_without_a_run_is_left_as_it_is(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoints"):
        prune(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_run_that_is_being_written_is_not_pruned(run):
    with (run / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(CheckpointError, match="a process is writing this run"):
            prune(run)
    assert len(entries(run)) == 12


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
    for out in (tmp_path / "out", run / "metrics.jsonl"):
        with pytest.raises(CheckpointError, match="exists and is not an empty folder"):
            copy(run, out)


def test_a_copy_without_its_cold_start_is_told(run, tmp_path, caplog):
    shutil.rmtree(run / "checkpoints/sft/7/state")
    copy(run, tmp_path / "out")
    assert "sft/7: is not copied: FileNotFoundError" in caplog.text
    assert f"{run}: no checkpoint of the cold start is sound; the copy has none." in caplog.text
    caplog.clear()
    shutil.rmtree(run / "checkpoints/sft")
    copy(run, tmp_path / "another")
    assert not caplog.text


def test_nothing_is_left_of_a_copy_that_failed(run, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))  # as on a full disk
    try:
        with pytest.raises(
            CheckpointError, match=r"out/checkpoints/rl/10: cannot be written \(.*File too large.*are free"
        ):
            copy(run, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    (run / "config.json").write_text('{"run_dir": ')
    with pytest.raises(CheckpointError, match=r"run/config\.json: cannot be read .*the run writes it again"):
        copy(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()
