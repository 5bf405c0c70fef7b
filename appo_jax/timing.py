"""Wall time of a run, time by phase, and compilations."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any, Literal

from appo_jax import heartbeat

Phase = Literal["rollout", "reward", "score", "branch", "update"]
"""The phases of a training step, in order."""


class Clock:
    """Wall time of a run, including its earlier processes, and the number of programs compiled since the last logged
    step."""

    def __init__(self) -> None:
        self.before = 0.0
        self._began = time.perf_counter()
        self._compilations = Compilations()

    def wall_s(self) -> float:
        """Seconds so far."""
        return self.before + time.perf_counter() - self._began

    def metrics(self) -> dict[str, float]:
        """Called once per step; the count of compilations starts again at 0."""
        return {"time/wall_s": self.wall_s(), "time/compiled_programs": self._compilations.take()}


class Compilations:
    """Counts the programs that are compiled or read from the compilation cache. After a run's first steps there should
    be none; if there are, a shape has changed that should be constant."""

    def __init__(self) -> None:
        import jax  # only here: `appo-jax view` takes the phases from this module, and does not need jax

        self._count = 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **_: Any) -> None:
        self._count += event == "/jax/core/compile/backend_compile_duration"

    def take(self) -> int:
        """The count since the last call."""
        count, self._count = self._count, 0
        return count


class Timer:
    """Seconds by phase. `with timer("rollout"): …`, any number of times."""

    def __init__(self) -> None:
        self._began, self._seconds = time.perf_counter(), dict[Phase, float]()

    @contextlib.contextmanager
    def __call__(self, phase: Phase) -> Iterator[None]:
        began = time.perf_counter()
        with heartbeat.phase(phase):
            yield
        self._seconds[phase] = self._seconds.get(phase, 0.0) + time.perf_counter() - began

    def metrics(self) -> dict[str, float]:
        phases = {f"time/{phase}_s": seconds for phase, seconds in self._seconds.items()}
        return phases | {"time/step_s": time.perf_counter() - self._began}
