"""An interpreter, as the supervisor records it from the request for it to the end of its process.

    ASKED ──> FORKING ──> RUNNING ──> FROZEN ──> DEAD        and from each of the first three directly to DEAD

Every change of phase goes through `Node.become`, which allows no other changes.
"""

from __future__ import annotations

import collections
import dataclasses
import enum
import socket


class Phase(enum.Enum):
    """The phase of an interpreter."""

    ASKED = "asked"  # the request waits in the queue of the state from which it will be forked
    FORKING = "forking"  # that state was asked to fork; the supervisor does not know the new process yet
    RUNNING = "running"  # its process runs the call's code
    FROZEN = "frozen"  # the call has ended; the process is a snapshot, from which later calls are forked
    DEAD = "dead"  # its call is answered, and it has no process


NEXT = {
    Phase.ASKED: {Phase.FORKING, Phase.DEAD},
    Phase.FORKING: {Phase.RUNNING, Phase.DEAD},
    Phase.RUNNING: {Phase.FROZEN, Phase.DEAD},
    Phase.FROZEN: {Phase.DEAD},
    Phase.DEAD: set(),
}


class NoSuchStep(Exception):
    """A change of phase that is not allowed: a bug of the supervisor, which is reported and affects only this state."""


@dataclasses.dataclass(eq=False)
class Node:
    """An interpreter. `id` 0 is state 0, which has only the preloaded modules."""

    id: int
    parent: Node | None = None  # the state from which it is forked; None after its call has ended
    code: bytes = b""
    timeout: float = 0.0
    phase: Phase = Phase.ASKED
    pid: int = 0
    pidfd: int = -1
    channel: socket.socket | None = None
    output: int = -1  # the file that the call writes to
    files: int = -1  # the mount of its /tmp
    mounts: int = -1  # its mount namespace, while its call runs
    namespace: int = 0  # the inode number of that namespace
    has_files: bool = False  # whether it is a snapshot whose /tmp is not empty
    deadline: float = 0.0
    tries: int = 0  # how often this request was made before
    allowed: set[int] = dataclasses.field(
        default_factory=set
    )  # supervised system calls that it may make now, once each
    killed: bool = False  # it was killed; the end of its process will be reported
    verdict: str = "died"  # the outcome of its call if its process ends while it runs
    greeted: bool = False  # its process has reported that it lives, and may have run the code (without namespaces)
    child: Node | None = None  # the node that is being forked from it
    unmet: bool = False  # it has forked a process that the supervisor does not know yet
    queue: collections.deque[Node] = dataclasses.field(default_factory=collections.deque)  # nodes to fork from it

    def become(self, phase: Phase) -> None:
        """Change the phase. Raises NoSuchStep."""
        if phase not in NEXT[self.phase]:
            raise NoSuchStep(f"state {self.id}: from {self.phase.value} to {phase.value}")
        self.phase = phase

    @property
    def alive(self) -> bool:
        """Whether the supervisor knows a process of it."""
        return self.phase in (Phase.RUNNING, Phase.FROZEN)
