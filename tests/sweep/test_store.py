"""The storage of a sweep: its queue of points, after a stop at any moment."""

import itertools
import os
import resource
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import optuna
import pytest
from matplotlib.figure import Figure
from optuna.storages import JournalStorage
from optuna.trial import TrialState
from test_claims import make_sweep

from appo_jax.errors import ConfigError, DataError, TrainingError
from appo_jax.interrupt import stop_requests
from appo_jax.storage import lock
from appo_jax.sweep import worker
from appo_jax.sweep.report import results, write_report
from appo_jax.sweep.store import Store

SPACE = {"branching.tau": (8.0, 32.0, 128.0), "branching.clip_high": (1.1, 1.2, 1.5)}


def small(out, **others):
    return make_sweep(out, **({"space": SPACE} | others))


def queued(store):
    return [tuple(trial.system_attrs["fixed_params"].values()) for trial in store.trials()]


def stop_in_call(monkeypatch, of, name, number):
    """From the call of this number on, the method `name` fails, as if the process ended there."""
    calls, method = [], getattr(of, name)

    def fail(*args, **others):
        calls.append(1)
        if len(calls) >= number:
            raise OSError(5, "Input/output error")
        return method(*args, **others)

    monkeypatch.setattr(of, name, fail)


@pytest.mark.parametrize("fails_at", [1, 4, 9])
def test_a_start_that_stops_while_it_queues_points_loses_none(tmp_path, monkeypatch, fails_at):
    """Once, the next start queued nothing, so that a grid of 9 had 3 trials."""
    with monkeypatch.context() as patched:
        stop_in_call(patched, optuna.Study, "enqueue_trial", fails_at)
        with pytest.raises(OSError, match="Input/output"):
            Store(small(tmp_path / "a"))
    assert queued(Store(small(tmp_path / "a"))) == queued(Store(small(tmp_path / "b")))
    assert len(Store(small(tmp_path / "a")).trials()) == 9
    Store(small(tmp_path / "a", space=dict(reversed(SPACE.items()))))  # the order of the fields means nothing
    assert len(Store(small(tmp_path / "a")).trials()) == 9


def test_a_start_after_one_that_stopped_may_give_the_fields_in_another_order(tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        stop_in_call(patched, optuna.Study, "enqueue_trial", 4)
        with pytest.raises(OSError, match="Input/output"):
            Store(small(tmp_path))
    store = Store(small(tmp_path, space=dict(reversed(SPACE.items()))))
    points = [trial.system_attrs["fixed_params"] for trial in store.trials()]
    assert sorted((p["branching.tau"], p["branching.clip_high"]) for p in points) == sorted(
        itertools.product(*SPACE.values())
    )


def test_a_random_sweep_gets_the_further_points_of_more_trials(tmp_path):
    """Also after a trial that was tried again, which is no point of its own."""
    space = {"branching.tau": optuna.distributions.FloatDistribution(1.0, 100.0)}
    store = Store(small(tmp_path / "a", search="random", trials=3, space=space))
    store.study.tell(store.claim_trial(), state=TrialState.FAIL)
    assert store.retry_failed() == 1
    more = small(tmp_path / "a", search="random", trials=6, space=space)
    assert len(Store(more).trials()) == 7
    points = [t.system_attrs["fixed_params"] for t in Store(more).trials() if "retry_of" not in t.user_attrs]
    assert points == more.queued_points()


def test_a_random_sweep_keeps_its_number_of_trials_when_others_would_be_drawn(tmp_path):
    """In another order of the fields, or after points that another version has drawn. Once, it doubled."""
    distribution = optuna.distributions.FloatDistribution(1.0, 100.0)
    space = {"branching.tau": distribution, "advantage.future_weight": distribution}
    sweep = small(tmp_path, search="random", trials=3, space=space)
    store = Store(sweep)
    assert len(Store(small(tmp_path, search="random", trials=3, space=dict(reversed(space.items())))).trials()) == 3
    shutil.rmtree(tmp_path)
    store = Store(small(tmp_path, search="random", trials=1, space=space))
    store.study.enqueue_trial({"branching.tau": 50.0, "advantage.future_weight": 50.0})
    assert len(Store(sweep).trials()) == 3
    assert Store(sweep).point(store.trials()[2]) == sweep.queued_points()[1]


@pytest.mark.parametrize("search", ["grid", "random", "tpe"])
@pytest.mark.parametrize("written", [0, 1])
def test_a_trial_whose_worker_stopped_while_it_got_its_point_gets_the_rest(tmp_path, monkeypatch, search, written):
    """Once, it was run with the base's values, and the report raised KeyError."""
    sweep = small(tmp_path, search=search, trials=4)
    with monkeypatch.context() as patched:
        stop_in_call(patched, JournalStorage, "set_trial_param", written + 1)
        with pytest.raises(OSError, match="Input/output"):
            Store(sweep).claim_trial()
    assert len(Store(sweep).trials()[0].params) == written
    trial = Store(sweep).claim_trial()
    assert (trial.number, trial.params.keys()) == (0, SPACE.keys())
    if search != "tpe":
        assert trial.params == sweep.queued_points()[0]


@pytest.mark.parametrize("stopped_in", ["set_trial_user_attr", "set_trial_state_values"])
def test_an_impossible_point_is_never_run(tmp_path, monkeypatch, stopped_in):
    """Its worker stopped before it was recorded as impossible, or as failed."""
    sweep = small(tmp_path, search="tpe", trials=2, space={"rollout.num_initial": (4, 16)})
    Store(sweep).study.enqueue_trial({"rollout.num_initial": 16})
    with monkeypatch.context() as patched:
        stop_in_call(patched, JournalStorage, stopped_in, 1 if stopped_in == "set_trial_user_attr" else 2)
        with pytest.raises(OSError, match="Input/output"):
            Store(sweep).claim_trial()
    assert Store(sweep).trials()[0].state == TrialState.RUNNING
    assert Store(sweep).claim_trial().params == {"rollout.num_initial": 4}
    assert Store(sweep).trials()[0].state == TrialState.FAIL


def test_a_failed_trial_that_is_tried_again_counts_once_and_keeps_its_runs(tmp_path, monkeypatch):
    """Once, its point stood twice in the report, it was its own rival, and its finished seeds were run again elsewhere."""
    monkeypatch.setattr(worker, "_cold_start", lambda *_: None)
    monkeypatch.setattr(worker, "objective", lambda sweep, run: 0.5)
    sweep = small(tmp_path, seeds=(0, 1), space={"branching.tau": (8.0, 32.0)})
    ran, fails = [], [False, True, False, True, True]  # of the runs of seed 1, the last first

    def run(store, command, config, stop, lost):
        ran.append(Path(config.run_dir).name)
        if config.seed == 1 and fails.pop():
            raise TrainingError("exit code 1")

    monkeypatch.setattr(worker, "_run", run)
    store = Store(sweep)
    with stop_requests() as stop:
        for number in range(5):
            if number in (2, 4):
                store.retry_failed()
            assert [len(r.values) for r in results(store)] == [[], [1], [1, 1], [2, 1], [2, 1]][number]
            worker._run_trial(store, store.claim_trial(), stop)
    assert store.all_done()
    assert ran == ["0000-0", "0000-1", "0001-0", "0001-1", "0000-1", "0001-1", "0001-1"]
    assert [sorted(r.values) for r in results(store)] == [[0, 1], [0, 1]]
    assert len(worker._values_of_others(store, 4)) == 1
    text = write_report(sweep)
    assert "Trials: 2 complete." in text
    assert text.count("| 2 | 0.5000") == 2


@pytest.mark.parametrize(("final", "metric", "objective"), [("null", 0.5, "final"), (0.5, "NaN", "time/wall_s")])
def test_a_run_without_an_objective_fails_its_trial_and_the_others_go_on(
    tmp_path, monkeypatch, final, metric, objective
):
    """All rewards of its last evaluation failed, or a metric is no number. Once, the worker ended."""
    monkeypatch.setattr(worker, "_cold_start", lambda *_: None)

    def run(store, command, config, stop, lost):
        folder = Path(config.run_dir)
        folder.mkdir()
        broken = config.branching.tau == 8.0
        (folder / "metrics.jsonl").write_text(f'{{"step": 1, "time/wall_s": {metric if broken else 0.5}}}\n')
        (folder / "summary.json").write_text(
            f'{{"accuracy_sft": 0, "accuracy_final": {final if broken else 0.5}, "sampled_tokens": 9, "wall_s": 1}}'
        )

    monkeypatch.setattr(worker, "_run", run)
    store = Store(small(tmp_path, objective=objective))
    with stop_requests() as stop:
        while (trial := store.claim_trial()) is not None:
            worker._run_trial(store, trial, stop)
    assert store.failed() == [0, 1, 2]
    assert len(results(store)) == 6


@pytest.mark.parametrize("search", ["grid", "tpe"])
def test_a_mistyped_objective_may_be_mended_and_costs_no_run(tmp_path, monkeypatch, search):
    """Once, the advice was to give another objective, and then the folder held "another sweep"."""
    monkeypatch.setattr(worker, "_cold_start", lambda *_: None)
    ran = []

    def run(store, command, config, stop, lost):
        folder = Path(config.run_dir)
        ran.append(folder.name)
        folder.mkdir()
        (folder / "metrics.jsonl").write_text(f'{{"step": 1, "time/wall_s": {config.branching.tau}}}\n')
        (folder / "summary.json").write_text(
            '{"accuracy_sft": 0, "accuracy_final": 0.5, "sampled_tokens": 9, "wall_s": 1}'
        )

    monkeypatch.setattr(worker, "_run", run)
    fields = {"search": search, "trials": 2, "space": {"branching.tau": (8.0, 32.0)}}

    def work(sweep):
        store = Store(sweep)
        store.retry_failed()
        with stop_requests() as stop:
            while (trial := store.claim_trial()) is not None:
                worker._run_trial(store, trial, stop)
                store.release(f"trial-{trial.number}")
        return store

    assert len(work(small(tmp_path, objective="time/wal_s", **fields)).failed()) == 2
    mended = small(tmp_path, objective="time/wall_s", maximize=False, **fields)
    store = work(mended)
    assert store.failed() == []
    assert sorted(ran) == ["0000-0", "0001-0"]
    assert results(store)[0].values == {0: 8.0}
    # the storage still maximizes, so Optuna's best trial is that of the lowest value
    assert store.point(store.study.best_trial) == {"branching.tau": 8.0}
    Store(mended)
    with pytest.raises(ConfigError, match="holds another sweep: objective, maximize differ; give another `out`"):
        Store(small(tmp_path, objective="time/wal_s", **fields))


def test_the_objective_stays_while_another_worker_has_a_trial(tmp_path):
    """It would give the trial its value of the old one."""
    other = (
        "import sys, time; sys.path.insert(0, {!r}); from test_store import *; "
        "Store(small({!r})).claim_trial(); print(flush=True); time.sleep(600)"
    )
    code = other.format(str(Path(__file__).parent), str(tmp_path))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        process.stdout.readline()
        with pytest.raises(ConfigError, match="holds another sweep: objective differ"):
            Store(small(tmp_path, objective="final"))
    finally:
        process.kill()
        process.wait()
    assert Store(small(tmp_path, objective="final")).sweep.objective == "final"


def test_the_figure_shows_trials_as_if_they_had_run_all_seeds(tmp_path, monkeypatch):
    """Trial 0 skipped the seed that is easy, and is the better one in the other. Once, the figure showed it as the worse one."""
    sweep = small(tmp_path, seeds=(0, 1), space={"branching.tau": (8.0, 32.0), "branching.clip_high": (1.2,)})
    store = Store(sweep)
    for values in ({0: 0.5}, {0: 0.4, 1: 0.8}):
        trial = store.claim_trial()
        for seed, value in values.items():
            trial.set_user_attr(f"seed-{seed}", value)
        store.tell(trial, values.values(), TrialState.COMPLETE)
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: figures.append(figure))
    write_report(sweep)
    axes = {(ax.get_xlabel(), ax.get_ylabel()): ax for ax in figures[0].axes}
    # the mean of both seeds: 0.6 in trial 1, and 0.1 more in trial 0
    dots = axes["branching.tau", "on_the_way"].lines[0].get_ydata()
    assert dots.tolist() == pytest.approx([0.7, 0.6])
    [pair] = [ax for names, ax in axes.items() if set(names) == set(sweep.space)]
    assert sorted(pair.images[0].get_array().ravel()) == pytest.approx([0.6, 0.7])


def test_a_worker_names_the_trials_that_failed_anywhere(tmp_path):
    """Once, `--worker` ended with exit code 0 and no word."""
    sweep = small(tmp_path, space={"branching.tau": (8.0, 32.0)})
    store = Store(sweep)
    store.study.tell(store.claim_trial(), 0.5)
    store.study.tell(store.claim_trial(), state=TrialState.FAIL)
    with pytest.raises(TrainingError, match=r"trials 1 failed: .* command without --worker tries them again"):
        worker.work(sweep)
    store.retry_failed()
    store.study.tell(store.claim_trial(), 0.5)
    worker.work(sweep)


def test_a_cold_start_that_was_removed_is_made_again(tmp_path, monkeypatch):
    """Once, a file elsewhere said that it was done, and every trial failed."""
    made = []
    monkeypatch.setattr(worker, "lacks_tokenizer", lambda policy: False)
    monkeypatch.setattr(worker, "_run", lambda *args: (made.append(1), Path(args[2].run_dir).mkdir()))
    store = Store(small(tmp_path, cold_starts=(str(tmp_path / "cold"),)))
    with stop_requests() as stop:
        for times in (1, 1, 2):
            if times == 2:
                shutil.rmtree(tmp_path / "cold")
            worker._cold_start(store, 0, stop, [])
            assert len(made) == times


def test_a_run_that_another_sweep_has_begun_is_waited_for(tmp_path, monkeypatch):
    """Once, it counted as failed. Its process has the lock of the directory; afterwards, attempts are counted."""
    store = Store(small(tmp_path))
    config = store.sweep.cold_start(0)
    codes, run = [0, 1, 1], Path(config.run_dir)
    run.mkdir()
    held = lock(run / "lock")
    monkeypatch.setattr(worker, "IDLE_S", 0.1)
    monkeypatch.setattr(worker, "start_run", lambda *_: subprocess.Popen(["sh", "-c", f"exit {codes.pop()}"]))
    threading.Timer(1.0, lambda: os.close(held)).start()
    with stop_requests() as stop:
        worker._run(store, "sft", config, stop, [])
        assert codes == []
        codes.extend([0, 1, 1])
        with pytest.raises(TrainingError, match="exit code 1"):
            worker._run(store, "sft", config, stop, [])


@pytest.mark.parametrize("fits", [1, 20])
def test_a_record_that_a_full_disk_has_cut_costs_nothing(tmp_path, fits):
    """Once, the next record was appended to its part, and no worker could read the journal again."""
    store, other, journal = Store(small(tmp_path)), Store(small(tmp_path)), tmp_path / "journal.log"
    trial, before = store.claim_trial(), journal.read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + fits, limit[1]))
        with pytest.raises(OSError, match="File too large"):
            trial.set_user_attr("seed-0", 0.5)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert len(journal.read_bytes()) == len(before) + fits
    assert other.values(other.trials()[0]) == {}
    trial.set_user_attr("seed-0", 0.5)
    assert journal.read_bytes()[: len(before)] == before
    assert journal.read_bytes().count(b"\n") == before.count(b"\n") + 1
    for reader in (store, other, Store(small(tmp_path))):
        assert reader.values(reader.trials()[0]) == {0: 0.5}


def test_a_journal_that_is_damaged_inside_is_named_with_the_line(tmp_path):
    sweep, journal = small(tmp_path), tmp_path / "journal.log"
    store = Store(sweep)
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(
        b"".join([*lines[:2], lines[2][:20] + lines[3], *lines[4:]])
    )  # a part of a record, then the next one
    with pytest.raises(
        DataError, match=r"journal\.log, line 3: expected a JSON record .* put the file back from a copy"
    ):
        Store(sweep)
    journal.write_bytes(b"".join(lines) + b"\xff\n" + lines[-1])
    with pytest.raises(
        DataError, match=rf"journal\.log, line {len(lines) + 1}: "
    ):  # also of one who has read the lines before
        store.all_done()
    journal.write_bytes(b"".join(lines))
    assert queued(Store(sweep)) == queued(store)


@pytest.mark.parametrize("content", [b"", b'{"base": {"ste', b"\0" * 64, b"\xff", b"3"])
def test_a_damaged_definition_is_named_and_may_be_deleted(tmp_path, content):
    sweep, file = small(tmp_path), tmp_path / "definition.json"
    before, written = queued(Store(sweep)), file.read_bytes()
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"definition\.json: expected the definition of a sweep .* delete it"):
        Store(sweep)
    file.unlink()
    assert queued(Store(sweep)) == before
    assert file.read_bytes() == written
