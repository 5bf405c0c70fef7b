"""Runs a sweep on this machine: starts workers on its cores, shows their progress, and writes the report."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import rich
from optuna.trial import TrialState
from rich.live import Live
from rich.table import Table

from appo_jax.errors import TrainingError
from appo_jax.interrupt import Stop, stop_requests
from appo_jax.metrics import read_metrics
from appo_jax.study.process import end_with_parent
from appo_jax.study.run import shares
from appo_jax.sweep.definition import Sweep
from appo_jax.sweep.report import results, write_report
from appo_jax.sweep.store import Store

log = logging.getLogger(__name__)

REFRESH_S = 2.0  # seconds between two updates of the live table


def run_sweep(sweep: Sweep, file: Path, jobs: int) -> str:
    """Run all unfinished trials with `jobs` workers, write the report, and return its text. Trials that failed earlier are tried
    again.

    `file`: the python file of the sweep, which the workers read. Raises ConfigError for more jobs than cores; TrainingError if
    trials or workers failed; KeyboardInterrupt after Ctrl-C or SIGTERM, when the current runs are saved.
    """
    cores = shares(jobs)
    store = Store(sweep)
    if retried := store.retry_failed():
        log.info("%d trials failed earlier and are tried again", retried)
    with stop_requests() as stop:
        workers = [_start_worker(file, share) for share in cores]
        try:
            with _progress(store):
                codes = _wait(workers, stop)
        finally:
            for worker in workers:
                worker.terminate()
            for worker in workers:
                worker.wait()
        if stop.requested:
            raise KeyboardInterrupt
    text = write_report(sweep)
    if store.failed():
        print(text)
        store.require_success()
    if not store.all_done():
        raise TrainingError(
            f"the workers ended with exit codes {codes} before all trials were done; see their messages above"
        )
    return text


def _start_worker(file: Path, cores: list[int]) -> subprocess.Popen[bytes]:
    """Start a worker on `cores`, in its own process group. It gets SIGTERM when this process ends."""
    worker = subprocess.Popen(
        [sys.executable, "-m", "appo_jax.cli", "sweep", "--config", str(file), "--worker"],
        process_group=0, preexec_fn=functools.partial(end_with_parent, os.getpid()),
    )  # fmt: skip
    os.sched_setaffinity(worker.pid, cores)
    return worker


def _wait(workers: Sequence[subprocess.Popen[bytes]], stop: Stop) -> list[int]:
    """Wait until all workers have ended or a stop is requested. Returns the exit codes of those that have ended."""
    while any(worker.poll() is None for worker in workers) and not stop.requested:
        time.sleep(0.2)
    return [worker.returncode for worker in workers if worker.returncode is not None]


@contextlib.contextmanager
def _progress(store: Store) -> Iterator[None]:
    """A context in which a terminal shows a live table. If there is no terminal, only the workers' messages are printed."""
    if not rich.get_console().is_terminal:
        yield
        return
    with Live(get_renderable=lambda: _progress_table(store), refresh_per_second=1 / REFRESH_S):
        yield


def _progress_table(store: Store) -> Table:
    """The state of the trials: running trials with their seed and step, then the best trials so far."""
    trials = store.standing()
    ended = sum(t.state.is_finished() for t in trials)
    total = store.sweep.trials if store.sweep.search == "tpe" else len(trials)
    table = Table(title=f"{ended} of {total} trials have ended", title_justify="left")
    for column in ("trial", *store.sweep.space, "state", "objective"):
        table.add_column(column)
    running = [t for t in trials if t.state == TrialState.RUNNING]
    for t in running:
        values = store.values(t)
        seed = next((seed for seed in store.sweep.seeds if seed not in values), None)
        step = "" if seed is None else _step(store.sweep.run_dir(store.runs_of(t), seed))
        mean = f"{sum(values.values()) / len(values):.4f}" if values else ""
        table.add_row(str(t.number), *(str(t.params.get(n, "")) for n in store.sweep.space), f"seed {seed}{step}", mean)
    for r in results(store)[:5]:
        if r.state != TrialState.RUNNING:
            fields = (str(r.params[n]) for n in store.sweep.space)
            table.add_row(str(r.number), *fields, f"{len(r.values)} seeds, {r.state.name.lower()}", f"{r.mean:.4f}")
    return table


def _step(run: Path) -> str:
    """The step and the sampled tokens of a run, from the last line of its metrics, as text."""
    records = read_metrics(run / "metrics.jsonl") if (run / "metrics.jsonl").exists() else []
    return (
        f", step {records[-1]['step']}, {records[-1].get('rollout/sampled_tokens_total', 0):,} tokens"
        if records
        else ""
    )
