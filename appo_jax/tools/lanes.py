"""A tool's queue, its worker threads, its time limit, and the circuit breaker that stops calling a failing tool.
Finished calls are released immediately: no worker and no timer keeps a call, its answer or its states.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

from appo_jax.tools.protocol import Tool, ToolResult
from appo_jax.types import Outcome

logger = logging.getLogger(__name__)

DEFAULT_TIMEOUT = 30.0  # seconds for a tool without a `timeout` attribute
GRACE = 2.0  # seconds a tool may exceed its limit before it is abandoned
MAX_ABANDONED = 32  # threads of one tool that may hang before the tool counts as down
TRIP_AFTER = 5  # this many failures in a row open the circuit
COOL_DOWN = (2.0, 60.0)  # seconds the circuit stays open: the first time, and the maximum

Done = Callable[[ToolResult, Any], None]


@dataclasses.dataclass
class _Job:
    state: Any
    argument: str
    done: Done
    opening: int = 0  # how often the circuit had been opened when the call was submitted
    abandoned: bool = False
    finished: bool = False


class Lane:
    """One tool's queue, workers and circuit breaker."""

    def __init__(self, tool: Tool, workers: int, clock: Clock):
        self._tool = tool
        self._clock = clock
        self._limit = float(getattr(tool, "timeout", DEFAULT_TIMEOUT)) + GRACE
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._workers = min(workers, getattr(tool, "max_concurrency", workers))
        self._started = 0
        self._abandoned = 0
        self._failures = 0
        self._openings = 0  # how often the circuit was opened
        self._opened = 0  # the same since the last success
        self._open_until = 0.0
        self._closed = False

    def submit(self, state: Any, argument: str, done: Done) -> int:
        """Queue a call. Returns the number of calls before it in the queue."""
        with self._lock:
            refused = self._closed or time.monotonic() < self._open_until
            if not refused and self._started < self._workers:
                self._start_worker()
            job = _Job(state, argument, done, self._openings)
        if refused:
            self._answer(job, self._unavailable("it has failed repeatedly"), None)
            return 0
        waiting = self._jobs.qsize()
        self._jobs.put(job)
        return waiting

    def close(self) -> None:
        with self._lock:
            self._closed = True
            for _ in range(self._started):
                self._jobs.put(None)
        while True:  # calls that still wait are answered here
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                break
            if job is not None:
                self._answer(job, self._unavailable("the run is closing"), None)
        for _ in range(self._started):
            self._jobs.put(None)

    def _start_worker(self) -> None:
        threading.Thread(target=self._work, name=f"tool-{self._tool.name}", daemon=True).start()
        self._started += 1

    def _work(self) -> None:
        while self._work_once():
            pass

    def _work_once(self) -> bool:
        """Wait for a call and run it. This is a separate method so that a waiting worker keeps no reference to its last
        call."""
        job = self._jobs.get()
        if job is None:
            return False
        alarm = self._clock.at(time.monotonic() + self._limit, lambda: self._abandon(job))
        result, state = self._call(job)
        alarm.cancel()
        with self._lock:
            job.finished = True
            if job.abandoned:
                self._abandoned -= 1
                return False  # another thread has replaced this one
            self._judge(job, result.outcome)
        self._answer(job, result, state)
        return True

    def _call(self, job: _Job) -> tuple[ToolResult, Any]:
        """Call the tool. A tool that raises anything, SystemExit included, or returns something else than a ToolResult and a state
        is unavailable: it must not end the worker's thread."""
        try:
            result, state = self._tool.call(job.state, job.argument)
            valid = (
                isinstance(result, ToolResult) and isinstance(result.text, str) and isinstance(result.outcome, Outcome)
            )
            if not valid:
                raise TypeError(f"call returned {result!r}; expected (ToolResult(text, Outcome…), state)")
        except BaseException as error:
            logger.exception("the tool %s raised", self._tool.name)
            return self._unavailable(f"{type(error).__name__}: {error}"[:200]), None
        # The backend causes the timeout of a stateless tool; the policy's code causes that of an interpreter.
        if result.outcome is Outcome.TIMEOUT and job.state is None:
            result = ToolResult(result.text, Outcome.UNAVAILABLE)
        return result, state

    def _answer(self, job: _Job, result: ToolResult, state: Any) -> None:
        try:
            job.done(result, state)
        except Exception:
            logger.exception("the answer of the tool %s could not be handed on", self._tool.name)

    def _abandon(self, job: _Job) -> None:
        with self._lock:
            if job.finished:
                return
            job.abandoned = True
            self._abandoned += 1
            self._judge(job, Outcome.UNAVAILABLE)
            if self._abandoned > MAX_ABANDONED:
                self._open_until = time.monotonic() + COOL_DOWN[1]
            self._start_worker()
        logger.warning(
            "the tool %s has not answered within %.1f s; the call is abandoned", self._tool.name, self._limit
        )
        late = ToolResult(f"The tool did not answer within {self._limit:.0f} seconds.", Outcome.UNAVAILABLE)
        self._answer(job, late, None)

    def _judge(self, job: _Job, outcome: Outcome) -> None:
        """Open or close the circuit after a call."""
        if outcome is Outcome.LIMIT:
            return  # of the code or of this run's own rate: which says nothing about the tool's state
        if outcome is not Outcome.UNAVAILABLE:
            self._failures = self._opened = 0
            if self._abandoned <= MAX_ABANDONED:
                self._open_until = 0.0
            return
        if job.opening != self._openings:
            return  # it was submitted before the circuit was opened, and says nothing about the tool since then
        self._failures += 1
        # After a cool-down a single failure opens the circuit again, for twice as long.
        if self._failures >= (1 if self._opened else TRIP_AFTER):
            seconds = min(COOL_DOWN[0] * 2**self._opened, COOL_DOWN[1])
            self._open_until = time.monotonic() + seconds
            self._opened += 1
            self._openings += 1
            self._failures = 0
            logger.warning("the tool %s keeps failing; it is not called for %.0f s", self._tool.name, seconds)

    def _unavailable(self, why: str) -> ToolResult:
        return ToolResult(f"The tool {self._tool.name} is not available ({why}).", Outcome.UNAVAILABLE)


class Alarm:
    """An action that has not run yet. Cancelling releases everything that the action references."""

    __slots__ = ("_action",)

    def __init__(self, action: Callable[[], None]):
        self._action: Callable[[], None] | None = action

    def cancel(self) -> None:
        self._action = None

    @property
    def cancelled(self) -> bool:
        return self._action is None

    def ring(self) -> None:
        action, self._action = self._action, None
        if action is not None:
            action()


class Clock:
    """A thread that runs short actions at given times."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Alarm]] = []
        self._order = itertools.count()
        self._sweep_at = 1024  # length of the heap at which cancelled alarms are removed
        self._wake = threading.Condition()
        self._closed = False
        threading.Thread(target=self._run, name="tool-clock", daemon=True).start()

    def at(self, when: float, action: Callable[[], None]) -> Alarm:
        """Run `action` at `when` (seconds of `time.monotonic`), unless the alarm is cancelled before."""
        alarm = Alarm(action)
        with self._wake:
            if len(self._heap) >= self._sweep_at:
                self._heap = [entry for entry in self._heap if not entry[2].cancelled]
                heapq.heapify(self._heap)
                self._sweep_at = max(1024, 2 * len(self._heap))
            heapq.heappush(self._heap, (when, next(self._order), alarm))
            if self._heap[0][2] is alarm:
                self._wake.notify()
        return alarm

    def close(self) -> None:
        with self._wake:
            self._closed = True
            self._heap.clear()
            self._wake.notify()

    def _run(self) -> None:
        while self._ring_next():
            pass

    def _ring_next(self) -> bool:
        with self._wake:
            while not self._closed and (not self._heap or self._heap[0][0] > time.monotonic()):
                self._wake.wait(min(self._heap[0][0] - time.monotonic(), threading.TIMEOUT_MAX) if self._heap else None)
            if self._closed:
                return False
            _, _, alarm = heapq.heappop(self._heap)
        try:
            alarm.ring()
        except Exception:  # the other alarms must ring all the same
            logger.exception("an alarm of the tools' clock failed")
        return True
