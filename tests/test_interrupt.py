"""Requests to stop, in whatever thread a run is."""

import signal
import threading

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
