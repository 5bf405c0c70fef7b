"""Requests to stop, in whatever thread a run is."""

import signal
import subprocess
import sys
import threading
import time

import pytest

from appo_jax import interrupt
from appo_jax.interrupt import stop_requests


def test_a_run_in_another_thread_leaves_the_signals_alone():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    heard = []

    def run():
        with stop_requests() as stop:
            heard.append((stop.agreed(), signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    assert heard == [(False, *before)]


def test_a_run_in_the_main_thread_hears_them():
    before = signal.getsignal(signal.SIGTERM)
    with stop_requests() as stop:
        signal.raise_signal(signal.SIGTERM)
        assert stop.agreed()
    assert signal.getsignal(signal.SIGTERM) == before


INT, TERM, HUP = signal.SIGINT, signal.SIGTERM, signal.SIGHUP


@pytest.mark.parametrize(
    ("signals", "again"),  # None: a pause
    [
        ([TERM], 0), ([TERM, HUP], 0), ([HUP, HUP], 0), ([HUP, TERM], 0), ([TERM, TERM], 0),
        ([INT, None, HUP], 0),  # the terminal is closed while the step ends
        ([HUP, None, TERM], 0),  # the machine is shut down while the step ends
        ([INT, None, INT], 1), ([HUP, None, TERM, None, TERM], 1), ([HUP, TERM, None, TERM], 1), ([TERM, HUP, None, INT], 1),
    ],
)  # fmt: skip
def test_signals_of_one_event_are_one_request(monkeypatch, signals, again):
    monkeypatch.setattr(interrupt, "ONE_REQUEST_S", 0.1)
    before = signal.signal(HUP, signal.SIG_DFL)  # under nohup it is ignored
    with stop_requests() as stop:
        for number in signals:
            try:
                time.sleep(0.11) if number is None else signal.raise_signal(number)
            except KeyboardInterrupt:
                again -= 1
    signal.signal(HUP, before)
    assert stop.requested
    assert again == 0


DROPPED = """
import gc, os, signal, sys, time
from appo_jax import interrupt
interrupt.LEAVE_S = float(sys.argv[1])
signal.signal(signal.SIGINT, interrupt.leave)
gc.callbacks.append(lambda phase, _: phase == "start" and os.kill(os.getpid(), signal.SIGINT))
gc.collect()
print("still here", flush=True)
gc.callbacks.clear()
time.sleep(20)
"""


@pytest.mark.parametrize(("seconds", "signals"), [(0.2, 0), (20.0, 1)])
def test_a_request_that_python_drops_ends_the_process_all_the_same(seconds, signals):
    """As in the garbage collector's callbacks of JAX."""
    process = subprocess.Popen([sys.executable, "-c", DROPPED, str(seconds)], stdout=subprocess.PIPE, text=True)
    if signals:
        assert process.stdout.readline() == "still here\n"
        time.sleep(2 * interrupt.ONE_REQUEST_S)
        process.send_signal(signal.SIGINT)
    assert process.wait(10) == 130
