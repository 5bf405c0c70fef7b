"""`appo-jax eval --compare A B`: the paired differences of two reports of one set."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from appo_jax.benchmark.sets import benchmark
from appo_jax.benchmark.statistics import paired_difference
from appo_jax.errors import DataError
from appo_jax.output import cell

_FIELDS = ("correct", "official", "judged", "judge_reason")  # of a sample
Items = Mapping[str, Mapping[str, Any]]  # by id


def compare(a: Path, b: Path) -> str:
    """Compare two reports of one set: the paired differences of accuracy and of the published figure, and the questions that
    changed.

    Raises DataError if a folder holds no report, if the reports are of two sets or of two versions of a set, or if they share no
    question."""
    name, first = _read(a)
    other, second = _read(b)
    if name != other:
        raise DataError(f"{a} is a report of {name}, {b} of {other}: compare reports of one set")
    shared = [id for id in first if id in second]
    if not shared:
        raise DataError(f"{a} and {b} share no question: compare reports of one set")
    for id in shared:
        for field in ("question", "golds"):
            if (x := first[id][field]) != (y := second[id][field]):
                raise DataError(
                    f"question {id} has another {field} in {a} ({str(x)[:60]!r}) than in {b} ({str(y)[:60]!r}): compare reports on "
                    "one version of the set's file"
                )
    lines = [
        f"{len(shared)} questions are in both ({len(first) - len(shared)} only in {a}, {len(second) - len(shared)} only in {b})."
    ]
    for title, value in _figures(name, [*first.values(), *second.values()]).items():
        before, after = (
            [[value(s) for s in items[id]["samples"]] or [0.0] for id in shared] for items in (first, second)
        )
        difference = paired_difference(before, after)
        means = [100 * np.mean([np.mean(row) for row in rows]) for rows in (before, after)]
        lines += [
            f"{title}: {means[0]:.1f} % -> {means[1]:.1f} %; difference {100 * difference.value:+.1f} points "
            f"[{100 * difference.low:+.1f}, {100 * difference.high:+.1f}] (95 %, paired by question)."
        ]
    return "\n".join(lines + _changed(first, second, shared))


def _figures(name: str, items: list[Mapping[str, Any]]) -> dict[str, Callable[[Mapping[str, Any]], float]]:
    """Title -> the value of a sample, for accuracy and for the published figure if both reports have it."""
    found: dict[str, Callable[[Mapping[str, Any]], float]] = {"Accuracy": lambda s: float(s["correct"] is True)}
    if benchmark(name).headline == "f1":
        found["Official token F1"] = lambda s: float(s["official"]["f1"])
    judged = all(sample["judge_reason"] for item in items for sample in item["samples"])
    if judged and benchmark(name).rule != "judge":
        found["Accuracy by the judge"] = lambda s: float(s["judged"] is True)
    return found


def _changed(first: Items, second: Items, shared: list[str]) -> list[str]:
    """A table of the questions whose share of right samples changed, by their text."""
    rates = {id: (_rate(first[id]), _rate(second[id])) for id in shared}
    changed = sorted((id for id, (x, y) in rates.items() if x != y), key=lambda id: first[id]["question"])
    rows = []
    for id in changed:
        before, after = rates[id]
        question = " ".join(first[id]["question"].split())[:100]
        rows.append(f"| {cell(id)} | {100 * before:.0f} % | {100 * after:.0f} % | {cell(question)} |")
    head = ["| id | before | after | question |", "|---|---|---|---|"]
    return ["", f"{len(changed)} questions changed:", "", *head, *rows]


def _rate(item: Mapping[str, Any]) -> float:
    """The share of a question's samples that are right."""
    right = [float(sample["correct"] is True) for sample in item["samples"]]
    return float(np.mean(right)) if right else 0.0


def _read(folder: Path) -> tuple[str, dict[str, dict[str, Any]]]:
    """The set's name and the questions of a report. Raises DataError."""
    file = folder / "report.json"
    try:
        name = json.loads(file.read_bytes())["set"]
        file = folder / "items.jsonl"
        records = [json.loads(line) for line in file.read_bytes().split(b"\n") if line]
        if missing := {
            field for record in records for sample in record["samples"] for field in _FIELDS if field not in sample
        }:
            raise KeyError(", ".join(sorted(missing)))
        return name, {record["id"]: record for record in records}
    except FileNotFoundError:
        raise DataError(f"{file}: no such file; --compare takes two folders that `appo-jax eval` wrote") from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{file}: it is not complete, or of another version ({type(error).__name__}: {error}); let `appo-jax eval` write it "
            "again"
        ) from error
