"""What a run asks of its disk: paths that checkpoints can live under, and files that are whole or not there."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from appo_jax.errors import CheckpointError

# Orbax finds a checkpoint's files with a glob over the whole path (where a star may find another run's), and loses a backslash.
REFUSED = "*?[\\"


def usable_path(path: str | Path) -> Path:
    """`path`, absolute. Raises CheckpointError where checkpoints could be written under it but not read again."""
    if "://" in str(path):
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
    """Bytes of all files under a folder; files that vanish meanwhile count nothing."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            total += path.stat().st_size if path.is_file() else 0
    return total


def write_atomically(path: Path, content: str | bytes, durable: bool = True) -> None:
    """Write a file that a reader finds old or new and never half written; `durable`: after a power cut, too."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        if durable:
            file.flush()
            os.fsync(file.fileno())
    temporary.replace(path)
    if durable:  # the new name, too
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def set_aside(path: Path, copy: bool = False) -> Path:
    """Rename a damaged file (or copy it) to a name that says so and is not taken: step_3.jsonl -> step_3.damaged-1.jsonl."""
    stem, dot, ending = path.name.partition(".")
    names = (path.with_name(f"{stem}.damaged-{i}{dot}{ending}") for i in itertools.count(1))
    target = next(name for name in names if not name.exists())
    shutil.copyfile(path, target) if copy else path.rename(target)
    return target


def to_json(record: Mapping[str, Any], indent: int | None = None) -> str:
    """One line of strict JSON, or an indented document: see `plain`."""
    return json.dumps(plain(record), indent=indent, allow_nan=False) + "\n"


def plain(value: Any) -> Any:
    """A value as strict JSON can hold it: array scalars as numbers, NaN and infinities as null."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
