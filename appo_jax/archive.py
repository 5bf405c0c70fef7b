"""`appo-jax checkpoints RUN`: list, verify and copy the checkpoints of a run, and remove broken ones."""

from __future__ import annotations

import dataclasses
import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from appo_jax.checkpoint import TEMPORARY
from appo_jax.checkpoint_read import verify
from appo_jax.errors import CheckpointError
from appo_jax.storage import usable_path


@dataclasses.dataclass(frozen=True)
class Entry:
    """Something in the checkpoint folder of a phase."""

    path: Path
    kind: str  # checkpoint, refused, half-written, stray
    size: int  # bytes
    written: float  # Unix time

    def line(self, word: str = "") -> str:
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(self.written))
        return f"{self.path.parent.name}/{self.path.name:24} {self.kind:13} {self.size / 1e6:10.1f} MB  {when}  {word}".rstrip()


def entries(run: Path) -> list[Entry]:
    """The entries of a run's checkpoint folders, with steps in order. Raises CheckpointError if there are no such folders."""
    folders = [folder for phase in ("sft", "rl") if (folder := run / "checkpoints" / phase).is_dir()]
    if not folders:
        raise CheckpointError(f"{run}: no checkpoints; give the directory of a run that has begun to train")
    return [_entry(path) for folder in folders for path in sorted(folder.iterdir(), key=_order)]


def verified(run: Path) -> Iterator[tuple[Entry, str]]:
    """Read every checkpoint completely. Each comes with "sound", or with what is wrong with it."""
    for entry in entries(run):
        if entry.kind == "checkpoint":
            yield entry, verify(entry.path)


def prune(run: Path) -> list[Entry]:
    """Remove refused and half-written checkpoints, and return them. Raises CheckpointError if a process is writing the run."""
    with _locked(run):
        gone = [entry for entry in entries(run) if entry.kind in ("refused", "half-written")]
        for entry in gone:
            shutil.rmtree(entry.path)
    return gone


def copy(run: Path, out: Path) -> Path:
    """Copy the newest sound RL checkpoint and the run's config to `out`, a run directory that can be continued or exported.

    Raises CheckpointError if no checkpoint is sound, or if `out` exists and is not empty.
    """
    if out.exists() and any(out.iterdir()):
        raise CheckpointError(f"{out}: exists and is not empty; give a new folder")
    for entry in reversed(entries(run)):
        if entry.kind != "checkpoint" or entry.path.parent.name != "rl" or verify(entry.path) != "sound":
            continue
        target = usable_path(out) / "checkpoints" / "rl" / entry.path.name
        shutil.copytree(entry.path, target)
        shutil.copy(run / "config.json", out)
        if (word := verify(target)) != "sound":
            raise CheckpointError(
                f"{target}: the copy differs from the original ({word}); the disk under {out} loses data"
            )
        return target
    raise CheckpointError(f"{run}: no sound checkpoint under checkpoints/rl; nothing can be copied")


def _entry(path: Path) -> Entry:
    files = [file for file in (path.rglob("*") if path.is_dir() else (path,)) if file.is_file()]
    kind = (
        "half-written" if TEMPORARY in path.name
        else "refused" if path.name.startswith("refused_")
        else "checkpoint" if path.name.isdigit() and path.is_dir()
        else "stray"
    )  # fmt: skip
    return Entry(path, kind, sum(file.stat().st_size for file in files), path.stat().st_mtime)


def _order(path: Path) -> tuple[bool, int, str]:
    return (not path.name.isdigit(), int(path.name) if path.name.isdigit() else 0, path.name)


class _locked:
    """A context in which no other process writes the run."""

    def __init__(self, run: Path) -> None:
        self._run = run

    def __enter__(self) -> None:
        self._lock = os.open(self._run / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            raise CheckpointError(f"{self._run}: a process is writing this run; prune it when it has ended") from error

    def __exit__(self, *exc: Any) -> None:
        os.close(self._lock)
