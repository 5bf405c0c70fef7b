"""Runs a study unattended: every run is a process of its own, finished ones are kept, a failed one stops no other."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
from pathlib import Path

from appo_jax.config import Config
from appo_jax.config_io import save_config
from appo_jax.errors import TrainingError
from appo_jax.study.plan import Study
from appo_jax.study.report import write_report

log = logging.getLogger(__name__)


def run_study(study: Study) -> str:
    """Make every run that is not finished, seed by seed, then the report; returns its table.

    A run that was interrupted goes on from its last checkpoint. Raises TrainingError, after the report, when runs failed.
    """
    first = study.cold_start(study.seeds[0])
    (Path(study.out) / "runs").mkdir(parents=True, exist_ok=True)
    failed = []
    if first.data.source == "world" and not Path(str(first.policy.tokenizer)).exists():
        _must(["data", "world"], first, study)
    for seed in study.seeds:
        if not _succeeds(["sft"], study.cold_start(seed), study):
            failed.append(f"cold-{seed}")
            continue
        for arm in study.arms:
            if finished(study, arm, seed):
                log.info("%s-%d: kept", arm, seed)
            elif not _succeeds(["train"], study.config(arm, seed), study):
                failed.append(f"{arm}-{seed}")
    table = write_report(study)
    if failed:
        logs = ", ".join(str(_log_file(study, name)) for name in failed)
        raise TrainingError(f"{len(failed)} runs failed: see {logs}; the same command tries them again")
    return table


def finished(study: Study, arm: str, seed: int) -> bool:
    """Whether a run has used up its budget and been evaluated."""
    summary = study.run_dir(arm, seed) / "summary.json"
    return summary.exists() and json.loads(summary.read_text())["sampled_tokens"] >= study.max_sampled_tokens


def _must(command: list[str], config: Config, study: Study) -> None:
    if not _succeeds(command, config, study):
        raise TrainingError(f"`appo-jax {' '.join(command)}` failed: see {_log_file(study, Path(config.run_dir).name)}")


def _succeeds(command: list[str], config: Config, study: Study) -> bool:
    """Run `appo-jax COMMAND` on a config, its output in a log file beside its run directory."""
    name = Path(config.run_dir).name
    file = Path(study.out) / "runs" / f"{name}.json"
    save_config(config, file)
    began = time.perf_counter()
    with _log_file(study, name).open("a") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "appo_jax.cli", *command, "--config", str(file)],
            stdout=out,
            stderr=subprocess.STDOUT,
        )
        try:
            code = process.wait()
        except KeyboardInterrupt:  # the run was asked to stop too: it saves, then leaves
            process.wait()
            raise
    log.info(
        "%s %s: %s after %.0f s",
        " ".join(command),
        name,
        "done" if code == 0 else "FAILED",
        time.perf_counter() - began,
    )
    return code == 0


def _log_file(study: Study, name: str) -> Path:
    return Path(study.out) / "runs" / f"{name}.log"
