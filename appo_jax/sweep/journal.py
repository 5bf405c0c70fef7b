"""The file of Optuna's journal: one JSON record a line, appended by all workers.

A full disk or a power cut may leave a part of a record. Optuna would append the next record to that part, and could never read the
journal again.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

from appo_jax.errors import DataError
from appo_jax.storage import cut_unfinished_line


class _Lock(JournalFileOpenLock):
    """The lock that Optuna takes to append records. Whoever takes it removes the part of a record that is at the end."""

    def __init__(self, journal: Path):
        super().__init__(str(journal))
        self._journal = journal

    def acquire(self) -> bool:
        super().acquire()
        try:
            cut_unfinished_line(self._journal)
        except BaseException:
            self.release()
            raise
        return True


class Journal(JournalFileBackend):
    """The journal in a file. Reading ignores a part of a record at the end."""

    def __init__(self, path: Path):
        super().__init__(str(path), _Lock(path))

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
