"""What a tool is: a name, a start state, and a function from (state, argument) to (result, next state).

States are immutable values from the caller's side: calling twice with the same state forks the tool. A branch
therefore continues from the interpreter as it was at its fork point by holding the state recorded there. A tool that
backs its states by processes frees each one when the last reference to its state object is gone.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

from appo_jax.types import Outcome


@dataclasses.dataclass(frozen=True)
class ToolResult:
    """What the policy will read, and how it came about."""

    text: str
    outcome: Outcome


class Tool(Protocol):
    """Implementations must be safe to call from several threads and return within their own time limit."""

    name: str  # also the tag: <name>…</name>

    def start(self) -> Any:
        """State of a rollout that has not called the tool yet (None for a stateless tool)."""

    def call(self, state: Any, argument: str) -> tuple[ToolResult, Any]:
        """Run one call. Errors of the policy's making are results, not exceptions."""

    def close(self) -> None:
        """Free every process, file and connection."""
