"""Ctrl-C, SIGTERM and a terminal that is closed (SIGHUP) end a run after the current step, when it is saved."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

from appo_jax import distributed, heartbeat

log = logging.getLogger(__name__)

# A command that is asked to stop may clean up for this time, in seconds.
LEAVE_S = 5.0
# Signals within this time, in seconds, are one request: systemd ends a session by SIGTERM and SIGHUP, `timeout` by SIGTERM twice.
ONE_REQUEST_S = 0.3


def stop_signals() -> set[signal.Signals]:
    """The signals that ask a process to stop. nohup makes it ignore SIGHUP; then the run goes on without its terminal."""
    hangup = () if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else (signal.SIGHUP,)
    return {signal.SIGINT, signal.SIGTERM, *hangup}


class Requests:
    """Requests to stop, heard as signals. `hear` is a handler of signals."""

    def __init__(self) -> None:
        self.count = 0
        # When SIGTERM or Ctrl-C was heard first; infinity: not yet. The machine may end soon after it, but not after SIGHUP.
        self.pressing_since = math.inf

    def hear(self, signum: int, frame: Any) -> None:
        """Count a request. SIGHUP asks only once. SIGTERM or Ctrl-C after it (a shutdown while the run finishes its step) is the
        same request, from which the time limit runs; only another one of these, later, is a second request."""
        self.count = max(self.count, 1)
        if signum != signal.SIGHUP:
            now = time.monotonic()
            self.count += now - self.pressing_since >= ONE_REQUEST_S
            self.pressing_since = min(self.pressing_since, now)


def leave(signum: int, frame: Any) -> None:
    """A handler of signals that ends the process: by KeyboardInterrupt; by force at a second request, and after LEAVE_S.

    KeyboardInterrupt alone is not enough: Python drops it if it is raised in a callback of the garbage collector, as JAX has one.
    """
    requests = Requests()
    requests.hear(signum, frame)

    def hear_again(signum: int, frame: Any) -> None:
        requests.hear(signum, frame)
        if requests.count > 1:
            os._exit(130)

    for number in stop_signals():
        signal.signal(number, hear_again)
    timer = threading.Timer(LEAVE_S, os._exit, (130,))
    timer.daemon = True
    timer.start()
    raise KeyboardInterrupt


class Stop:
    """Whether the run was asked to end."""

    requested = False
    pressing = False  # by SIGTERM or Ctrl-C: the machine may end soon

    def agreed(self) -> bool:
        """Whether the run was asked to end on any host. All hosts call this together and get the same answer."""
        heartbeat.stoppable(True)
        return any(distributed.exchange(self.requested))


@contextlib.contextmanager
def stop_requests() -> Iterator[Stop]:
    """A context in which the first request by one of the `stop_signals` sets `requested`, and the second raises KeyboardInterrupt.

    If there is a supervisor, it handles the signals: it sends SIGTERM, and ends the process at the second request. Signals reach
    only the main thread; a program that calls `train` in another thread must handle them itself.
    """
    stop, requests, supervised = Stop(), Requests(), heartbeat.supervised()

    def ask(signum: int, frame: Any) -> None:
        requests.hear(signum, frame)
        stop.pressing = requests.pressing_since < math.inf
        if requests.count > 1 and not supervised:
            raise KeyboardInterrupt
        if not stop.requested:
            stop.requested = True
            log.warning("asked to stop: stopping after this step (again: at once, without saving it)")

    numbers = {signal.SIGTERM} if supervised else stop_signals()
    if threading.current_thread() is not threading.main_thread():
        numbers = set()
    previous = {number: signal.signal(number, ask) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
