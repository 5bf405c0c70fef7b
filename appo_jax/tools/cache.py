"""A cache of answered queries in an SQLite file that all processes of a machine share (in WAL mode, readers do not wait for a
writer)."""

from __future__ import annotations

import contextlib
import json
import logging
import sqlite3
import threading
import time
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path

from appo_jax.errors import DataError
from appo_jax.tools.protocol import writable

LOCK_TIMEOUT_S = 30.0
log = logging.getLogger(__name__)


class QueryCache:
    """`{query: text}` on disk. Queries that differ only in case, spacing or Unicode spelling count as the same.

    `backend` separates the answers of different servers and numbers of pages. Safe to use from several threads and processes.
    """

    def __init__(self, path: str | Path, backend: str = ""):
        self.path = Path(path)
        self.backend = backend
        self._local = threading.local()
        self._connections: list[sqlite3.Connection] = []
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self._database() as database:
                database.execute(
                    "CREATE TABLE IF NOT EXISTS answers "
                    "(query TEXT, backend TEXT, text TEXT, PRIMARY KEY (query, backend))"
                )
        except (sqlite3.Error, OSError) as error:
            raise DataError(
                f"tools.search.cache = {self.path}: cannot be opened as an SQLite file ({error})"
            ) from error

    def get(self, query: str) -> str | None:
        """The stored text, from this backend or from a file of answers (`fill`); None if there is none, or it cannot be read."""
        row = None
        with going_on_without(self.path):
            rows = self._database().execute(
                "SELECT text FROM answers WHERE query = ? AND backend IN (?, '') ORDER BY backend DESC LIMIT 1",
                (_key(query), self.backend),
            )
            row = rows.fetchone()
        return row[0] if row else None

    def put(self, query: str, text: str) -> None:
        """Store a text. If the file cannot be written, it is not stored."""
        with going_on_without(self.path):
            self._store([(_key(query), self.backend, writable(text))])

    def fill(self, path: str | Path) -> int:
        """Store the answers of a `{query: text}` JSON file. Returns their number. Raises DataError."""
        try:
            answers = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise DataError(f"search answers {path}: cannot be read as JSON ({error})") from error
        if not isinstance(answers, dict) or not all(isinstance(text, str) for text in answers.values()):
            raise DataError(f"search answers {path}: expected an object of the form {{query: text}}")
        try:
            self._store((_key(query), "", writable(text)) for query, text in answers.items())
        except sqlite3.Error as error:
            raise DataError(f"tools.search.cache = {self.path}: {path} cannot be stored in it ({error})") from error
        return len(answers)

    def close(self) -> None:
        for connection in self._connections:
            connection.close()

    def _store(self, rows: Iterable[tuple[str, str, str]]) -> None:
        with self._database() as database:  # one transaction
            database.executemany("INSERT OR REPLACE INTO answers VALUES (?, ?, ?)", rows)

    def _database(self) -> sqlite3.Connection:
        if not hasattr(self._local, "connection"):
            # One connection per thread. Only close() uses the connections of other threads.
            connection = open_shared(self.path)
            connection.execute("PRAGMA synchronous = NORMAL")
            self._local.connection = connection
            self._connections.append(connection)
        return self._local.connection


@contextlib.contextmanager
def going_on_without(path: Path) -> Iterator[None]:
    """A context that an error of a cache's file ends: a full disk or a damaged file costs the use of the cache, and nothing
    else. The first error of each file is logged."""
    try:
        yield
    except sqlite3.Error as error:
        if path not in _logged:
            _logged.add(path)
            log.warning(
                "%s: going on without this cache where it fails (%s); free the disk, or delete it and its -wal and -shm files",
                path,
                error,
            )


_logged: set[Path] = set()  # files of which an error was logged


def open_shared(path: str | Path) -> sqlite3.Connection:
    """A connection to a file in WAL mode, for any thread. Raises sqlite3.Error.

    Setting WAL mode is the only operation in which SQLite does not wait for a lock: if two processes open a new file at the
    same time, one gets "database is locked" at once. So it is retried here.
    """
    connection = sqlite3.connect(path, timeout=LOCK_TIMEOUT_S, check_same_thread=False)
    give_up = time.monotonic() + LOCK_TIMEOUT_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return connection
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > give_up:
                raise
            time.sleep(0.01)


def _key(query: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", writable(query)).casefold().split())
