"""What the two python tools share: how they are described, which code they do not run, and what they tell the policy."""

from __future__ import annotations

from appo_jax.tools.arguments import NO_CODE, is_data
from appo_jax.tools.protocol import ToolResult
from appo_jax.types import Outcome

MAX_CODE_BYTES = 100_000  # of a call
KEPT = "Variables are as they were before this call."
ENDED = "The interpreter ended (a crash or os._exit)."


class PythonCode:
    """Base of the `python` tools."""

    name = "python"
    argument_name = "code"
    description = "Runs Python code and returns what it prints, or the value of its last expression"
    skills = ("compute", "run_python")


def refusal(code: str) -> ToolResult | None:
    """The result of code that is too long, or that is no code; None: it may be run."""
    if len(code.encode("utf-8", "replace")) > MAX_CODE_BYTES:
        return ToolResult(f"The code is longer than {MAX_CODE_BYTES} bytes.", Outcome.LIMIT)
    return ToolResult(NO_CODE, Outcome.MALFORMED) if is_data(code) else None


def unavailable(reason: object) -> ToolResult:
    """The result of a call that no interpreter has run."""
    return ToolResult(f"The Python interpreter is not available ({reason}).", Outcome.UNAVAILABLE)
