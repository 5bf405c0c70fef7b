"""When a tool is down, the run waits; if it stays down, the run stops instead of learning from unanswered calls."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping

from appo_jax import heartbeat
from appo_jax.config import ToolsConfig
from appo_jax.errors import ToolError

# A tool with fewer calls than this is not judged.
MIN_CALLS = 8
_log = logging.getLogger(__name__)


class OutageWatch:
    """Checks the calls of every step. All hosts get the same numbers, so they wait or stop together."""

    def __init__(self, config: ToolsConfig) -> None:
        self._config = config
        self._down_before: set[str] = set()

    def see(self, step: int, metrics: Mapping[str, object]) -> None:
        """After a step: pause if a tool was down in it; raise ToolError if it was also down in the step before.

        A tool is down if more than the share `tools.max_unavailable` of its calls were unavailable.
        """
        down = self._down(metrics)
        if still := [name for name in down if name in self._down_before]:
            name = still[0]
            raise ToolError(
                f"the tool {name!r} is down: {down[name]} in step {step}, after a pause of {self._config.pause_seconds:.0f} s. "
                "Repair its server (the log above has its answers), then start again: the run goes on from its last checkpoint. "
                f"tools.max_unavailable = {self._config.max_unavailable} is the share of calls that may fail"
            )
        self._down_before = set(down)
        if down:
            text = "; ".join(f"{name}: {description}" for name, description in down.items())
            seconds = self._config.pause_seconds
            _log.warning(
                "step %d: %s. Waiting %.0f s; if the next step is no better, the run stops", step, text, seconds
            )
            deadline = time.monotonic() + seconds
            while (left := deadline - time.monotonic()) > 0:
                time.sleep(min(1.0, left))
                heartbeat.progress()

    def _down(self, metrics: Mapping[str, object]) -> dict[str, str]:
        """Tool -> description, for the tools that are down."""
        found = {}
        for key, calls in metrics.items():
            name = key.removeprefix("tools/").removesuffix("/calls")
            if key != f"tools/{name}/calls" or not isinstance(calls, int | float) or calls < MIN_CALLS:
                continue
            unanswered = metrics.get(f"tools/{name}/unavailable", 0)
            if isinstance(unanswered, int | float) and unanswered > self._config.max_unavailable * calls:
                found[name] = f"{unanswered:.0f} of {calls:.0f} calls were unavailable"
        return found
