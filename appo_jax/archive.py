"""`appo-jax checkpoints RUN`: list, verify and copy the checkpoints of a run, and remove broken ones."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from appo_jax.checkpoint import TEMPORARY
from appo_jax.checkpoint_read import REMOVED, verify
from appo_jax.errors import CheckpointError
from appo_jax.storage import folder_size, lock, usable_path, write_atomically


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
    paths = [path for folder in folders for path in sorted(folder.iterdir(), key=_order)]
    return [entry for path in paths if (entry := _entry(path)) is not None]


def verified(run: Path) -> Iterator[tuple[Entry, str]]:
    """Read every checkpoint completely. Each comes with "sound", or with what is wrong with it."""
    for entry in entries(run):
        if entry.kind == "checkpoint" and (word := verify(entry.path)) != REMOVED:  # by the run, which goes on
            yield entry, word


def prune(run: Path) -> list[Entry]:
    """Remove refused and half-written checkpoints, and return them. Raises CheckpointError if a process is writing the run."""
    with _locked(run):
        gone = [entry for entry in entries(run) if entry.kind in ("refused", "half-written")]
        for entry in gone:
            shutil.rmtree(entry.path)
    return gone


def copy(run: Path, out: Path) -> Path:
    """Copy a run with its newest sound RL checkpoint to `out`, which can then be continued or exported. Returns the copied step.

    Copied are the newest sound checkpoint of the cold start, too, the records of steps, and the config with `run_dir = out`.
    Raises CheckpointError if no RL checkpoint is sound, or if `out` exists and is not empty.
    """
    if out.exists() and any(out.iterdir()):
        raise CheckpointError(f"{out}: exists and is not empty; give a new folder")
    out = usable_path(out)
    copied = {phase: step for phase in ("rl", "sft") if (step := _newest_sound(run, phase)) is not None}
    if "rl" not in copied:
        raise CheckpointError(f"{run}: no sound checkpoint under checkpoints/rl; nothing can be copied")
    for phase, step in copied.items():
        target = out / "checkpoints" / phase / step.name
        try:
            shutil.copytree(step, target)
        except (OSError, shutil.Error) as error:
            if step.exists():
                raise
            raise CheckpointError(f"{step}: the run has removed it meanwhile; delete {out} and try again") from error
        if (word := verify(target)) != "sound":
            raise CheckpointError(
                f"{target}: the copy differs from the original ({word}); the disk under {out} loses data"
            )
    for records in ("metrics.jsonl", "sft.jsonl"):
        if (run / records).exists():
            shutil.copy(run / records, out)
    config = json.loads((run / "config.json").read_text())
    write_atomically(out / "config.json", json.dumps(config | {"run_dir": str(out)}, indent=2) + "\n")
    return out / "checkpoints" / "rl" / copied["rl"].name


def _newest_sound(run: Path, phase: str) -> Path | None:
    for entry in reversed(entries(run)):
        if entry.kind == "checkpoint" and entry.path.parent.name == phase and verify(entry.path) == "sound":
            return entry.path
    return None


def _entry(path: Path) -> Entry | None:
    kind = (
        "half-written" if TEMPORARY in path.name
        else "refused" if path.name.startswith("refused_")
        else "checkpoint" if path.name.isdigit() and path.is_dir()
        else "stray"
    )  # fmt: skip
    try:
        stat = path.stat()
    except FileNotFoundError:  # the run has removed it
        return None
    return Entry(path, kind, folder_size(path) if path.is_dir() else stat.st_size, stat.st_mtime)


def _order(path: Path) -> tuple[bool, int, str]:
    return (not path.name.isdigit(), int(path.name) if path.name.isdigit() else 0, path.name)


@contextlib.contextmanager
def _locked(run: Path) -> Iterator[None]:
    """A context in which no other process writes the run."""
    if (held := lock(run / "lock")) is None:
        raise CheckpointError(f"{run}: a process is writing this run; prune it when it has ended")
    try:
        yield
    finally:
        os.close(held)
