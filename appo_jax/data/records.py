"""Reads data files. Errors name the file, and the line of a malformed record."""

from __future__ import annotations

import csv
import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pyarrow
import pyarrow.parquet

from appo_jax.config import OnMalformed
from appo_jax.errors import DataError

logger = logging.getLogger(__name__)
Raw = TypeVar("Raw")
Record = TypeVar("Record")
# The name of a record in messages, by the file's suffix.
UNITS = {".jsonl": "line", ".json": "record", ".parquet": "row", ".csv": "line", ".tsv": "line"}


def need_file(path: Path, what: str) -> Path:
    """`path`, if it is a file that is not empty. Raises DataError otherwise. `what`: the expected file, for the message."""
    if not path.is_file():
        raise DataError(f"{path}: no such file; expected {what}")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty; expected {what}")
    return path


def read_records(
    path: Path,
    parse: Callable[[int, Any], Record | None],
    malformed: OnMalformed | None,
    what: str = "a file of questions",
) -> list[Record]:
    """`parse(number, record)` of every record of a jsonl, json, parquet, csv or tsv file, in order. Blank lines are ignored. NaN,
    which pandas writes for a missing value, is read as None.

    `number` counts lines, rows or records from 1. `parse` returns None for a record that is left out, such as a question without
    an answer; their number is logged. It raises KeyError, TypeError or ValueError for a malformed one. `malformed`: with "fatal"
    the first malformed record raises DataError with file and line; with "skip" each gives a warning, and their number is logged;
    None is "fatal" for files to which `data.malformed` does not apply. Raises DataError if no record is left.
    """
    need_file(path, what)
    unit = UNITS.get(path.suffix.lower())
    if unit is None:
        raise DataError(f"{path}: expected a file that ends in {', '.join(UNITS)}")
    places = ((f"{path}, {unit} {number}", (number, raw)) for number, raw in _rows(path))
    return parse_each(places, lambda row: parse(row[0], _value(row[1])), malformed, str(path))


def parse_each(
    places: Iterable[tuple[str, Raw]], parse: Callable[[Raw], Record | None], malformed: OnMalformed | None, whole: str
) -> list[Record]:
    """`parse` of every record, with the rules of `read_records`. places: (where it is, record). whole: all of them, for
    messages."""
    records: list[Record] = []
    skipped = left_out = 0
    first = ""
    for where, raw in places:
        try:
            record = parse(raw)
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            problem = problem_of(error)
            if malformed != "skip":
                choice = ", or set data.malformed to skip" if malformed else ""
                raise DataError(f"{where}: {problem}; correct it{choice}") from error
            logger.warning("%s: %s; skipped", where, problem)
            first = first or f"; the first: {where}: {problem}"
            skipped += 1
        else:
            records += [] if record is None else [record]
            left_out += record is None
    total = skipped + left_out + len(records)
    if skipped:
        logger.warning("%s: skipped %d malformed of %d records", whole, skipped, total)
    if left_out:
        logger.warning("%s: %d of %d records are left out", whole, left_out, total)
    if not records:
        raise DataError(f"{whole}: holds no usable record ({skipped} malformed, {left_out} left out){first}")
    return records


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    """(number, record) of a file. Records of a jsonl file are bytes, so that the caller can handle one with broken JSON."""
    suffix = path.suffix.lower()
    try:
        if suffix == ".jsonl":
            with path.open("rb") as lines:
                for number, line in enumerate(lines, start=1):
                    if number == 1:
                        line = line.removeprefix(b"\xef\xbb\xbf")
                    if line.strip():
                        yield number, line
        elif suffix == ".json":
            yield from enumerate(_listed(json.loads(path.read_bytes().decode("utf-8-sig")), path), start=1)
        elif suffix == ".parquet":
            number = 0
            for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
                for row in batch.to_pylist():
                    yield (number := number + 1), row
        else:
            csv.field_size_limit(2**31 - 1)  # the default of 128 KB is less than ten Wikipedia paragraphs
            with path.open(newline="", encoding="utf-8-sig") as text:
                yield from _cells(text, "\t" if suffix == ".tsv" else ",")
    except (pyarrow.ArrowException, csv.Error, OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: expected a {suffix[1:]} file: {error}") from error


def _cells(text: Iterable[str], delimiter: str) -> Iterator[tuple[int, dict[str, Any] | csv.Error]]:
    """(number, row) of a table; a row that cannot be read is an error, with the number of its first line. Raises csv.Error for
    a faulty header, and for a row without end."""
    rows = csv.DictReader(text, delimiter=delimiter, strict=True)
    begins = rows.line_num if rows.fieldnames is None else rows.line_num + 1
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            if "end of data" in str(error):  # a quotation mark that never closes: the rest of the file is lost
                raise csv.Error(f"{error} in the row that begins at line {begins}") from error
            yield begins, error
        else:
            yield rows.line_num, {name: cell or None for name, cell in row.items()}  # a blank cell has no value
        begins = rows.line_num + 1


def _value(raw: Any) -> Any:
    """A record from what `_rows` yields. Raises ValueError for broken JSON, for a row that cannot be read, and for one with more
    cells than the header."""
    if isinstance(raw, csv.Error):
        raise ValueError(f"{raw}: quote the whole of a cell that holds a quotation mark, and double the mark in it")
    if isinstance(raw, dict) and None in raw:  # csv's key for what has no name
        names = [name for name in raw if name is not None]
        raise ValueError(
            f"it has {len(names) + len(raw[None])} cells, the header {len(names)} ({', '.join(names)}): quote a cell that holds "
            "the delimiter"
        )
    return _without_nan(json.loads(raw) if isinstance(raw, bytes) else raw)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nan(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _listed(content: Any, path: Path) -> list[Any]:
    if isinstance(content, dict) and isinstance(content.get("data"), list):
        return content["data"]
    if not isinstance(content, list):
        raise DataError(
            f"{path}: expected a list of records (or an object with one in `data`), got {type(content).__name__}"
        )
    return content


class MissingField(KeyError):
    """A record lacks a field."""

    def __init__(self, path: str, record: dict[str, Any]):
        self.path, self.fields = path, sorted(map(str, record))[:12]
        self.advice = ""

    def __str__(self) -> str:
        return f"{self.path!r} (it has {', '.join(map(repr, self.fields)) or 'none'}){self.advice}"


def problem_of(error: Exception) -> str:
    """What is wrong with a record for which `error` was raised."""
    if isinstance(error, KeyError):
        return f"missing field {error}"
    return f"not valid JSON ({error})" if isinstance(error, json.JSONDecodeError) else str(error)


def field(record: Any, path: str) -> Any:
    """The value at a dotted path. Raises KeyError or TypeError."""
    value = record
    for key in path.split("."):
        if not isinstance(value, dict):
            raise TypeError(f"expected an object with field {key!r}, got {type(value).__name__}")
        if key not in value:
            raise MissingField(path, value)
        value = value[key]
    return value


def text_field(record: Any, path: str) -> str:
    """A non-blank string at a dotted path. Raises KeyError, TypeError or ValueError."""
    value = field(record, path)
    if not isinstance(value, str):
        raise TypeError(f"field {path!r}: expected text, got {value!r}")
    if not value.strip():
        raise ValueError(f"field {path!r} is blank")
    return value
