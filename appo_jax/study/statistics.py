"""Means over seeds with intervals, and paired tests between arms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

# The sign-flip test tries all ways to flip up to this many pairs (0.4 s), and of more, as many by chance.
EXACT_PAIRS = 16
EQUAL = 1e-9  # accuracies that differ by less are equal


class Interval(NamedTuple):
    """A mean and its 95% confidence interval. The limits are NaN for a single value, and for values that are all equal."""

    mean: float
    low: float
    high: float


class Paired(NamedTuple):
    """The mean difference of two arms over the seeds that they share, and its p-values."""

    difference: Interval
    p_permutation: float  # two-sided sign-flip test; exact up to EXACT_PAIRS seeds
    p_t: float  # two-sided, paired t-test


def mean_interval(values: Sequence[float] | np.ndarray) -> Interval:
    """The mean with its 95 % interval by Student's t, which holds for few values too if they are about normal.

    Equal values say nothing of the noise: a held-out set of n questions has steps of 1/n.
    """
    values = np.asarray(values, float)
    if np.ptp(values) <= EQUAL:
        return Interval(float(values.mean()), float("nan"), float("nan"))
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return Interval(float(values.mean()), float(values.mean() - half), float(values.mean() + half))


def paired(a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray) -> Paired:
    """Tests of `a − b`, paired by position: `a[i]` and `b[i]` belong to the same seed.

    p-values are NaN for fewer than two seeds, and 1 if all differences are 0. That of the t-test is NaN if all differences are
    the same number, because then the noise is not known.
    """
    difference = np.asarray(a, float) - np.asarray(b, float)
    interval = mean_interval(difference)
    if len(difference) < 2:
        return Paired(interval, float("nan"), float("nan"))
    if np.abs(difference).max() <= EQUAL:
        return Paired(interval, 1.0, 1.0)
    flips = stats.permutation_test(
        (difference,), np.mean, permutation_type="samples", n_resamples=2**EXACT_PAIRS, rng=np.random.default_rng(0)
    )
    t = float("nan") if np.ptp(difference) <= EQUAL else float(stats.ttest_1samp(difference, 0.0).pvalue)
    return Paired(interval, float(flips.pvalue), t)


def detectable(standard_error: float, freedom: int, level: float = 0.05) -> float:
    """The smallest true difference that a two-sided t-test at `level` finds significant with probability 0.95.

    `standard_error`: of the difference. `freedom`: degrees of freedom of the t-test; the result is NaN if they are 0.
    """
    if freedom <= 0:
        return float("nan")
    return float((stats.t.ppf(1 - level / 2, freedom) + stats.t.ppf(0.95, freedom)) * standard_error)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for several tests by Holm's step-down method (Holm 1979), in the order of `p_values`. NaN stays NaN
    and does not count as a test."""
    p = np.asarray(p_values, float)
    known = np.flatnonzero(~np.isnan(p))
    order = known[np.argsort(p[known])]
    adjusted = p.copy()
    largest = 0.0  # adjusted p-values never fall in the order of the p-values
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, float((len(order) - rank) * p[index])))
        adjusted[index] = largest
    return adjusted.tolist()


def format_p(p: float) -> str:
    """A p-value for a table. Empty for NaN."""
    return "" if math.isnan(p) else f"{p:.3f}" if p >= 0.001 else "< 0.001"
