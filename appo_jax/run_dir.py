"""The run directory: everything that a run writes, and the lock that allows only one process to write.

config.json           the resolved config; `appo-jax train --config RUN_DIR/config.json` trains from it again
metrics.jsonl         one line per step
summary.json          the run's figures
sft.json              the held-out accuracies before and after the cold start
checkpoints/          one folder per kept step
rollouts/             step_000012.jsonl.gz: one rollout tree per line
status.json           what the run does now (supervision/status.py)
plots/  tensorboard/  pictures and event files of the metrics
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import logging
import os
import secrets
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from appo_jax import distributed, heartbeat
from appo_jax.checkpoint_read import NO_RECORD, record_here
from appo_jax.config import Config
from appo_jax.config.effects import Affects
from appo_jax.config_io import changed_effects, config_json, flatten, load_config, parse_config
from appo_jax.dumps import dumped_steps
from appo_jax.errors import CheckpointError, ConfigError
from appo_jax.storage import SHARED_S, lock, naming, numbered_folders, set_aside, usable_path, write_atomically

# An NFS 4 server frees the lock of a machine that it has lost after about 90 s.
LOST_LOCK_S = 120.0

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class RunDir:
    """The paths of a run. A context manager: leaving it releases the lock (so does the end of the process)."""

    path: Path
    continued: bool  # the directory already held results of this run
    max_unsaved: (
        int  # steps that may be on record without a checkpoint: the larger checkpoint_every of this start and the last
    )
    lock: int | None  # the file descriptor that holds the lock, on the first host; None on the others

    @property
    def config(self) -> Path:
        return self.path / "config.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def rollouts(self) -> Path:
        return self.path / "rollouts"

    @property
    def plots(self) -> Path:
        return self.path / "plots"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    def evaluations(self, step: int) -> Path:
        """The folder of the reports on `eval.sets` at a step."""
        return self.path / "eval" / f"step_{step:06d}"

    def keep(self, config: Config) -> None:
        """Write config.json. A continued run does this when its records fit its checkpoints: with a smaller `checkpoint_every`, a
        later start would refuse the records that no checkpoint holds."""
        if self.lock is not None:
            write_atomically(self.config, config_json(config, self.config))

    def close(self) -> None:
        if self.lock is not None:
            os.close(self.lock)

    def __enter__(self) -> RunDir:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def open_run(config: Config) -> RunDir:
    """Create `config.run_dir`, or continue the run of the same config that it holds, and lock it for this process.

    The config of a continued run is written by `RunDir.keep`. Raises CheckpointError if the directory holds a run of another
    config (the message lists the fields; by config/effects.py, those that affect nothing may differ, and those that affect only
    rounding may with a warning) or of an unknown config, holds a config.json that is not a run's, is in use by another process,
    cannot be written, or cannot hold checkpoints (`usable_path`). With several hosts, the first does all this and tells the others
    the result, and all check that they see the same folder.
    """
    run = problem = number = None
    mark = secrets.token_hex(8)
    # CPU hosts wait only 30 s for each other in their first exchange (gloo), and the first host may wait longer for the lock.
    distributed.exchange(None)
    if distributed.host() == 0:
        try:
            run = _open(config, mark)
        except CheckpointError as error:
            problem = str(error)
        except OSError as error:
            problem, number = f"run_dir = {config.run_dir}: cannot be read, written or locked: {error}", error.errno
    message = [problem, number, run is not None and run.continued, mark]
    problem, number, continued, mark = distributed.exchange(message)[0]
    if problem is not None:
        # On every host, the disk's error decides whether the run is started again.
        disk = OSError(number, os.strerror(number), config.run_dir) if number else None
        raise CheckpointError(problem) from disk
    run = run or RunDir(Path(config.run_dir).absolute(), continued, config.checkpoint_every, lock=None)
    if distributed.num_hosts() > 1:
        _require_shared(run, mark)
    # On every host: if the first one fails, another one's supervisor records it.
    heartbeat.send(run_dir=str(run.path))
    return run


def _require_shared(run: RunDir, mark: str) -> None:
    """Raises CheckpointError, on every host, if one of them does not find the mark that the first host has written."""
    until = time.monotonic() + SHARED_S
    while not (seen := _holds(run.path / "lock", mark)) and time.monotonic() < until:
        heartbeat.progress()
        time.sleep(0.2)
    answers = distributed.exchange([seen, f"{run.path} on host {distributed.host()} ({socket.gethostname()})"])
    if others := [place for seen, place in answers if not seen]:
        run.close()
        raise CheckpointError(
            f"run_dir: {', '.join(others)} is not the folder {answers[0][1]}; all hosts must see the run in one folder: mount the "
            "shared storage on each of them, and give an absolute path on it"
        )


def _holds(file: Path, text: str) -> bool:
    with contextlib.suppress(OSError):
        return file.read_text(errors="replace") == text
    return False


def _open(config: Config, mark: str) -> RunDir:
    """Open the run on the first host, and write the mark for which the other hosts look. Raises CheckpointError or OSError."""
    path = usable_path(config.run_dir)
    if not _holds_results(path):
        _require_ours(path / "config.json")
    path.mkdir(parents=True, exist_ok=True)
    held = _lock(path)
    try:
        run = RunDir(path, _holds_results(path), config.checkpoint_every, held)
        if run.continued:
            kept = _check_same_run(run, config)
            run = dataclasses.replace(run, max_unsaved=max(config.checkpoint_every, kept.checkpoint_every))
        if run.metrics.exists() and run.metrics.stat().st_size and not (run.checkpoints / "rl").is_dir():
            raise CheckpointError(
                f"{run.metrics} records training steps, but {run.checkpoints / 'rl'} is gone; put it back, or delete "
                f"{path} to start the run from the beginning"
            )
        if not run.continued:
            run.keep(config)
        for folder in (run.checkpoints, run.rollouts, run.plots, run.tensorboard):
            folder.mkdir(exist_ok=True)
        with naming(path / "lock"):
            os.ftruncate(held, os.pwrite(held, mark.encode(), 0))
            os.fsync(held)  # NFS sends what is written to an open file to its server after half a minute
    except BaseException:
        os.close(held)
        raise
    return run


def _sets_measured_otherwise(kept: Config, config: Config) -> Iterator[str]:
    """A line for each set of `eval.sets` that is in both configs but not measured alike: its figures have one name, so they would
    be one curve."""
    before = {chosen.set: chosen for chosen in kept.eval.sets}
    for chosen in config.eval.sets:
        for field in dataclasses.fields(chosen) if chosen.set in before else ():
            was, given = (getattr(x, field.name) for x in (before[chosen.set], chosen))
            if was != given:
                yield f"  eval.sets: {field.name} of {chosen.set}: {was!r} in the run, {given!r} given"


def _holds_results(path: Path) -> bool:
    """A run that failed before its first step (for example, because of a wrong --data) has no results to protect."""
    records = (path / "metrics.jsonl", path / "sft.jsonl", *dumped_steps(path / "rollouts").values())
    return any(file.is_file() for file in itertools.chain(records, (path / "checkpoints").rglob("*")))


def _require_ours(file: Path) -> None:
    """Raises CheckpointError for a config.json that no run has written, such as that of a model's weights."""
    if not file.exists():
        return
    try:
        load_config(file)
    except ConfigError as error:
        raise CheckpointError(
            f"{file}: is not the config.json of a run, and no run's results are here; give another --run-dir, or delete this file\n"
            f"{error}"
        ) from error


def _lock(path: Path) -> int:
    """Lock a run. The lock of another machine, which may be lost, is waited for. Raises CheckpointError if it stays locked."""
    before, until, warned = _last_sign(path), time.monotonic() + LOST_LOCK_S, False
    while (held := lock(path / "lock")) is None:
        now = _last_sign(path)
        if now is None or now[1] == socket.gethostname() or now != before or time.monotonic() > until:
            sign = "" if now is None else f" (last sign of it {max(0, time.time() - now[0]):.0f} s ago, from {now[1]})"
            raise CheckpointError(
                f"{path}: another process is writing this run{sign}; wait for it, or give another --run-dir. NFS 3 keeps the "
                f"lock of a machine that was cut off: if it will not come back, delete {path / 'lock'}"
            )
        if not warned:
            log.warning(
                "%s: %s holds the run's lock; waiting up to %.0f s, in case it is lost", path, now[1], LOST_LOCK_S
            )
        warned = True
        heartbeat.progress()
        time.sleep(0.2)
    return held


def _last_sign(path: Path) -> tuple[float, str] | None:
    """(Unix time, machine) of status.json, which the process that writes the run renews every few seconds; None: unknown."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        status = json.loads((path / "status.json").read_text())
        return float(status["time"]), str(status["hosts"]["0"]["machine"])
    return None


def _kept_config(run: RunDir) -> Config:
    """The config with which the run was started last. If config.json is damaged or gone, it is written again from a checkpoint.

    Raises CheckpointError if no checkpoint holds it either, OSError if config.json cannot be read or written."""
    try:
        return load_config(run.config)
    except ConfigError as error:
        if isinstance(error.__cause__, OSError):  # it may be sound
            raise error.__cause__ from None
        if (found := _config_in_a_checkpoint(run)) is None:
            raise CheckpointError(
                f"{run.path} holds results, but neither a readable config.json nor a checkpoint says to which run they belong; put "
                f"config.json back, give another --run-dir, or delete this one to start from the beginning\n{error}"
            ) from error
    text, folder = found
    aside = f"; the damaged file is kept as {set_aside(run.config).name}" if run.config.exists() else ""
    write_atomically(run.config, text)
    log.warning("%s: is written again from the checkpoint %s%s", run.config, folder, aside)
    return load_config(run.config)


def _config_in_a_checkpoint(run: RunDir) -> tuple[str, Path] | None:
    """The JSON of the config in the newest checkpoint that holds one, and that checkpoint's folder."""
    for phase in ("rl", "sft"):
        for folder in reversed(numbered_folders(run.checkpoints / phase)):
            with contextlib.suppress(ConfigError, *NO_RECORD):
                text = record_here(folder)["meta"]["config"]
                parse_config(text)
                return text, folder
    return None


def _check_same_run(run: RunDir, config: Config) -> Config:
    """The config with which the run was started last. Raises CheckpointError if it is another run."""
    kept = _kept_config(run)
    old, new = flatten(kept), flatten(config)
    effects = changed_effects(kept, config)
    if how := [name for name, effect in effects.items() if effect is Affects.ROUNDING]:
        changes = ", ".join(f"{name} was {old.get(name)!r} and is {new.get(name)!r}" for name in how)
        log.warning(
            "%s: the run goes on, computed in another way (%s): the last bits of its figures may differ",
            run.path,
            changes,
        )
    absent = "(absent)"
    lines = [
        f"  {name}: {old.get(name, absent)!r} in the run, {new.get(name, absent)!r} given"
        for name, effect in effects.items()
        if effect not in (Affects.NOTHING, Affects.ROUNDING, Affects.CURVE)
    ]
    lines += _sets_measured_otherwise(kept, config)
    if lines:
        raise CheckpointError(
            f"{run.path} holds a run of another config:\n" + "\n".join(lines) + "\n"
            f"Give another --run-dir, delete {run.path} to start from the beginning, or train from {run.config} to continue "
            "that run."
        )
    return kept
