"""`appo-jax` that ends itself: `main`, given PHASE STEP DELAY_S SIGNAL ALONE FILE before its own arguments.

A thread waits until the run is in that phase of that step (or in a later step), then so long, then writes to FILE where it strikes.
SIGKILL strikes the training process (ALONE = 1), or its supervisor, too; SIGTERM the supervisor, as a service manager does;
SIGINT both, as a terminal does.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path


def strike(phase: str, step: int, delay: float, number: int, alone: bool, file: Path) -> None:
    from appo_jax import heartbeat

    while not (heartbeat.doing()[0] == phase and heartbeat.now()[1] >= step):
        time.sleep(0.0005)
    time.sleep(delay)
    now, done = heartbeat.now()
    file.write_text(f"step {done + 1}, {now}")
    if number != signal.SIGKILL or not alone:
        os.kill(os.getppid(), number)
    if number != signal.SIGTERM:
        os.kill(os.getpid(), number)


def main() -> int:
    phase, step, delay, number, alone, file = sys.argv[1:7]
    sys.argv = ["appo-jax", *sys.argv[7:]]
    started = False

    def start() -> None:
        nonlocal started
        if not started:  # the first fork is the supervisor's: the child trains
            started = True
            arguments = (phase, int(step), float(delay), int(number), alone == "1", Path(file))
            threading.Thread(target=strike, args=arguments, daemon=True).start()

    os.register_at_fork(after_in_child=start)
    from appo_jax.__main__ import main as train

    return train()
