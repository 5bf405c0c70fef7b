"""Reads predictions from a file: one JSON object per line with `id` and `prediction`. Lines of the same id are its samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from appo_jax.benchmark.sets import Item
from appo_jax.data.records import read_records
from appo_jax.errors import DataError

# The fields that may hold a prediction. `answer` is none of them: in most files of results it is the gold.
TEXT = ("prediction", "response", "output", "text")


@dataclasses.dataclass(frozen=True)
class Sample:
    """One prediction for a question, and the facts about its rollout if it comes from one."""

    text: str
    rollout: dict[str, Any] = dataclasses.field(default_factory=dict)  # e.g. calls, seconds, tokens, stop_reason


@dataclasses.dataclass(frozen=True)
class Predictions:
    """The samples of every question, and the problems of the file."""

    samples: dict[str, list[Sample]]  # by id, for every question of the set
    unknown: list[str]  # ids that are not in the set
    missing: list[str]  # ids of questions without a prediction
    uneven: list[str]  # ids of questions whose number of samples is not the most frequent one


def read_predictions(path: Path, items: Sequence[Item]) -> Predictions:
    """The predictions in a file.

    Raises DataError for a missing or empty file, for a line without id or text, and if no id is in the set."""
    samples: dict[str, list[Sample]] = {item.id: [] for item in items}
    unknown: list[str] = []
    read = read_records(path, _prediction, None, "one JSON object a line with id and prediction")
    for id, sample in read:
        if id in samples:
            samples[id].append(sample)
        else:
            unknown.append(id)
    if len(unknown) == len(read):
        raise DataError(
            f"{path}: none of its ids ({', '.join(unknown[:3])} …) is a question of the set ({items[0].id} …)"
        )
    return check_samples(samples, unknown)


def _prediction(number: int, record: Any) -> tuple[str, Sample]:
    """(id, sample) of one record. A prediction that is null is a sample without an answer. Raises ValueError."""
    if not isinstance(record, dict):
        raise ValueError(f"expected an object, got {type(record).__name__}")
    name = next((name for name in TEXT if name in record), None)
    if record.get("id") is None or name is None:
        raise ValueError(f"expected fields id and prediction, found {', '.join(record)}")
    text = "" if record[name] is None else str(record[name])
    return str(record["id"]), Sample(text, {k: v for k, v in record.items() if k not in ("id", *TEXT)})


def check_samples(samples: dict[str, list[Sample]], unknown: list[str]) -> Predictions:
    """Predictions with the lists of missing and uneven ids."""
    counts = [len(found) for found in samples.values() if found]
    usual = max(set(counts), key=counts.count)
    return Predictions(
        samples, unknown,
        missing=[id for id, found in samples.items() if not found],
        uneven=[id for id, found in samples.items() if found and len(found) != usual],
    )  # fmt: skip
