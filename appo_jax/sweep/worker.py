"""A worker of a sweep: it takes trials from the shared storage until all are done. Workers may run on several machines.

A trial runs its point of the space with one seed after the other, each run in a process of its own. If the worker dies, another
worker takes the lease of the trial. Finished runs are kept, and a run in progress continues from its last checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from optuna.trial import Trial, TrialState

from appo_jax.config import Config
from appo_jax.errors import DataError, TrainingError
from appo_jax.interrupt import Stop, stop_requests
from appo_jax.metrics import read_metrics, read_summary
from appo_jax.study.process import in_use, log_file, start_run
from appo_jax.study.report import load_outcome
from appo_jax.sweep.definition import Sweep
from appo_jax.sweep.racing import excluded
from appo_jax.sweep.store import LEASE_S, RENEW_S, Store
from appo_jax.text.tokenizer import lacks_tokenizer

log = logging.getLogger(__name__)

POLL_S = 0.2  # seconds between two checks of a process
IDLE_S = 2.0  # seconds between two attempts to get a task while other workers have all of them
AWAY_S = 300.0  # seconds for which the shared disk may fail
ATTEMPTS = 2  # to do a run that fails


class LeaseLost(Exception):
    """Another worker has taken the task, because this worker did not renew its lease in time."""


def work(sweep: Sweep) -> None:
    """Do trials until all are done. Raises TrainingError then if some of them failed, here or elsewhere; KeyboardInterrupt after
    Ctrl-C or SIGTERM, when the current run is saved; OSError if the shared disk fails for longer than AWAY_S."""
    store, failing_since = Store(sweep), None
    with stop_requests() as stop:
        while not stop.requested:
            try:
                if store.all_done():
                    return store.require_success()
                if (trial := store.claim_trial()) is None:
                    time.sleep(IDLE_S)
                else:
                    with contextlib.suppress(LeaseLost):
                        _run_trial(store, trial, stop)
                failing_since = None
            except OSError as error:  # the shared disk may answer again
                failing_since = failing_since or time.monotonic()
                if time.monotonic() - failing_since > AWAY_S:
                    raise
                log.warning("the shared disk fails: %s; trying again", error)
                time.sleep(IDLE_S)
        raise KeyboardInterrupt


def _run_trial(store: Store, trial: Trial, stop: Stop) -> None:
    """Do the runs of a trial that have no result yet, and record the outcome in the storage. Raises LeaseLost."""
    sweep, task = store.sweep, f"trial-{trial.number}"
    values = store.values(store.study.trials[trial.number])
    state, reason = TrialState.COMPLETE, None
    with holding(store, task) as lost:
        try:
            for seed in sweep.seeds:
                if seed in values:
                    continue
                values[seed] = _run_seed(store, trial, seed, stop, [lost])
                trial.set_user_attr(f"seed-{seed}", values[seed])
                if sweep.prune and excluded(
                    _higher_is_better(sweep, values), _values_of_others(store, trial.number), len(sweep.seeds)
                ):
                    state = TrialState.PRUNED
                    break
        except (TrainingError, DataError) as error:
            state, reason = TrialState.FAIL, str(error)
        if lost.is_set():
            raise LeaseLost
        if reason is not None:
            log.error("trial %d failed: %s", trial.number, reason)
            trial.set_user_attr("error", reason)
        store.tell(trial, values.values(), state)


def _run_seed(store: Store, trial: Trial, seed: int, stop: Stop, lost: Sequence[threading.Event]) -> float:
    """Do a run, or the rest of it, and return its objective. Raises TrainingError or DataError if it fails ATTEMPTS times or lacks
    the objective."""
    sweep = store.sweep
    _cold_start(store, seed, stop, lost)
    config = sweep.config(store.runs_of(trial), trial.params, seed)
    if read_summary(Path(config.run_dir)) is None:
        _run(store, "train", config, stop, lost)
    value = objective(sweep, Path(config.run_dir))
    if not math.isfinite(value):
        raise TrainingError(f"objective = {sweep.objective!r} is {value} in {config.run_dir}")
    return value


def _cold_start(store: Store, seed: int, stop: Stop, lost: Sequence[threading.Event]) -> None:
    """Do the cold start with which a seed begins. If the data must still be generated, do this first."""
    config = store.sweep.cold_start(seed)
    tokenizer = config.policy.tokenizer
    if tokenizer is not None and lacks_tokenizer(config.policy):
        world = dataclasses.replace(config, run_dir=str(store.folder / "runs" / "world"))
        run_shared(store, "data world", world, Path(tokenizer), stop, lost)
    run_shared(store, "sft", config, Path(config.run_dir) / "cold_start.done", stop, lost)


def run_shared(
    store: Store, command: str, config: Config, done: Path, stop: Stop, lost: Sequence[threading.Event]
) -> None:
    """Do a task that all trials share. If another worker has it, wait until it is done.

    `done`: the file that says so. It is a part of the result, so that it is gone when the result is."""
    task = Path(config.run_dir).name
    while not done.exists():
        if not store.take(task):
            _wait(IDLE_S, stop, lost)
            continue
        with holding(store, task) as task_lost:
            _run(store, command, config, stop, [*lost, task_lost])
            done.touch()


def _run(store: Store, command: str, config: Config, stop: Stop, lost: Sequence[threading.Event]) -> None:
    """Run `appo-jax COMMAND` in a process until it ends. If another process, such as that of another sweep, has the run
    directory, wait until that ends. Raises TrainingError if it fails ATTEMPTS times; KeyboardInterrupt after Ctrl-C or SIGTERM;
    LeaseLost."""
    folder, run_dir, failures = store.folder / "runs", Path(config.run_dir), 0
    while failures < ATTEMPTS:
        process = start_run(command, config, folder)
        try:
            while (code := process.poll()) is None:
                _wait(POLL_S, stop, lost)
        finally:
            _stop_process(process, stop)
        if code == 0:
            return
        if in_use(run_dir):
            log.warning("%s: another process writes there; waiting until it ends", run_dir)
            while in_use(run_dir):
                _wait(IDLE_S, stop, lost)
            continue
        failures += 1
        log.warning("%s ended with exit code %d (attempt %d of %d)", run_dir.name, code, failures, ATTEMPTS)
    raise TrainingError(f"exit code {code}, see {log_file(folder, run_dir.name)}")


def _stop_process(process: subprocess.Popen[bytes], stop: Stop) -> None:
    """If a process still runs, ask it to save its run, and wait until it has ended. SIGHUP gives it all the time that it needs;
    if a pressing request follows, SIGTERM begins its `stop_grace_seconds`."""
    sent = None
    while process.poll() is None:
        number = signal.SIGHUP if stop.requested and not stop.pressing else signal.SIGTERM
        if sent not in (number, signal.SIGTERM):  # a second SIGTERM would end it at once
            process.send_signal(number)
            sent = number
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(POLL_S)


def _wait(seconds: float, stop: Stop, lost: Sequence[threading.Event]) -> None:
    """Sleep. Raises KeyboardInterrupt if a stop was requested, LeaseLost if one of the leases was lost."""
    time.sleep(seconds)
    if stop.requested:
        raise KeyboardInterrupt
    if any(event.is_set() for event in lost):
        raise LeaseLost


@contextlib.contextmanager
def holding(store: Store, task: str) -> Iterator[threading.Event]:
    """A context in which a thread renews the lease of a task. The event that it gives is set if the lease is lost.

    At its end, also after an error, a lease that is not lost is released, so that another worker need not wait until it runs out.
    """
    lost, ended = threading.Event(), threading.Event()

    def renew() -> None:
        renewed = time.monotonic()
        while not ended.wait(RENEW_S):
            try:
                if not store.renew(task):
                    return
                renewed = time.monotonic()
            except OSError as error:  # the shared disk may answer again
                log.warning("the lease of %s cannot be renewed: %s", task, error)
                if time.monotonic() - renewed > LEASE_S - RENEW_S:  # soon another worker may take it
                    return

    def renew_until_lost() -> None:
        try:
            renew()
        finally:  # also after an error that nobody expected
            if not ended.is_set():
                lost.set()

    thread = threading.Thread(target=renew_until_lost, daemon=True)
    thread.start()
    try:
        yield lost
    finally:
        ended.set()
        thread.join()
        if not lost.is_set():
            try:
                store.release(task)
            except OSError as error:
                log.warning("the lease of %s cannot be given back, and runs out by itself: %s", task, error)


def objective(sweep: Sweep, run: Path) -> float:
    """The objective of a finished run, from the files in its directory `run`. Raises TrainingError if its metrics lack it,
    DataError if its summary does."""
    if sweep.objective == "on_the_way":
        return load_outcome(run).on_the_way(sweep.max_sampled_tokens)
    if sweep.objective == "final":
        return load_outcome(run).final
    found = [r[sweep.objective] for r in read_metrics(run / "metrics.jsonl") if r.get(sweep.objective) is not None]
    if not found:
        summary = read_summary(run) or {}
        raise TrainingError(
            f"objective = {sweep.objective!r}: no such metric in {run}/metrics.jsonl after {summary.get('steps')} steps; give "
            "'on_the_way', 'final' or the name of a metric"
        )
    return float(found[-1])


def _values_of_others(store: Store, number: int) -> list[dict[int, float]]:
    """For each other trial that stands for its point and has results, its values by seed; higher is better."""
    trials = [trial for trial in store.standing() if trial.number != number]
    return [_higher_is_better(store.sweep, values) for trial in trials if (values := store.values(trial))]


def _higher_is_better(sweep: Sweep, values: dict[int, float]) -> dict[int, float]:
    """The values, negated if lower values of the objective are better."""
    return values if sweep.maximize else {seed: -value for seed, value in values.items()}
