"""A control group for a sandbox, where this machine lets its user make one: the memory of all its processes together, files
and what the supervisor cannot see included, has a hard limit there. Where none can be made, the supervisor's own count
(sandbox/budget.py) is what holds."""

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
        """A new group below this process's own, limited to so many bytes; None where that is not allowed."""
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
        """Move processes in; what they start later is in there too."""
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                (self.folder / "cgroup.procs").write_text(str(pid))

    def close(self) -> None:
        """Remove the group; its processes must have ended."""
        with contextlib.suppress(OSError):
            self.folder.rmdir()


def _candidates() -> list[tuple[Path, str]]:
    """This process's own groups that can limit memory, and the file that does."""
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
    """Remove what trainers that were killed have left: groups without processes whose maker is gone."""
    for folder in parent.glob(f"{PREFIX}*"):
        maker = folder.name.removeprefix(PREFIX).partition("-")[0]
        if not os.path.exists(f"/proc/{maker}"):
            with contextlib.suppress(OSError):
                folder.rmdir()
