"""Reads questions from the files that others publish: for evaluation, and to compare training questions with.

The names of the fields are those that these files use, in any case.
"""

from __future__ import annotations

import base64
import itertools
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from appo_jax.data.examples import optional_field, prompt_of
from appo_jax.data.golds import accepted_answers
from appo_jax.data.records import UNITS, field, read_records
from appo_jax.errors import DataError

log = logging.getLogger(__name__)

# A prompt may ask for another format than ours, so it is read last: veRL has the question alone in `extra_info`.
QUESTION = ("question", "problem", "extra_info.question", "prompt")
ANSWER = ("answer", "golden_answers", "final answer", "gold", "target", "answers")  # or a solution
HIDDEN = "?"  # what GAIA's test split holds instead of answers, which are not public
# The splits by the words that files and folders are named with.
SPLITS = {
    "test": "test", "dev": "dev", "validation": "dev", "valid": "dev", "val": "dev", "train": "train", "training": "train",
}  # fmt: skip
_ALIASES = "id_aliases.json"  # of 2WikiMultihopQA: it holds names, no questions


def published_records(path: Path) -> list[tuple[str, Any]]:
    """(place, record) of the records of a file, or of one split under a folder, its files in the order of their names. A place is
    such as "line 3".

    The split is the test split; the dev (validation) split, if there is no test split or it has no answers; the files that name no
    split, if there is neither. Raises DataError for a file that cannot be read, and for a folder with nothing but a training split.
    """
    if not path.is_dir():
        return _of_file(path)
    splits: dict[str, list[Path]] = {}
    for file in sorted(path.rglob("*")):
        if file.suffix.lower() in UNITS and file.name != _ALIASES and file.is_file():
            splits.setdefault(_split(file.relative_to(path)), []).append(file)
    if splits.keys() == {"train"}:
        raise DataError(
            f"{path}: holds only a training split ({splits['train'][0].relative_to(path)} …); expected files of a test, "
            "validation or dev split: give their folder, or a file"
        )
    named = [splits[split] for split in ("test", "dev") if split in splits] or [splits.get("", [])]
    without_answers: list[list[tuple[str, Any]]] = []
    for files in named:
        records = [found for file in files for found in _of_folder(file, path)]
        if any(_is_answered(record) for _, record in records):
            if without_answers:
                log.warning("%s: its test split has no answers; its dev (validation) split is read", path)
            return records
        without_answers.append(records)
    return without_answers[0]


def _split(file: Path) -> str:
    """The split that a path names, by the last word that does: "test", "dev" or "train"; "" if it names none."""
    words = re.findall("[a-z]+", file.as_posix().lower())
    return next((SPLITS[word] for word in reversed(words) if word in SPLITS), "")


def _of_folder(file: Path, folder: Path) -> Iterator[tuple[str, Any]]:
    name = file.relative_to(folder)
    content = _object(file) if file.suffix.lower() == ".json" else None
    if content is not None:  # MATH as distributed: test/<subject>/<number>.json
        yield str(name), {"unique_id": f"{file.parent.name}/{file.stem}", **content}
    else:
        yield from ((f"{name}, {place}", record) for place, record in _of_file(file))


def _is_answered(record: Any) -> bool:
    try:
        golds = accepted_answers(first_value(lower_case(record), (*ANSWER, "solution")))
    except TypeError:
        return False
    return golds not in ((), (HIDDEN,))


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


def first_value(record: Mapping[str, Any], names: Iterable[str]) -> Any:
    """The value of the first of these names, which may be dotted, that has one; else None."""
    return next((value for name in names if (value := optional_field(record, name)) is not None), None)


def question_of(record: Mapping[str, Any]) -> str:
    """The question of a record with names in lower case: text, or chat messages with one question. Raises KeyError, TypeError or
    ValueError if it has none."""
    name = next((name for name in QUESTION if optional_field(record, name) is not None), None)
    if name is None:
        raise ValueError(f"no question; expected a text or chat messages under one of {', '.join(QUESTION)}")
    return prompt_of(field(record, name), name)[0]


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
