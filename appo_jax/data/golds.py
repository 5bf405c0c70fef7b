"""Reads accepted answers as data files write them: text, a number, a list of aliases, or an object that holds them."""

from __future__ import annotations

import ast
import json
import math
import re
from typing import Any

_TARGETS = (
    "target",
    "ground_truth",
    "answers",
    "aliases",
    "value",
)  # the fields of an object that may hold the answers


def accepted_answers(value: Any) -> tuple[str, ...]:
    """The answers as texts, in order, each once, without blank ones. An empty tuple means that there is no answer.

    `value` may be text, a number, a truth value (yes or no), a list of these, the text of a list of texts as JSON, Python or numpy
    write it, or an object that holds them under `target` (veRL, Search-R1), `ground_truth`, `answers`, `aliases` or `value`.
    Raises TypeError for anything else.
    """
    return tuple(dict.fromkeys(text for text in (answer.strip() for answer in _walk(value, 0)) if text))


def _walk(value: Any, depth: int) -> list[str]:
    if depth > 4:
        raise TypeError("the accepted answers are nested too deeply")
    if value is None:
        return []
    if isinstance(value, str):
        listed = _list_of_texts(value)
        return [value] if listed is None else listed
    if isinstance(value, bool):
        return ["yes" if value else "no"]
    if isinstance(value, int):
        return [str(value)]
    if isinstance(value, float):
        if not math.isfinite(value):
            raise TypeError(f"an accepted answer is {value}")
        return [str(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)]
    if isinstance(value, list | tuple):
        return [answer for item in value for answer in _walk(item, depth + 1)]
    if isinstance(value, dict):
        for key in _TARGETS:
            if key in value:
                return _walk(value[key], depth + 1)
        raise TypeError(
            f"accepted answers: expected one of {', '.join(_TARGETS)} in an object, got {sorted(value)[:8]}"
        )
    if hasattr(value, "tolist"):  # numpy's arrays and numbers
        return _walk(value.tolist(), depth + 1)
    raise TypeError(f"accepted answers: expected text, a number or a list of them, got {value!r}")


def _list_of_texts(text: str) -> list[str] | None:
    """The list of texts in a text such as `["a", "b"]` (JSON), `['a', 'b']` (Python) or `['a' 'b']` (numpy), else None. Lists of
    numbers may be vectors: they stay text."""
    text = text.strip()
    quoted = re.fullmatch(r"\[\s*(['\"]).*['\"]\s*,?\s*\]", text, re.DOTALL)
    if not quoted:
        return None
    # numpy writes no comma between texts, which Python would join
    apart = re.sub(r"(?<=['\"])\s+(?=['\"])", ", ", text)
    for read, written in ((json.loads, text), (ast.literal_eval, apart)):
        try:
            listed = read(written)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        if isinstance(listed, list) and all(isinstance(item, str) for item in listed):
            return listed
    return None
