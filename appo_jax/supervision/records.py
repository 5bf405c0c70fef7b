"""What a supervisor writes into the run's folder: status.json and failures.jsonl.

A thread writes them. A shared disk may not answer for a while, and the supervisor must send its heartbeats meanwhile.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from appo_jax.errors import DataError
from appo_jax.supervision.status import Status, note_failure, read_status

# At the end, the supervisor waits this long for a file.
LAST_S = 5.0


class Records:
    """The files of a run that its supervisor writes. An error of the disk must not end the supervisor, so none is raised."""

    def __init__(self, run_dir: Path, steps: int) -> None:
        self._run_dir, self._steps = run_dir, steps
        self._error: str | None = None  # the last one, which may be that of an earlier start
        self._error_time, self._failures = 0.0, 0
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "records")
        self._work = self._thread.submit(self._remember)

    def running(self, hosts: Mapping[str, Mapping[str, Any]]) -> None:
        """Write the status of a run that goes on; nothing if the last write has not ended."""
        if self._work.done():
            self._work = self._thread.submit(self._write, "running", hosts)

    def ended(self, state: str, hosts: Mapping[str, Mapping[str, Any]], error: str | None) -> None:
        """Write the last status of a run. `error`: the failure that ended it."""
        self._wait_for(self._thread.submit(self._end, state, hosts, error))

    def note(self, host: int, machine: str, step: int, error: str) -> str:
        """Add a failure to failures.jsonl. Returns a warning (`note_failure`) or ""."""
        return self._wait_for(self._thread.submit(note_failure, self._run_dir, host, machine, step, error)) or ""

    def _wait_for(self, work: concurrent.futures.Future[Any]) -> Any:
        with contextlib.suppress(OSError, concurrent.futures.TimeoutError):
            return work.result(LAST_S)

    def _remember(self) -> None:
        with contextlib.suppress(DataError):
            if (before := read_status(self._run_dir)) is not None:
                self._error, self._error_time, self._failures = before.error, before.error_time, before.failures

    def _end(self, state: str, hosts: Mapping[str, Mapping[str, Any]], error: str | None) -> None:
        if error is not None:
            self._error, self._error_time, self._failures = error, time.time(), self._failures + 1
        elif state == "done":
            self._error, self._failures = None, 0
        self._write(state, hosts)

    def _write(self, state: str, hosts: Mapping[str, Mapping[str, Any]]) -> None:
        status = Status(state, self._steps, time.time(), hosts, self._error, self._error_time, self._failures)
        status.write(self._run_dir)
