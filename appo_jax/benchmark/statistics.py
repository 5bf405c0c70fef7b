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


def over_questions(values: Sequence[float], bounds: tuple[float, float] = (0.0, 1.0)) -> Figure:
    """The mean over questions. A question's value may be a mean over samples of the policy: the values then differ by question and
    by the luck of the samples, and resampling the questions measures both.

    The interval is the expanded percentile bootstrap over questions (Hesterberg 2015, arXiv 1411.5279), with a fixed seed. Plain
    percentiles are too narrow for few questions. This one takes percentiles further out: those at which a normal distribution
    gives Student's interval. If all values are the same, resampling shows no spread, and the interval says what n questions cannot
    exclude: a share 1 - 0.025^(1/n) of questions with other values, which n questions miss with a probability of 2.5 %.

    bounds: the smallest and the largest value that a question can have."""
    x = np.asarray(values, float)
    if not len(x):
        return Figure(*[float("nan")] * 3)
    if np.ptp(x) < 1e-9:  # the same, except for rounding
        missed = 1 - 0.025 ** (1 / len(x))
        return Figure(float(x.mean()), *(float(x.mean() + missed * (bound - x.mean())) for bound in bounds))
    from scipy import special  # only here: SciPy takes a fifth of the time in which a run starts

    rng = np.random.default_rng(0)
    means = np.concatenate([x[rng.integers(len(x), size=(n, len(x)))].mean(1) for n in _chunks(len(x))])
    freedom = len(x) - 1
    tail = special.ndtr(special.stdtrit(freedom, 0.025) * math.sqrt(len(x) / freedom))
    return Figure(float(x.mean()), *map(float, np.quantile(means, (tail, 1 - tail))))


def paired_difference(before: Sequence[Sequence[float]], after: Sequence[Sequence[float]]) -> Figure:
    """The mean of `after` minus that of `before`, which hold the samples of the same questions, from 0 to 1; the interval is over
    questions."""
    differences = [float(np.mean(y) - np.mean(x)) for x, y in zip(before, after, strict=True)]
    return over_questions(differences, bounds=(-1.0, 1.0))


def _chunks(size: int) -> list[int]:
    """RESAMPLES cut into parts that fit in memory."""
    part = max(1, min(RESAMPLES, 4_000_000 // size))
    return [part] * (RESAMPLES // part) + ([RESAMPLES % part] if RESAMPLES % part else [])
