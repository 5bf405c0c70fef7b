"""When a tool is down, the run waits; if it stays down, the run stops: unanswered calls are neither learned from nor measured."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

from appo_jax import heartbeat
from appo_jax.config import ToolsConfig
from appo_jax.errors import ToolError


class ToolsDown(ToolError):
    """A tool stays down. All hosts raise it together."""


# A tool with fewer calls than this is not judged.
MIN_CALLS = 8
ROUND_S = 1.0  # a pause is as many rounds on every host
_log = logging.getLogger(__name__)
Drawn = TypeVar("Drawn")
Stopping = Callable[[], bool]
"""Whether the run was asked to stop. All hosts call it together and get the same answer."""


class OutageWatch:
    """Checks the calls of every step. All hosts get the same numbers, so they wait or stop together."""

    def __init__(self, config: ToolsConfig, stopping: Stopping | None = None) -> None:
        self._config, self._stopping = config, stopping
        self._down_before: set[str] = set()

    def see(self, step: int, metrics: Mapping[str, object]) -> None:
        """After a step: pause if a tool was down in it; raise ToolsDown if it was also down in the step before.

        A tool is down if more than the share `tools.max_unavailable` of its calls were unavailable. A request to stop ends the
        pause.
        """
        found = down(metrics, self._config)
        if still := {name: found[name] for name in found if name in self._down_before}:
            raise _stays_down(still, f"in step {step}", self._config)
        self._down_before = set(found)
        if found:
            _pause(found, f"step {step}", "if the next step is no better", self._config, self._stopping)


def with_tools(
    draw: Callable[[], Drawn],
    metrics: Callable[[], Mapping[str, object]],
    what: str,
    config: ToolsConfig,
    stopping: Stopping | None = None,
) -> Drawn:
    """The result of `draw`, an evaluation whose wrong answers must be the policy's own.

    If a tool was down meanwhile, everything is drawn again after a pause. Raises ToolsDown if the tool is still down, or if the run
    was asked to stop in the pause. `metrics`: the figures of the calls since it was called last. `what`: the evaluation, in words.
    """
    metrics()
    drawn = draw()
    if found := down(metrics(), config):
        if _pause(found, what, "then all is drawn again; if it is no better", config, stopping):
            raise _stays_down(found, f"in {what}", config)
        drawn = draw()
        if found := down(metrics(), config):
            raise _stays_down(found, f"in {what}", config)
    return drawn


def down(metrics: Mapping[str, object], config: ToolsConfig) -> dict[str, str]:
    """Tool -> description, for the tools that are down."""
    found = {}
    for key, calls in metrics.items():
        name = key.removeprefix("tools/").removesuffix("/calls")
        if key != f"tools/{name}/calls" or not isinstance(calls, int | float) or calls < MIN_CALLS:
            continue
        unanswered = metrics.get(f"tools/{name}/unavailable", 0)
        if isinstance(unanswered, int | float) and unanswered > config.max_unavailable * calls:
            found[name] = f"{unanswered:.0f} of {calls:.0f} calls were unavailable"
    return found


def _stays_down(found: Mapping[str, str], where: str, config: ToolsConfig) -> ToolsDown:
    name, description = next(iter(found.items()))
    return ToolsDown(
        f"the tool {name!r} is down: {description} {where}, after a pause of {config.pause_seconds:.0f} s. "
        "Repair its server (the log above has its answers), then start again: a run goes on from its last checkpoint. "
        f"tools.max_unavailable = {config.max_unavailable} is the share of calls that may fail"
    )


def _pause(
    found: Mapping[str, str],
    where: str,
    otherwise: str,
    config: ToolsConfig,
    stopping: Stopping | None = None,
) -> bool:
    """Wait. Returns whether the run was asked to stop meanwhile."""
    text = "; ".join(f"{name}: {description}" for name, description in found.items())
    _log.warning("%s: %s. Waiting %.0f s; %s, the run stops", where, text, config.pause_seconds, otherwise)
    # Rounds are counted, because hosts would reach a time in different rounds.
    for i in range(math.ceil(config.pause_seconds / ROUND_S)):
        if stopping is not None and stopping():
            return True
        time.sleep(min(ROUND_S, config.pause_seconds - i * ROUND_S))
        heartbeat.progress()
    return False
