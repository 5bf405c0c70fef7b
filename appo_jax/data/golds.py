"""Reads accepted answers as data files write them: text, a number, a list of aliases, or an object that holds them."""

from __future__ import annotations

import ast
import json
import logging
import math
import re
from datetime import date, datetime, time
from decimal import Decimal
from typing import Any

import numpy as np

logger = logging.getLogger(__name__)
_TARGETS = ("target", "ground_truth", "value", "answer", "answers", "text", "aliases")
"""The fields of an object that may hold answers."""
_APART = re.compile(r"(?<=['\"])\s+(?=['\"])")  # numpy writes no comma between texts, which Python would join
_TOUCHING = re.compile(r"[^\s,\[({:](?:''|\"\")[^\s,\])}:]")  # don''t, which Python would join to dont
# A command of LaTeX after one backslash, which JSON and Python would read as a control character.
_LATEX = re.compile(r"(?<!\\)\\(?=[abfv][a-z]|(?:ne|neq|nu|rho|right|tan|tfrac|theta|times)(?![a-z])|text)")


def accepted_answers(value: Any) -> tuple[str, ...]:
    """The answers as texts, in order, each once, without blank ones. An empty tuple means that there is no answer.

    `value` may be text, a number, a date, a truth value (yes or no), a list of these, the text of a list as JSON, Python or numpy
    write it, an object that holds them under `target` (veRL, Search-R1), `ground_truth`, `value` and `aliases` (TriviaQA), `answer`
    or `answers`, all together, or else under `text` (SQuAD), or the text of such an object. Raises TypeError for anything else.
    """
    return tuple(dict.fromkeys(text for text in (answer.strip() for answer in _walk(value, 0)) if text))


def _walk(value: Any, depth: int) -> list[str]:
    if depth > 4:
        raise TypeError("the accepted answers are nested too deeply")
    if value is None:
        return []
    if isinstance(value, str):
        decoded = _decoded(value)
        return [value] if decoded is None else _walk(decoded, depth + 1)
    if isinstance(value, float) and not math.isfinite(value):
        raise TypeError(f"an accepted answer is {value}")
    if (text := answer_text(value)) is not None:
        return [text]
    if isinstance(value, list | tuple):
        return [answer for item in value for answer in _walk(item, depth + 1)]
    if isinstance(value, dict):
        answered = any(value.get(key) is not None for key in _TARGETS if key not in ("text", "aliases"))
        # Beside an answer, a text explains it.
        found = [value[key] for key in _TARGETS if key in value and not (answered and key == "text")]
        if found:
            return [answer for item in found for answer in _walk(item, depth + 1)]
        raise TypeError(
            f"accepted answers: expected one of {', '.join(_TARGETS)} in an object, got {sorted(value)[:8]}"
        )
    if hasattr(value, "tolist"):  # numpy's arrays and numbers
        return _walk(value.tolist(), depth + 1)
    raise TypeError(f"accepted answers: expected text, a number or a list of them, got {value!r}")


def answer_text(value: Any) -> str | None:
    """The text of an answer that is a text, a number, a truth value (yes or no) or a date; None for anything else."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str | int | float):
        return plain(value)
    if isinstance(value, Decimal):
        return format(value.normalize(), "f")
    if isinstance(value, datetime) and value.time() == time():  # parquet has columns of times where days are meant
        value = value.date()
    return value.isoformat() if isinstance(value, date) else None


def plain(value: Any) -> str:
    """A text or a number as text. A whole number has no point: pandas makes 1990.0 of 1990 in a column with gaps."""
    if not isinstance(value, float):
        return str(value)
    return str(int(value)) if value.is_integer() and abs(value) <= 2**53 else _shortest(value)


def _shortest(value: float) -> str:
    """The decimal of a number. One that came from a column of 32-bit numbers is 0.1, not 0.10000000149011612; a number with few
    digits has no such noise (1250000.25). An integer with many is exact (2.0**60)."""
    written = repr(value)
    if len(re.sub(r"e.*|\D", "", written).lstrip("0")) <= 12:
        return written
    if value.is_integer():
        return str(int(value))
    single = np.float32(value)
    return str(single) if float(single) == value else written


def _decoded(text: str) -> Any:
    """The list in a text such as `["a", "b"]` (JSON), `['a', None]` (Python) or `['a' 'b']` (numpy), or the object in the text of
    one; else None. Lists of numbers may be vectors: they stay text."""
    text = _LATEX.sub(r"\\\\", text.strip())
    if not re.match(r"[\[{].*['\"]", text, re.DOTALL):
        return None
    readings = [(json.loads, text)] + ([] if _TOUCHING.search(text) else [(ast.literal_eval, _APART.sub(", ", text))])
    for read, written in readings:
        try:
            value = read(written)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            continue
        if isinstance(value, dict) and any(key in value for key in _TARGETS):
            return value
        plain = isinstance(value, list) and all(item is None or isinstance(item, str | int | float) for item in value)
        if plain and any(isinstance(item, str) for item in value):
            return value
    if re.match(r"[\[{]\s*['\"]", text):
        logger.warning("the accepted answer %.80s looks like a list or an object, but is read as text", text)
    return None
