"""Runs a study: every run is a separate process, finished runs are not repeated, and a failed run does not stop the others."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from appo_jax import failures
from appo_jax.config import Config
from appo_jax.errors import ConfigError, DataError, TrainingError
from appo_jax.interrupt import stop_requests
from appo_jax.study.definition import Study
from appo_jax.study.process import in_use, log_file, start_run
from appo_jax.study.report import write_report
from appo_jax.text.tokenizer import lacks_tokenizer

log = logging.getLogger(__name__)

POLL_S = 0.2  # seconds between two checks of the processes


@dataclasses.dataclass(frozen=True)
class Job:
    """One `appo-jax COMMAND` of a study. It begins when the job `after` has succeeded; if that fails, it does not run."""

    command: Literal["data world", "sft", "train"]
    config: Config
    after: Job | None = None

    @property
    def name(self) -> str:
        """The name of its run directory."""
        return Path(self.config.run_dir).name


def run_study(study: Study, jobs: int = 1) -> str:
    """Do every run that is not finished, seed by seed, write the report, and return its tables.

    `jobs`: number of runs at a time, each on its share of the cores. An interrupted run continues from its last checkpoint.
    Raises ConfigError for more jobs than cores; TrainingError, after the report is written, if runs failed;
    KeyboardInterrupt after Ctrl-C or SIGTERM, when the current runs are saved.
    """
    cores = shares(jobs)
    _runs_folder(study).mkdir(parents=True, exist_ok=True)
    failed = _run(jobs_left(study), cores, study)
    if not failed:
        return write_report(study)
    with contextlib.suppress(DataError):  # perhaps no run is finished, so that there is no report
        write_report(study)
    logs = ", ".join(str(log_file(_runs_folder(study), job.name)) for job in failed)
    raise TrainingError(f"{len(failed)} runs failed: see {logs}; the same command tries them again")


def jobs_left(study: Study) -> list[Job]:
    """The jobs that are not done yet, in order: the generation of the data, then for each seed its cold start and its arms."""
    first_cold_start = study.cold_start(study.seeds[0])
    world = None
    if lacks_tokenizer(first_cold_start.policy):
        world = Job(
            "data world", dataclasses.replace(first_cold_start, run_dir=str(Path(study.out) / "runs" / "world"))
        )
    jobs: list[Job] = []
    cold_starts: dict[str, Job] = {}  # by run directory
    for seed in study.seeds:
        config = study.cold_start(seed)
        unfinished = [arm for arm in study.arms if not study.finished(arm, seed)]
        if unfinished and config.run_dir not in cold_starts:
            cold_starts[config.run_dir] = Job("sft", config, after=world)
            jobs.append(cold_starts[config.run_dir])
        jobs += [Job("train", study.config(arm, seed), after=cold_starts[config.run_dir]) for arm in unfinished]
    return [world, *jobs] if world and jobs else jobs


def shares(jobs: int) -> list[list[int]]:
    """The cores of each of `jobs` jobs. Each gets its own cores, because a process starts as many threads as it may use cores.

    Raises ConfigError for more jobs than cores.
    """
    cores = sorted(os.sched_getaffinity(0))
    if not 1 <= jobs <= len(cores):
        raise ConfigError(f"--jobs {jobs}: give 1 to {len(cores)}, because each job needs at least one core")
    return [cores[i::jobs] for i in range(jobs)]


def _run(queue: Sequence[Job], cores: Sequence[list[int]], study: Study) -> list[Job]:
    """Run the jobs, and return those that failed. The next job is always the first one that need not wait for another. One that
    was lost (`failures.START_AGAIN`) is started again once; one whose directory another process has, when that has ended.

    A Ctrl-C at the terminal reaches only this process (see `start_run`), which then stops the others.
    """
    waiting, done, again, held, failed = list(queue), set[str](), set[str](), set[str](), list[Job]()
    running: dict[int, tuple[Job, subprocess.Popen[bytes], float]] = {}  # by index into `cores`

    def ready() -> list[Job]:
        return [job for job in waiting if job.after is None or job.after.name in done]

    def startable() -> Job | None:
        return next((job for job in ready() if job.name not in held or not in_use(Path(job.config.run_dir))), None)

    def ask_to_stop() -> None:
        for _, process, _ in running.values():
            process.terminate()

    try:
        with stop_requests() as stop:
            while running or ready():
                for share in range(len(cores)):
                    if share not in running and (job := startable()):
                        waiting.remove(job)
                        process = start_run(job.command, job.config, _runs_folder(study), cores[share])
                        running[share] = job, process, time.perf_counter()
                time.sleep(POLL_S)
                for share, (job, process, began) in list(running.items()):
                    if (code := process.poll()) is not None:
                        del running[share]
                        word = "done" if code == 0 else "FAILED"
                        if code == failures.START_AGAIN and job.name not in again:
                            word = "lost, and is started again,"
                            again.add(job.name)
                            waiting.insert(0, job)
                        elif code != 0 and in_use(Path(job.config.run_dir)):
                            word = "in use by another process, and waits until that ends,"
                            held.add(job.name)
                            waiting.insert(0, job)
                        else:
                            done.add(job.name) if code == 0 else failed.append(job)
                        log.info("%s: %s after %.0f s", job.name, word, time.perf_counter() - began)
                if stop.requested:
                    ask_to_stop()
                    for _, process, _ in running.values():
                        process.wait()
                    raise KeyboardInterrupt
    finally:  # after any error, stop all processes
        ask_to_stop()
    return failed


def _runs_folder(study: Study) -> Path:
    return Path(study.out) / "runs"
