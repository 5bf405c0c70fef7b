"""Reads the argument of a call that is written as JSON. Common mistakes are accepted if the meaning is certain; other
mistakes are explained to the policy."""

from __future__ import annotations

import ast
import json
from typing import Any

from appo_jax.tools.protocol import ToolSpec

NO_CODE = (
    "Malformed call: the code is only data in quotes or brackets. Write the code itself, without quotes around it."
)
"""The answer of a python tool to a text that `is_data`."""


class Problem(str):
    """An explanation of what is wrong with a call's arguments."""


def read_argument(tool: ToolSpec, arguments: Any, depth: int = 4) -> str | Problem:
    """The text with which a tool is called: the argument if the tool has one argument, else the JSON object.

    `depth`: how many encodings inside each other are read."""
    encoded = isinstance(arguments, str)
    for _ in range(depth):  # some models write the arguments as a string of JSON, as in OpenAI's interface
        if isinstance(arguments, str) and isinstance(decoded := _value(arguments), dict | list | str):
            arguments = decoded
    if isinstance(arguments, str):
        return arguments
    if tool.parameters is None and _is_number(arguments):
        return json.dumps(arguments)
    if not isinstance(arguments, dict):
        return Problem(f"arguments must be an object or a string, not {type(arguments).__name__}")
    only = next(iter(arguments.values())) if len(arguments) == 1 else None
    if tool.parameters is None and _is_number(only):
        only = json.dumps(only)  # a tool without a schema reads text
    if tool.several_arguments or (tool.argument_name is None and tool.parameters is None):
        declared = tool.parameters is not None
        return only if isinstance(only, str) and not declared else json.dumps(arguments, ensure_ascii=False)
    if depth and (inner := _arguments_inside(tool, only)) is not None:  # {"code": "{\"code\": …}"}
        return read_argument(tool, inner, depth - 1)
    extra = [key for key in arguments if key != tool.key]
    if extra and (encoded or len(arguments) > 1):  # a string with another name in it may be the argument itself
        return Problem(f'{tool.name} takes one argument, "{tool.key}"; it was given {", ".join(arguments)[:80]}')
    if not arguments:
        return ""
    if isinstance(only, str):
        # A tool with a schema reads a JSON object as its arguments, so a text that looks like one is given by its name. So is
        # a blank text, where a call without an argument means another value, the default.
        by_name = tool.parameters is not None and isinstance(decode(only), dict)
        by_name |= tool.no_argument_needed and not only.strip()
        return json.dumps({tool.key: only}, ensure_ascii=False) if by_name else only
    if tool.parameters is not None:
        return json.dumps(arguments, ensure_ascii=False)
    return Problem(f'"{tool.key}" of {tool.name} must be a string, not {type(only).__name__}')


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _arguments_inside(tool: ToolSpec, value: Any) -> Any:
    """The arguments, or the whole call, that were written as the value of the tool's only argument; else None."""
    inner = _value(value) if isinstance(value, str) else value
    if not isinstance(inner, dict):
        return None
    if inner.get("name") == tool.name and "arguments" in inner:
        return inner["arguments"]
    return inner if tool.key in inner else None


def _value(text: str) -> Any:
    """The value of a text in JSON, or written as Python writes a dictionary, list or string; None if it is neither."""
    if text.lstrip()[:1] not in tuple("{['\""):
        return None
    if (value := decode(text)) is not None:
        return value
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):  # TypeError: {{}}, which cannot be hashed
        return None


def is_data(code: str) -> bool:
    """Whether a text that should be code is only a string, or a dictionary or list of strings, that holds code: an argument
    that is encoded twice, which Python would show and not run. (Other strings are values that a policy may want to see.)"""
    value = _value(code)
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
    return any(isinstance(part, str) and _is_code(part) for part in parts)


def _is_code(text: str) -> bool:
    """Whether a text is Python that does more than name a value."""
    try:
        body = ast.parse(text).body
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return False
    lone = len(body) == 1 and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Name | ast.Constant)
    return bool(body) and not lone


def decode(text: str) -> Any:
    """The value of a JSON text, or None."""
    try:
        return json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return None
