"""Means over samples and questions with 95 % intervals, and pass@k."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 10_000


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


def over_questions(values: Sequence[float]) -> Figure:
    """The mean over questions. The interval resamples questions (percentile bootstrap with a fixed seed)."""
    x = np.asarray(values, float)
    if not len(x):
        return Figure(*[float("nan")] * 3)
    rng = np.random.default_rng(0)
    means = np.concatenate([x[rng.integers(len(x), size=(n, len(x)))].mean(1) for n in _chunks(len(x))])
    return Figure(float(x.mean()), *map(float, np.quantile(means, (0.025, 0.975))))


def over_questions_and_samples(values: Sequence[Sequence[float]]) -> Figure:
    """The mean over questions of the mean over samples. The interval resamples questions, then the samples of each.

    It is for sets of few questions, where sampling the policy moves the mean as much as the choice of questions does.
    """
    if not len(values):
        return Figure(*[float("nan")] * 3)
    rng = np.random.default_rng(0)
    samples = [np.asarray(row, float) for row in values]
    counts = np.array([len(row) for row in samples])
    table = np.full((len(samples), counts.max()), np.nan)
    for row, values_of_question in zip(table, samples, strict=True):
        row[: len(values_of_question)] = values_of_question
    questions = rng.integers(len(samples), size=(RESAMPLES // 5, len(samples)))
    # The index of a drawn sample is uniform over the samples of its question.
    drawn = rng.random((*questions.shape, table.shape[1])) * counts[questions][..., None]
    picked = table[questions[..., None], drawn.astype(int)]
    used = np.arange(table.shape[1]) < counts[questions][..., None]
    means = (np.where(used, picked, 0.0).sum(-1) / counts[questions]).mean(-1)
    return Figure(float(np.mean([row.mean() for row in samples])), *map(float, np.quantile(means, (0.025, 0.975))))


def _chunks(size: int) -> list[int]:
    """RESAMPLES cut into parts that fit in memory."""
    part = max(1, min(RESAMPLES, 4_000_000 // size))
    return [part] * (RESAMPLES // part) + ([RESAMPLES % part] if RESAMPLES % part else [])
