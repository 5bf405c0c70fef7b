"""Reads questions from the files that others publish: for evaluation, and to compare training questions with.

The names of the fields are those that these files use, in any case.
"""

from __future__ import annotations

import base64
import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from appo_jax.data.records import UNITS, read_records

QUESTION = ("question", "problem", "prompt")


def published_records(path: Path) -> Iterator[tuple[str, Any]]:
    """(place, record) of the records of a file, or of the files under a folder in the order of their names (only those of the
    test split, if it has one). A place is such as "line 3". Raises DataError."""
    if not path.is_dir():
        yield from _of_file(path)
        return
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in UNITS and file.is_file())
    tests = [file for file in files if any(part.startswith("test") for part in file.relative_to(path).parts)]
    for file in tests or files:
        name = file.relative_to(path)
        content = _object(file) if file.suffix.lower() == ".json" else None
        if content is not None:  # MATH as distributed: test/<subject>/<number>.json
            yield str(name), {"unique_id": f"{file.parent.name}/{file.stem}", **content}
        else:
            yield from ((f"{name}, {place}", record) for place, record in _of_file(file))


def _of_file(path: Path) -> list[tuple[str, Any]]:
    unit = UNITS.get(path.suffix.lower(), "record")
    return read_records(path, lambda number, record: (f"{unit} {number}", record), None)


def _object(file: Path) -> dict[str, Any] | None:
    """The object that is all of a json file; None for a list of records, or what `read_records` will name."""
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) and not isinstance(content.get("data"), list) else None


def lower_case(record: Any) -> dict[str, Any]:
    """The record with the names of its fields in lower case. Raises TypeError for anything but an object."""
    if not isinstance(record, dict):
        raise TypeError(f"expected an object, got {type(record).__name__}")
    return {str(name).lower(): value for name, value in sorted(record.items(), key=lambda pair: str(pair[0]))}


def question_of(record: Mapping[str, Any]) -> str:
    """The question of a record with names in lower case. Raises ValueError if it has none."""
    question = next((record[name] for name in QUESTION if record.get(name) is not None), None)
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"no question; expected a text under one of {', '.join(QUESTION)}")
    return question


def decrypted(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """A record of xbench's own file as text: its question and answer are XOR `canary`, then base64. Others stay as they are."""
    if not record.get("canary"):
        return record
    try:
        parts = {name: base64.b64decode(record[name], validate=True) for name in ("prompt", "answer")}
    except (KeyError, TypeError, ValueError):  # text: it was decrypted before
        return record
    key = str(record["canary"]).encode()
    return {**record, **{name: _xor(part, key).decode() for name, part in parts.items()}}


def _xor(text: bytes, key: bytes) -> bytes:
    return bytes(byte ^ key_byte for byte, key_byte in zip(text, itertools.cycle(key), strict=False))
