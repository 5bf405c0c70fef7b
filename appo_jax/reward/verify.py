"""math-verify in a separate process (verify_worker.py), because an answer such as `9^{9^{9^9}}` never returns, and
math-verify's own time limit works only in the main thread."""

from __future__ import annotations

import atexit
import functools
import json
import os
import subprocess
import sys
import threading

from appo_jax.errors import AppoError

VERIFY_SECONDS = 3.0
"""Seconds for one comparison by math-verify; if it takes longer, the answers count as unequal."""


class _Worker:
    """A process that runs verify_worker.py. It kills itself if a comparison takes too long, and is then started
    again."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        atexit.register(self.close)

    def start(self) -> None:
        """Start the process, if it is not running. Raises AppoError."""
        with self._lock:
            self._process = self._process or self._start()

    def compare(self, answer: str, gold: str) -> bool | None:
        with self._lock:
            process = self._process or self._start()
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                process.stdin.write(json.dumps([answer, gold, VERIFY_SECONDS]) + "\n")
                process.stdin.flush()
                reply = process.stdout.readline()
            except BrokenPipeError:
                reply = ""
            if not reply:  # it died of its time limit or its memory limit
                self._stop()
                return None
            verdict: bool = json.loads(reply)
            return verdict

    def _start(self) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "appo_jax.reward.verify_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
            start_new_session=True,  # only the trainer handles Ctrl-C
        )
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            process.kill()
            process.communicate()
            raise AppoError(
                f"math-verify could not be started by {sys.executable} (its message is above); mathematical golds need "
                "it: reinstall appo_jax with its dependencies"
            )
        self._process = process
        return process

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def close(self) -> None:
        with self._lock:
            self._stop()


_worker = _Worker()


def start() -> None:
    """Start math-verify before a comparison, so that the start does not count for the time limit. Raises AppoError."""
    _worker.start()


@functools.lru_cache(maxsize=8192)
def same_value(answer: str, gold: str) -> bool | None:
    """math-verify's verdict on two expressions; None when it ran out of time or memory. Raises AppoError.

    Rollouts of one prompt repeat answers, hence the cache."""
    return _worker.compare(answer, gold)
