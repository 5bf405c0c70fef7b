"""Means over samples and questions with 95 % intervals, and pass@k."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 10_000
FEW_QUESTIONS = 100  # with fewer questions, intervals resample the samples as well


class Figure(NamedTuple):
    """A mean over questions and its 95 % interval."""

    value: float
    low: float
    high: float


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """The probability that at least one of k samples is right: the unbiased estimate 1 − C(n−c, k) / C(n, k) of Chen et al.
    2021, where c of n samples are correct. NaN if k > n."""
    if k > samples:
        return float("nan")
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def majority_at_k(groups: Sequence[tuple[int, float]], blanks: int, k: int) -> float:
    """The probability that the most frequent answer of k samples is right: the mean over all subsets of k samples.

    groups: (size, share that is right) of the samples with each answer. blanks: samples without an answer, which do not vote. If
    several answers are equally frequent, one of them is drawn. NaN if k is more than there are samples."""
    samples = blanks + sum(size for size, _ in groups)
    if k > samples:
        return float("nan")
    total = 0.0
    for i, (size, right) in enumerate(groups):
        others = [group[0] for j, group in enumerate(groups) if j != i]
        for votes in range(1, min(size, k) + 1) if right else ():
            ways = _ways(others, blanks, votes, k - votes)
            total += right * math.comb(size, votes) * sum(count / (1 + ties) for ties, count in ways.items())
    return total / math.comb(samples, k)


def _ways(sizes: Sequence[int], blanks: int, most: int, k: int) -> dict[int, int]:
    """The number of ways to draw k samples from groups, none more than `most` times, and from `blanks`; by how many groups are
    drawn exactly `most` times."""
    ways = {(drawn, 0): math.comb(blanks, drawn) for drawn in range(min(blanks, k) + 1)}
    for size in sizes:
        following: dict[tuple[int, int], int] = {}
        for (drawn, ties), count in ways.items():
            for more in range(min(size, most, k - drawn) + 1):
                key = (drawn + more, ties + (more == most))
                following[key] = following.get(key, 0) + count * math.comb(size, more)
        ways = following
    return {ties: count for (drawn, ties), count in ways.items() if drawn == k}


def over_questions(values: Sequence[float]) -> Figure:
    """The mean over questions. The interval resamples questions (percentile bootstrap with a fixed seed)."""
    x = np.asarray(values, float)
    if not len(x):
        return Figure(*[float("nan")] * 3)
    rng = np.random.default_rng(0)
    means = np.concatenate([x[rng.integers(len(x), size=(n, len(x)))].mean(1) for n in _chunks(len(x))])
    return _figure(float(x.mean()), means)


def over_questions_and_samples(values: Sequence[Sequence[float]]) -> Figure:
    """The mean over questions of the mean over samples. The interval resamples questions, then the samples of each.

    It is for sets of few questions, where sampling the policy moves the mean as much as the choice of questions does.
    """
    if not len(values):
        return Figure(*[float("nan")] * 3)
    rng = np.random.default_rng(0)
    questions = rng.integers(len(values), size=(RESAMPLES // 5, len(values)))
    return _figure(_mean(values), _resampled(values, questions, rng))


def paired_difference(before: Sequence[Sequence[float]], after: Sequence[Sequence[float]]) -> Figure:
    """The mean of `after` minus that of `before`, which hold the samples of the same questions.

    The interval resamples questions and, if there are few of them with several samples, the samples of both."""
    value = _mean(after) - _mean(before)
    if len(before) >= FEW_QUESTIONS or max(map(len, [*before, *after])) == 1:
        figure = over_questions([float(np.mean(y) - np.mean(x)) for x, y in zip(before, after, strict=True)])
        return Figure(value, figure.low, figure.high)
    rng = np.random.default_rng(0)
    questions = rng.integers(len(before), size=(RESAMPLES // 5, len(before)))
    return _figure(value, _resampled(after, questions, rng) - _resampled(before, questions, rng))


def _mean(values: Sequence[Sequence[float]]) -> float:
    return float(np.mean([np.mean(row) for row in values]))


def _figure(value: float, means: np.ndarray) -> Figure:
    return Figure(value, *map(float, np.quantile(means, (0.025, 0.975))))


def _resampled(values: Sequence[Sequence[float]], questions: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """[n] means over the drawn `questions` [n, q] of the means over samples drawn from each question's samples."""
    counts = np.array([len(row) for row in values])
    table = np.full((len(values), counts.max()), np.nan)
    for row, values_of_question in zip(table, values, strict=True):
        row[: len(values_of_question)] = values_of_question
    # The index of a drawn sample is uniform over the samples of its question.
    drawn = rng.random((*questions.shape, table.shape[1])) * counts[questions][..., None]
    picked = table[questions[..., None], drawn.astype(int)]
    used = np.arange(table.shape[1]) < counts[questions][..., None]
    return (np.where(used, picked, 0.0).sum(-1) / counts[questions]).mean(-1)


def _chunks(size: int) -> list[int]:
    """RESAMPLES cut into parts that fit in memory."""
    part = max(1, min(RESAMPLES, 4_000_000 // size))
    return [part] * (RESAMPLES // part) + ([RESAMPLES % part] if RESAMPLES % part else [])
