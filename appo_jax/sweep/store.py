"""The sweep's state on a shared disk: Optuna's journal of trials, and leases that say which worker has which task.

A task (a trial, or the cold start of a seed) belongs to the worker that holds its lease. The worker renews the lease while
it works. A lease that was not renewed in time, or whose process is gone, is free: another worker continues the task in
the same run directory, from its last checkpoint. Leases are taken under a lock, so no task has two workers.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, Trial, TrialState

from appo_jax.config_io import flatten
from appo_jax.errors import ConfigError
from appo_jax.sweep.plan import Point, Sweep

LEASE_S = 60.0  # a lease that was not renewed for this long is free
RENEW_S = 5.0
MAX_ASKS = 100  # impossible points that TPE may propose in a row


class Store:
    """One process's view of a sweep's storage."""

    def __init__(self, sweep: Sweep):
        self.sweep = sweep
        self.folder = Path(sweep.out)
        (self.folder / "runs").mkdir(parents=True, exist_ok=True)
        (self.folder / "leases").mkdir(exist_ok=True)
        self.me = {"host": socket.gethostname(), "pid": os.getpid()}
        self._lock_file = str(self.folder / "claims")
        with self.lock():
            self._check_same_sweep()
            journal = str(self.folder / "journal.log")
            storage = JournalStorage(JournalFileBackend(journal, JournalFileOpenLock(journal)))
            self.study = optuna.create_study(
                storage=storage, study_name="sweep", direction="maximize" if sweep.maximize else "minimize",
                load_if_exists=True, sampler=self._sampler(),
            )  # fmt: skip
            if not self.study.trials:
                for point in sweep.planned_points():
                    self.study.enqueue_trial(point)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """A lock that is held for milliseconds and works over NFS. If its holder died, it is taken over after 30
        seconds."""
        lock = JournalFileOpenLock(self._lock_file)
        lock.acquire()
        try:
            yield
        finally:
            lock.release()

    # ---- trials
    def trials(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False)

    def values(self, trial: FrozenTrial) -> dict[int, float]:
        """Objective by seed, of the seeds that a trial has run."""
        return {int(name[5:]): value for name, value in trial.user_attrs.items() if name.startswith("seed-")}

    def claim_trial(self) -> Trial | None:
        """A trial whose worker is gone, else a new one. None if all are done or other workers have the rest."""
        with self.lock():
            trials = self.trials()
            for trial in trials:
                if trial.state == TrialState.RUNNING and self._take(f"trial-{trial.number}"):
                    return Trial(self.study, trial._trial_id)
            if not self._more_wanted(trials):
                return None
            new = self._ask()
            self._take(f"trial-{new.number}")
            return new

    def retry_failed(self) -> int:
        """Queue the point of every failed trial again, once for each failure. Returns the number of points."""
        with self.lock():
            trials = self.trials()
            retried = {t.user_attrs["retry_of"] for t in trials if "retry_of" in t.user_attrs}
            failed = [t for t in trials if t.state == TrialState.FAIL and "impossible" not in t.user_attrs]
            left = [t for t in failed if t.number not in retried]
            for trial in left:
                self.study.enqueue_trial(trial.params, user_attrs={"retry_of": trial.number})
            return len(left)

    def all_done(self) -> bool:
        """Whether every trial has ended."""
        trials = self.trials()
        return not self._more_wanted(trials) and all(trial.state.is_finished() for trial in trials)

    def _more_wanted(self, trials: list[FrozenTrial]) -> bool:
        """Whether a new trial is needed: one waits in the queue, or TPE has not chosen all its points yet."""
        if any(trial.state == TrialState.WAITING for trial in trials):
            return True
        retried = {t.user_attrs.get("retry_of") for t in trials}
        begun = [t for t in trials if "impossible" not in t.user_attrs and t.number not in retried]
        return self.sweep.search == "tpe" and len(begun) < self.sweep.trials

    def _ask(self) -> Trial:
        for _ in range(MAX_ASKS):
            trial = self.study.ask(self.sweep.distributions)
            if self.sweep.possible(trial.params):
                return trial
            trial.set_user_attr("impossible", True)
            self.study.tell(trial, state=TrialState.FAIL)
        raise ConfigError(f"space: {MAX_ASKS} points in a row break a rule between fields; narrow the space")

    def _sampler(self) -> optuna.samplers.BaseSampler:
        if self.sweep.search == "tpe":
            # Workers choose at the same time. Running trials count as bad ones, so that workers choose different
            # points.
            return optuna.samplers.TPESampler(constant_liar=True, multivariate=True)
        return optuna.samplers.RandomSampler(seed=0)  # never asked: every point waits in the queue

    def _check_same_sweep(self) -> None:
        """Raise ConfigError if the folder holds another sweep, whose trials would mean something else."""
        file = self.folder / "definition.json"
        mine = _description(self.sweep)
        if not file.exists():
            _write(file, mine)
            return
        theirs = json.loads(file.read_text())
        if different := [key for key in mine if mine[key] != theirs.get(key)]:
            raise ConfigError(f"{self.folder} holds another sweep: {', '.join(different)} differ; give another `out`")

    # ---- leases
    def _take(self, task: str) -> bool:
        """Take a task's lease if it is free. Called under the lock."""
        file = self.folder / "leases" / f"{task}.json"
        with contextlib.suppress(FileNotFoundError, ValueError):
            if self._held_by_another(json.loads(file.read_text())):
                return False
        _write(file, self.me | {"time": time.time()})
        return True

    def take(self, task: str) -> bool:
        """Take a task's lease where it is free."""
        with self.lock():
            return self._take(task)

    def renew(self, task: str) -> bool:
        """Renew this worker's lease. False: another worker has taken it, and the work must stop."""
        with self.lock():
            file = self.folder / "leases" / f"{task}.json"
            lease = json.loads(file.read_text()) if file.exists() else {}
            if {key: lease.get(key) for key in self.me} != self.me:
                return False
            _write(file, self.me | {"time": time.time()})
            return True

    def release(self, task: str) -> None:
        if self.renew(task):
            (self.folder / "leases" / f"{task}.json").unlink(missing_ok=True)

    def _held_by_another(self, lease: dict[str, Any]) -> bool:
        if time.time() - lease["time"] > LEASE_S:
            return False
        return lease["host"] != self.me["host"] or (lease["pid"] != self.me["pid"] and _alive(lease["pid"]))


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _description(sweep: Sweep) -> dict[str, Any]:
    """Everything that a sweep's trials depend on, as JSON."""
    fields = {name: repr(value) for name, value in flatten(sweep.base).items()}
    space: Point = {name: repr(distribution) for name, distribution in sweep.distributions.items()}
    return {
        "base": fields, "space": space, "seeds": list(sweep.seeds), "max_sampled_tokens": sweep.max_sampled_tokens,
        "cold_starts": list(sweep.cold_starts), "search": sweep.search, "objective": sweep.objective, "maximize": sweep.maximize,
    }  # fmt: skip


def _write(file: Path, content: dict[str, Any]) -> None:
    """Write a file atomically."""
    partial = file.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps(content))
    partial.replace(file)
