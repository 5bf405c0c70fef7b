"""Runs the policy's tool calls in the background, with limits and statistics. Failures are returned as results, not
raised.

Each tool has a lane (`lanes.py`): a queue and a bounded number of worker threads. A call that exceeds its time limit is
answered with an error and abandoned; its thread is replaced. A tool that keeps failing is not called for a while.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import logging
import operator
import re
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from types import TracebackType
from typing import Any

import numpy as np

from appo_jax import distributed, heartbeat
from appo_jax.config import ToolsConfig
from appo_jax.errors import ConfigError
from appo_jax.text.tokenizer import TAG_NAMES
from appo_jax.tools.format import Call, CallFormat, make_format
from appo_jax.tools.lanes import Clock, Lane
from appo_jax.tools.protocol import Tool, ToolResult, writable
from appo_jax.types import Outcome

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class CallRecord:
    """The outcome of a call."""

    name: str
    argument: str
    result: str  # the text for the policy, before it is shielded and marked as a result
    outcome: Outcome
    seconds: float  # from submission to result, including the time in the queue
    states: Mapping[str, Any]  # tool states after the call; if it failed, those before it


# A name is a tag in the policy's text, in any case, and a part of the metrics' names, where "malformed" stands for malformed calls.
_RESERVED = (*TAG_NAMES, "malformed")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,63}")


def _checked_names(tools: Sequence[Tool]) -> list[str]:
    names = [tool.name for tool in tools]
    for name in names:
        if not isinstance(name, str) or not _NAME.fullmatch(name) or name.lower() in _RESERVED:
            raise ConfigError(
                f"tools.enabled: a tool is named {name!r}; expected up to 64 letters, digits, _, . and -, beginning with a "
                f"letter or _, and none of {', '.join(_RESERVED)}. Give it another `name`"
            )
    if len(set(names)) != len(names):
        raise ConfigError(f"tools.enabled: two tools are named alike ({', '.join(names)}); each needs its own name")
    return names


class ToolExecutor:
    """The tools of a run. A context manager: leaving it closes every tool."""

    def __init__(self, tools: Sequence[Tool], config: ToolsConfig, call_format: CallFormat | None = None):
        """call_format: used instead of `config.call_format`. Raises ConfigError for a tool's name."""
        names = _checked_names(tools)
        self.call_format = call_format or make_format(config.call_format, tools)
        self.names = tuple(names)
        self._tools = {tool.name: tool for tool in tools}
        self._clock = Clock()
        self._lanes = {tool.name: Lane(tool, config.max_concurrency, self._clock) for tool in tools}
        self._stats = _Stats()
        self._closed = False

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """Strings after which sampling pauses for a tool."""
        return self.call_format.stop_strings

    def start(self) -> Mapping[str, Any]:
        """Tool states of a rollout that has made no call. Where a tool cannot make one, the rollout's calls of it are answered
        as unavailable."""
        return {name: _started(tool) for name, tool in self._tools.items()}

    def submit(self, states: Mapping[str, Any], text: str, bound: float | None = None) -> Future[CallRecord]:
        """Run the call at the end of `text`, from `states`. The future never fails; if `bound` is given, it is done within
        `bound` seconds."""
        began = time.monotonic()
        answer: Future[CallRecord] = Future()
        call = self.call_format.parse(text)
        if isinstance(call, str) or call.name not in self._lanes:
            names = ", ".join(self.names)
            explanation = call if isinstance(call, str) else f"Unknown tool {call.name[:80]!r}; the tools are: {names}."
            self._finish(
                answer, began, Call("malformed", text[-200:]), ToolResult(explanation, Outcome.MALFORMED), states
            )
            return answer
        call = dataclasses.replace(call, argument=writable(call.argument))
        known = states.get(call.name)
        if isinstance(known, _NotStarted):
            notice = ToolResult(f"The tool {call.name} is not available ({known.why}).", Outcome.UNAVAILABLE)
            self._finish(answer, began, call, notice, states)
            return answer
        if isinstance(known, _Answered) and (earlier := known.get(call.argument)) is not None:
            notice = ToolResult(f"(You have asked this before; the result is the same.)\n{earlier}", Outcome.OK)
            self._stats.repeated(call.name)
            self._finish(answer, began, call, notice, states)
            return answer

        def done(result: ToolResult, state: Any) -> None:
            after = states
            if result.outcome in (Outcome.OK, Outcome.ERROR):
                if state is None and (known is None or isinstance(known, _Answered)):
                    # A stateless tool: its state is the answers that it has given in this rollout.
                    state = (known or _Answered()).adding(call.argument, result.text)
                after = {**states, call.name: state}
            self._finish(answer, began, call, result, after)

        state = None if isinstance(known, _Answered) else known
        self._stats.queue(call.name, self._lanes[call.name].submit(state, call.argument, done))
        if bound is not None:
            late = ToolResult("The time of this attempt is over.", Outcome.TIMEOUT)
            alarm = self._clock.at(began + max(bound, 0.0), lambda: self._finish(answer, began, call, late, states))
            answer.add_done_callback(lambda _: alarm.cancel())
        return answer

    def run(self, name: str, argument: str, bound: float = 60.0) -> CallRecord:
        """Make a call outside of any rollout, and wait for it. Raises ValueError for an argument that a call cannot
        contain."""
        text = self.call_format.render_call(name, argument)
        record = self.submit(self.start(), text, bound).result()
        heartbeat.progress()  # making demonstrations takes many calls
        return record

    def metrics(self) -> dict[str, float]:
        """Calls, outcomes, latencies (seconds) and queue lengths of each tool since the last call of this method.

        With several hosts: the sums of counts, and the maxima of percentiles and queue lengths, over all hosts.
        """
        figures = self._stats.read()
        for name, tool in self._tools.items():
            try:  # failed requests to a backend, by kind, including retried ones
                faults = tool.faults() if hasattr(tool, "faults") else {}
                figures |= {f"tools/{name}/fault_{kind}": float(n) for kind, n in sorted(faults.items())}
            except Exception:
                logger.exception("the faults of the tool %s could not be read", name)
        merged: dict[str, float] = {}
        for of_host in distributed.exchange(figures):
            for key, value in of_host.items():
                add = max if "/seconds_" in key or key.endswith("/queue_max") else operator.add
                merged[key] = add(merged.get(key, 0.0), value)
        return merged

    def close(self) -> None:
        """Stop the lanes and close every tool; calls still running are answered as unavailable. Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        for lane in self._lanes.values():
            lane.close()
        for tool in self._tools.values():
            try:
                tool.close()
            except Exception:
                logger.exception("closing the tool %s failed", tool.name)
        self._clock.close()

    def __enter__(self) -> ToolExecutor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _finish(
        self, answer: Future[CallRecord], began: float, call: Call, result: ToolResult, states: Mapping[str, Any]
    ) -> None:
        seconds = time.monotonic() - began
        record = CallRecord(call.name, call.argument, writable(result.text), result.outcome, seconds, states)
        with contextlib.suppress(
            InvalidStateError
        ):  # only the first answer counts: that of the tool, or that of the time limit
            answer.set_result(record)
            self._stats.count(call.name, result.outcome, seconds)


@dataclasses.dataclass(frozen=True)
class _NotStarted:
    """In place of a state that a tool could not make."""

    why: str


def _started(tool: Tool) -> Any:
    try:
        return tool.start()
    except (Exception, SystemExit) as error:
        logger.exception("the tool %s could not make a state", tool.name)
        return _NotStarted(f"{type(error).__name__}: {error}"[:200])


class _Answered(dict[str, str]):
    """The answers of a stateless tool in this rollout, by argument. Never changed in place, because branches share it."""

    def adding(self, argument: str, text: str) -> _Answered:
        return _Answered({**self, argument: text})


class _Stats:
    """Counters behind `metrics`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._reset()

    def _reset(self) -> None:
        self._outcomes: collections.Counter[tuple[str, str]] = collections.Counter()
        self._seconds: dict[str, list[float]] = collections.defaultdict(list)
        self._queue: dict[str, int] = collections.defaultdict(int)

    def count(self, name: str, outcome: Outcome, seconds: float) -> None:
        with self._lock:
            self._outcomes[name, str(outcome)] += 1
            self._seconds[name].append(seconds)

    def repeated(self, name: str) -> None:
        with self._lock:
            self._outcomes[name, "repeated"] += 1

    def queue(self, name: str, waiting: int) -> None:
        with self._lock:
            self._queue[name] = max(self._queue[name], waiting)

    def read(self) -> dict[str, float]:
        with self._lock:
            figures: dict[str, float] = {}
            for name, seconds in sorted(self._seconds.items()):
                figures[f"tools/{name}/calls"] = float(len(seconds))
                for level in (50, 90, 99):
                    figures[f"tools/{name}/seconds_p{level}"] = float(np.percentile(seconds, level))
                figures[f"tools/{name}/queue_max"] = float(self._queue.get(name, 0))
            for (name, outcome), count in sorted(self._outcomes.items()):
                figures[f"tools/{name}/{outcome}"] = float(count)
            self._reset()
        return figures
