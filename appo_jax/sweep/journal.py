"""The file of Optuna's journal: one JSON record a line, appended by all workers.

A full disk or a power cut may leave a part of a record. Optuna would append the next record to that part, and could never read the
journal again.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

from appo_jax.errors import DataError
from appo_jax.storage import cut_unfinished_line


class Lock(JournalFileOpenLock):
    """The lock of the journal and of all leases: a file, so that it works over NFS. If its holder dies or stalls, it is free after
    30 s; a holder that only stalled may then write beside the next one.

    Whoever has it may take it again, as Optuna does for every record. With a lock of its own for the journal, a process that dies
    with both would keep all others waiting twice as long. Whoever takes it removes the part of a record at the end of the journal.
    """

    def __init__(self, journal: Path):
        super().__init__(str(journal))
        self._journal = journal
        self._thread = threading.RLock()
        self._taken = 0  # times that this process has taken the lock and not given it back

    def acquire(self) -> bool:
        """Wait for the lock and take it. Raises OSError if the disk fails."""
        self._thread.acquire()
        try:
            if not self._taken:
                super().acquire()
                try:
                    cut_unfinished_line(self._journal)
                except BaseException:
                    self.release()
                    raise
        except BaseException:
            self._thread.release()
            raise
        self._taken += 1
        return True

    def release(self) -> None:
        """Give the lock back. Raises OSError if the disk fails, or if another process has taken the lock over."""
        if not self._taken:  # `acquire` removes a lock whose holder has died, or its own after an error
            super().release()
            return
        self._taken -= 1
        try:
            if not self._taken:
                super().release()
        except RuntimeError as error:
            raise OSError(f"{self._lock_file}: cannot be removed, or another process has taken it over") from error
        finally:
            self._thread.release()


class Journal(JournalFileBackend):
    """The journal in a file. Reading ignores a part of a record at the end."""

    def __init__(self, path: Path):
        self.lock = Lock(path)
        super().__init__(str(path), self.lock)

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:  # type: ignore[override]
        """The records from this number on. Raises DataError that names the line which is no record."""
        number = log_number_from
        try:
            for record in super().read_logs(log_number_from):
                number += 1
                yield record
        except ValueError as error:
            raise DataError(
                f"{self._file_path}, line {number + 1}: expected a JSON record of Optuna's journal ({error}); the disk or another "
                "program has damaged it: put the file back from a copy, give another `out`, or, if a part of a record stands "
                "before a complete one in this line, delete that part"
            ) from error
