"""The figures of a set: the verdicts of all its questions, and their means with 95 % intervals."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from appo_jax import heartbeat
from appo_jax.benchmark.grading import Verdict, grade_prediction, votes
from appo_jax.benchmark.official import is_equiv
from appo_jax.benchmark.predictions import Predictions, Sample
from appo_jax.benchmark.sets import Benchmark, Item, benchmark
from appo_jax.benchmark.statistics import (
    Figure,
    majority_at_k,
    over_questions,
    pass_at_k,
)
from appo_jax.reward.language_judge import LanguageJudge


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
    """The verdicts of every question. With a judge, every answer gets its verdict too; it decides the sets whose rule is "judge".

    Without a judge, answers of such a set have token F1 but no verdict."""
    known_set = benchmark(name)
    pairs = [(item, sample) for item in items for sample in predictions.samples[item.id]]
    verdicts = []
    for item, sample in pairs:
        verdicts.append(grade_prediction(item, sample, known_set.rule))
        heartbeat.progress()
    if judge is not None:
        verdicts = _judged([item for item, _ in pairs], verdicts, judge, known_set)
    elif known_set.rule == "judge":
        verdicts = [dataclasses.replace(v, reason="no judge was given") if v.correct is None else v for v in verdicts]
    found = iter(verdicts)
    return [
        Graded(item, tuple(samples), tuple(next(found) for _ in samples))
        for item in items
        for samples in [predictions.samples[item.id]]
    ]


def _judged(
    items: Sequence[Item], verdicts: Sequence[Verdict], judge: LanguageJudge, known_set: Benchmark
) -> list[Verdict]:
    """Verdicts with those of the judge. As in the official evaluation, an answer that equals a gold is right without asking."""
    out = [
        dataclasses.replace(verdict, judged=equal or (None if verdict.answer else False), judge_reason=reason)
        for item, verdict in zip(items, verdicts, strict=True)
        for equal in [bool(verdict.answer) and any(is_equiv(verdict.answer, gold) for gold in item.golds)]
        for reason in ["it equals a gold" if equal else "no answer"]
    ]
    asked = [i for i, verdict in enumerate(out) if verdict.judged is None]
    decisions = judge.decide([(items[i].question, items[i].golds, out[i].answer) for i in asked], known_set.number_rule)
    for i, decision in zip(asked, decisions, strict=True):
        out[i] = dataclasses.replace(out[i], judged=decision.correct, judge_reason=decision.reason)
    if known_set.rule == "judge":
        out = [dataclasses.replace(verdict, correct=verdict.judged, reason=verdict.judge_reason) for verdict in out]
    return out


def summarize(name: str, graded: Sequence[Graded], predictions: Predictions, ks: Sequence[int]) -> dict[str, Any]:
    """All figures of the report. A question without a prediction or a verdict counts as wrong and is listed."""
    answered = [g for g in graded if g.verdicts]
    samples = max(len(g.verdicts) for g in answered)
    fewest = min(len(g.verdicts) for g in answered)

    def figure(value: Callable[[Verdict], float], some: Sequence[Graded] = graded) -> Figure:
        return over_questions([float(np.mean([value(v) for v in g.verdicts] or [0.0])) for g in some])

    def accuracy(some: Sequence[Graded]) -> Figure:
        return figure(lambda v: float(v.correct is True), some)

    def ids(open: Callable[[Verdict], bool]) -> list[str]:
        return [g.item.id for g in graded if any(open(v) for v in g.verdicts)]

    judged = any(v.judge_reason for g in answered for v in g.verdicts)
    undecided = ids(lambda v: v.judged is None) if judged and benchmark(name).rule != "judge" else []
    record: dict[str, Any] = {
        "set": name, "title": benchmark(name).title, "questions": len(graded), "samples": samples,
        "accuracy": accuracy(graded), "f1": figure(lambda v: v.f1),
        "official": {
            key: figure(lambda v, key=key: v.official[key])  # type: ignore[misc]
            for key in answered[0].verdicts[0].official
        },
        "accuracy_if_open_are_right": figure(lambda v: float(v.correct is not False)).value,
        "pass_at_k": {
            k: over_questions([pass_at_k(len(g.verdicts), g.right, k) if g.verdicts else 0.0 for g in graded])
            for k in ks
            if k <= fewest
        },
        "majority": over_questions([_majority(name, g, None) for g in graded]),
        "majority_at_k": {
            k: over_questions([_majority(name, g, k) for g in graded]) for k in ks if 1 < k <= fewest and k < samples
        },
        "by_level": _grouped(graded, lambda g: g.item.level, accuracy),
        "by_type": _grouped(graded, lambda g: g.item.type, accuracy),
        "by_language": _grouped(graded, lambda g: g.item.language, accuracy),
        "counted_as_wrong": {
            "without_prediction": predictions.missing, "without_verdict": ids(lambda v: v.correct is None),
            "without_verdict_of_the_judge": undecided,
            "without_answer": [g.item.id for g in answered if all(not v.answer for v in g.verdicts)],
        },
        "uneven_samples": predictions.uneven, "unknown_ids": predictions.unknown,
        "rollouts": _rollout_figures(graded),
    }  # fmt: skip
    if judged:
        record["judged"] = figure(lambda v: float(v.judged is True))
        record["judged_if_open_are_right"] = figure(lambda v: float(v.judged is not False)).value
    return record


def _majority(name: str, graded: Graded, k: int | None) -> float:
    """The chance that the most frequent answer of k samples (None: of all) is right. Equally frequent answers count equally."""
    groups = votes([verdict.answer for verdict in graded.verdicts], benchmark(name).rule)
    shares = [float(np.mean([graded.verdicts[i].correct is True for i in group])) for group in groups]
    if not groups:
        return 0.0
    if k is None:
        return float(np.mean([s for s, group in zip(shares, groups, strict=True) if len(group) == len(groups[0])]))
    blanks = len(graded.verdicts) - sum(map(len, groups))
    return majority_at_k([(len(group), share) for group, share in zip(groups, shares, strict=True)], blanks, k)


def _grouped(
    graded: Sequence[Graded], key: Callable[[Graded], str], accuracy: Callable[[Sequence[Graded]], Figure]
) -> dict[str, dict[str, Any]]:
    names = sorted({key(g) for g in graded} - {""})
    groups = {name: [g for g in graded if key(g) == name] for name in names}
    return {name: {"questions": len(some), "accuracy": accuracy(some)} for name, some in groups.items()}


def _rollout_figures(graded: Sequence[Graded]) -> dict[str, Any]:
    """Tool calls, tokens, time and stop reasons of the predictions that are rollouts of ours."""
    found = [
        (sample.rollout, verdict)
        for g in graded
        for sample, verdict in zip(g.samples, g.verdicts, strict=True)
        if sample.rollout
    ]
    if not found:
        return {}
    calls = [call for rollout, _ in found for call in rollout["calls"]]
    right = sum(verdict.correct is True for _, verdict in found)
    tokens, seconds, decoding = (
        sum(rollout[key] for rollout, _ in found) for key in ("tokens", "seconds", "decode_seconds")
    )
    return {
        "calls_per_prediction": len(calls) / len(found),
        "calls_per_right_answer": len(calls) / right if right else None,
        "calls": dict(sorted(Counter(f"{call['name']}/{call['outcome']}" for call in calls).items())),
        "tokens_per_prediction": tokens / len(found),
        "seconds_per_question": seconds / sum(any(sample.rollout for sample in g.samples) for g in graded),
        "tokens_per_second_of_decoding": tokens / decoding if decoding else None,
        "stop_reasons": dict(sorted(Counter(rollout["stop_reason"] for rollout, _ in found).items())),
    }
