"""A worker of a sweep that is asked to stop asks its run in the same way."""

import signal
import subprocess
import threading
import time

import pytest

from appo_jax.interrupt import stop_requests
from appo_jax.sweep.worker import _stop_process

HUP, TERM = signal.SIGHUP, signal.SIGTERM

# Names each signal that it gets, and ends after a second without any.
RUN = """
trap 'echo HUP; left=10' HUP
trap 'echo TERM; left=10' TERM
echo ready
left=100
while [ $left -gt 0 ]; do sleep 0.1; left=$((left - 1)); done
"""


@pytest.fixture
def hears_hangups():
    """Tests that are started under nohup ignore this signal."""
    before = signal.signal(HUP, signal.SIG_DFL)
    yield
    signal.signal(HUP, before)


@pytest.mark.parametrize(
    ("heard", "later", "passed_on"),
    [
        ([HUP], [], ["HUP"]),  # launch/stop.sh: the run has all the time that it needs
        ([TERM], [], ["TERM"]),
        ([], [], ["TERM"]),  # the lease was lost
        ([HUP], [TERM], ["HUP", "TERM"]),  # the machine is shut down meanwhile
        ([TERM], [HUP], ["TERM"]),
        ([], [HUP, TERM], ["TERM"]),  # a second SIGTERM would end the run at once
    ],
)
@pytest.mark.usefixtures("hears_hangups")
def test_a_run_is_asked_as_its_worker_was(heard, later, passed_on):
    with subprocess.Popen(["sh", "-c", RUN], stdout=subprocess.PIPE, text=True) as process, stop_requests() as stop:
        assert process.stdout.readline() == "ready\n"
        for number in heard:
            signal.raise_signal(number)
        timers = [threading.Timer(0.4 * i, signal.raise_signal, [number]) for i, number in enumerate(later, 1)]
        for timer in timers:
            timer.start()
        _stop_process(process, stop)
        assert process.poll() == 0
        for timer in timers:
            timer.join()
        assert process.stdout.read().split() == passed_on


def test_a_process_that_has_ended_is_not_asked():
    process = subprocess.Popen(["true"])
    process.wait()
    with stop_requests() as stop:
        began = time.monotonic()
        _stop_process(process, stop)
    assert time.monotonic() - began < 1
