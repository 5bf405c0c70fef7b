"""A run directory belongs to one config and one process."""

import dataclasses
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from appo_jax import failures, heartbeat
from appo_jax.checkpoint_read import sha256
from appo_jax.config import (
    BranchingConfig,
    Config,
    EvalSetConfig,
    JudgeConfig,
    LoRAConfig,
    MeshConfig,
    PolicyConfig,
    RewardConfig,
)
from appo_jax.config.effects import Affects, affects
from appo_jax.config_io import config_json, flatten, load_config, save_config, with_fields
from appo_jax.errors import CheckpointError
from appo_jax.metrics import MetricsLogger
from appo_jax.run_dir import open_run
from appo_jax.storage import lock, usable_path
from appo_jax.supervision.status import Status, note_failure


@pytest.fixture
def config(tmp_path):
    return Config(run_dir=str(tmp_path / "run"), policy=PolicyConfig(path="weights"))


@pytest.fixture
def run_with_results(config):
    with open_run(config) as run:
        run.metrics.write_text('{"step": 1}\n')
        (run.checkpoints / "rl").mkdir()
    return run


def test_a_new_directory_holds_the_config(config):
    with open_run(config) as run:
        assert not run.continued
        assert load_config(run.config) == config
        for folder in (run.checkpoints, run.rollouts, run.plots, run.tensorboard):
            assert folder.is_dir()


def test_the_same_config_continues_with_more_steps_and_from_another_place(config, run_with_results, tmp_path):
    run_with_results.path.rename(tmp_path / "moved")
    longer = dataclasses.replace(config, steps=config.steps * 2, run_dir=str(tmp_path / "moved"))
    with open_run(longer) as run:
        assert run.continued
        run.keep(longer)
        assert load_config(run.config) == longer
        assert run.metrics.read_text() == '{"step": 1}\n'


def test_a_run_that_ended_before_its_first_checkpoint_may_save_more_often(config):
    """It made 7 steps and would have saved the tenth. Its next start makes the steps again, and saves every second."""
    with open_run(config) as run:
        assert run.max_unsaved == config.checkpoint_every == 10
        metrics = MetricsLogger(run.path)
        for step in range(1, 8):
            metrics.log(step, {"a": 1})
        (run.checkpoints / "rl").mkdir()
    often = dataclasses.replace(config, checkpoint_every=2)
    open_run(often).close()  # this start is killed before it has put the records in order
    with open_run(often) as run:
        MetricsLogger(run.path).resume(0, max_unsaved=run.max_unsaved)
        assert run.metrics.read_text() == ""
        run.keep(often)
    with open_run(dataclasses.replace(config, checkpoint_every=2)) as run:
        assert run.max_unsaved == 2


def test_another_config_is_refused_with_the_fields_that_differ(config, run_with_results):
    other = dataclasses.replace(config, seed=7, branching=BranchingConfig(tau=16.0))
    with pytest.raises(CheckpointError) as error:
        open_run(other)
    assert "seed: 0 in the run, 7 given" in str(error.value)
    assert "branching.tau: 32.0 in the run, 16.0 given" in str(error.value)
    assert "--run-dir" in str(error.value)
    assert load_config(run_with_results.config) == config
    open_run(config).close()  # the refusal gave up the lock


def test_a_run_that_never_made_a_step_may_be_given_another_config(config):
    open_run(config).close()
    other = dataclasses.replace(config, seed=7)
    with open_run(other) as run:
        assert not run.continued
        assert load_config(run.config) == other


@pytest.mark.parametrize("kept", ["rollouts/step_000300.jsonl.gz", "checkpoints/sft/5/meta/metadata", "sft.jsonl"])
def test_what_a_run_has_made_is_not_given_to_another_config(config, kept):
    """Its checkpoints and metrics were moved away to make room, for example."""
    open_run(config).close()
    file = Path(config.run_dir) / kept
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("")
    with pytest.raises(CheckpointError, match="seed: 0 in the run, 7 given"):
        open_run(dataclasses.replace(config, seed=7))


@pytest.mark.parametrize("content", ['{"model_type": "qwen2"}', "not even JSON"])
def test_the_folder_of_something_else_is_left_alone(config, tmp_path, content):
    """--run-dir and policy.path were exchanged."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text(content)
    with pytest.raises(
        CheckpointError, match=r"run/config\.json: is not the config\.json of a run.*give another --run-dir"
    ):
        open_run(config)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.json"]
    assert (tmp_path / "run/config.json").read_text() == content


def test_no_run_directory_is_no_value(config):
    with pytest.raises(CheckpointError, match="run_dir = '': it would be the current folder"):
        open_run(dataclasses.replace(config, run_dir=""))


def test_failures_of_hosts_are_no_results(config):
    open_run(config).close()
    note_failure(Path(config.run_dir), 1, "worker-1", 0, "the process of host 1 was ended by SIGKILL")
    with open_run(dataclasses.replace(config, seed=7)) as run:
        assert not run.continued


def test_results_without_their_config_are_refused(config, run_with_results):
    run_with_results.config.unlink()
    with pytest.raises(CheckpointError, match=r"neither a readable config\.json nor a checkpoint"):
        open_run(config)


def test_a_config_that_the_disk_does_not_give_is_left_alone_and_the_run_is_started_again(config, run_with_results):
    run_with_results.config.unlink()
    run_with_results.config.symlink_to("/proc/self/mem")  # reading it is an EIO
    write_record(run_with_results, 9, config)
    with pytest.raises(CheckpointError, match=r"cannot be read, written or locked: \[Errno 5\]") as error:
        open_run(config)
    assert failures.exit_code(error.value) == failures.START_AGAIN
    assert run_with_results.config.is_symlink()


def write_record(run, step, config, seal=sha256):
    """The metadata of a checkpoint with a config."""
    meta = run.checkpoints / f"rl/{step}/meta/metadata"
    meta.parent.mkdir(parents=True)
    record = {"step": step, "meta": {"config": config_json(config, "config.json").decode()}}
    meta.write_text(json.dumps({"record": record, "sha256": seal(record)}))


def test_a_config_that_cannot_be_written_again_is_told_and_nothing_is_lost(config, run_with_results):
    """The disk is full. Once, the message was that no checkpoint holds the config, and that the run may be deleted."""
    write_record(run_with_results, 9, config)
    run_with_results.config.write_text('{"steps": 10')
    run_with_results.config.with_name("config.json.tmp").symlink_to("/dev/full")
    with pytest.raises(CheckpointError, match=r"Errno 28\] No space left on device: .*/run/config\.json"):
        open_run(config)
    assert run_with_results.path.joinpath("config.damaged-1.json").read_text() == '{"steps": 10'
    with open_run(config) as run:  # there is space again
        assert load_config(run.config) == config


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_text('{"steps": 10')])
def test_an_unreadable_config_is_written_again_from_a_checkpoint(config, run_with_results, caplog, damage):
    damage(run_with_results.config)
    for step, other in ((9, config), (10, config), (11, dataclasses.replace(config, seed=7))):
        write_record(run_with_results, step, other, sha256 if step < 11 else lambda record: "damaged")
    with open_run(config) as run:
        assert run.continued
        assert load_config(run.config) == config
    assert "config.json: is written again from the checkpoint" in caplog.text
    assert "rl/10" in caplog.text
    with pytest.raises(CheckpointError, match="seed: 0 in the run, 7 given"):
        open_run(dataclasses.replace(config, seed=7))


@pytest.mark.parametrize(("machine", "writes"), [("here", False), ("lost-3", True), ("lost-3", False)])
def test_the_lock_of_a_machine_that_may_be_lost_is_waited_for(config, monkeypatch, machine, writes):
    """A file server frees the lock of a lost machine after a while. One that is alive writes its status."""
    monkeypatch.setattr("appo_jax.run_dir.LOST_LOCK_S", 60.0)
    with open_run(config) as run:
        pass
    held = lock(run.path / "lock")
    host = {"machine": socket.gethostname() if machine == "here" else machine}
    status = Status("running", 5, time.time() - 7200, {"0": host})
    status.write(run.path)
    if machine == "here":  # refused at once
        with pytest.raises(
            CheckpointError, match=rf"writing this run \(last sign of it 7200 s ago, from {host['machine']}\)"
        ):
            open_run(config)
        os.close(held)
    elif writes:
        threading.Timer(0.2, lambda: dataclasses.replace(status, time=time.time()).write(run.path)).start()
        with pytest.raises(CheckpointError, match=r"last sign of it \d s ago, from lost-3\); wait for it"):
            open_run(config)
        os.close(held)
    else:
        threading.Timer(0.2, os.close, [held]).start()
        open_run(config).close()
        never_made_progress = heartbeat.doing()[2]
        assert not never_made_progress


def test_two_processes_cannot_write_one_run(config, tmp_path):
    save_config(config, tmp_path / "config.json")
    code = (
        "import sys; from appo_jax.config_io import load_config; from appo_jax.run_dir import open_run\n"
        "run = open_run(load_config(sys.argv[1])); print('open', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, tmp_path / "config.json"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "open\n"
        with pytest.raises(CheckpointError, match=r"another process is writing.*delete .*/run/lock"):
            open_run(config)
        other.kill()
        other.wait()
    open_run(config).close()  # a killed process holds no lock


def test_a_place_that_cannot_be_written_is_named(config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"run_dir = .*file/run: cannot be read, written or locked"):
        open_run(dataclasses.replace(config, run_dir=str(tmp_path / "file" / "run")))


@pytest.mark.parametrize("name", ["lock", "config.json.tmp"])
def test_a_full_disk_is_told_with_the_file(config, tmp_path, name):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to("/dev/full")
    with pytest.raises(CheckpointError, match=rf"run: cannot be .*: \[Errno 28\] No space left .*/run/{name[:6]}"):
        open_run(config)


def test_the_lock_holds_the_mark_alone_whatever_it_held(config):
    """The other hosts compare all of it with the mark. They refused the run as that of another folder, at every start."""
    Path(config.run_dir).mkdir(parents=True)
    (Path(config.run_dir) / "lock").write_text("longer than any mark of a start")
    with open_run(config) as run:
        assert re.fullmatch("[0-9a-f]{16}", (run.path / "lock").read_text())


def test_what_the_other_hosts_look_for_is_on_the_disk_before_they_look(config, tmp_path, monkeypatch):
    synced, fsync = {}, os.fsync

    def watched(descriptor):
        file = Path(f"/proc/self/fd/{descriptor}")
        synced[file.readlink().name] = file.read_bytes() if file.is_file() else b""
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    with open_run(config) as run:
        assert synced["lock"] == (run.path / "lock").read_bytes() != b""


@pytest.mark.parametrize("name", ["a[b]c", "a*b", "a?b", "a\\b"])
def test_a_path_under_which_checkpoints_are_lost_is_refused_before_anything_is_written(config, tmp_path, name):
    with pytest.raises(CheckpointError, match="could not be read again"):
        open_run(dataclasses.replace(config, run_dir=str(tmp_path / name)))
    assert not list(tmp_path.iterdir())


def test_an_object_store_is_refused_with_what_to_do(config):
    with pytest.raises(CheckpointError, match="gs://bucket/run: runs are written through the file system; mount"):
        open_run(dataclasses.replace(config, run_dir="gs://bucket/run"))
    with pytest.raises(CheckpointError, match="gs:/bucket/run: runs are written through the file system"):
        usable_path(Path("gs://bucket/run"))  # as commands give it; it was a folder on the machine's own disk


def test_training_steps_without_their_checkpoints_are_refused(config, run_with_results):
    (run_with_results.checkpoints / "rl").rmdir()
    with pytest.raises(CheckpointError, match=r"records training steps, but .*checkpoints/rl is gone; put it back"):
        open_run(config)
    assert run_with_results.metrics.read_text() == '{"step": 1}\n'


def test_a_run_goes_on_on_other_hardware_with_a_warning(config, run_with_results, caplog):
    other = dataclasses.replace(
        config,
        mesh=MeshConfig(fsdp=2),
        optimizer=dataclasses.replace(config.optimizer, micro_batch=2, remat="layers"),
        rollout=dataclasses.replace(config.rollout, decode_rows=8),
    )
    with open_run(other) as run:
        run.keep(other)
        assert load_config(run.config) == other
    assert "mesh.fsdp was 1 and is 2" in caplog.text
    assert "last bits of its figures may differ" in caplog.text


@pytest.mark.parametrize(
    "field", ["rollout.temperature", "optimizer.learning_rate", "sft.steps", "policy.compute_dtype"]
)
def test_what_is_computed_may_not_change(config, run_with_results, field):
    part, name = field.split(".")
    value = {"temperature": 0.5, "learning_rate": 1e-3, "steps": 7, "compute_dtype": "bfloat16"}[name]
    other = dataclasses.replace(config, **{part: dataclasses.replace(getattr(config, part), **{name: value})})
    with pytest.raises(CheckpointError, match=rf"{field}: .* in the run, {value!r} given"):
        open_run(other)


def test_a_judge_may_move_and_another_one_is_another_reward(config, tmp_path):
    def judged(**judge):
        reward = RewardConfig("judge", judge=JudgeConfig(**{"url": "http://a", "model": "m"} | judge))
        return dataclasses.replace(config, reward=reward)

    with open_run(judged()) as run:
        run.metrics.write_text('{"step": 1}\n')
        (run.checkpoints / "rl").mkdir()
    with open_run(judged(url="http://b", concurrency=2)) as run:
        assert run.continued
    with pytest.raises(CheckpointError, match=r"reward\.judge\.model: 'm' in the run, 'n' given"):
        open_run(judged(model="n"))
    with pytest.raises(CheckpointError, match=r"reward\.judge\.temperature: 0\.0 in the run, None given"):
        open_run(judged(temperature=None))


@pytest.mark.parametrize("function", ["robust", "judge"])
def test_a_judge_may_be_added_for_sets_alone(config, run_with_results, function):
    other = dataclasses.replace(config, reward=RewardConfig(function, judge=JudgeConfig("http://a", "m")))
    if function == "robust":
        with open_run(other) as run:
            assert run.continued
    else:
        with pytest.raises(CheckpointError, match=r"reward\.function: 'robust' in the run, 'judge' given\nGive"):
            open_run(other)


@pytest.mark.parametrize(
    ("first", "then", "refused"),
    [
        ({"tools.search.url": "http://a"}, {"tools.search.url": "http://b"}, ""),
        ({"tools.search.url": "http://a"}, {"tools.search.url": None}, "tools.search.url"),
        ({"tools.python.url": "http://a"}, {"tools.python.url": "http://b"}, ""),
        ({}, {"tools.search.timeout": 3.0, "tools.search.max_retries": 0, "tools.search.max_per_second": 1.0}, ""),
        ({}, {"reward.timeout": 3.0, "eval.every": 1, "keep_best_checkpoints": 1, "checkpoint_every": 1}, ""),
        ({}, {"eval.num_prompts": 3}, "eval.num_prompts"),
        ({}, {"tools.search.top_k": 1}, "tools.search.top_k"),
        ({}, {"policy.lora": LoRAConfig()}, "policy.lora"),
    ],
)
def test_what_changes_nothing_of_a_step_may_change(config, first, then, refused):
    with open_run(with_fields(config, first)) as run:
        run.metrics.write_text('{"step": 1}\n')
        (run.checkpoints / "rl").mkdir()
    if refused:
        with pytest.raises(CheckpointError, match=rf"\n  {refused}: .* in the run"):
            open_run(with_fields(config, first | then))
    else:
        with open_run(with_fields(config, first | then)) as run:
            assert run.continued


@pytest.mark.parametrize(
    ("then", "message"),
    [
        ([], ""),
        ([EvalSetConfig("gsm8k", "g"), EvalSetConfig("aime24", "f", limit=10)], ""),
        ([EvalSetConfig("aime24", "f")], "limit of aime24: 10 in the run, 0 given"),
        ([EvalSetConfig("aime24", "g", limit=10)], "data of aime24: 'f' in the run, 'g' given"),
        ([EvalSetConfig("aime24", "f", 10, samples=4, temperature=0.6)], "samples of aime24: 1 in the run, 4 given"),
    ],
)
def test_sets_may_be_added_and_removed_but_not_measured_otherwise(config, then, message):
    def with_sets(sets):
        return dataclasses.replace(config, eval=dataclasses.replace(config.eval, sets=tuple(sets)))

    with open_run(with_sets([EvalSetConfig("aime24", "f", limit=10)])) as run:
        run.metrics.write_text('{"step": 1}\n')
        (run.checkpoints / "rl").mkdir()
    if message:
        with pytest.raises(CheckpointError, match=rf"eval\.sets: {message}"):
            open_run(with_sets(then))
    else:
        with open_run(with_sets(then)) as run:
            assert run.continued


def test_the_table_says_what_every_field_affects(config):
    """The groups stand for what a user would expect: a new field of a tool, say, is part of everything until it is named."""
    fields = flatten(dataclasses.replace(config, reward=RewardConfig(judge=JudgeConfig("http://a", "m"))))
    effects = {field: affects(field) for field in fields}  # raises KeyError for a field that the table lacks
    assert {field for field, effect in effects.items() if not effect} >= {"run_dir", "steps", "eval.sets"}
    assert {field.partition(".")[0] for field, effect in effects.items() if effect & Affects.SAMPLES} == {
        "policy", "data", "tools", "rollout", "seed"
    }  # fmt: skip
