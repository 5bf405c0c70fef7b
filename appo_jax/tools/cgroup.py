"""A control group for a sandbox, if this machine lets the user create one: it limits the memory of all processes of the
sandbox together, including files and memory that the supervisor cannot see. Without such a group, only the supervisor's count
(sandbox/budget.py) limits memory."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
PREFIX = "appo-python-"


class ControlGroup:
    """A group that exists until `close`."""

    def __init__(self, folder: Path):
        self.folder = folder

    @classmethod
    def make(cls, memory: int) -> ControlGroup | None:
        """A new group below the group of this process, limited to this many bytes; None if that is not allowed."""
        for parent, limit in _candidates():
            folder = parent / f"{PREFIX}{os.getpid()}-{os.urandom(4).hex()}"
            try:
                if limit == "memory.max" and "memory" not in (parent / "cgroup.subtree_control").read_text().split():
                    (parent / "cgroup.subtree_control").write_text("+memory")
                _sweep(parent)
                folder.mkdir()
                try:
                    (folder / limit).write_text(str(memory))
                except OSError:
                    folder.rmdir()
                    raise
                return cls(folder)
            except OSError:
                continue
        return None

    def add(self, pids: Iterable[int]) -> None:
        """Move processes into the group; processes that they start later belong to it too."""
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                (self.folder / "cgroup.procs").write_text(str(pid))

    def close(self) -> None:
        """Remove the group; its processes must have ended."""
        with contextlib.suppress(OSError):
            self.folder.rmdir()


def _candidates() -> list[tuple[Path, str]]:
    """The groups of this process that can limit memory, each with the name of the file that sets the limit."""
    found = []
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            number, controllers, path = line.split(":", 2)
            if number == "0":
                for root in (ROOT, ROOT / "unified"):
                    found.append((root / path.strip("/"), "memory.max"))
            elif "memory" in controllers.split(","):
                found.append((ROOT / "memory" / path.strip("/"), "memory.limit_in_bytes"))
    return found


def _sweep(parent: Path) -> None:
    """Remove the groups of killed trainers: groups without processes whose creator has ended."""
    for folder in parent.glob(f"{PREFIX}*"):
        maker = folder.name.removeprefix(PREFIX).partition("-")[0]
        if not os.path.exists(f"/proc/{maker}"):
            with contextlib.suppress(OSError):
                folder.rmdir()
