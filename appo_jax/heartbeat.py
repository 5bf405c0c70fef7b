"""Heartbeats for the supervisor: the phase of a run, the time of its last progress, and errors.

The loop reports what it does (`phase`, `at_step`, `progress`), and a thread sends it to the supervising process (supervision/)
every second. A Python caller of `train` has no supervisor; then nothing is sent.
"""

from __future__ import annotations

import contextlib
import json
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

BEAT_S = 1.0  # seconds between two heartbeats

ANSWER_S = 10.0  # seconds within which the supervisor must answer a question

PAUSED_S = 30.0  # if a heartbeat is this late, the process was not running

# A phase may go without progress for this multiple of its longest wait so far, and for at least `floor_s`.
PATIENCE = 10
# Before its first progress, a phase may go without progress for this multiple of `floor_s`, because it may be compiling.
FIRST_PATIENCE = 3
# A checkpoint makes progress when this many bytes have been read or written. What else a process reads and writes is less.
MOVED_BYTES = 1 << 20
# Phases in which no step, and no update of the cold start, is being made.
BETWEEN_STEPS = ("start", "evaluate", "checkpoint")


class _Life:
    """The state of this process. Written by the main thread, read by the thread that sends it."""

    def __init__(self) -> None:
        self.phase, self.step = "start", 0
        # Steps of the training, or updates of the cold start: done, on disk, and being written.
        self.counted, self.done, self.saved, self.writing = "step", 0, 0, 0
        self.detail = ""
        self.failed_in: str | None = None
        self.stoppable = False  # whether requests to stop are handled
        self.exchanges, self.waiting = 0, False
        self.floor_s = 600.0
        self.longest: dict[str, float] = {}
        self.progressed = time.monotonic()
        self.channel: socket.socket | None = None
        self.sending = threading.Lock()

    def limit_s(self) -> float:
        longest = self.longest.get(self.phase)
        return self.floor_s * FIRST_PATIENCE if longest is None else max(self.floor_s, PATIENCE * longest)

    def unsaved(self) -> str:
        """What would be lost if the process ended now, in words: "steps 7 and 8". "": nothing."""
        first, last = self.saved + 1, self.done + (self.phase not in BETWEEN_STEPS)
        if first > last:
            return ""
        if first == last:
            return f"{self.counted} {last}"
        return f"{self.counted}s {first} {'and' if last == first + 1 else 'to'} {last}"

    def beat(self) -> dict[str, Any]:
        return {
            "phase": self.phase, "step": self.step, "silent_s": time.monotonic() - self.progressed,
            "limit_s": self.limit_s(), "exchanges": self.exchanges, "waiting": self.waiting, "stoppable": self.stoppable,
            "unsaved": self.unsaved(),
        }  # fmt: skip


_life = _Life()


def connect(channel: socket.socket) -> None:
    """Send heartbeats to the supervisor until this process ends."""
    _life.channel = channel
    _life.progressed = time.monotonic()
    threading.Thread(target=_send_beats, name="heartbeat", daemon=True).start()


def supervised() -> bool:
    """Whether there is a supervisor."""
    return _life.channel is not None


def send(**message: Any) -> None:
    """Send a message to the supervisor immediately, in addition to the heartbeats."""
    _send(lambda: message)


def _send_beat() -> None:
    """Send the state. It is read while no other thread sends: an older one after a newer one would deceive the supervisor."""
    _send(_life.beat)


def _send(message: Callable[[], dict[str, Any]]) -> None:
    if _life.channel is None:
        return
    with _life.sending, contextlib.suppress(OSError):  # without a supervisor this process is about to end
        _life.channel.sendall(json.dumps(message()).encode() + b"\n")


def ask(**message: Any) -> dict[str, Any]:
    """Send a message to the supervisor and wait for the answer. Raises OSError if none comes within ANSWER_S."""
    assert _life.channel is not None
    send(**message)
    readable, _, _ = select.select([_life.channel], [], [], ANSWER_S)
    if not readable:
        raise OSError("the supervising process does not answer")
    return json.loads(_life.channel.recv(1 << 16))


def progress() -> None:
    """Report that the phase has made progress."""
    now = time.monotonic()
    _life.longest[_life.phase] = max(_life.longest.get(_life.phase, 0.0), now - _life.progressed)
    _life.progressed = now


def detail(text: str) -> None:
    """The progress of the phase in words, such as "40 of 64 rollouts". It is reset when the phase ends."""
    _life.detail = text


def doing() -> tuple[str, str, bool]:
    """The phase, its progress in words, and whether it has never made progress before (then it may be compiling)."""
    return _life.phase, _life.detail, _life.phase not in _life.longest


def at_step(step: int, on_disk: bool = False) -> None:
    """Report that this many training steps are done, and whether it is known that all are on disk."""
    _life.step = step
    _count("step", step, on_disk)


def at_update(update: int, on_disk: bool = False) -> None:
    """`at_step` for the updates of the cold start."""
    _count("update", update, on_disk)


def _count(counted: str, done: int, on_disk: bool) -> None:
    _life.counted, _life.done = counted, done
    if on_disk:
        _life.saved = done
    progress()
    _send_beat()


def saving(step: int) -> None:
    """Report that this step, or update, is being written in the background."""
    _life.writing = step


def saved() -> None:
    """Report that the step, or update, that was being written is on disk. Any thread may call it."""
    _life.saved = _life.writing
    _send_beat()


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """A context in which the run is in this phase. Entering and leaving count as progress."""
    outer, outer_detail = _life.phase, _life.detail
    _life.phase, _life.detail, _life.progressed = name, "", time.monotonic()
    _life.failed_in = None  # an earlier failure has been handled
    _send_beat()
    try:
        yield
    except Exception:
        _life.failed_in = _life.failed_in or name
        raise
    finally:
        progress()
        _life.phase, _life.detail = outer, outer_detail


@contextlib.contextmanager
def exchanging() -> Iterator[None]:
    """A context in which this host exchanges data with the others and waits for all of them. Completing it counts as
    progress, but not as a pause of the phase: it lasts as long as the slowest host needs."""
    _life.exchanges += 1
    _life.waiting = True
    try:
        yield
    finally:
        _life.waiting = False
        _life.progressed = time.monotonic()


def stoppable(heard: bool) -> None:
    """Set whether requests to stop are handled from now on. If not, ending the process loses nothing."""
    if heard != _life.stoppable:
        _life.stoppable = heard
        _send_beat()


def expect_progress_within(seconds: float) -> None:
    """Set the shortest time after which a phase without progress counts as hanging."""
    _life.floor_s = seconds


def now() -> tuple[str, int]:
    """The current phase, or the phase in which the run failed, and the number of finished steps."""
    return _life.failed_in or _life.phase, _life.step


def _send_beats() -> None:
    sent, moved = time.monotonic(), bytes_moved()
    while True:
        now = time.monotonic()
        if now - sent > PAUSED_S:  # the process was stopped, for example by Ctrl-Z, and could make no progress
            _life.progressed = now
        if _life.phase == "checkpoint" and (moved_now := bytes_moved()) - moved >= MOVED_BYTES:
            moved, _life.progressed = moved_now, now
        sent = now
        _send_beat()
        time.sleep(BEAT_S)


def bytes_moved() -> int:
    """The bytes that this process has read and written so far; 0 where the system does not count them."""
    with contextlib.suppress(OSError), open("/proc/self/io") as file:
        counted = dict(line.split(": ") for line in file.read().splitlines())
        return int(counted["rchar"]) + int(counted["wchar"])
    return 0
