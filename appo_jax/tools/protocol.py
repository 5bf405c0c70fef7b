"""The interface of a tool: a name, a start state, and a function from (state, argument) to (result, next state).

For the caller, states are immutable values: two calls with the same state fork the tool. A branch gets the state that was
recorded at its fork, so it continues from the interpreter as it was there. A tool whose states are processes ends each process
when the last reference to its state object is gone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol

from appo_jax.types import Outcome


@dataclasses.dataclass(frozen=True)
class ToolResult:
    """The text for the policy, and the outcome of the call."""

    text: str
    outcome: Outcome


class Tool(Protocol):
    """Implementations must be safe to call from several threads and return within their own time limit.

    A tool may also have the attributes below. They describe and demonstrate the tool to a policy.

        timeout: float                    seconds that a call may take
        max_concurrency: int              calls that may run at the same time, if fewer than tools.max_concurrency
        description: str                  one sentence on what the tool does, for the system prompt
        argument_name: str                name of its only argument, for calls written as JSON ("code", "query")
        parameters: Mapping               JSON schema of its arguments, for a tool that reads a JSON object
        skills: Collection[str]           what the demonstrations of a data source may use it for (SKILLS)
        examples: Sequence[ToolExample]   its own demonstrations, for the cold start
    """

    name: str

    def start(self) -> Any:
        """The state before the first call of a rollout (None for a stateless tool)."""

    def call(self, state: Any, argument: str) -> tuple[ToolResult, Any]:
        """Run a call. Errors caused by the policy are results, not exceptions."""

    def close(self) -> None:
        """Free every process, file and connection."""


SKILLS = {
    "compute": "takes an arithmetic expression and returns its value",
    "run_python": "takes Python code and returns what it prints",
    "look_up": "takes the name of a thing and returns text about it",
}


@dataclasses.dataclass(frozen=True)
class ToolExample:
    """A question that one call of a tool answers."""

    question: str
    argument: str
    answer: str | Callable[[str], str]  # the answer, or a function that reads it from the tool's result
    thought: str = ""  # what the policy thinks before the call


@dataclasses.dataclass(frozen=True)
class ToolSpec:
    """The description of a tool for the policy."""

    name: str
    argument_name: str | None = None  # None: the tool gives no name for its argument
    description: str = ""
    parameters: Mapping[str, Any] | None = None  # JSON schema of a tool that reads its argument as a JSON object
    skills: Collection[str] = ()
    examples: Sequence[ToolExample] = ()

    @classmethod
    def of(cls, tool: Tool) -> ToolSpec:
        """The description in a tool's attributes."""
        fields = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: getattr(tool, name) for name in fields if hasattr(tool, name)})

    @property
    def key(self) -> str:
        """Name of the argument in a call written as JSON."""
        properties = list((self.parameters or {}).get("properties", ()))
        return self.argument_name or (properties[0] if len(properties) == 1 else "input")

    @property
    def several_arguments(self) -> bool:
        """Whether the tool reads a JSON object of arguments."""
        return self.parameters is not None and len(self.parameters.get("properties", ())) != 1

    @property
    def no_argument_needed(self) -> bool:
        """Whether a call may leave out all arguments: by the tool's schema, none is required."""
        return self.parameters is not None and not self.parameters.get("required")

    def schema(self) -> dict[str, Any]:
        """The tool as an OpenAI-style function, as chat templates expect it."""
        only = {"type": "object", "properties": {self.key: {"type": "string"}}, "required": [self.key]}
        function = {
            "name": self.name,
            "description": self.description,
            "parameters": only if self.parameters is None else dict(self.parameters),
        }
        return {"type": "function", "function": function}


def writable(text: str) -> str:
    """Text without lone surrogates, which JSON can contain but no file, server or tokenizer accepts."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()
