"""`appo-jax checkpoints RUN`: list, verify and copy the checkpoints of a run, and remove broken ones."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from appo_jax.checkpoint import TEMPORARY
from appo_jax.checkpoint_read import OLD, REFUSED, REMOVED, verify
from appo_jax.errors import CheckpointError
from appo_jax.storage import folder_size, lock, numbered_folders, usable_path, write_atomically

log = logging.getLogger(__name__)

# What the list says about an entry of a kind.
KINDS = {
    "checkpoint": "",
    "refused": "broken, and set aside; --prune removes it",
    "half-written": "being written, or left by a killed run; --prune removes it",
    "half-removed": "the rest of an old checkpoint; --prune removes it",
    "stray": "not written by a run, which leaves it alone",
}


@dataclasses.dataclass(frozen=True)
class Entry:
    """Something in the checkpoint folder of a phase."""

    path: Path
    kind: str  # one of KINDS
    size: int  # bytes
    written: float  # Unix time

    def line(self, word: str = "") -> str:
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(self.written))
        name, size = f"{self.path.parent.name}/{self.path.name:24}", f"{self.size / 1e6:10.1f} MB"
        return f"{name} {self.kind:13} {size}  {when}  {word or KINDS[self.kind]}".rstrip()


def entries(run: Path) -> list[Entry]:
    """The entries of a run's checkpoint folders, with steps in order. Raises CheckpointError if there are no such folders."""
    folders = [folder for phase in ("sft", "rl") if (folder := run / "checkpoints" / phase).is_dir()]
    if not folders:
        raise CheckpointError(f"{run}: no checkpoints; give the directory of a run that has begun to train")
    paths = [path for folder in folders for path in sorted(folder.iterdir(), key=_order)]
    return [entry for path in paths if (entry := _entry(path)) is not None]


def verified(run: Path) -> Iterator[tuple[Entry, str]]:
    """The entries of a run, with its checkpoints read completely: each comes with "sound" or with what is wrong with it, and
    entries of other kinds with ""."""
    for entry in entries(run):
        word = verify(entry.path) if entry.kind == "checkpoint" else ""
        if word != REMOVED:  # by the run, which goes on
            yield entry, word


def prune(run: Path) -> list[Entry]:
    """Remove refused, half-written and half-removed checkpoints, and return them. Raises CheckpointError if a process is writing
    the run."""
    entries(run)  # a folder without a run gets no lock
    with _locked(run):
        gone = [entry for entry in entries(run) if entry.kind in ("refused", "half-written", "half-removed")]
        for entry in gone:
            shutil.rmtree(entry.path)
    return gone


def copy(run: Path, out: Path) -> Path:
    """Copy a run with its newest sound RL checkpoint to `out`, which can then be continued or exported. Returns the copied step.

    Copied are the newest sound checkpoint of the cold start, too, the records of steps, and the config with `run_dir = out`.
    Raises CheckpointError if no RL checkpoint is sound, if config.json cannot be read, if `out` exists and is not an empty folder,
    or if it cannot be written; nothing is left there then.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise CheckpointError(f"{out}: exists and is not an empty folder; give a new folder")
    out, config = usable_path(out), _config(run)
    copied = {phase: step for phase in ("rl", "sft") if (step := _newest_sound(run, phase)) is not None}
    if "rl" not in copied:
        raise CheckpointError(f"{run}: no sound checkpoint under checkpoints/rl; nothing can be copied")
    if "sft" not in copied and numbered_folders(run / "checkpoints/sft"):
        log.warning(
            "%s: no checkpoint of the cold start is sound; the copy has none. If its loss has a KL term or it trains adapters, it "
            "trains a new cold start", run,
        )  # fmt: skip
    try:
        for phase, step in copied.items():
            _copy_step(step, out / "checkpoints" / phase / step.name)
        for records in ("metrics.jsonl", "sft.jsonl", "sft.json"):
            if (run / records).exists():
                shutil.copy(run / records, out)
        write_atomically(out / "config.json", json.dumps(config | {"run_dir": str(out)}, indent=2) + "\n")
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)
        raise
    return out / "checkpoints" / "rl" / copied["rl"].name


def _config(run: Path) -> dict[str, Any]:
    """The content of a run's config.json. Raises CheckpointError if it cannot be read."""
    try:
        return dict(json.loads((run / "config.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{run / 'config.json'}: cannot be read ({error}); the run writes it again from a checkpoint when it goes on"
        ) from error


def _copy_step(step: Path, target: Path) -> None:
    """Copy a checkpoint, and read the copy. Raises CheckpointError if it cannot be written or is not the original."""
    try:
        shutil.copytree(step, target)
    except OSError as error:  # shutil.Error holds what happened to each file
        if not step.exists():
            raise CheckpointError(f"{step}: the run has removed it meanwhile; try again") from error
        reason = error.args[0][0][2] if isinstance(error, shutil.Error) else error
        place = next(folder for folder in target.parents if folder.exists())
        raise CheckpointError(
            f"{target}: cannot be written ({reason}); it takes {folder_size(step) / 1e9:.2f} GB, and "
            f"{shutil.disk_usage(place).free / 1e9:.2f} are free besides what is written of it already"
        ) from error
    if (word := verify(target)) != "sound":
        raise CheckpointError(f"{target}: the copy differs from the original ({word}); the disk under it loses data")


def _newest_sound(run: Path, phase: str) -> Path | None:
    """The newest sound checkpoint of a phase. Newer ones are logged with what is wrong with them."""
    for entry in reversed(entries(run)):
        if entry.kind == "checkpoint" and entry.path.parent.name == phase:
            if (word := verify(entry.path)) == "sound":
                return entry.path
            log.warning("%s: is not copied: %s", entry.path, word)
    return None


def _entry(path: Path) -> Entry | None:
    kind = (
        "checkpoint" if path.name.isdecimal() and path.is_dir()
        else "stray" if path.is_symlink() or not path.is_dir()
        else "half-written" if TEMPORARY in path.name
        else "refused" if REFUSED.fullmatch(path.name)
        else "half-removed" if OLD.fullmatch(path.name)
        else "stray"
    )  # fmt: skip
    try:
        stat = path.stat()
    except FileNotFoundError:  # the run has removed it
        return None
    return Entry(path, kind, folder_size(path) if path.is_dir() else stat.st_size, stat.st_mtime)


def _order(path: Path) -> tuple[bool, int, str]:
    return (not path.name.isdecimal(), int(path.name) if path.name.isdecimal() else 0, path.name)


@contextlib.contextmanager
def _locked(run: Path) -> Iterator[None]:
    """A context in which no other process writes the run."""
    if (held := lock(run / "lock")) is None:
        raise CheckpointError(f"{run}: a process is writing this run; prune it when it has ended")
    try:
        yield
    finally:
        os.close(held)
