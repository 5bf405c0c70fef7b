"""Reads predictions from a file: one JSON object per line with `id` and `prediction`, a text or a list of samples. Lines of the
same id are samples, too."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from appo_jax.benchmark.sets import Item
from appo_jax.data.golds import answer_text, plain
from appo_jax.data.records import read_records
from appo_jax.errors import DataError

# The fields that may hold a prediction. `answer` is none of them: in most files of results it is the gold.
TEXT = ("prediction", "response", "output", "text")
# What `evaluate.draw_samples` says about a rollout besides its text.
ROLLOUT = ("calls", "tokens", "stop_reason", "seconds", "decode_seconds")


@dataclasses.dataclass(frozen=True)
class Sample:
    """One prediction for a question."""

    text: str
    rollout: dict[str, Any] = dataclasses.field(default_factory=dict)
    """The facts about the rollout of ours that it comes from (`evaluate.draw_samples`). Empty: it was made elsewhere."""
    record: dict[str, Any] = dataclasses.field(default_factory=dict)
    """The other fields of its line in a file of predictions."""

    @classmethod
    def of_line(cls, text: str, fields: dict[str, Any]) -> Sample:
        """A sample with the other fields of its line: the facts about a rollout of ours are among them, or it has none."""
        rollout = {name: fields[name] for name in ROLLOUT} if _of_rollout(fields) else {}
        return cls(text, rollout, {name: value for name, value in fields.items() if name not in rollout})


def _of_rollout(fields: dict[str, Any]) -> bool:
    """Whether a line has all facts about a rollout of ours, each of its type."""
    calls, numbers = fields.get("calls"), [fields.get(name) for name in ("tokens", "seconds", "decode_seconds")]
    return (
        isinstance(fields.get("stop_reason"), str)
        and all(isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x) for x in numbers)
        and isinstance(calls, list)
        and all(isinstance(call, dict) and {"name", "outcome"} <= call.keys() for call in calls)
    )


@dataclasses.dataclass(frozen=True)
class Predictions:
    """The samples of every question, and the problems of the file."""

    samples: dict[str, list[Sample]]  # by id, for every question of the set
    unknown: list[str]  # ids that are not in the set
    missing: list[str]  # ids of questions without a prediction
    uneven: list[str]  # ids of questions whose number of samples is not the most frequent one


def read_predictions(path: Path, items: Sequence[Item], limit: int | None = None) -> Predictions:
    """The predictions in a file for the first `limit` questions of a set (None: all).

    Raises DataError for a missing or empty file, for a line without id or text, and if it answers none of these questions."""
    samples: dict[str, list[Sample]] = {item.id: [] for item in items}
    unknown: list[str] = []
    read = read_records(path, _predictions, None, "one JSON object a line with id and prediction")
    for id, found in read:
        if id in samples:
            samples[id] += found
        else:
            unknown.append(id)
    if len(unknown) == len(read):
        raise DataError(
            f"{path}: none of its ids ({', '.join(unknown[:3])} …) is a question of the set ({items[0].id} …); give the ids of the "
            "set's file (a question without one, or whose `prepare` leaves it out, has its position, from 0)"
        )
    samples = {item.id: samples[item.id] for item in items[:limit]}
    if not any(samples.values()):
        some = "any question of the set" if limit is None else f"the first {len(samples)} questions; raise --limit"
        raise DataError(f"{path}: has no prediction for {some}")
    return check_samples(samples, unknown)


def _predictions(number: int, record: Any) -> tuple[str, list[Sample]]:
    """(id, samples) of one record: its first field in TEXT that is not null holds them. If all are null, it is one sample without
    an answer; an empty list holds no sample. Raises ValueError."""
    if not isinstance(record, dict):
        raise ValueError(f"expected an object, got {type(record).__name__}")
    names = [name for name in TEXT if name in record]
    if record.get("id") is None or not names:
        raise ValueError(f"expected fields id and prediction, found {', '.join(record)}")
    name = next((name for name in names if record[name] is not None), names[0])
    others = {key: value for key, value in record.items() if key not in ("id", *TEXT)}
    samples = []
    for value in record[name] if isinstance(record[name], list) else [record[name]]:
        text = "" if value is None else answer_text(value)
        if text is None:
            raise ValueError(
                f"field {name}: expected a text, a number, true, false, null or a list of these, got {value!r}"[:300]
            )
        samples.append(Sample.of_line(text, others))
    return plain(record["id"]), samples


def check_samples(samples: dict[str, list[Sample]], unknown: list[str]) -> Predictions:
    """Predictions with the lists of missing and uneven ids. At least one question has a sample."""
    counts = [len(found) for found in samples.values() if found]
    usual = max(set(counts), key=counts.count)
    return Predictions(
        samples, unknown,
        missing=[id for id, found in samples.items() if not found],
        uneven=[id for id, found in samples.items() if found and len(found) != usual],
    )  # fmt: skip
