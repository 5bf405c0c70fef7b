"""Reads the argument of a call that is written as JSON. Common mistakes are accepted if the meaning is certain; other
mistakes are explained to the policy."""

from __future__ import annotations

import json
from typing import Any

from appo_jax.tools.protocol import ToolSpec


class Problem(str):
    """An explanation of what is wrong with a call's arguments."""


def read_argument(tool: ToolSpec, arguments: Any) -> str | Problem:
    """The text with which a tool is called: the argument if the tool has one argument, else the JSON object."""
    # Some models write the arguments as a string of JSON, as in OpenAI's interface.
    if isinstance(arguments, str) and isinstance(decoded := decode(arguments), dict):
        arguments = decoded
    if isinstance(arguments, str):
        return arguments
    if not isinstance(arguments, dict):
        return Problem(f"arguments must be an object or a string, not {type(arguments).__name__}")
    only = next(iter(arguments.values())) if len(arguments) == 1 else None
    if tool.several_arguments or (tool.argument_name is None and tool.parameters is None):
        declared = tool.parameters is not None
        return only if isinstance(only, str) and not declared else json.dumps(arguments, ensure_ascii=False)
    for _ in range(4):  # {"code": "{\"code\": …}"}: arguments that are encoded twice
        inner = decode(only) if isinstance(only, str) else only
        if not (isinstance(inner, dict) and list(inner) == [tool.key]):
            break
        only = inner[tool.key]
    if not arguments or isinstance(only, str):
        return only or ""
    extra = [key for key in arguments if key != tool.key]
    if extra and len(arguments) > 1:
        return Problem(f'{tool.name} takes one argument, "{tool.key}"; it was also given {", ".join(extra)[:80]}')
    if tool.parameters is not None:
        return json.dumps(arguments, ensure_ascii=False)
    return Problem(f'"{tool.key}" of {tool.name} must be a string, not {type(only).__name__}')


def decode(text: str) -> Any:
    """The value of a JSON text, or None."""
    try:
        return json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return None
