"""Ctrl-C and SIGTERM end a run between two steps, after it is saved."""

from __future__ import annotations

import contextlib
import logging
import signal
from collections.abc import Iterator
from typing import Any

from appo_jax import distributed

log = logging.getLogger(__name__)


class Stop:
    """Whether somebody asked the run to end."""

    requested = False

    def agreed(self) -> bool:
        """Whether somebody asked on any host, the same answer on all of them; they call it together."""
        return any(distributed.exchange(self.requested))


@contextlib.contextmanager
def stop_requests() -> Iterator[Stop]:
    """Within: the first Ctrl-C or SIGTERM sets `requested`; the second one ends the process at once."""
    stop = Stop()

    def ask(signum: int, frame: Any) -> None:
        stop.requested = True
        log.warning("%s: stopping after this step (again: at once, without saving it)", signal.Signals(signum).name)
        for number in previous:
            signal.signal(number, signal.default_int_handler)

    previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
