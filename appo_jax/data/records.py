"""Reading data files: what is missing, empty or malformed is named by file and line."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, TypeVar

from appo_jax.errors import DataError

logger = logging.getLogger(__name__)
Raw = TypeVar("Raw")
Record = TypeVar("Record")
OnMalformed = Literal["fatal", "skip"]


def need_file(path: Path, what: str) -> Path:
    """`path` if it is a file with something in it. Raises DataError."""
    if not path.is_file():
        raise DataError(f"{path}: no such file; data.path must lead to {what}")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty; expected {what}")
    return path


def parse_records(
    path: Path, raws: Iterable[Raw], parse: Callable[[Raw], Record], malformed: OnMalformed, unit: str = "line"
) -> list[Record]:
    """`parse` of every raw record, in order. `parse` raises KeyError, TypeError or ValueError for a malformed one.

    fatal: raises DataError with file and line of the first. skip: warns of each and counts them.
    Raises DataError when nothing is left.
    """
    records: list[Record] = []
    skipped = 0
    for number, raw in enumerate(raws, start=1):
        try:
            records.append(parse(raw))
        except (KeyError, TypeError, ValueError) as error:
            problem = f"missing field {error}" if isinstance(error, KeyError) else str(error)
            message = f"{path}, {unit} {number}: {problem}"
            if malformed == "fatal":
                raise DataError(f"{message}; mend it, or set data.malformed to skip") from error
            logger.warning("%s; skipped", message)
            skipped += 1
    if skipped:
        logger.warning("%s: skipped %d malformed of %d records", path, skipped, skipped + len(records))
    if not records:
        raise DataError(f"{path}: holds no usable record ({skipped} malformed)")
    return records


def text_field(record: Any, *keys: str) -> str:
    """A non-blank string at `record[key][key]...`. Raises KeyError, TypeError or ValueError."""
    value = record
    for key in keys:
        if not isinstance(value, dict):
            raise TypeError(f"expected an object with field {key!r}, got {type(value).__name__}")
        value = value[key]
    name = ".".join(keys)
    if not isinstance(value, str):
        raise TypeError(f"field {name!r}: expected text, got {value!r}")
    if not value.strip():
        raise ValueError(f"field {name!r} is blank")
    return value
