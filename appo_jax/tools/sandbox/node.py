"""One interpreter as the supervisor knows it: from the request for it to the death of its process.

    ASKED ──> FORKING ──> RUNNING ──> FROZEN ──> DEAD        and from each of the first three straight to DEAD

Every change of phase goes through `Node.become`, which allows these and no others.
"""

from __future__ import annotations

import collections
import dataclasses
import enum
import socket


class Phase(enum.Enum):
    """How far an interpreter has come."""

    ASKED = "asked"  # it waits in the queue of the state it is to be forked from
    FORKING = "forking"  # that state has been told; the new process has not made itself known
    RUNNING = "running"  # its process runs the call's code
    FROZEN = "frozen"  # the call has ended; the process is a snapshot that later calls are forked from
    DEAD = "dead"  # answered for, and without a process


NEXT = {
    Phase.ASKED: {Phase.FORKING, Phase.DEAD},
    Phase.FORKING: {Phase.RUNNING, Phase.DEAD},
    Phase.RUNNING: {Phase.FROZEN, Phase.DEAD},
    Phase.FROZEN: {Phase.DEAD},
    Phase.DEAD: set(),
}


class NoSuchStep(Exception):
    """A change of phase that an interpreter cannot make: a fault of the supervisor, reported and contained."""


@dataclasses.dataclass(eq=False)
class Node:
    """An interpreter. `id` 0 is state 0, which has only the preloaded modules."""

    id: int
    parent: Node | None = None  # the state it is forked from; None from its end on
    code: bytes = b""
    timeout: float = 0.0
    phase: Phase = Phase.ASKED
    pid: int = 0
    pidfd: int = -1
    channel: socket.socket | None = None
    output: int = -1  # the file that the call writes to
    files: int = -1  # the mount of its /tmp
    mounts: int = -1  # its mount namespace, while its call runs
    namespace: int = 0  # that namespace's number
    has_files: bool = False  # a snapshot whose /tmp is not empty
    deadline: float = 0.0
    tries: int = 0  # times that this request was made before
    allowed: set[int] = dataclasses.field(default_factory=set)  # supervised system calls it may make now, once each
    killed: bool = False  # its end has been asked for and will be reported
    verdict: str = "died"  # what the end of its process means while it runs
    greeted: bool = False  # its process has said that it lives, and may have run the code (without namespaces)
    child: Node | None = None  # being forked from it
    unmet: bool = False  # it has forked a child that has not made itself known
    queue: collections.deque[Node] = dataclasses.field(default_factory=collections.deque)  # to be forked from it

    def become(self, phase: Phase) -> None:
        """Change the phase. Raises NoSuchStep."""
        if phase not in NEXT[self.phase]:
            raise NoSuchStep(f"state {self.id}: from {self.phase.value} to {phase.value}")
        self.phase = phase

    @property
    def alive(self) -> bool:
        """Whether it has a process that the supervisor knows."""
        return self.phase in (Phase.RUNNING, Phase.FROZEN)
