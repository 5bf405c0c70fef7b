"""A tool that is down: the run waits for it, and stops rather than learn from calls that nobody answered."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping

from appo_jax import heartbeat
from appo_jax.config import ToolsConfig
from appo_jax.errors import ToolError

# Fewer calls of a tool than this say nothing about it.
MIN_CALLS = 8
_log = logging.getLogger(__name__)


class OutageWatch:
    """Sees every step's calls. All hosts see the same numbers, so all of them wait or stop alike."""

    def __init__(self, config: ToolsConfig) -> None:
        self._config = config
        self._down_before: set[str] = set()

    def see(self, step: int, metrics: Mapping[str, object]) -> None:
        """Of a step that is done: pause when a tool was down in it; raise ToolError when it was down in the step before, too.

        A tool is down when more than `tools.max_unavailable` of its calls went unanswered.
        """
        down = self._down(metrics)
        if still := [name for name in down if name in self._down_before]:
            name = still[0]
            raise ToolError(
                f"the tool {name!r} is down: {down[name]} in step {step}, after a pause of {self._config.pause_seconds:.0f} s. See "
                "to its server (the log above has its answers), then start again: the run goes on from its last checkpoint. "
                f"tools.max_unavailable = {self._config.max_unavailable} is the share that is put up with"
            )
        self._down_before = set(down)
        if down:
            said = "; ".join(f"{name}: {words}" for name, words in down.items())
            seconds = self._config.pause_seconds
            _log.warning(
                "step %d: %s. Waiting %.0f s; if the next step is no better, the run stops", step, said, seconds
            )
            deadline = time.monotonic() + seconds
            while (left := deadline - time.monotonic()) > 0:
                time.sleep(min(1.0, left))
                heartbeat.progress()

    def _down(self, metrics: Mapping[str, object]) -> dict[str, str]:
        """Tool -> in words, for those that are down."""
        found = {}
        for key, calls in metrics.items():
            name = key.removeprefix("tools/").removesuffix("/calls")
            if key != f"tools/{name}/calls" or not isinstance(calls, int | float) or calls < MIN_CALLS:
                continue
            unanswered = metrics.get(f"tools/{name}/unavailable", 0)
            if isinstance(unanswered, int | float) and unanswered > self._config.max_unavailable * calls:
                found[name] = f"{unanswered:.0f} of {calls:.0f} calls were unavailable"
        return found
