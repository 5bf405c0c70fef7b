"""Means over seeds, their intervals, and paired tests between arms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

RESAMPLES = 10_000


class Interval(NamedTuple):
    """A mean and its 95% interval; NaN limits for a single value."""

    mean: float
    low: float
    high: float


class Paired(NamedTuple):
    """Differences of two arms over the seeds they share."""

    difference: Interval
    p_permutation: float  # two-sided, exact: every sign of every difference
    p_t: float  # two-sided, paired t-test


def mean_interval(values: Sequence[float] | np.ndarray) -> Interval:
    """Mean with its 95% percentile-bootstrap interval (10,000 resamples, always the same ones)."""
    values = np.asarray(values, float)
    if len(values) < 2:
        return Interval(float(values.mean()), float("nan"), float("nan"))
    result = stats.bootstrap(
        (values,), np.mean, n_resamples=RESAMPLES, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    return Interval(float(values.mean()), float(result.low), float(result.high))


def paired(a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray) -> Paired:
    """`a − b`, seed by seed. p-values are NaN for fewer than two seeds, and 1 if all differences are 0."""
    difference = np.asarray(a, float) - np.asarray(b, float)
    interval = mean_interval(difference)
    if len(difference) < 2:
        return Paired(interval, float("nan"), float("nan"))
    if not difference.any():
        return Paired(interval, 1.0, 1.0)
    flips = stats.permutation_test(
        (difference,), np.mean, permutation_type="samples", n_resamples=RESAMPLES, rng=np.random.default_rng(0)
    )
    t = 0.0 if np.ptp(difference) == 0 else float(stats.ttest_1samp(difference, 0.0).pvalue)
    return Paired(interval, float(flips.pvalue), t)


def detectable(standard_error: float, freedom: int, level: float = 0.05, power: float = 0.95) -> float:
    """The smallest true difference that a two-sided t-test at `level` sees with `power`; NaN without degrees of freedom."""
    if freedom <= 0:
        return float("nan")
    return float((stats.t.ppf(1 - level / 2, freedom) + stats.t.ppf(power, freedom)) * standard_error)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for several tests (Holm's step-down method), in their order. NaN stays NaN and does not count
    as a test."""
    p = np.asarray(p_values, float)
    known = np.flatnonzero(~np.isnan(p))
    order = known[np.argsort(p[known])]
    out = p.copy()
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, float((len(order) - rank) * p[index])))
        out[index] = largest
    return out.tolist()
