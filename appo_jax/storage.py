"""What a run asks of its disk: paths that checkpoints can live under, and files that are whole or not there."""

from __future__ import annotations

import os
from pathlib import Path

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


def write_atomically(path: Path, text: str, durable: bool = True) -> None:
    """Write a file that a reader finds old or new and never half written; `durable`: after a power cut, too."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w") as file:
        file.write(text)
        if durable:
            file.flush()
            os.fsync(file.fileno())
    temporary.replace(path)
