"""Reads the questions of a benchmark set from the file that its authors publish, or from the copy in the official repository.

The names of the fields are those that these files use, in any case. A record that is no question of the set, or has no answer,
is left out and counted.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from appo_jax.benchmark.sets import Benchmark, Item, benchmark
from appo_jax.data.golds import accepted_answers, plain
from appo_jax.data.question_files import ANSWER, first_value, lower_case, published_records, question_of
from appo_jax.data.records import problem_of
from appo_jax.errors import DataError
from appo_jax.reward.latex import boxed_gold

log = logging.getLogger(__name__)

ALIASES = ("answer_aliases", "aliases")
ID = ("id", "_id", "task_id", "unique_id", "question_id")
LEVEL = ("level", "difficulty", "info.difficulty_level")
TYPE = ("type", "subject", "category", "info.type")
LANGUAGE = ("lang", "language", "info.lang")


@dataclasses.dataclass(frozen=True)
class Questions:
    """The questions of a set, and the records of its file that are left out."""

    items: tuple[Item, ...]
    left_out: dict[str, list[str]]  # the reason -> the places of the records, such as "line 3"

    def first(self, count: int | None) -> Questions:
        """The first `count` questions; all if it is None."""
        return dataclasses.replace(self, items=self.items[:count])


def load_questions(name: str, path: Path) -> Questions:
    """The questions of a set, in the order of the file. A question without an id gets its position, from 0.

    `path`: a file, or a folder, of which one split is read (`published_records`). A record without a question or an answer, of an
    unknown level, with the id of an earlier question, or without an id and equal to a question of another file of the folder is
    left out with a warning. Raises DataError for a missing file (it says where to get it), for one that is not of its type, for a
    folder with nothing but a training split, and if nothing is left.
    """
    found = benchmark(name)
    if not path.exists():
        raise DataError(f"{path}: no such file; {found.title} comes from {found.where}, give its file with --data")
    items: dict[str, Item] = {}
    left_out: dict[str, list[str]] = {}
    files: dict[tuple[str, tuple[str, ...]], str] = {}  # the file that a question without an id is in
    for position, (place, record) in enumerate(published_records(path)):
        try:
            item = _item(found, record, position, path)
            if item.id in items:
                raise ValueError("its id is that of an earlier question")
            file = place.rpartition(", ")[0]
            if item.id == str(position) and files.setdefault((item.question, item.golds), file) != file:
                raise ValueError("it is in another file, too")
        except (KeyError, TypeError, ValueError) as error:
            left_out.setdefault(problem_of(error), []).append(place)
        else:
            items[item.id] = item
    if not items:
        reasons = "; ".join(f"{places[0]}: {reason}" for reason, places in left_out.items())
        raise DataError(f"{path}: holds no question of {found.title}: {reasons or 'there are no records'}")
    for reason, places in left_out.items():
        log.warning("%s: left out %d: %s (%s)", path, len(places), reason, shown(places))
    if found.count and len(items) != found.count:
        log.warning("%s: it has %d questions, %s as the paper uses it %d", path, len(items), found.title, found.count)
    return Questions(tuple(items.values()), left_out)


def shown(names: list[str], max_names: int = 20) -> str:
    """A list of names, cut after `max_names` of them."""
    return ", ".join(names[:max_names]) + (" …" if len(names) > max_names else "")


def _item(found: Benchmark, record: Any, position: int, path: Path) -> Item:
    """The item of a record. Without an id it gets its position. Raises KeyError, TypeError or ValueError."""
    try:
        prepared = found.prepare(lower_case(record), path)
    except (LookupError, AttributeError) as error:  # of a set's own function, for a record without what it reads
        raise ValueError(f"the set's `prepare` raised {type(error).__name__}: {error}") from error
    if not isinstance(prepared, Mapping):
        raise TypeError(f"the set's `prepare` returned a {type(prepared).__name__}; expected the record as an object")
    question = question_of(prepared)
    answer = first_value(prepared, ANSWER)
    if answer is None:
        answer = _boxed(prepared.get("solution")) if found.rule == "math" else prepared.get("solution")
    golds = accepted_answers([answer, first_value(prepared, ALIASES)])
    if not golds:
        raise ValueError(f"no answer; expected a text, a number or a list under one of {', '.join(ANSWER)}")
    level, *more = (_group(prepared, names) for names in (LEVEL, TYPE, LANGUAGE))
    if found.levels and level not in found.levels:
        raise ValueError(f"level {level!r} is unknown; {found.title} has {', '.join(found.levels)}")
    id = first_value(prepared, ID)
    return Item(plain(position if id is None else id), question, golds, level, *more)


def _boxed(solution: Any) -> Any:
    """The answer in a solution: its last box if it is text. Raises ValueError if that has none."""
    if not isinstance(solution, str):
        return solution
    if (answer := boxed_gold(solution)) is None:
        raise ValueError(f"no answer, and no \\boxed{{…}} in the solution; expected either ({', '.join(ANSWER)})")
    return answer


def _group(record: Mapping[str, Any], names: tuple[str, ...]) -> str:
    value = first_value(record, names)
    return "" if value is None else plain(value)
