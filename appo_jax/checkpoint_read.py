"""Reads one step of a checkpoint folder and verifies it, on all hosts together.

Every host reads the parts of the arrays that its own devices hold, so a file may be damaged for one host only. Orbax's
`CheckpointManager.restore` ends with a barrier, at which the others would wait for that host for ever. Here steps are read by
orbax's handler, which waits for nobody, and then the hosts tell each other whether they could read.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp

from appo_jax import distributed, failures, heartbeat
from appo_jax.digests import describe
from appo_jax.errors import CheckpointError
from appo_jax.storage import SHARED_S, unreadable, usable_path

PyTree = Any
T = TypeVar("T")

# A step is verified in parts of at most this size, because the state in training leaves little memory free.
MAX_BYTES_AT_ONCE = 1 << 28
REMOVED = "removed in the meantime"  # the reason for a step that vanished while it was read
# Names of old steps that are being removed, and of broken steps that are set aside. Other names are a user's.
OLD, REFUSED = re.compile(r"removed_[0-9]+(_again)*"), re.compile(r"refused_[0-9]+(_again)*")

# What orbax, tensorstore and json raise for damaged files. Tensorstore's text may hold an error of the system.
_DAMAGE = (ValueError, LookupError, TypeError, AttributeError, FileNotFoundError, NotADirectoryError, IsADirectoryError)
_SYSTEM_ERROR = re.compile(r"os_error_code='(\d+)'")
_MISSING = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)
# What a disk or its server reports when it does not give a file. The file may be sound, and readable later.
_DISK = (*failures.DISK, errno.EBADMSG, errno.EUCLEAN)
# What `record_here` may raise.
NO_RECORD = (OSError, ValueError, LookupError, TypeError, AttributeError)
READ_AGAIN_S = (1.0, 3.0)  # pauses after which a file that the disk did not give is read again


class Broken(Exception):
    """A step cannot be used, for at least one host. All hosts raise it with the same text; REMOVED: it is gone.

    `number`: the system's errno if the disk did not give the step, which may be sound; None if it is not what was written.
    """

    def __init__(self, reason: str, number: int | None = None) -> None:
        super().__init__(reason)
        self.number = number


def read_record(folder: Path, ours: bool = False) -> dict[str, Any]:
    """The metadata of the step in `folder`. Raises Broken if it is not what was written.

    `ours`: this run alone removes steps there. If a host does not see the step, NFS shows it late: it is waited for.
    """
    until = time.monotonic() + (SHARED_S if ours else 0.0)
    while not _listed(folder) and time.monotonic() < until:
        heartbeat.progress()
        time.sleep(0.2)
    return _on_all_hosts(folder, lambda: record_here(folder))


def _listed(folder: Path) -> bool:
    """Whether the folder is there. Listing its parent makes NFS ask the server: the answer to a look-up may be an old one."""
    with contextlib.suppress(OSError):
        return folder.name in os.listdir(folder.parent)
    return False


def record_here(folder: Path) -> dict[str, Any]:
    """The metadata of the step in `folder`, for this host alone. Raises one of NO_RECORD."""
    meta = json.loads((folder / "meta" / "metadata").read_text())
    if sha256(meta["record"]) != meta["sha256"] or str(meta["record"]["step"]) != folder.name:
        raise ValueError("its metadata is not what was written")
    return meta["record"]


def require_meta(meta: Mapping[str, Any], names: Collection[str], folder: Path) -> None:
    """Raises CheckpointError if the `meta` of a checkpoint in `folder` lacks one of `names`."""
    if missing := [name for name in names if name not in meta]:
        raise CheckpointError(
            f"{folder}: its checkpoints hold no {', '.join(map(repr, missing))}, so another version of appo_jax has written them; "
            "go on with that version, or begin again in another --run-dir"
        )


def read_arrays(folder: Path, abstract_state: PyTree, written: Mapping[str, Any]) -> PyTree:
    """The arrays of a step that `abstract_state` names. Raises Broken if one is not what was `written` (`describe`)."""
    where = ocp.checkpoint_utils.construct_restore_args(abstract_state)
    args = ocp.args.PyTreeRestore(abstract_state, restore_args=where, partial_restore=True)

    def read() -> PyTree:
        with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
            return handler.restore(folder / "state", args=args)

    state = _on_all_hosts(folder, read)
    arrays = jax.tree.map(lambda leaf: None if leaf is ocp.PLACEHOLDER else leaf, state)
    found = describe(arrays)  # on the devices of all hosts together

    def compare() -> None:  # a host may have another copy of an array than the others
        if damaged := [name for name in found if found[name] != written.get(name)]:
            raise ValueError(f"{len(damaged)} arrays are not what was written, among them {damaged[0]}")

    _on_all_hosts(folder, compare)
    return state


def check_arrays(folder: Path, abstract_state: PyTree, written: Mapping[str, Any]) -> None:
    """Read all arrays of a step, a part at a time. Raises Broken if one is not what was `written`."""
    leaves, structure = jax.tree.flatten(abstract_state)
    for part in _parts(leaves):
        chosen = [leaf if i in part else ocp.PLACEHOLDER for i, leaf in enumerate(leaves)]
        read_arrays(folder, jax.tree.unflatten(structure, chosen), written)


def verify(folder: Path) -> str:
    """Read a whole step of any policy into the host's memory. Returns "sound", or what is wrong with it."""
    folder = usable_path(folder)  # orbax reads no metadata under a relative path
    host = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])

    def abstract_state() -> PyTree:
        with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
            tree = handler.metadata(folder / "state").tree
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=host), tree)

    try:
        written = read_record(folder)["arrays"]
        abstract = _on_all_hosts(folder, abstract_state)
        check_arrays(folder, abstract, written)
    except (Broken, CheckpointError) as error:  # CheckpointError: this user may not read it
        return str(error)
    return "sound"


def sha256(value: Any) -> str:
    """The checksum of plain JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _on_all_hosts(folder: Path, read: Callable[[], T]) -> T:
    """What `read` returns, if it returns on every host. It must not wait for other hosts.

    Raises Broken on all hosts if it finds damage on one of them, or if a disk does not give the files after some seconds either;
    CheckpointError on all hosts if the user of one of them may not read a file. Any other error is raised only where it happens;
    the supervisors end the other hosts.
    """
    found, wrong = None, None
    for pause in (*READ_AGAIN_S, None):
        try:
            found, wrong = read(), None
        except Exception as error:
            wrong = _damage(folder, error)
        if wrong is None or wrong.number not in _DISK or pause is None:
            break
        time.sleep(pause)
    reasons = distributed.exchange(None if wrong is None else [str(wrong), wrong.number])
    if any(reasons):
        failed = [(host, *said) for host, said in enumerate(reasons) if said]
        if any(reason == REMOVED for _, reason, _ in failed):
            raise Broken(REMOVED)
        host, reason, number = next((one for one in failed if one[2] not in _DISK), failed[0])  # damage counts first
        text = reason if len(reasons) == 1 else f"host {host}: {reason}"
        raise CheckpointError(text) if number == errno.EACCES else Broken(text, number)
    return found  # type: ignore[return-value]


def _damage(folder: Path, error: Exception) -> Broken:
    """What is wrong with a step for which reading it raised `error`. Raises `error` again if it says nothing about the files."""
    first = failures.causes(error)[-1]  # orbax raises plain Exceptions from it
    named = _SYSTEM_ERROR.search(str(first))
    number = int(named[1]) if named else first.errno if isinstance(first, OSError) else None
    if number is not None and number in _DISK:
        return Broken(f"cannot be read: {os.strerror(number)}", number)
    if not folder.exists():  # the process that writes here has removed it, because it was old
        return Broken(REMOVED)
    if (path := unreadable(folder)) is not None:
        return Broken(
            f"{path}: this user may not read it; grant the permission (chown -R, chmod -R u+rX)", errno.EACCES
        )
    if named and number is not None and number not in _MISSING:
        raise OSError(number, os.strerror(number), str(folder)) from error
    if (
        not isinstance(first, _DAMAGE)
        or failures.is_out_of_memory(error)
        or failures.may_follow_from_another_host(error)
    ):
        raise error
    return Broken(f"{type(first).__name__}: {first}".splitlines()[0])


def _parts(leaves: Sequence[jax.ShapeDtypeStruct]) -> list[set[int]]:
    """Indices of the leaves, in parts of at most MAX_BYTES_AT_ONCE on all devices together (or a single leaf)."""
    parts: list[set[int]] = []
    bytes_left = 0
    for i, leaf in enumerate(leaves):
        size = math.prod(leaf.shape) * leaf.dtype.itemsize
        if not parts or size > bytes_left:
            parts.append(set())
            bytes_left = MAX_BYTES_AT_ONCE
        parts[-1].add(i)
        bytes_left -= size
    return parts
