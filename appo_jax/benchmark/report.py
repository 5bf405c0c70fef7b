"""The report of one set (report.md, report.json and items.jsonl in a folder), and the comparison of two reports."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from appo_jax import heartbeat
from appo_jax.benchmark.grading import Verdict, grade_prediction, votes
from appo_jax.benchmark.predictions import Predictions, Sample
from appo_jax.benchmark.sets import Item, benchmark
from appo_jax.benchmark.statistics import Figure, over_questions, over_questions_and_samples, pass_at_k
from appo_jax.errors import DataError
from appo_jax.reward.language_judge import LanguageJudge

FEW_QUESTIONS = 100  # with fewer questions, intervals resample the samples as well
SHOWN = 20  # the number of ids that report.md shows of a list; report.json has all


@dataclasses.dataclass(frozen=True)
class Graded:
    """One question with the verdicts of its samples."""

    item: Item
    samples: tuple[Sample, ...]
    verdicts: tuple[Verdict, ...]

    @property
    def right(self) -> int:
        return sum(verdict.correct is True for verdict in self.verdicts)


def grade_all(name: str, items: Sequence[Item], predictions: Predictions, judge: LanguageJudge | None) -> list[Graded]:
    """The verdicts of every question. If a judged set has no judge, its samples have token F1 but no verdict."""
    rule = benchmark(name).rule
    pairs = [(item, sample) for item in items for sample in predictions.samples[item.id]]
    verdicts = []
    for item, sample in pairs:
        verdicts.append(grade_prediction(item, sample.text, rule))
        heartbeat.progress()
    if rule == "judge":
        verdicts = _judged(pairs, verdicts, judge)
    found = iter(zip(pairs, verdicts, strict=True))
    graded = []
    for item in items:
        of_item = [next(found) for _ in predictions.samples[item.id]]
        graded.append(Graded(item, tuple(pair[1] for pair, _ in of_item), tuple(verdict for _, verdict in of_item)))
    return graded


def _judged(
    pairs: Sequence[tuple[Item, Sample]], verdicts: Sequence[Verdict], judge: LanguageJudge | None
) -> list[Verdict]:
    if judge is None:
        return [dataclasses.replace(v, reason="no judge was given") if v.reason == "judge" else v for v in verdicts]
    asked = [i for i, verdict in enumerate(verdicts) if verdict.reason == "judge"]
    decisions = judge.decide([(pairs[i][0].question, pairs[i][0].golds, verdicts[i].answer) for i in asked])
    out = list(verdicts)
    for i, decision in zip(asked, decisions, strict=True):
        out[i] = dataclasses.replace(out[i], correct=decision.correct, reason=decision.reason)
    return out


def summarize(name: str, graded: Sequence[Graded], predictions: Predictions, ks: Sequence[int]) -> dict[str, Any]:
    """All figures of the report. A question without a prediction or a verdict counts as wrong and is listed."""
    answered = [s for s in graded if s.verdicts]
    samples = max(len(s.verdicts) for s in answered)
    mean = over_questions if len(graded) >= FEW_QUESTIONS or samples == 1 else None

    def figure(value: Callable[[Verdict], float], some: Sequence[Graded]) -> Figure:
        rows = [[value(v) for v in s.verdicts] or [0.0] for s in some]
        if mean is not None:
            return mean([float(np.mean(row)) for row in rows])
        return over_questions_and_samples(rows)

    def accuracy(some: Sequence[Graded]) -> Figure:
        return figure(lambda v: float(v.correct is True), some)

    no_verdict = [s.item.id for s in graded if any(v.correct is None for v in s.verdicts)]
    record: dict[str, Any] = {
        "set": name, "title": benchmark(name).title, "questions": len(graded), "samples": samples,
        "accuracy": accuracy(graded), "f1": figure(lambda v: v.f1, graded),
        "accuracy_if_open_are_right": figure(lambda v: float(v.correct is not False), graded).value,
        "pass_at_k": {
            k: over_questions([pass_at_k(len(s.verdicts), s.right, k) if s.verdicts else 0.0 for s in graded])
            for k in ks
            if k <= min(len(s.verdicts) for s in answered)
        },
        "majority": over_questions([_majority(name, s) for s in graded]),
        "by_level": _grouped(graded, lambda s: s.item.level, accuracy),
        "by_type": _grouped(graded, lambda s: s.item.type, accuracy),
        "problems": {
            "without_prediction": predictions.missing, "without_verdict": no_verdict, "unknown_ids": predictions.unknown,
            "uneven_samples": predictions.uneven,
            "without_answer": [s.item.id for s in answered if all(not v.answer for v in s.verdicts)],
        },
        "rollouts": _rollout_figures(graded),
    }  # fmt: skip
    return record


def _majority(name: str, graded: Graded) -> float:
    """1 if the most frequent answer is right, else 0. If several answers are equally frequent, their mean."""
    if not graded.verdicts:
        return 0.0
    groups = votes([verdict.answer for verdict in graded.verdicts], benchmark(name).rule)
    leading = [group for group in groups if len(group) == len(groups[0])]
    return float(np.mean([np.mean([graded.verdicts[i].correct is True for i in group]) for group in leading]))


def _grouped(
    graded: Sequence[Graded], key: Callable[[Graded], str], accuracy: Callable[[Sequence[Graded]], Figure]
) -> dict[str, dict[str, Any]]:
    names = sorted({key(s) for s in graded} - {""})
    groups = {name: [s for s in graded if key(s) == name] for name in names}
    return {name: {"questions": len(some), "accuracy": accuracy(some)} for name, some in groups.items()}


def _rollout_figures(graded: Sequence[Graded]) -> dict[str, Any]:
    """Tool calls, tokens and stop reasons of the predictions that come from rollouts."""
    found = [(s.rollout, v) for graded_ in graded for s, v in zip(graded_.samples, graded_.verdicts, strict=True)]
    found = [(rollout, verdict) for rollout, verdict in found if "calls" in rollout]
    if not found:
        return {}
    calls = [call for rollout, _ in found for call in rollout["calls"]]
    right = sum(verdict.correct is True for _, verdict in found)
    return {
        "calls_per_prediction": len(calls) / len(found),
        "calls_per_right_answer": len(calls) / right if right else None,
        "calls": dict(sorted(Counter(f"{call['name']}/{call['outcome']}" for call in calls).items())),
        "tokens_per_prediction": float(np.mean([rollout["tokens"] for rollout, _ in found])),
        "stop_reasons": dict(sorted(Counter(rollout["stop_reason"] for rollout, _ in found).items())),
    }


def write_report(folder: Path, record: Mapping[str, Any], graded: Sequence[Graded]) -> str:
    """Write report.md, report.json and items.jsonl; returns the text of report.md."""
    folder.mkdir(parents=True, exist_ok=True)
    text = to_markdown(record)
    (folder / "report.md").write_text(text + "\n", encoding="utf-8")
    (folder / "report.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    # What UTF-8 cannot hold (half of a surrogate pair) becomes JSON's escape for it.
    with (folder / "items.jsonl").open("w", encoding="utf-8", errors="backslashreplace") as file:
        for s in graded:
            samples = [
                {"prediction": sample.text} | sample.rollout | dataclasses.asdict(verdict)
                for sample, verdict in zip(s.samples, s.verdicts, strict=True)
            ]
            file.write(json.dumps(dataclasses.asdict(s.item) | {"samples": samples}, ensure_ascii=False) + "\n")
    return text


def to_markdown(record: Mapping[str, Any]) -> str:
    found = benchmark(record["set"])
    lines = [
        f"# {record['title']}", "",
        f"{record['questions']} questions, {record['samples']} samples each. Graded by {found.rule}; elsewhere: "
        f"{found.convention}. Intervals: 95 %, over questions"
        + (" and samples." if record["questions"] < FEW_QUESTIONS and record["samples"] > 1 else "."),
        "", "| figure | value |", "|---|---|",
    ]  # fmt: skip
    rows = {"accuracy (mean over samples)": record["accuracy"], "token F1": record["f1"]}
    if record["samples"] > 1:
        rows |= {f"pass@{k}": x for k, x in record["pass_at_k"].items()} | {"majority": record["majority"]}
    lines += [f"| {name} | {percent(x)} |" for name, x in rows.items()]
    for kind in ("level", "type"):
        groups = record[f"by_{kind}"]
        lines += [f"| {kind} {name} ({g['questions']}) | {percent(g['accuracy'])} |" for name, g in groups.items()]
    if problems := [(name, ids) for name, ids in record["problems"].items() if ids]:
        lines += ["", "Problems (all of them are counted as wrong; report.json has every id):", ""]
        lines += [
            f"- {name.replace('_', ' ')}: {len(ids)} ({', '.join(ids[:SHOWN])}{' …' if len(ids) > SHOWN else ''})"
            for name, ids in problems
        ]
    if record["problems"]["without_verdict"]:
        lines += [f"- if all of those without a verdict were right: {100 * record['accuracy_if_open_are_right']:.1f} %"]
    if record["rollouts"]:
        lines += ["", "| rollouts | |", "|---|---|"]
        lines += [f"| {name.replace('_', ' ')} | {_shown(value)} |" for name, value in record["rollouts"].items()]
    return "\n".join(lines)


def percent(figure: Sequence[float]) -> str:
    value, low, high = (100 * x for x in figure)
    return f"{value:.1f} % [{low:.1f}, {high:.1f}]"


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}: {count}" for name, count in value.items())
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def compare(a: Path, b: Path) -> str:
    """Compare two reports of one set: the paired difference of their accuracies, and the questions that changed.

    Raises DataError if a folder holds no report, or if the reports share no question."""
    first, second = (_read_items(folder) for folder in (a, b))
    shared = [id for id in first if id in second]
    if not shared:
        raise DataError(f"{a} and {b} share no question: compare reports of one set")
    rates = [[_rate(items[id]) for id in shared] for items in (first, second)]
    difference = over_questions([y - x for x, y in zip(*rates, strict=True)])
    changed = sorted(
        (id for id, x, y in zip(shared, *rates, strict=True) if x != y), key=lambda id: first[id]["question"]
    )
    rate = {id: (x, y) for id, x, y in zip(shared, *rates, strict=True)}
    lines = [
        f"{len(shared)} questions are in both ({len(first) - len(shared)} only in {a}, {len(second) - len(shared)} only in {b}).",
        f"Accuracy: {100 * np.mean(rates[0]):.1f} % -> {100 * np.mean(rates[1]):.1f} %; difference {100 * difference.value:+.1f} "
        f"points [{100 * difference.low:+.1f}, {100 * difference.high:+.1f}] (95 %, paired by question).",
        "", f"{len(changed)} questions changed:", "", "| id | before | after | question |", "|---|---|---|---|",
    ]  # fmt: skip
    lines += [
        f"| {id} | {100 * rate[id][0]:.0f} % | {100 * rate[id][1]:.0f} % | {' '.join(first[id]['question'].split())[:100]} |"
        for id in changed
    ]
    return "\n".join(lines)


def _rate(item: Mapping[str, Any]) -> float:
    """The share of a question's samples that are right."""
    right = [float(sample["correct"] is True) for sample in item["samples"]]
    return float(np.mean(right)) if right else 0.0


def _read_items(folder: Path) -> dict[str, dict[str, Any]]:
    file = folder / "items.jsonl"
    if not file.is_file():
        raise DataError(f"{file}: no such file; --compare takes two folders that `appo-jax eval` wrote")
    try:
        records = [json.loads(line) for line in file.read_bytes().split(b"\n") if line]
        return {record["id"]: record for record in records}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file}: it is not complete ({error}); let `appo-jax eval` write it again") from error
