"""Checkpoints on orbax: saved in the background, read back after writing, and verified whenever they are read.

Orbax alone lists a half-deleted step, restores flipped bits silently, takes an empty folder for the latest step, casts dtypes
silently, and skips a step that it will not save. Here every step carries a digest of each array and of its own metadata, and
is read back once it is written. A step that fails verification is refused with the reason, and the newest good step is
restored. Orbax would also end the run when an old step cannot be removed, and would choose the best steps by a file without a
digest. Here old steps are removed after the new one has been read back, and the accuracy is part of a step's metadata.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import shutil
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

import grain
import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from appo_jax import distributed, heartbeat
from appo_jax.checkpoint_items import items, not_written
from appo_jax.checkpoint_read import (
    NO_RECORD,
    OLD,
    REFUSED,
    REMOVED,
    Broken,
    check_arrays,
    read_arrays,
    read_record,
    record_here,
    sha256,
)
from appo_jax.digests import describe, named_leaves
from appo_jax.errors import CheckpointError
from appo_jax.storage import folder_size, unused_name, usable_path

PyTree = Any
T = TypeVar("T")
_log = logging.getLogger(__name__)

TEMPORARY = ".orbax-checkpoint-tmp"  # part of the name of a step that is being written
REPORTED_WHEN_WRITTEN = ocp.AsyncOptions(post_finalization_callback=heartbeat.saved)
MAX_LISTINGS = 20  # in a row that may fail because a step was removed meanwhile


class Checkpointer:
    """The newest `keep` checkpoints of a run, each in a folder named by its step.

    A state is a pytree of jax arrays, sharded in any way over any number of devices and hosts. All hosts call every
    method together.
    """

    def __init__(self, directory: Path, keep: int, keep_best: int = 0, read_only: bool = False) -> None:
        """`keep_best`: this many of the steps with the highest accuracy are kept, too.

        `read_only`: nothing is written, removed or renamed; another process may be writing here.
        """
        self._directory, self._read_only = usable_path(directory), read_only
        self._keep, self._keep_best = keep, keep_best
        self._accuracies: dict[int, float | None] = {}  # of steps; None: it was not measured
        self._lasting: set[int] = set()  # steps that cannot be removed, or that may be among the best: this was logged
        self._not_given: list[int] = []  # steps that the disk did not give when they were read
        if not read_only and jax.process_index() == 0:
            self._settle_leftovers()
        options = (
            ocp.CheckpointManagerOptions(read_only=True, create=False, save_interval_steps=0)
            if read_only
            else ocp.CheckpointManagerOptions(cleanup_tmp_directories=True, async_options=REPORTED_WHEN_WRITTEN)
        )
        self._manager = _despite_removals(
            lambda: ocp.CheckpointManager(self._directory, options=options, item_handlers=items(self._directory))
        )
        self._begun = False  # whether a save was begun since the last `wait`
        # (step, abstract state, arrays) of a step that was not read back yet
        self._unread: tuple[int, PyTree, dict[str, Any]] | None = None

    @heartbeat.phase("checkpoint")
    def save(
        self, step: int, state: PyTree, meta: Mapping[str, Any], iterator: grain.DatasetIterator | None,
        accuracy: float | None = None,
    ) -> None:  # fmt: skip
        """Start to write a step: state, JSON `meta`, position of the data. `state` may be donated once this returns.

        `accuracy`: of this policy on held-out questions, if it is known.

        Raises CheckpointError if this step or a later one exists, and, as `wait`, for problems of the previous save.
        """
        self.wait()
        self._set_aside(self._not_given)  # orbax saves no step before them
        self._not_given = []
        arrays = describe(state)
        accuracy = None if accuracy is None or math.isnan(accuracy) else float(accuracy)
        record: dict[str, Any] = {"step": step, "meta": dict(meta), "arrays": arrays, "accuracy": accuracy}
        if iterator is not None:  # all hosts read the same data and are at the same position
            record["position"] = _position(iterator)
        items: dict[str, Any] = {
            "state": ocp.args.PyTreeSave(state),
            "meta": ocp.args.JsonSave({"record": record, "sha256": sha256(record)}),
        }
        if jax.process_index() == 0:
            self._warn_of_full_disk(step)
        heartbeat.saving(step)
        self._begun = True
        try:
            saved = self._manager.save(step, args=ocp.args.Composite(**items))
        except Exception as error:
            raise not_written(self._directory, error) from error
        if not saved:
            raise CheckpointError(
                f"{self._directory}: step {step} was not saved, because step {self._manager.latest_step()} exists already; "
                "restore it and go on from there, or give another --run-dir"
            )
        self._accuracies[step] = accuracy
        self._unread = step, jax.tree.map(ocp.utils.to_shape_dtype_struct, state), arrays

    @heartbeat.phase("checkpoint")
    def restore_latest(
        self, abstract_state: PyTree, iterator: grain.DatasetIterator | None, partial: bool = False
    ) -> tuple[int, PyTree, dict[str, Any]] | None:
        """The newest step that verifies: (step, state, meta), with `iterator` moved to its position. None: no step yet.

        `abstract_state` gives structure, shapes, dtypes and shardings (arrays, or `jax.ShapeDtypeStruct` with a sharding).
        `partial`: it is only a part of the state, such as `{"params": …}`, and only this part is read and verified. Broken steps
        are logged; once an older step is found good, they are renamed to `refused_<step>`. A step that the disk does not give is
        passed over, too, but renamed only when the next step is saved. Raises CheckpointError if a sound step holds other arrays
        than `abstract_state`, or if no step can be used: the run must not silently start from nothing.
        """
        self.wait()
        refused: dict[int, Broken] = {}
        while (step := self._newest_except(refused)) is not None:
            try:
                state, record = self._restore(step, abstract_state, partial)
            except Broken as error:
                refused[step] = error
                if str(error) != REMOVED:
                    _log.warning("%s: checkpoint of step %d is refused: %s", self._directory, step, error)
                continue
            if iterator is not None:
                iterator.set_state(record["position"])
            if not self._read_only:
                self._set_aside([s for s, why in refused.items() if why.number is None and str(why) != REMOVED])
                self._not_given = [s for s, why in refused.items() if why.number is not None]
            return step, state, record["meta"]
        if refused:
            raise self._nothing_usable(refused)
        return None

    def restore_step(self, step: int, abstract_state: PyTree) -> tuple[int, PyTree, dict[str, Any]]:
        """A part of the state at one step, as `restore_latest` with `partial` gives that of the newest. Raises CheckpointError if
        this step is missing or broken."""
        steps = sorted(self._manager.all_steps())
        if step not in steps:
            raise CheckpointError(f"{self._directory}: no step {step}; it has {', '.join(map(str, steps)) or 'none'}")
        try:
            state, record = self._restore(step, abstract_state, partial=True)
        except Broken as error:
            raise CheckpointError(f"{self._directory}: checkpoint of step {step} is refused: {error}") from error
        return step, state, record["meta"]

    def _nothing_usable(self, refused: Mapping[int, Broken]) -> CheckpointError:
        reasons = "\n".join(f"  step {step}: {reason}" for step, reason in refused.items())
        number = next((why.number for why in refused.values() if why.number is not None), None)
        if number is not None:
            advice = "Check the disk, and try again."
        elif self._read_only:
            advice = "If the run is being written now, try again; otherwise put a good copy of a step in its place."
        else:
            advice = "Put a good copy in its place, or delete this folder to start the run from the beginning."
        what = "every checkpoint is broken" if number is None else "no checkpoint can be read"
        error = CheckpointError(f"{self._directory}: {what}:\n{reasons}\n{advice}")
        if number is not None:  # `failures` looks there
            error.__cause__ = OSError(number, os.strerror(number), str(self._directory))
        return error

    def _warn_of_full_disk(self, step: int) -> None:
        """Warn if this step or the next may not fit on the disk. A step is written before the oldest one is removed."""
        sizes = [folder_size(path) for path in self._directory.glob("[0-9]*") if path.name.isdigit()]
        free, needed = shutil.disk_usage(self._directory).free, max(sizes, default=0)
        if needed and free < 2 * needed:
            _log.warning(
                "%s: %.1f GB are free and a checkpoint takes %.1f: step %d %s. Free some space, or lower keep_checkpoints",
                self._directory, free / 1e9, needed / 1e9, step, "may not fit" if free < needed else "fits, the next one may not",
            )  # fmt: skip

    def _newest_except(self, refused: Collection[int]) -> int | None:
        """The newest step that host 0 finds on disk and that has not been refused."""
        _despite_removals(self._manager.reload)
        newest = max((step for step in self._manager.all_steps() if step not in refused), default=None)
        return distributed.exchange(newest)[0]

    def _settle_leftovers(self) -> None:
        """Log what the folder holds besides checkpoints, and remove the rest of old ones."""
        names = sorted(path.name for path in self._directory.iterdir()) if self._directory.is_dir() else []
        for name in filter(OLD.fullmatch, names):
            _delete(self._directory / name)
        if half := [name for name in names if TEMPORARY in name]:
            _log.info("%s: files of an interrupted save are removed: %s", self._directory, ", ".join(half))
        if refused := [name for name in names if REFUSED.fullmatch(name)]:
            _log.info(
                "%s: broken checkpoints are kept: %s; `appo-jax checkpoints RUN --prune` removes them", self._directory,
                ", ".join(refused),
            )  # fmt: skip

    def wait(self) -> None:
        """Return when everything saved so far is on disk, and the newest step has been read back from it.

        Raises CheckpointError if a step could not be written (a full disk is noticed here) or does not read back equal.
        """
        if not self._begun:  # the time for nothing would count as the first progress of the phase
            return
        self._begun, unread, self._unread = False, self._unread, None
        with heartbeat.phase("checkpoint"):
            try:
                with heartbeat.exchanging():  # orbax's barriers: a host that has written its part waits for the others
                    self._manager.wait_until_finished()
            except Exception as error:
                raise not_written(self._directory, error) from error
            if unread is not None:
                self._read_back(*unread)
                if jax.process_index() == 0:
                    self._remove_old()

    def _remove_old(self) -> None:
        """Remove the steps that are neither among the newest nor among the best. One that cannot be removed is logged once."""
        steps = sorted(step for step in self._manager.all_steps() if (self._directory / str(step)).is_dir())
        found = {step: a for step in steps if self._keep_best and (a := self._accuracy(step)) is not None}
        best = sorted(found, key=lambda step: (found[step], step))[-self._keep_best :]
        kept = {*steps[-self._keep :], *best, *self._lasting}
        for step in (step for step in steps if step not in kept):
            folder = self._directory / str(step)
            if folder.is_symlink() or not os.access(folder, os.W_OK, effective_ids=True):
                _log.warning("%s: is old, but a link or write-protected: it is kept", folder)
                self._lasting.add(step)
                continue
            try:  # at once for those who read: they never find a part of a step
                folder = folder.rename(unused_name(folder.with_name(f"removed_{step}")))
            except OSError as error:
                _log.warning("%s: is old, but cannot be removed (%s)", folder, error)
                self._lasting.add(step)
                continue
            _delete(folder)

    def _accuracy(self, step: int) -> float | None:
        """The accuracy with which a step was saved. A step whose metadata cannot be read is kept, because it may be one of the
        best."""
        if step not in self._accuracies:
            try:
                self._accuracies[step] = record_here(self._directory / str(step)).get("accuracy")
            except NO_RECORD as error:
                self._accuracies[step] = None
                self._lasting.add(step)
                _log.warning(
                    "%s: its accuracy cannot be read (%s): it is kept, as one of the best may be",
                    self._directory / str(step), error,
                )  # fmt: skip
        return self._accuracies[step]

    def close(self) -> None:
        """Wait, then free orbax's threads. While an error is raised, several hosts read nothing back: the others are elsewhere."""
        try:
            if distributed.num_hosts() > 1 and sys.exc_info()[1] is not None:
                self._unread = None
            self.wait()
        finally:
            self._manager.close()

    def _read_back(self, step: int, abstract_state: PyTree, written: dict[str, Any]) -> None:
        """Compare a step on disk with what was given to `save`. Raises CheckpointError if they differ."""
        folder = self._directory / str(step)
        try:
            # The record is the first host's, whose `meta` may differ from this host's.
            if read_record(folder, ours=True)["arrays"] != written:
                raise Broken("its metadata is not what was written")
            check_arrays(folder, abstract_state, written)
        except Broken as error:
            raise CheckpointError(
                f"{self._directory}: step {step} was written, but cannot be read back ({error}); the storage under "
                "this folder loses data: move the run to another disk and start again; it goes on from its last good step"
            ) from error

    def _restore(self, step: int, abstract_state: PyTree, partial: bool) -> tuple[PyTree, dict[str, Any]]:
        """(state, record) of a step. Raises Broken, or CheckpointError if `abstract_state` does not fit."""
        folder = self._directory / str(step)
        record = read_record(folder, ours=not self._read_only)
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, abstract_state)
        written = record["arrays"]
        if partial:
            written = {name: written[name] for name, _ in named_leaves(abstract) if name in written}
        self._check_fit(step, written, abstract)
        return read_arrays(folder, abstract, written), record

    def _check_fit(self, step: int, written: Mapping[str, Any], abstract_state: PyTree) -> None:
        expected = {name: [str(leaf.dtype), list(leaf.shape)] for name, leaf in named_leaves(abstract_state)}
        lines = []
        for name in {**expected, **written}:
            have, want = written.get(name), expected.get(name)
            if have is None or want is None:
                lines.append(f"  {name}: only in the {'checkpoint' if want is None else 'program'}")
            elif have[:2] != want:
                lines.append(f"  {name}: {have[0]}{have[1]} in the checkpoint, {want[0]}{want[1]} in the program")
        if lines:
            shown = lines[:10] + ([f"  and {len(lines) - 10} more"] if len(lines) > 10 else [])
            raise CheckpointError(
                f"{self._directory}: the arrays of step {step} do not fit the program's:\n" + "\n".join(shown) + "\n"
                "The policy or optimizer has changed since; use the config of that run, or give another --run-dir."
            )

    def _set_aside(self, steps: list[int]) -> None:
        """Rename broken steps, because orbax would count them as saved and refuse to save them again."""
        if not steps:
            return
        if jax.process_index() == 0:
            for step in steps:
                (self._directory / str(step)).rename(unused_name(self._directory / f"refused_{step}"))
        multihost_utils.sync_global_devices("checkpoints set aside")
        self._manager.reload()


def _despite_removals(list_steps: Callable[[], T]) -> T:
    """Call a function of orbax that lists the steps. It raises if another process removes one between listing and reading."""
    for _ in range(MAX_LISTINGS - 1):
        with contextlib.suppress(FileNotFoundError):
            return list_steps()
    return list_steps()


def _delete(folder: Path) -> None:
    """Delete the folder of an old step. What cannot be deleted is logged, and left to `appo-jax checkpoints RUN --prune`."""
    try:
        shutil.rmtree(folder)
    except OSError as error:
        _log.warning(
            "%s: the rest of an old checkpoint cannot be removed (%s); remove it when it can be", folder, error
        )


def _position(iterator: grain.DatasetIterator) -> Any:
    """The iterator's state after a round trip through JSON."""
    return json.loads(json.dumps(iterator.get_state()))
