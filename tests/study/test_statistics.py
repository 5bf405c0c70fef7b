"""The study's statistics against closed forms and against brute force over resamples."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from appo_jax.study.statistics import EXACT_PAIRS, detectable, mean_interval, paired

values = st.lists(st.integers(-20, 20).map(lambda x: x / 4), min_size=2, max_size=6)


def test_the_interval_by_hand():
    """1, 2, 6: mean 3, standard deviation √7, t with two degrees of freedom 4.3027."""
    got = mean_interval([1.0, 2.0, 6.0])
    half = 4.30265 * math.sqrt(7 / 3)
    assert got == pytest.approx((3.0, 3.0 - half, 3.0 + half), rel=1e-5)


@pytest.mark.parametrize("n", [2, 3, 5, 16])
def test_the_interval_holds_the_mean_in_95_of_100_cases(n):
    found = np.array([mean_interval(x)[1:] for x in np.random.default_rng(0).normal(1.0, 0.3, (4000, n))])
    assert np.mean((found[:, 0] < 1.0) & (found[:, 1] > 1.0)) == pytest.approx(0.95, abs=0.012)


def test_degenerate_intervals():
    assert mean_interval([3.0])[0] == 3.0
    assert np.isnan(mean_interval([3.0])[1:]).all()
    assert mean_interval([2.0, 2.0, 2.0])[0] == 2.0
    assert np.isnan(mean_interval([2.0, 2.0, 2.0])[1:]).all()  # steps of 1/n, and no exactness


@given(values, st.integers(0, 100))
def test_the_permutation_test_counts_the_signs(difference, seed):
    b = np.random.default_rng(seed).integers(0, 8, len(difference)) / 4
    got = paired(np.array(difference) + b, b)
    # exact: the share of sign patterns on each side whose mean is at least as far out, both sides
    sums = [
        sum(s * d for s, d in zip(signs, difference, strict=True))
        for signs in itertools.product((1, -1), repeat=len(b))
    ]
    at = sum(difference)
    upper, lower = (np.mean([s >= at for s in sums]), np.mean([s <= at for s in sums]))
    assert got.p_permutation == pytest.approx(min(1.0, 2 * min(upper, lower)))


def test_five_seeds_that_all_gain_have_the_smallest_possible_p():
    got = paired([0.5, 0.6, 0.7, 0.8, 0.9], [0.4] * 5)
    assert got.p_permutation == pytest.approx(2 / 32)
    d = np.array([0.1, 0.2, 0.3, 0.4, 0.5])
    t = d.mean() / (d.std(ddof=1) / math.sqrt(5))
    assert got.p_t == pytest.approx(2 * stats.t.sf(t, df=4))
    assert got.difference.mean == pytest.approx(0.3)


@pytest.mark.parametrize("n", [13, 14, 16])
def test_the_permutation_test_is_exact_for_as_many_seeds_as_the_report_says(n):
    """Once, 14 seeds were compared by a sample of the sign patterns, and the report called it exact."""
    assert paired(np.arange(1.0, n + 1), np.zeros(n)).p_permutation == 2 / 2**n
    assert n <= EXACT_PAIRS


def test_degenerate_tests():
    assert paired([1.0, 2.0], [1.0, 2.0])[1:] == (1.0, 1.0)
    assert np.isnan(paired([1.0], [2.0])[1:]).all()
    same_gain = paired([0.5, 0.55, 0.8], [0.45, 0.5, 0.75])  # equal up to rounding
    assert np.isnan(same_gain.p_t)
    assert same_gain.p_permutation == pytest.approx(2 / 8)


def test_what_is_called_detectable_is_detected_in_95_of_100_cases():
    """Of two independent means, and of paired differences at a stricter level."""
    rng = np.random.default_rng(3)
    n, deviation = 10, 0.02
    difference = detectable(deviation * math.sqrt(2 / n), 2 * n - 2)
    a = rng.normal(0, deviation, (4000, n))
    b = rng.normal(difference, deviation, (4000, n))
    assert np.mean(stats.ttest_ind(a, b, axis=1).pvalue < 0.05) == pytest.approx(0.95, abs=0.015)
    shift = detectable(deviation / math.sqrt(n), n - 1, level=0.01)
    assert np.mean(stats.ttest_1samp(a + shift, 0.0, axis=1).pvalue < 0.01) == pytest.approx(0.95, abs=0.015)


def test_one_run_detects_nothing():
    assert math.isnan(detectable(0.1, 0))
