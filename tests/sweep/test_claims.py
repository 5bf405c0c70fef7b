"""Claims on a shared disk: real processes, real kills."""

import dataclasses
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState

from appo_jax.config_io import load_config
from appo_jax.errors import ConfigError, TrainingError
from appo_jax.interrupt import stop_requests
from appo_jax.sweep import store as store_module
from appo_jax.sweep import worker
from appo_jax.sweep.definition import Sweep
from appo_jax.sweep.effects import Runs, field_effects
from appo_jax.sweep.report import write_report
from appo_jax.sweep.store import Store

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.py"


def make_sweep(out, **others):
    space = {"branching.tau": (2.0, 4.0, 8.0, 16.0), "branching.num_branch_points": (3, 4, 5)}
    fields = {"out": str(out), "base": load_config(QUICKSTART), "space": space, "seeds": (0,), "max_sampled_tokens": 9}
    return Sweep(**(fields | others))


@pytest.fixture
def store(tmp_path):
    return Store(make_sweep(tmp_path))


WORKER = """
    import sys, time
    sys.path.insert(0, {tests!r})
    from test_claims import make_sweep
    from appo_jax.sweep.store import Store

    store = Store(make_sweep({out!r}))
    while not store.all_done():
        if (trial := store.claim_trial()) is None:
            time.sleep(0.05)
            continue
        print("began", trial.number, flush=True)
        time.sleep(0.1)
        trial.set_user_attr("seed-0", trial.params["branching.tau"])
        store.study.tell(trial, trial.params["branching.tau"])
        store.release(f"trial-{{trial.number}}")
        print("ended", trial.number, flush=True)
"""


def test_workers_that_are_killed_lose_no_trial_and_none_is_done_twice(tmp_path):
    code = textwrap.dedent(WORKER.format(tests=str(Path(__file__).parent), out=str(tmp_path)))
    rng, out = random.Random(0), tmp_path / "printed"

    def start():
        with out.open("a") as file:
            return subprocess.Popen([sys.executable, "-c", code], stdout=file)

    workers = [start(), start()]
    for _ in range(3):
        time.sleep(2.0 + rng.random())
        victim = workers.pop(0)
        victim.kill()
        victim.wait()
        workers.append(start())
    assert [worker.wait(timeout=60) for worker in workers] == [0, 0]
    store = Store(make_sweep(tmp_path))
    assert [t.state for t in store.trials()] == [TrialState.COMPLETE] * 12
    points = Counter(tuple(t.params.values()) for t in store.trials())
    assert set(points.values()) == {1}
    assert len(points) == 12
    ended = Counter(line.split()[1] for line in out.read_text().splitlines() if line.startswith("ended"))
    assert set(ended.values()) == {1}


def test_a_worker_that_dies_leaves_one_lock(tmp_path):
    """With two, one for leases and one for the journal, the others waited for 30 s twice. Once, that made the test above fail."""
    dies = "import os, signal\nos.fsync = lambda file: os.kill(os.getpid(), signal.SIGKILL)\nstore.claim_trial()"
    code = textwrap.dedent(WORKER.format(tests=str(Path(__file__).parent), out=str(tmp_path))).split("while")[0] + dies
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    (lock,) = tmp_path.glob("*.lock")
    lock.unlink()  # as another worker does it after 30 s
    store = Store(make_sweep(tmp_path))
    assert len(run_all(store, lambda point: point["branching.tau"])) == 12


@pytest.mark.parametrize("ahead", [-3600.0, 0.0, 3600.0])
def test_a_silent_workers_trial_goes_to_another_and_a_living_ones_does_not(store, tmp_path, monkeypatch, ahead):
    """Whatever its clock says."""
    monkeypatch.setattr(store_module, "LEASE_S", 0.5)
    trial = store.claim_trial()
    lease = tmp_path / "leases" / f"trial-{trial.number}.json"
    task = f"trial-{trial.number}"
    for renewal in range(3):
        lease.write_text(json.dumps({"host": "another", "pid": 1, "time": time.time() + ahead + renewal}))
        assert not store.take(task)
        time.sleep(0.3)
    second = store.claim_trial()
    assert second.number != trial.number
    store.release(f"trial-{second.number}")
    store.study.tell(second, 0.0)
    time.sleep(0.3)
    assert store.claim_trial().number == trial.number


@pytest.mark.parametrize(
    "elsewhere",
    [{"pids": "this boot pid:[1]"}, {"pids": "another boot pid:[4026531836]"}, {"host": "another"}],
    ids=["container", "machine", "host"],
)
@pytest.mark.parametrize("pid", [os.getpid(), 2**30], ids=["own", "none"])
def test_a_living_worker_of_another_container_keeps_its_lease(store, tmp_path, elsewhere, pid):
    """Both have one host name. The number of its process is that of this one, or of none here."""
    assert store.take("cold-0")
    lease = tmp_path / "leases" / "cold-0.json"
    own = json.loads(lease.read_text())
    lease.write_text(json.dumps(own | {"pid": pid, "id": "another"} | elsewhere))
    assert not store.take("cold-0")
    assert not store.renew("cold-0")
    lease.write_text(
        json.dumps(own | {"pid": pid, "id": "another"})
    )  # it has ended, and was one that this one would see
    assert store.take("cold-0")


def test_a_disk_that_fails_for_a_moment_costs_no_lease_and_one_that_stays_away_does(store, tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "RENEW_S", 0.02)
    monkeypatch.setattr(worker, "LEASE_S", 0.5)
    assert store.take("cold-0")
    leases, away = tmp_path / "leases", tmp_path / "away"
    with worker.holding(store, "cold-0") as lost:
        with store.lock():
            leases.rename(away)
            leases.write_text("")  # no folder: NotADirectoryError
        time.sleep(0.2)
        with store.lock():
            leases.unlink()
            away.rename(leases)
        assert not lost.wait(0.6)
        leases.rename(away)
        leases.write_text("")
        assert lost.wait(2)
        leases.unlink()
        away.rename(leases)


def test_a_lease_that_is_lost_with_its_disk_is_not_given_back(store, tmp_path, monkeypatch):
    """Once, giving it back raised OSError in place of LeaseLost, and the worker ended."""
    monkeypatch.setattr(worker, "RENEW_S", 0.02)
    monkeypatch.setattr(worker, "LEASE_S", 0.1)
    assert store.take("cold-0")

    def lose():
        with worker.holding(store, "cold-0") as lost:
            (tmp_path / "leases").rename(tmp_path / "away")
            assert lost.wait(2)
            raise worker.LeaseLost

    with pytest.raises(worker.LeaseLost):
        lose()
    (tmp_path / "away").rename(tmp_path / "leases")
    assert store.take("cold-0")
    with worker.holding(store, "cold-0"):  # the disk fails at its end
        (tmp_path / "leases").rename(tmp_path / "away")


def test_a_worker_outlives_a_disk_that_fails_for_a_moment(store, tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "IDLE_S", 0.1)
    monkeypatch.setattr(worker, "Store", lambda sweep: store)  # the disk fails after the start
    done = tmp_path / "journal.done"
    while (trial := store.claim_trial()) is not None:
        store.study.tell(trial, 0.0)
        store.release(f"trial-{trial.number}")
    journal = tmp_path / "journal.log"
    journal.rename(done)
    journal.mkdir()  # IsADirectoryError

    def repair():
        journal.rmdir()
        done.rename(journal)

    threading.Timer(0.5, repair).start()
    worker.work(store.sweep)


@pytest.mark.parametrize(
    "damage",
    ["", "{", "5", "[]", '["x"]', "null", '{"host": "another"}', '{"host": 3, "pid": "x"}', '{"pid": 1}', "\x80"],
)
def test_a_damaged_lease_is_none(store, tmp_path, damage):
    assert store.take("cold-0")
    (tmp_path / "leases" / "cold-0.json").write_text(damage, encoding="latin-1")
    assert not store.renew("cold-0")
    assert store.take("cold-0")
    assert store.renew("cold-0")


def test_an_error_that_nobody_expects_costs_the_lease(store, monkeypatch):
    """Otherwise, the worker would go on although nobody renews its lease."""
    monkeypatch.setattr(worker, "RENEW_S", 0.02)
    assert store.take("cold-0")
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    with worker.holding(store, "cold-0") as lost:
        store._owner = None
        assert lost.wait(2)


def test_two_processes_that_both_believe_to_have_the_lock_write_whole_leases(store, tmp_path):
    """The first one stalled so long that its lock was taken over. Each writes under a name of its own."""
    other = Store(make_sweep(tmp_path))
    other._writer = ".another.1"

    def write(one):
        for _ in range(200):
            one._write_lease("cold-0")

    threads = [threading.Thread(target=write, args=[one]) for one in (store, other)]
    failed = []
    threading.excepthook, before = failed.append, threading.excepthook
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        threading.excepthook = before
    assert not failed
    assert store._lease("cold-0")["host"]


def test_a_worker_that_lost_its_lease_is_told(store, tmp_path):
    assert store.take("cold-0")
    assert store.renew("cold-0")
    (tmp_path / "leases" / "cold-0.json").write_text(json.dumps({"host": "another", "pid": 1, "time": time.time()}))
    assert not store.renew("cold-0")
    assert not store.take("cold-0")
    store.release("cold-0")  # another's lease stays
    assert not store.take("cold-0")
    (tmp_path / "leases" / "cold-0.json").write_text("")  # after a power cut
    assert not store.renew("cold-0")
    assert store.take("cold-0")


def test_the_lease_of_a_task_that_failed_is_free_at_once(store, tmp_path):
    assert store.take("cold-0")
    with pytest.raises(TrainingError), worker.holding(store, "cold-0"):
        raise TrainingError("exit code 1")
    assert not (tmp_path / "leases" / "cold-0.json").exists()


def test_a_shared_task_stops_when_its_own_lease_is_lost(store, tmp_path, monkeypatch):
    """Its trial's lease is still held: once, only that one was watched, and two workers made one cold start."""
    monkeypatch.setattr(worker, "RENEW_S", 0.05)
    assert store.take("trial-0")
    lease = tmp_path / "leases" / "cold-0.json"
    other = json.dumps({"host": "another", "pid": 1, "time": time.time()})
    config = dataclasses.replace(load_config(QUICKSTART), run_dir=str(tmp_path / "runs" / "cold-0"))

    def steal():
        with store.lock():
            lease.write_text(other)

    threading.Timer(0.5, steal).start()  # while the process of the cold start begins
    with stop_requests() as stop, worker.holding(store, "trial-0") as lost, pytest.raises(worker.LeaseLost):
        worker.run_shared(store, "sft", config, tmp_path / "done", stop, [lost])
    assert not (tmp_path / "done").exists()
    assert lease.read_text() == other


def test_failed_trials_are_tried_again_once_for_each_failure(store):
    trial = store.claim_trial()
    trial.set_user_attr("error", "exit code 1")
    store.study.tell(trial, state=TrialState.FAIL)
    store.release(f"trial-{trial.number}")
    assert store.retry_failed() == 1
    assert store.retry_failed() == 0
    points = [tuple(t.system_attrs.get("fixed_params", t.params).values()) for t in store.trials()]
    assert Counter(points)[tuple(trial.params.values())] == 2


def test_a_folder_belongs_to_one_sweep(store, tmp_path):
    with pytest.raises(ConfigError, match="holds another sweep: seeds differ"):
        Store(make_sweep(tmp_path, seeds=(0, 1)))
    base = load_config(QUICKSTART)
    other = dataclasses.replace(base, optimizer=dataclasses.replace(base.optimizer, learning_rate=1.0))
    with pytest.raises(ConfigError, match=r"holds another sweep: base: optimizer\.learning_rate differ;"):
        Store(make_sweep(tmp_path, base=other))
    space = {"branching.tau": (2.0, 4.0), "branching.clip_high": (1.1, 1.2)}
    names = r"space: branching\.tau, space: branching\.clip_high, space: branching\.num_branch_points differ"
    with pytest.raises(ConfigError, match=names):
        Store(make_sweep(tmp_path, space=space))


def test_a_sweep_with_its_report_can_be_opened_again(store, tmp_path):
    """Once, the report took the place of the file that says which sweep the folder holds."""
    while (trial := store.claim_trial()) is not None:
        trial.set_user_attr("seed-0", trial.params["branching.tau"])
        store.study.tell(trial, trial.params["branching.tau"])
        store.release(f"trial-{trial.number}")
    write_report(store.sweep)
    assert (tmp_path / "sweep.json").exists()
    assert Store(make_sweep(tmp_path)).all_done()


def run_all(store, value):
    """Do all trials of a store, each with the value of its point. Returns their points."""
    points = []
    while (trial := store.claim_trial()) is not None:
        points.append(trial.params)
        trial.set_user_attr("seed-0", value(trial.params))
        store.study.tell(trial, value(trial.params))
        store.release(f"trial-{trial.number}")
    return points


@pytest.mark.parametrize("asks", [store_module.MAX_ASKS, 0])
def test_tpe_chooses_different_possible_points_and_as_many_as_asked(tmp_path, monkeypatch, asks):
    """Also where it proposes the same points again and again, and random ones take their place. Once, 25 trials on 27 points had
    16 different ones."""
    monkeypatch.setattr(store_module, "MAX_ASKS", asks)
    space = {"rollout.num_initial": (4, 16), "branching.tau": (2.0, 4.0, 8.0, 16.0)}
    store = Store(make_sweep(tmp_path, search="tpe", trials=4, space=space))
    points = run_all(store, lambda point: point["branching.tau"])
    assert {p["rollout.num_initial"] for p in points} == {4}
    assert sorted(p["branching.tau"] for p in points) == [2.0, 4.0, 8.0, 16.0]
    assert store.all_done()
    assert [store.point(trial) for trial in store.standing()] == points


@pytest.mark.parametrize("search", ["grid", "tpe"])
def test_chance_alone_seldom_makes_a_field_matter_where_others_have_no_effect(tmp_path, search):
    """grpo and dapo have neither τ nor a clip of Ω: with a trial for each combination, a field was found in two of three sweeps."""
    space = {
        "algorithm": ("appo", "grpo", "dapo"),
        "branching.tau": (8.0, 32.0, 128.0),
        "branching.clip_high": (1.1, 1.2),
    }
    sweep = make_sweep(tmp_path, search=search, trials=8, space=space)
    points = run_all(Store(sweep), lambda point: 0.5) if search == "tpe" else sweep.queued_points()
    assert sorted(p["algorithm"] for p in points) == ["appo"] * 6 + ["dapo", "grpo"]
    rng = np.random.default_rng(0)
    found = 0
    for _ in range(200):
        effects = field_effects(Runs(points, range(8), [0] * 8, rng.normal(size=8)), list(space))
        found += any(field.p < 0.05 for field in effects.fields)
    assert found <= 0.08 * 200


@pytest.mark.parametrize("search", ["random", "tpe"])
def test_chance_alone_seldom_makes_a_field_matter(tmp_path, search):
    """The runs of a point give the same values again, so a copy would be no observation of its own: with copies, about half of
    these sweeps found a field."""
    space = {"branching.tau": (8.0, 32.0, 128.0), "branching.clip_high": (1.1, 1.2, 1.5, 1.7)}
    sweep = make_sweep(tmp_path, search=search, trials=10, space=space)
    rng, found = np.random.default_rng(0), 0
    for _ in range(100):
        noise = {point: rng.normal() for point in itertools.product(*space.values())}
        if search == "tpe":
            store = Store(sweep)
            store.study = optuna.create_study(direction="maximize", sampler=store.study.sampler)  # in memory: faster
            points = run_all(store, lambda point, noise=noise: noise[tuple(point.values())])
        else:
            points = sweep.queued_points()
        values = np.array([noise[tuple(point.values())] for point in points])
        effects = field_effects(Runs(points, range(10), [0] * 10, values), list(space))
        found += any(field.p < 0.05 for field in effects.fields)
    assert found <= 10
