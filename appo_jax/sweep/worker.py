"""A worker of a sweep: it takes trials from the shared storage until all are done. Workers may run on several machines.

A trial runs its point of the space with every seed in turn, each run in a process. If the worker dies, nothing is lost:
finished runs stay, a run in progress continues from its checkpoint, and the next worker takes the trial's lease.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from optuna.trial import Trial, TrialState

from appo_jax.config import Config
from appo_jax.errors import TrainingError
from appo_jax.interrupt import Stop, stop_requests
from appo_jax.metrics import read_metrics
from appo_jax.study.plan import lacks_tokenizer
from appo_jax.study.process import log_file, start_run
from appo_jax.study.report import load_outcome
from appo_jax.sweep.plan import Sweep
from appo_jax.sweep.racing import excluded
from appo_jax.sweep.store import RENEW_S, Store

log = logging.getLogger(__name__)

POLL_S = 0.2
IDLE_S = 2.0  # between two attempts to find work while other workers have all remaining tasks
ATTEMPTS = 2  # of a run that fails


class LeaseLost(Exception):
    """Another worker has taken the task, because this one did not renew its lease in time."""


def work(sweep: Sweep) -> None:
    """Take trials until none is left. Raises KeyboardInterrupt when asked to stop, after the current run is saved."""
    store = Store(sweep)
    with stop_requests() as stop:
        while not store.all_done():
            if stop.requested:
                raise KeyboardInterrupt
            if (trial := store.claim_trial()) is None:
                time.sleep(IDLE_S)
                continue
            with contextlib.suppress(LeaseLost):
                _run_trial(store, trial, stop)


def _run_trial(store: Store, trial: Trial, stop: Stop) -> None:
    """Run a trial's seeds, from the first without a result, and record the outcome in the storage."""
    sweep, task = store.sweep, f"trial-{trial.number}"
    values = store.values(store.study.trials[trial.number])
    state, reason = TrialState.COMPLETE, None
    with _renewed(store, task) as lost:
        try:
            for seed in sweep.seeds:
                if seed in values:
                    continue
                values[seed] = _run_seed(store, trial, seed, stop, lost)
                trial.set_user_attr(f"seed-{seed}", values[seed])
                if sweep.prune and excluded(_signed(sweep, values), _others(store, trial.number), len(sweep.seeds)):
                    state = TrialState.PRUNED
                    break
        except TrainingError as error:
            state, reason = TrialState.FAIL, str(error)
        finally:
            if lost.is_set():
                raise LeaseLost
        if reason is not None:
            log.error("trial %d failed: %s", trial.number, reason)
            trial.set_user_attr("error", reason)
        mean = sum(values.values()) / len(values) if values else None
        if state == TrialState.PRUNED:
            trial.report(mean or 0.0, len(values))  # a pruned trial's value is the last one that it reported
        store.study.tell(trial, mean if state == TrialState.COMPLETE else None, state=state)
    store.release(task)


def _run_seed(store: Store, trial: Trial, seed: int, stop: Stop, lost: threading.Event) -> float:
    """Do or finish a run and return its objective. Raises TrainingError if it fails repeatedly."""
    sweep = store.sweep
    _cold_start(store, seed, stop, lost)
    config = sweep.config(trial.number, trial.params, seed)
    summary = Path(config.run_dir) / "summary.json"
    if not summary.exists():
        _run(store, "train", config, stop, lost)
    return objective(sweep, Path(config.run_dir))


def _cold_start(store: Store, seed: int, stop: Stop, lost: threading.Event) -> None:
    """Do the cold start that a seed begins with; if the embedded world is missing, generate it first."""
    config = store.sweep.cold_start(seed)
    if lacks_tokenizer(config):
        world = dataclasses.replace(config, run_dir=str(store.folder / "runs" / "world"))
        _once(store, "world", "data world", world, stop, lost)
    _once(store, Path(config.run_dir).name, "sft", config, stop, lost)


def _once(store: Store, task: str, command: str, config: Config, stop: Stop, lost: threading.Event) -> None:
    """Run a task that all trials share, or wait for the worker that runs it."""
    done = store.folder / "runs" / f"{task}.done"
    while not done.exists():
        if not store.take(task):
            _wait(IDLE_S, stop, lost)
            continue
        with _renewed(store, task):
            _run(store, command, config, stop, lost)
            done.touch()
        store.release(task)


def _run(store: Store, command: str, config: Config, stop: Stop, lost: threading.Event) -> None:
    """Run a process to its end. Raises TrainingError when it fails, KeyboardInterrupt when asked to stop, LeaseLost."""
    folder = store.folder / "runs"
    for attempt in range(ATTEMPTS):
        process = start_run(command, config, folder)
        try:
            while (code := process.poll()) is None:
                _wait(POLL_S, stop, lost)
        finally:
            _end(process)
        if code == 0:
            return
        log.warning("%s ended with exit code %d (attempt %d)", Path(config.run_dir).name, code, attempt + 1)
    raise TrainingError(f"exit code {code}, see {log_file(folder, Path(config.run_dir).name)}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask a process to save its run, and wait until it ends."""
    if process.poll() is None:
        process.terminate()
        process.wait()


def _wait(seconds: float, stop: Stop, lost: threading.Event) -> None:
    time.sleep(seconds)
    if stop.requested:
        raise KeyboardInterrupt
    if lost.is_set():
        raise LeaseLost


@contextlib.contextmanager
def _renewed(store: Store, task: str) -> Iterator[threading.Event]:
    """A context in which a lease is renewed; the event is set if the lease is lost."""
    lost, ended = threading.Event(), threading.Event()

    def renew() -> None:
        while not ended.wait(RENEW_S):
            if not store.renew(task):
                lost.set()
                return

    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
        yield lost
    except KeyboardInterrupt:
        ended.set()
        thread.join()
        store.release(task)  # saved and free for the next worker at once
        raise
    finally:
        ended.set()
        thread.join()


def objective(sweep: Sweep, run: Path) -> float:
    """The objective of a finished run. Raises TrainingError when its metrics lack it."""
    if sweep.objective == "on_the_way":
        return load_outcome(run).on_the_way(sweep.max_sampled_tokens)
    if sweep.objective == "final":
        return load_outcome(run).final
    found = [r[sweep.objective] for r in read_metrics(run / "metrics.jsonl") if r.get(sweep.objective) is not None]
    if not found:
        summary = json.loads((run / "summary.json").read_text())
        raise TrainingError(f"objective = {sweep.objective!r}: not a metric of {run} (steps: {summary.get('steps')})")
    return float(found[-1])


def _others(store: Store, number: int) -> list[dict[int, float]]:
    trials = [trial for trial in store.trials() if trial.number != number]
    return [_signed(store.sweep, values) for trial in trials if (values := store.values(trial))]


def _signed(sweep: Sweep, values: dict[int, float]) -> dict[int, float]:
    """Values of which higher ones are better."""
    return values if sweep.maximize else {seed: -value for seed, value in values.items()}
