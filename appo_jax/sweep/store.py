"""The state of a sweep on a shared disk: Optuna's journal of trials, and leases that say which worker has which task.

A task is a trial, or work that trials share: a cold start, the generation of the data. It belongs to the worker that holds its
lease, and the worker renews the lease while it works. If a lease was not renewed in time, or if its process has ended, the
lease is free: another worker continues the task in the same run directory, from its last checkpoint. Leases are taken under a
lock, so two workers never take the same task.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState

from appo_jax.config_io import flatten
from appo_jax.errors import ConfigError, DataError, TrainingError
from appo_jax.storage import write_atomically
from appo_jax.sweep.definition import Point, Sweep
from appo_jax.sweep.journal import Journal

LEASE_S = 60.0  # seconds without renewal after which a lease is free
RENEW_S = 5.0  # seconds between two renewals
PROCESS = secrets.token_hex(8)  # the name of this process among those of all machines
MAX_ASKS = 20  # points in a row that cannot be used, after which a random one takes the place of TPE's choice


class Store:
    """Access of one process to the storage of a sweep. The first process creates the storage."""

    def __init__(self, sweep: Sweep):
        """Raises ConfigError if the folder of the sweep holds another sweep, DataError if a file in it is damaged."""
        self.sweep = sweep
        self.folder = Path(sweep.out)
        (self.folder / "runs").mkdir(parents=True, exist_ok=True)
        (self.folder / "leases").mkdir(exist_ok=True)
        self._seen: dict[
            str, tuple[dict[str, Any], float]
        ] = {}  # task: its last lease, and the time at which it was new
        self._owner = {"host": socket.gethostname(), "pid": os.getpid(), "pids": _pids(), "id": PROCESS}
        self._writer = f".{PROCESS}"  # two processes may believe that they have the lock
        self._forms: dict[tuple[tuple[str, Any], ...], frozenset[tuple[str, Any]]] = {}  # by point
        self._journal = Journal(self.folder / "journal.log")
        with self.lock():
            stored = self._stored_definition()
            self.study = optuna.create_study(
                storage=JournalStorage(self._journal), study_name="sweep",
                direction="maximize" if sweep.maximize else "minimize", load_if_exists=True, sampler=self._sampler(),
            )  # fmt: skip
            self._keep_definition(stored)
            self._queue_points()

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """A context that holds the lock of the journal and of all leases. Threads other than the one that does the trials must not
        use the journal in it. Raises OSError if the disk fails, or if another process has taken the lock over."""
        self._journal.lock.acquire()
        try:
            yield
        finally:
            self._journal.lock.release()

    def _queue_points(self) -> None:
        """Queue the points of a grid or of a random sweep that are not queued yet: all of them; the rest, if a process was killed
        before it had queued all; or those of a number of `trials` that was raised."""
        queued = [self._form(self.point(trial)) for trial in self.standing()]
        new = [point for point in self.sweep.queued_points() if self._form(point) not in queued]
        if self.sweep.search == "random":  # an earlier version has drawn others
            new = new[: max(0, self.sweep.trials - len(queued))]
        for point in new:
            self.study.enqueue_trial(point)

    def _form(self, point: Point) -> frozenset[tuple[str, Any]]:
        """`Sweep.form`, which is slow, once for each point."""
        key = tuple(point.items())
        if key not in self._forms:
            self._forms[key] = self.sweep.form(point)
        return self._forms[key]

    # ---- trials
    def trials(self) -> list[FrozenTrial]:
        """All trials, in the order of their numbers."""
        return self.study.get_trials(deepcopy=False)

    def standing(self) -> list[FrozenTrial]:
        """The trials that stand for their points: without points that break a rule or have an earlier trial, and without failed
        trials that are tried again in a later trial."""
        trials = self.trials()
        retried = {t.user_attrs.get("retry_of") for t in trials}
        return [t for t in trials if not {"impossible", "repeated"} & t.user_attrs.keys() and t.number not in retried]

    def failed(self) -> list[int]:
        """The numbers of the trials that failed and are not tried again."""
        return [trial.number for trial in self.standing() if trial.state == TrialState.FAIL]

    def require_success(self) -> None:
        """Raises TrainingError that names the failed trials. Workers do not try them again: every start of one would."""
        if failed := self.failed():
            raise TrainingError(
                f"trials {', '.join(map(str, failed))} failed: see the logs in {self.folder / 'runs'}; the command without "
                "--worker tries them again"
            )

    def point(self, trial: FrozenTrial) -> Point:
        """The point of a trial, which may still wait."""
        return trial.system_attrs.get("fixed_params", {}) | trial.params

    def runs_of(self, trial: FrozenTrial | Trial) -> int:
        """The number in the names of a trial's run directories. A trial that tries a failed one again goes on in its directories:
        finished runs stay, and the run that failed continues from its last checkpoint."""
        return trial.user_attrs.get("runs_of", trial.number)

    def tell(self, trial: Trial, values: Collection[float], state: TrialState) -> None:
        """End a trial. `values`: the objective of its runs; Optuna gets the mean, negated if `maximize` has changed since the
        storage was made."""
        sign = 1 if self.sweep.maximize == (self.study.direction == StudyDirection.MAXIMIZE) else -1
        mean = sign * sum(values) / len(values) if values else 0.0
        if state == TrialState.PRUNED:
            trial.report(mean, len(values))  # Optuna takes the last reported value as that of a pruned trial
        self.study.tell(trial, mean if state == TrialState.COMPLETE else None, state=state)

    def values(self, trial: FrozenTrial) -> dict[int, float]:
        """The objective of a trial by seed, for the seeds that it has run."""
        return {int(name[5:]): value for name, value in trial.user_attrs.items() if name.startswith("seed-")}

    def claim_trial(self) -> Trial | None:
        """Take a trial whose lease is free, or, if there is none, a new trial.

        None: all trials are done, or other workers have the rest. If TPE proposes no point that can be used, the trial gets the
        next random one.
        """
        with self.lock():
            for trial in self.trials():
                if trial.state == TrialState.RUNNING and self._take(f"trial-{trial.number}"):
                    found = Trial(self.study, trial._trial_id)
                    if self._has_point(found):
                        return found
                    self.study.tell(found, state=TrialState.FAIL)
            new, unusable = None, list[Trial]()
            while new is None and self._needs_new_trial(self.trials()):
                if self.sweep.search == "tpe" and len(unusable) == MAX_ASKS:
                    tried = [self._form(self.point(trial)) for trial in self.standing()]
                    points = self.sweep.random_points()
                    self.study.enqueue_trial(next(p for p in points if self._form(p) not in tried))
                asked = self.study.ask()
                if self._has_point(asked):
                    new = asked
                else:
                    unusable.append(asked)
            # They have run until here, so that TPE took them for bad results and did not propose them again and again.
            for failed in unusable:
                self.study.tell(failed, state=TrialState.FAIL)
            if new is not None:
                self._take(f"trial-{new.number}")
            return new

    def _has_point(self, trial: Trial) -> bool:
        """Give a trial its point: the one that it was queued with, or one that the sampler chooses. A worker that was killed here
        has left a part of it. A point that breaks a rule, or whose runs a trial has already, is marked, and the result is False."""
        for name, distribution in self.sweep.distributions.items():
            trial._suggest(name, distribution)  # as `Study.ask` does it; a field that has its value keeps it
        earlier = [other for other in self.standing() if other.number < trial.number]
        if not self.sweep.possible(trial.params):
            trial.set_user_attr("impossible", True)
        elif self._form(trial.params) in [self._form(self.point(other)) for other in earlier]:
            trial.set_user_attr("repeated", True)
        else:
            return True
        return False

    def retry_failed(self) -> int:
        """Queue the point of every failed trial again, once for each failure. Returns the number of queued points."""
        with self.lock():
            trials = self.trials()
            failed = [trials[number] for number in self.failed()]
            for trial in failed:
                results = {name: value for name, value in trial.user_attrs.items() if name.startswith("seed-")}
                origin = {"retry_of": trial.number, "runs_of": self.runs_of(trial)}
                self.study.enqueue_trial(trial.params, user_attrs=origin | results)
            return len(failed)

    def all_done(self) -> bool:
        """Whether every trial has ended."""
        trials = self.trials()
        return not self._needs_new_trial(trials) and all(trial.state.is_finished() for trial in trials)

    def _needs_new_trial(self, trials: list[FrozenTrial]) -> bool:
        """Whether a new trial must begin: one waits in the queue, or TPE has not chosen all its points yet."""
        if any(trial.state == TrialState.WAITING for trial in trials):
            return True
        return self.sweep.search == "tpe" and len(self.standing()) < self.sweep.trials

    def _sampler(self) -> optuna.samplers.BaseSampler:
        if self.sweep.search == "tpe":
            # With `constant_liar`, running trials count as bad results, so that several workers choose different points.
            return optuna.samplers.TPESampler(constant_liar=True, multivariate=True)
        return optuna.samplers.RandomSampler(seed=0)  # chooses no point, because all points wait in the queue

    def _stored_definition(self) -> dict[str, Any] | None:
        """The definition of the sweep that the folder holds; None if it holds none. Raises DataError for a damaged one."""
        file = self.folder / "definition.json"
        if not file.exists():
            return None
        try:
            return dict(json.loads(file.read_text()))
        except (ValueError, TypeError) as error:
            raise DataError(
                f"{file}: expected the definition of a sweep as JSON ({error}); put it back from a copy, or, if the runs in this "
                "folder are of this sweep, delete it: the same command writes it again"
            ) from error

    def _keep_definition(self, stored: dict[str, Any] | None) -> None:
        """Write the definition of the sweep into the folder. Raises ConfigError if it holds that of another sweep. While no trial
        has a value or is under way, another objective may be given: the finished runs have its value, too."""
        definition = _description(self.sweep)
        different = [] if stored is None else _differences(stored, definition)
        free = {"objective", "maximize"} if not any(map(self._has_begun, self.trials())) else set()
        if refused := [name for name in different if name not in free]:
            raise ConfigError(f"{self.folder} holds another sweep: {', '.join(refused)} differ; give another `out`")
        if stored is None or different:
            write_atomically(self.folder / "definition.json", json.dumps(definition), writer=self._writer)

    def _has_begun(self, trial: FrozenTrial) -> bool:
        """Whether a trial has a value, or a worker that would give it one."""
        task = f"trial-{trial.number}"
        under_way = trial.state == TrialState.RUNNING and self._held_by_another(task, self._lease(task))
        return bool(self.values(trial)) or under_way

    # ---- leases
    def _take(self, task: str) -> bool:
        """`take`, for callers that hold the lock."""
        if self._held_by_another(task, self._lease(task)):
            return False
        self._write_lease(task)
        return True

    def _lease(self, task: str) -> dict[str, Any]:
        """The lease of a task; empty if there is none, or a damaged one."""
        with contextlib.suppress(FileNotFoundError, ValueError):
            lease = json.loads((self.folder / "leases" / f"{task}.json").read_text())
            if isinstance(lease, dict) and isinstance(lease.get("host"), str) and isinstance(lease.get("pid"), int):
                return lease
        return {}

    def _write_lease(self, task: str) -> None:
        file = self.folder / "leases" / f"{task}.json"
        write_atomically(file, json.dumps(self._owner | {"time": time.time()}), durable=False, writer=self._writer)

    def take(self, task: str) -> bool:
        """Take the lease of a task if it is free or this process has it already. Returns whether this process has it now."""
        with self.lock():
            return self._take(task)

    def renew(self, task: str) -> bool:
        """Renew the lease of a task. False: another worker has taken it, so this worker must stop the task."""
        with self.lock():
            lease = self._lease(task)
            if {key: lease.get(key) for key in self._owner} != self._owner:
                return False
            self._write_lease(task)
            return True

    def release(self, task: str) -> None:
        """Give the lease of a task back. Does nothing if another worker has it."""
        if self.renew(task):
            (self.folder / "leases" / f"{task}.json").unlink(missing_ok=True)

    def _held_by_another(self, task: str, lease: dict[str, Any]) -> bool:
        """Whether another process holds the lease: it was renewed in time, and its process, if this one can see it, lives.

        The clocks of machines differ. So the time of a renewal only tells one from the next, and LEASE_S is counted from when this
        process first saw the last one. Containers may have one host name, and each may have a process of this number.
        """
        if not lease:
            return False
        if self._seen.get(task, ({}, 0.0))[0] != lease:
            self._seen[task] = lease, time.monotonic()
        if lease.get("id") == PROCESS or time.monotonic() - self._seen[task][1] > LEASE_S:
            return False
        if any(lease.get(key) != self._owner[key] for key in ("host", "pids")):
            return True
        return lease["pid"] != self._owner["pid"] and _alive(lease["pid"])


def _pids() -> str:
    """A name of the processes that this one sees: those of its machine since it was booted, or of its container there."""
    with contextlib.suppress(OSError):
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    return PROCESS  # not known: no other process has this name


def _alive(pid: int) -> bool:
    """Whether a process lives, of those that this one sees."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):  # OverflowError: no process has such a number
        return False
    except PermissionError:
        return True
    return True


def _description(sweep: Sweep) -> dict[str, Any]:
    """Everything on which the trials of a sweep depend, as JSON."""
    fields = {name: repr(value) for name, value in flatten(sweep.base).items()}
    space: Point = {name: repr(distribution) for name, distribution in sweep.distributions.items()}
    return {
        "base": fields, "space": space, "seeds": list(sweep.seeds), "max_sampled_tokens": sweep.max_sampled_tokens,
        "cold_starts": list(sweep.cold_starts), "search": sweep.search, "objective": sweep.objective, "maximize": sweep.maximize,
    }  # fmt: skip


def _differences(stored: dict[str, Any], given: dict[str, Any], within: str = "") -> list[str]:
    """The names of the values that differ between two descriptions; for fields of the base and of the space, with theirs."""
    different = []
    for name in dict.fromkeys([*given, *stored]):
        was, now = stored.get(name), given.get(name)
        if isinstance(was, dict) and isinstance(now, dict):
            different += _differences(was, now, f"{name}: ")
        elif was != now:
            different.append(f"{within}{name}")
    return different
