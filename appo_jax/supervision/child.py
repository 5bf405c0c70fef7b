"""What the child of a supervisor does before it trains."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import resource
import signal
import socket

from appo_jax import failures, heartbeat, interrupt
from appo_jax.config import Config

PR_SET_PDEATHSIG = 1


def set_up_child(parent: int, channel: socket.socket, config: Config) -> None:
    """End with the parent, leave requests to stop to it, and send it heartbeats over `channel`."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the parent ended before the call of prctl
        os._exit(failures.START_AGAIN)
    stops = interrupt.stop_signals()
    # A terminal sends the others to both processes; the parent passes them on as SIGTERM.
    for number in stops - {signal.SIGTERM}:
        signal.signal(number, lambda *_: None)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, stops)
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    faulthandler.enable()
    heartbeat.expect_progress_within(config.max_silent_seconds)
    heartbeat.connect(channel)
