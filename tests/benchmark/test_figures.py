"""Figures against brute force, closed forms and scipy."""

import itertools

import numpy as np
import pytest
from scipy import stats

from appo_jax.benchmark import statistics
from appo_jax.benchmark.statistics import (
    majority_at_k,
    over_questions,
    paired_difference,
    pass_at_k,
)


@pytest.mark.parametrize("n", [1, 4, 6])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(n):
    for correct, k in itertools.product(range(n + 1), range(1, n + 1)):
        right = [i < correct for i in range(n)]
        subsets = list(itertools.combinations(right, k))
        assert pass_at_k(n, correct, k) == pytest.approx(np.mean([any(s) for s in subsets]))
    assert np.isnan(pass_at_k(n, n, n + 1))


@pytest.mark.parametrize("answers", ["AABC", "ABBC-", "AAABB--", "ABCDE", "BBBA", "----", "AB"])
def test_majority_at_k_is_the_mean_over_all_subsets(answers):
    """A is right, - is no answer. Ties count as a draw by lot."""

    def share(subset):
        counts = [subset.count(answer) for answer in "ABCDE"]
        leading = [answer for answer, count in zip("ABCDE", counts, strict=True) if count == max(counts) > 0]
        return "A" in leading and 1 / len(leading)

    groups = [(answers.count(answer), float(answer == "A")) for answer in sorted(set(answers) - {"-"})]
    for k in range(1, len(answers) + 1):
        expected = np.mean([share("".join(subset)) for subset in itertools.combinations(answers, k)])
        assert majority_at_k(groups, answers.count("-"), k) == pytest.approx(expected)
    assert np.isnan(majority_at_k(groups, answers.count("-"), len(answers) + 1))


def test_intervals_over_questions_are_scipys():
    """At the level where the percentiles of a normal distribution give Student's interval."""
    x = (np.random.default_rng(1).random(40) < 0.3).astype(float)
    figure = over_questions(x)
    half = stats.t.ppf(0.975, 39) * stats.sem(x) / (x.std() / np.sqrt(40))
    expected = stats.bootstrap(
        (x,), np.mean, confidence_level=1 - 2 * stats.norm.sf(half), n_resamples=9999, method="percentile", rng=3
    ).confidence_interval
    assert figure.value == pytest.approx(x.mean())
    assert (figure.low, figure.high) == pytest.approx((expected.low, expected.high), abs=0.013)  # half a question


@pytest.mark.parametrize(("questions", "samples", "beta"), [(30, 8, (1, 1)), (30, 8, (1e6, 1e6)), (12, 4, (0.6, 1.4))])
def test_intervals_cover_the_truth_in_95_of_100_evaluations(monkeypatch, questions, samples, beta):
    """Of the accuracy, and of the difference of two evaluations of one policy. Once, both resampled the samples as well, which the
    means over samples had in them already: differences were covered in 99.3 %."""
    monkeypatch.setattr(statistics, "RESAMPLES", 2_000)
    rng, covered = np.random.default_rng(0), np.zeros(2)
    for _ in range(1000):
        chances = rng.beta(*beta, questions)
        before, after = (rng.random((questions, samples)) < chances[:, None] for _ in range(2))
        figure, difference = over_questions(before.mean(1)), paired_difference(before.tolist(), after.tolist())
        assert figure.value == pytest.approx(before.mean())
        assert difference.value == pytest.approx(after.mean() - before.mean())
        covered += figure.low <= beta[0] / sum(beta) <= figure.high, difference.low <= 0 <= difference.high
    assert ((covered >= 930) & (covered <= 970)).all()


@pytest.mark.parametrize(
    ("values", "bounds", "low", "high"),
    [
        ([0.0] * 30, (0.0, 1.0), 0.0, 0.1157),  # 0.8843^30 = 0.025
        ([1.0] * 30, (0.0, 1.0), 0.8843, 1.0),
        ([0.0] * 200, (0.0, 1.0), 0.0, 0.0183),  # 0.9817^200 = 0.025
        ([1.0], (0.0, 1.0), 0.025, 1.0),
        ([0.5], (0.0, 1.0), 0.0125, 0.9875),
        (
            [0.1 + 0.2, 0.3],
            (0.0, 1.0),
            0.3 - 0.8419 * 0.3,
            0.3 + 0.8419 * 0.7,
        ),  # equal except for rounding; 0.1581^2 = 0.025
        ([0.0] * 30, (-1.0, 1.0), -0.1157, 0.1157),
    ],
)
def test_equal_values_have_an_interval_of_what_the_questions_cannot_exclude(values, bounds, low, high):
    figure = over_questions(values, bounds)
    assert figure == pytest.approx((values[0], low, high), abs=1e-4)


def test_two_equal_reports_have_a_difference_with_an_interval():
    assert paired_difference([[1.0, 0.0]] * 30, [[0.0, 1.0]] * 30) == pytest.approx((0.0, -0.1157, 0.1157), abs=1e-4)


@pytest.mark.parametrize(
    ("p", "n", "percent"),
    [(0.02, 30, 99.7), (0.97, 30, 98.8), (0.05, 30, 99.7), (0.01, 200, 99.9)],
)
def test_intervals_of_rates_near_0_and_1_cover_them(p, n, percent):
    """The exact coverage: n questions with k right ones have one interval, and k is binomial. Where all questions were alike, the
    interval had no width: 46, 55, 75 and 88 % in these cases."""
    covered = 0.0
    for right in range(n + 1):
        figure = over_questions([1.0] * right + [0.0] * (n - right))
        covered += stats.binom.pmf(right, n, p) * (figure.low <= p <= figure.high)
    assert 100 * covered == pytest.approx(percent, abs=0.5)


def test_nothing_gives_nan():
    assert np.isnan(over_questions([]).value)
    assert np.isnan(paired_difference([], []).value)
