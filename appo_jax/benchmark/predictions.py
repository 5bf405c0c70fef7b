"""Predictions from a file: one JSON object a line with `id` and `prediction`; several lines of an id are its samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from appo_jax.benchmark.sets import Item
from appo_jax.data.records import read_records
from appo_jax.errors import DataError

TEXT = ("prediction", "response", "output", "text", "answer")


@dataclasses.dataclass(frozen=True)
class Sample:
    """One prediction of a question, and what its rollout tells where there was one."""

    text: str
    rollout: dict[str, Any] = dataclasses.field(default_factory=dict)  # e.g. calls, seconds, tokens, stop_reason


@dataclasses.dataclass(frozen=True)
class Predictions:
    """Samples of every question, and what was wrong with the file, counted."""

    samples: dict[str, list[Sample]]  # by id, for every question of the set
    unknown: list[str]  # ids that the set does not have
    missing: list[str]  # questions without a prediction
    uneven: list[str]  # questions with another number of samples than most


def read_predictions(path: Path, items: Sequence[Item]) -> Predictions:
    """Raises DataError: no such file, nothing in it, a line without id or text, no id that the set has."""
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
    """(id, sample) of one record. Raises ValueError."""
    if not isinstance(record, dict):
        raise ValueError(f"expected an object, got {type(record).__name__}")
    text = next((record[name] for name in TEXT if record.get(name) is not None), None)
    if record.get("id") is None or text is None:
        raise ValueError(f"expected fields id and prediction, found {', '.join(record)}")
    return str(record["id"]), Sample(str(text), {k: v for k, v in record.items() if k not in ("id", *TEXT)})


def check_samples(samples: dict[str, list[Sample]], unknown: list[str]) -> Predictions:
    """Predictions with what is missing or uneven named."""
    counts = [len(found) for found in samples.values() if found]
    usual = max(set(counts), key=counts.count)
    return Predictions(
        samples, unknown,
        missing=[id for id, found in samples.items() if not found],
        uneven=[id for id, found in samples.items() if found and len(found) != usual],
    )  # fmt: skip
