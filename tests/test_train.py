"""The whole loop on the embedded world: compilations, what a step reports, and a run that is killed and continued."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from appo_jax import heartbeat, sft
from appo_jax.algorithms import make_algorithm
from appo_jax.checkpoint import Checkpointer
from appo_jax.checkpoint_read import sha256
from appo_jax.components import Components, build, initial_params, response_of
from appo_jax.config import Architecture, Config, EvalConfig, JudgeConfig
from appo_jax.config_io import check, save_config
from appo_jax.errors import CheckpointError, ConfigError, TrainingError
from appo_jax.evaluate import evaluate
from appo_jax.export import export_run
from appo_jax.interrupt import Stop
from appo_jax.learner.optimizer import rl_optimizer
from appo_jax.learner.step import StepSpec, TrainState, make_train_step
from appo_jax.metrics import read_metrics
from appo_jax.reward import Judge, Response
from appo_jax.rollout.growth import TreeGrower
from appo_jax.run_dir import open_run
from appo_jax.text.tokenizer import load_tokenizer
from appo_jax.tools.outage import ToolsDown, with_tools
from appo_jax.train import train
from appo_jax.train_step import Trainer, train_step
from appo_jax.types import RewardResult


@pytest.fixture(scope="module")
def config(
    tmp_path_factory: pytest.TempPathFactory,
    short_quickstart: Callable[[Path], Config],
    smallest: Architecture,
    prepare_small_world: Callable[[Config], None],
) -> Config:
    folder = tmp_path_factory.mktemp("quickstart")
    c = short_quickstart(folder)
    config = dataclasses.replace(
        c,
        run_dir=str(folder / "run"),
        steps=3,
        policy=dataclasses.replace(c.policy, architecture=smallest),
        sft=dataclasses.replace(c.sft, steps=2),
        eval=dataclasses.replace(c.eval, num_prompts=4),
    )
    check(config)
    prepare_small_world(config)
    return config


def learner(config: Config, components: Components) -> tuple:
    optimizer = rl_optimizer(config.optimizer)
    params = initial_params(config, components.arch, components.mesh)
    spec = StepSpec(components.arch, config.loss, config.rollout.temperature, components.dtype)
    return TrainState(params, optimizer.init(params)), make_train_step(optimizer, spec)


def make_grower(config: Config, components: Components) -> TreeGrower:
    vocab_size = components.arch.vocab_size
    return TreeGrower(
        components.sampler, components.tokenizer, config.rollout, config.branching, vocab_size, config.seed
    )


@pytest.mark.parametrize(("algorithm", "steps"), [("appo", 20), ("grpo", 4)])
def test_steps_compile_once_and_keep_the_budget(config: Config, algorithm: str, steps: int) -> None:
    config = dataclasses.replace(config, algorithm=algorithm)
    compiled: list[str] = []

    def listen(event: str, duration: float, **kwargs: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        with build(config) as components:
            state, update = learner(config, components)
            trainer = Trainer(components, make_algorithm(config), make_grower(config, components), update, None)
            counts, records = [], []
            for step in range(steps):
                examples = components.train[4 * step : 4 * step + 4]
                before = jax.tree.map(np.asarray, state.params)
                state, record, trees = train_step(trainer, step, state, examples, iter(()))
                counts.append(len(compiled))
                records.append(record)
                assert [len(tree) for tree in trees] == [config.rollout.budget] * 4
                moved = jax.tree.map(lambda a, b: bool((a != np.asarray(b)).any()), before, state.params)
                if record["advantage/zero_share"] < 1:
                    assert any(jax.tree.leaves(moved))
    finally:
        jax.monitoring.clear_event_listeners()
    assert counts[0] > 0
    assert counts[-1] == counts[2], "a program was compiled after the third step"
    if algorithm == "appo":
        # The first mini-batch is scored under π_old itself; after its update Ω must move.
        assert all(record["branching/constant_future_share"] >= 0.5 for record in records)
        for tree in trees:
            initial = [r for r in tree if r.is_initial]
            assert len(initial) == config.rollout.num_initial
            for branch in tree[len(initial) :]:
                parent = tree[branch.parent]
                assert branch.tokens[: branch.fork].tolist() == parent.tokens[: branch.fork].tolist()
                assert parent.sampled[branch.fork]


def start(config: Config, run_dir: Path, folder: Path, log: Path) -> subprocess.Popen:
    run = dataclasses.replace(config, run_dir=str(run_dir))
    file = folder / f"{run_dir.name}.json"
    save_config(run, file)
    command = [sys.executable, "-m", "appo_jax.cli", "train", "--config", str(file)]
    return subprocess.Popen(command, stdout=log.open("w"), stderr=subprocess.STDOUT, start_new_session=True)


def finish(process: subprocess.Popen, log: Path) -> None:
    assert process.wait(timeout=240) == 0, log.read_text()[-3000:]


def wait_for_step_two(process: subprocess.Popen, run_dir: Path, log: Path) -> None:
    """Return when the first step is logged, so that the second one has begun."""
    deadline = time.monotonic() + 240
    while len(read_metrics(run_dir / "metrics.jsonl")) < 1:
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def final_state(config: Config, run_dir: Path) -> dict[str, np.ndarray]:
    with build(config) as components:
        state, _ = learner(config, components)
    checkpointer = Checkpointer(run_dir / "checkpoints" / "rl", keep=3)
    try:
        restored = checkpointer.restore_latest(state, None)
    finally:
        checkpointer.close()
    assert restored is not None
    assert restored[0] == config.steps
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(restored[1])}


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_killed_run_continues_to_the_same_parameters(config: Config, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(start(config, whole, tmp_path, tmp_path / "whole.log"), tmp_path / "whole.log")

    process = start(config, killed, tmp_path, tmp_path / "killed.log")
    wait_for_step_two(process, killed, tmp_path / "killed.log")
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    finish(start(config, killed, tmp_path, tmp_path / "again.log"), tmp_path / "again.log")

    expected, found = final_state(config, whole), final_state(config, killed)
    assert expected.keys() == found.keys()
    different = [name for name in expected if not np.array_equal(expected[name], found[name])]
    assert not different
    steps = [[r["step"] for r in read_metrics(run / "metrics.jsonl")] for run in (whole, killed)]
    assert steps == [[1, 2, 3], [1, 2, 3]]
    summaries = [json.loads((run / "summary.json").read_text()) for run in (whole, killed)]
    assert summaries[0]["sampled_tokens"] == summaries[1]["sampled_tokens"]
    assert summaries[0]["accuracy_final"] == summaries[1]["accuracy_final"]


def test_an_interrupted_run_saves_and_leaves(config: Config, tmp_path: Path) -> None:
    config = dataclasses.replace(config, steps=1000, checkpoint_every=1000)
    run, log = tmp_path / "interrupted", tmp_path / "interrupted.log"
    process = start(config, run, tmp_path, log)
    wait_for_step_two(process, run, log)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=120) == 130
    assert "is saved" in log.read_text()
    saved = [int(path.name) for path in (run / "checkpoints" / "rl").iterdir() if path.name.isdigit()]
    assert saved == [read_metrics(run / "metrics.jsonl")[-1]["step"]]
    assert not (run / "summary.json").exists()


@pytest.mark.parametrize("asked", [1, 2])
def test_a_request_to_stop_loses_no_step_of_the_cold_start(
    tiny: Config, tmp_path: Path, asked: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither in the middle nor in the last step, after which the policy is measured. What was measured, and the records, may be
    damaged later."""
    config = dataclasses.replace(tiny, run_dir=str(tmp_path / "run"), sft=dataclasses.replace(tiny.sft, steps=2))
    stop, steps, raised, read_back = Stop(), [], [], Checkpointer._read_back

    def watched(checkpointer: Checkpointer, *args: Any) -> None:
        raised.append(sys.exc_info()[1])
        read_back(checkpointer, *args)

    monkeypatch.setattr(Checkpointer, "_read_back", watched)

    def on_step(step: int, record: dict[str, object]) -> None:
        steps.append(step)
        stop.requested = step == asked

    with build(config) as components, open_run(config) as run:
        with pytest.raises(KeyboardInterrupt):
            sft.cold_start(components, run, on_step, stop)
        assert raised == [None]  # before KeyboardInterrupt was raised: after it, several hosts read nothing back
        (run.checkpoints / "rl").mkdir()
        (run.checkpoints / "rl/5").write_text(
            "a stray file is no step of RL, with which the cold start could be left out"
        )
        _, accuracies = sft.cold_start(components, run, on_step, stop)
        assert set(accuracies) == {"accuracy_base", "accuracy_sft"}
        assert sft.cold_start(components, run, on_step, stop)[1] == accuracies
        assert "lost" not in caplog.text
        assert "damaged" not in caplog.text
        measured = run.path / "sft.json"
        measured.write_text(measured.read_text().replace('"accuracy_sft": ', '"accuracy_sft": 1'))
        (run.path / "sft.jsonl").write_text("")
        assert sft.cold_start(components, run, on_step, stop)[1] == accuracies
        assert (
            "sft.json: is damaged (it is not what was written): the accuracy after the cold start is measured"
            in caplog.text
        )
        assert "sft.jsonl: the file as it was is kept" in caplog.text
        meta = run.checkpoints / "sft/2/meta/metadata"
        record = json.loads(meta.read_text())["record"]
        del record["meta"]["finished"]  # which an older version did not write
        meta.write_text(json.dumps({"record": record, "sha256": sha256(record)}))
        with pytest.raises(
            CheckpointError, match="sft: its checkpoints hold no 'finished', so another version of appo"
        ):
            sft.cold_start(components, run, on_step, stop)
        assert "the records of steps 1-2 are lost" in caplog.text
    assert steps == [1, 2]


def test_a_run_that_goes_on_says_at_which_step(tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`appo-jax status` shows that for a finished run, too."""
    config = dataclasses.replace(tiny, run_dir=str(tmp_path / "run"))
    train(config)
    monkeypatch.setattr(heartbeat, "_life", heartbeat._Life())
    train(config)
    assert heartbeat.now()[1] == config.steps


@pytest.mark.parametrize("asked", [False, True])
def test_a_tool_that_is_down_in_an_evaluation_loses_no_step(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: bool
) -> None:
    """Whether the run ends by it, or is asked to stop in the pause."""
    config = dataclasses.replace(
        tiny, run_dir=str(tmp_path / "run"), eval=dataclasses.replace(tiny.eval, every=1), checkpoint_every=2
    )

    def without_search(params: object, components: Components, stopping: Any = None) -> Any:
        if asked:
            signal.raise_signal(signal.SIGINT)
        tools = dataclasses.replace(config.tools, pause_seconds=600.0 if asked else 0.0)
        calls = {"tools/search/calls": 9.0, "tools/search/unavailable": 9.0}
        return with_tools(lambda: None, lambda: calls, "an evaluation", tools, stopping)

    with monkeypatch.context() as outage:
        outage.setattr("appo_jax.train.evaluate", without_search)
        with pytest.raises(KeyboardInterrupt if asked else ToolsDown):
            train(config)
    assert [path.name for path in (tmp_path / "run/checkpoints/rl").iterdir()] == ["1"]
    if asked:
        return
    train(config)
    records = read_metrics(tmp_path / "run/metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2]
    assert "eval/accuracy" not in records[0]


def test_the_last_step_is_evaluated_once_and_on_record(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once, the record of a step that ended the run had no accuracy: a run that went on with a larger budget had a gap there."""
    run = tmp_path / "run"
    config = dataclasses.replace(
        tiny, run_dir=str(run), eval=dataclasses.replace(tiny.eval, every=1), steps=100, max_sampled_tokens=1
    )
    evaluated: list[int] = []

    def count(params: object, components: Components, stopping: Any = None) -> Any:
        evaluated.append(heartbeat.now()[1])
        if len(evaluated) == 2:
            raise ToolsDown("down")
        return evaluate(params, components, stopping)

    monkeypatch.setattr("appo_jax.train.evaluate", count)
    train(config)
    [first] = read_metrics(run / "metrics.jsonl")
    summary = json.loads((run / "summary.json").read_text())
    assert (first["step"], first["eval/accuracy"]) == (1, summary["accuracy_final"])
    assert evaluated == [1]
    longer = dataclasses.replace(config, max_sampled_tokens=first["rollout/sampled_tokens_total"] + 1)
    with pytest.raises(ToolsDown):  # in the evaluation of the last step, which is saved
        train(longer)
    assert (run / "checkpoints/rl/2").is_dir()
    assert [r["step"] for r in read_metrics(run / "metrics.jsonl") if "eval/accuracy" in r] == [1]
    train(longer)
    assert evaluated == [1, 2, 2]
    assert json.loads((run / "summary.json").read_text())["steps"] == 2
    train(longer)  # it was killed before it wrote its summary, or is started again
    assert evaluated == [1, 2, 2, 2]


def test_a_run_may_be_ended_at_once_only_when_its_last_step_is_on_disk(tiny: Config, tmp_path: Path) -> None:
    """What a supervisor hears: the first heartbeat after the last step by which it may kill the process."""
    supervisor, channel = socket.socketpair()
    heartbeat.connect(channel)
    on_disk: list[bool] = []

    def listen() -> None:
        for line in supervisor.makefile():
            beat = json.loads(line)
            if beat.get("step") == tiny.steps and not beat["stoppable"]:
                on_disk.append((tmp_path / f"run/checkpoints/rl/{tiny.steps}").exists())

    listener = threading.Thread(target=listen)
    listener.start()
    train(dataclasses.replace(tiny, run_dir=str(tmp_path / "run")))
    channel.shutdown(socket.SHUT_RDWR)
    listener.join()
    assert on_disk[0]


FULL_DISK = """
import resource
import shutil
from appo_jax import heartbeat
from appo_jax.types import RewardResult

def reward(response):
    if heartbeat.now() == ("reward", 0):  # from the first step on no file grows beyond this: less than a checkpoint has
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 15, resource.RLIM_INFINITY))
    return RewardResult(float(len(response.text)), False, {})
"""


def test_no_summary_tells_of_a_policy_that_could_not_be_saved(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "full_disk.py").write_text(FULL_DISK)
    monkeypatch.syspath_prepend(tmp_path)
    reward = dataclasses.replace(tiny.reward, function="full_disk:reward")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(CheckpointError, match="a checkpoint could not be written"):
            train(dataclasses.replace(tiny, run_dir=str(tmp_path / "run"), steps=1, reward=reward))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (tmp_path / "run/summary.json").exists()


def test_a_loss_that_is_not_finite_stops_the_run_by_name(config: Config, tmp_path: Path) -> None:
    config = dataclasses.replace(config, sft=dataclasses.replace(config.sft, steps=5, learning_rate=1e38))
    log = tmp_path / "nan.log"
    process = start(config, tmp_path / "nan", tmp_path, log)
    assert process.wait(timeout=240) == 1, log.read_text()[-3000:]
    text = log.read_text()
    assert re.search(r"sft/(loss|grad_norm) is (nan|inf) at step 3: training stops", text), text[-3000:]
    assert "sft.learning_rate" in text
    assert "Traceback" not in text


def test_a_reward_that_fails_is_counted_and_one_that_always_fails_ends_the_run(config: Config) -> None:
    def fails(response: Response) -> bool:
        return len(response.text) % 2 == 0

    def flaky(response: Response) -> RewardResult:
        return RewardResult(float("nan") if fails(response) else 1.0 + len(response.text), True)

    def broken(response: Response) -> float:
        return 1.0

    with build(config) as built:
        components = dataclasses.replace(built, reward=Judge("mine:flaky", flaky))
        state, update = learner(config, components)
        trainer = Trainer(components, make_algorithm(config), make_grower(config, components), update, None)
        state, record, trees = train_step(trainer, 0, state, components.train[:4], iter(()))
        failed = [r for tree in trees for r in tree if fails(response_of(r, components.tokenizer))]
        assert 0 < record["reward/failed"] == len(failed)
        assert {r.reward_error for r in failed} == {"reward.function = 'mine:flaky' returned the reward nan"}
        for name in ("reward/initial", "update/loss", "advantage/abs_mean"):
            assert np.isfinite(record[name])
        assert record["accuracy/initial"] == 1.0  # of those with a verdict, like the reward beside it
        evaluation = evaluate(state.params, components)
        without = sum(fails(response_of(r, components.tokenizer)) for r in evaluation.rollouts)
        assert 0 < without == evaluation.metrics["eval/failed"]
        assert evaluation.metrics["eval/accuracy"] == 1.0
        with pytest.raises(TrainingError, match=r"'mine:broken' returned 1.0, a float"):
            evaluate(state.params, dataclasses.replace(built, reward=Judge("mine:broken", broken)))


def test_a_reward_of_the_wrong_kind_is_found_before_the_run(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wrong_rewards.py").write_text("def number(response): return 1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    config = dataclasses.replace(config, reward=dataclasses.replace(config.reward, function="wrong_rewards:number"))
    with pytest.raises(ConfigError, match=r"'wrong_rewards:number' returned 1\.0.* tried out on a right answer to"):
        build(config)


def test_a_policy_taken_over_is_judged_on_this_runs_questions(tiny: Config, tmp_path: Path) -> None:
    first = dataclasses.replace(tiny, run_dir=str(tmp_path / "first"), eval=EvalConfig(num_prompts=4))
    measured = sft.run(first)
    alike = dataclasses.replace(
        first, run_dir=str(tmp_path / "alike"), init_from=first.run_dir, algorithm="grpo", seed=7
    )
    assert sft.run(alike) == measured
    # The policy alone is taken over, whatever optimizer made it or is used next.
    cold = dataclasses.replace(alike.sft, optimizer="adamw", learning_rate=1e-5)
    assert sft.run(dataclasses.replace(alike, run_dir=str(tmp_path / "adamw"), sft=cold)) == measured
    folder = tmp_path / "rewards"
    folder.mkdir()
    (folder / "short.py").write_text(
        "from appo_jax.types import RewardResult\n"
        "def question(response):\n    right = len(response.question) % 3 > 0\n    return RewardResult(1.0, right)\n"
    )
    sys.path.insert(0, str(folder))
    try:
        for other in ({"eval": EvalConfig(num_prompts=7)}, {"eval": EvalConfig(num_prompts=4)}):
            reward = dataclasses.replace(tiny.reward, function="short:question")
            other = dataclasses.replace(
                alike, reward=reward, run_dir=str(tmp_path / f"{other['eval'].num_prompts}"), **other
            )
            with build(other) as components:
                questions = [components.held_out[i].question for i in range(other.eval.num_prompts)]
            expected = sum(len(question) % 3 > 0 for question in questions) / len(questions)
            assert 0 < expected < 1
            assert sft.run(other) == {"accuracy_sft": pytest.approx(expected)}
    finally:
        sys.path.remove(str(folder))


def test_a_policy_keeps_its_tokenizer(
    tiny: Config, tmp_path: Path, prepare_small_world: Callable[[Config], None]
) -> None:
    """`data world` does not replace it, and if something else has, no command reads the policy's ids as other text."""
    file = tmp_path / "tokenizer.model"
    shutil.copyfile(tiny.policy.tokenizer, file)
    config = dataclasses.replace(
        tiny, run_dir=str(tmp_path / "run"), steps=1, policy=dataclasses.replace(tiny.policy, tokenizer=str(file))
    )
    other = dataclasses.replace(config, data=dataclasses.replace(tiny.data, seed=1, path=str(tmp_path / "other")))
    before = file.read_bytes()
    prepare_small_world(config)  # it is the same again
    with pytest.raises(ConfigError, match=r"another tokenizer is there.* give another --policy\.tokenizer"):
        prepare_small_world(other)
    assert file.read_bytes() == before
    train(config)
    shutil.copytree(config.run_dir, tmp_path / "cold", ignore=shutil.ignore_patterns("rl", "metrics.jsonl", "rollouts"))
    file.unlink()
    prepare_small_world(other)
    assert load_tokenizer(file).vocab_size == load_tokenizer(tiny.policy.tokenizer).vocab_size
    for attempt in (
        lambda: train(dataclasses.replace(config, steps=2)),
        lambda: export_run(Path(config.run_dir), tmp_path / "out"),
        lambda: train(dataclasses.replace(config, run_dir=str(tmp_path / "cold"), steps=2)),
        lambda: train(dataclasses.replace(config, run_dir=str(tmp_path / "new"), init_from=config.run_dir)),
    ):
        with pytest.raises(CheckpointError, match=r"checkpoints/\w+: its policy was trained with another tokenizer"):
            attempt()
    file.write_bytes(before)
    train(dataclasses.replace(config, steps=2))


@pytest.mark.parametrize(
    ("change", "alike"),
    [
        ({"eval.num_prompts": 7}, False),
        ({"data.seed": 8}, False),
        ({"data.system_prompt": "Be brief."}, False),
        ({"tools.search.top_k": 2}, False),
        ({"rollout.max_response_tokens": 48}, False),
        ({"reward.function": "official"}, False),
        ({"reward.judge.model": "another"}, False),
        ({"policy.template_variables": {"enable_thinking": False}}, False),
        ({"reward.judge.url": "http://127.0.0.1:2/v1"}, True),
        ({"algorithm": "grpo", "seed": 7, "steps": 9, "optimizer.learning_rate": 1e-3, "rollout.decode_rows": 4}, True),
    ],
)
def test_whose_figure_may_stand_beside_this_runs(
    tiny: Config, tmp_path: Path, change: dict[str, Any], alike: bool
) -> None:
    """The accuracy of another run's cold start is used only if the same questions were asked and judged in the same way."""
    judged = dataclasses.replace(tiny.reward, judge=JudgeConfig("http://127.0.0.1:1/v1", "one"))
    first = dataclasses.replace(tiny, reward=judged)
    save_config(first, tmp_path / "config.json")
    assert sft._measures_alike(tmp_path, first)

    def changed(part: Any, path: str, value: Any) -> Any:
        head, _, rest = path.partition(".")
        return dataclasses.replace(part, **{head: changed(getattr(part, head), rest, value) if rest else value})

    for path, value in change.items():
        first = changed(first, path, value)
    assert sft._measures_alike(tmp_path, first) is alike
