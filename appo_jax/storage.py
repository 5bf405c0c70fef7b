"""Paths under which checkpoints work, and files that are written completely or not at all."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from appo_jax.errors import CheckpointError

# Orbax finds a checkpoint's files by a glob over the full path: a star may match another run's files, and a backslash is lost.
REFUSED = "*?[\\"
# In this time, in seconds, a host must find what another host has written on a shared disk. NFS shows it late.
SHARED_S = 60.0


def usable_path(path: str | Path) -> Path:
    """The absolute form of `path`. Raises CheckpointError if it is empty, or if checkpoints could be written under it but not read
    again."""
    if not str(path):
        raise CheckpointError(
            "run_dir = '': it would be the current folder; give the folder of the run (a variable may be unset)"
        )
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:/", str(path)):  # a Path has one slash where a URL has two
        raise CheckpointError(
            f"{path}: runs are written through the file system; mount the bucket or share (docs/pods.md) and give its folder"
        )
    absolute = Path(path).absolute()
    if found := sorted({character for character in str(absolute) if character in REFUSED}):
        raise CheckpointError(
            f"{absolute}: checkpoints under a path with {' '.join(found)} in it could not be read again; "
            f"rename the folder, or give a --run-dir without any of {' '.join(REFUSED)}"
        )
    try:
        str(absolute).encode()
    except UnicodeEncodeError as error:
        raise CheckpointError(
            f"{str(absolute)!r}: a path that is not valid UTF-8 cannot hold checkpoints; give another --run-dir"
        ) from error
    return absolute


def folder_size(folder: Path) -> int:
    """The bytes of all files under a folder. Files that are removed in the meantime count as 0."""
    total = 0
    for place, _, files in os.walk(folder):  # unlike rglob, it passes over a folder that vanishes
        for name in files:
            with contextlib.suppress(OSError):
                total += os.stat(os.path.join(place, name)).st_size
    return total


def unreadable(folder: Path) -> Path | None:
    """A file or folder in `folder` that this user may not read; orbax would take it for missing. None: there is none.

    Another process may be removing `folder`: what vanishes meanwhile does not count.
    """
    if not _readable(folder, os.R_OK | os.X_OK):
        return folder
    for place, folders, files in os.walk(folder):
        for names, rights in (folders, os.R_OK | os.X_OK), (files, os.R_OK):
            for name in sorted(names):
                if not _readable(path := Path(place, name), rights):
                    return path
    return None


def _readable(path: Path, rights: int) -> bool:
    return os.access(path, rights, effective_ids=True) or not os.path.lexists(path)


def lock(path: Path) -> int | None:
    """Lock a file until the returned descriptor is closed or the process ends. None: another process has locked it.

    Raises OSError if the file cannot be opened, or if its file system cannot lock.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return None
        raise OSError(error.errno, error.strerror, str(path)) from error
    return descriptor


def write_atomically(path: Path, content: str | bytes, durable: bool = True, writer: str = "") -> None:
    """Write a file so that a reader sees the old or the new content, never a partial one. `durable`: also after a power cut.

    `writer`: the name of this process, if several may write the file at the same time."""
    temporary = path.with_name(f"{path.name}{writer}.tmp")
    with naming(path):
        try:
            with temporary.open("wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                if durable:
                    file.flush()
                    os.fsync(file.fileno())
            temporary.replace(path)
        except OSError:  # on a full disk, its part would take the last space
            temporary.unlink(missing_ok=True)
            raise
        if durable:  # the new name, too
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """A context in which an OSError gets the name of a file. Those of write and fsync, such as that of a full disk, have none."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def read_resumable(path: Path) -> list[Any]:
    """The values in a file of JSON lines that a process appends to; [] if there is no file.

    An incomplete last line, which a killed process left, is removed from the file. Raises ValueError for any other line that is
    not JSON in UTF-8."""
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    values = [json.loads(line) for line in whole.split(b"\n") if line.strip()]
    if len(whole) < len(content):
        os.truncate(path, len(whole))
    return values


def cut_unfinished_line(path: Path) -> None:
    """Remove an incomplete last line from a file of lines: a full disk or a power cut has left a part of it."""
    with path.open("r+b") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)


def numbered_folders(folder: Path) -> list[Path]:
    """The folders in `folder` whose name is a number, in order: the steps of checkpoints."""
    found = [path for path in folder.glob("*") if path.name.isdecimal() and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name))


def unused_name(path: Path) -> Path:
    """`path`, with endings until nothing has this name."""
    while os.path.lexists(path):
        path = path.with_name(path.name + "_again")
    return path


def set_aside(path: Path, copy: bool = False) -> Path:
    """Rename (or copy) a damaged file to a new name such as step_3.damaged-1.jsonl. Returns the new path."""
    stem, dot, ending = path.name.partition(".")
    names = (path.with_name(f"{stem}.damaged-{i}{dot}{ending}") for i in itertools.count(1))
    target = next(name for name in names if not name.exists())
    shutil.copyfile(path, target) if copy else path.rename(target)
    return target


def to_json(record: Mapping[str, Any], indent: int | None = None) -> str:
    """Strict JSON of a record (`plain`), on one line or indented, with a newline at the end."""
    return json.dumps(plain(record), indent=indent, allow_nan=False) + "\n"


def plain(value: Any) -> Any:
    """A value in the types of strict JSON: array scalars become numbers, NaN and infinities become null."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
