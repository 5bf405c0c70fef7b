"""Figures against brute force, closed forms and scipy."""

import itertools

import numpy as np
import pytest
from scipy import stats

from appo_jax.benchmark.statistics import (
    majority_at_k,
    over_questions,
    over_questions_and_samples,
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


def test_a_paired_difference_is_over_questions_and_with_few_of_them_over_samples():
    rng = np.random.default_rng(0)
    before, after = (rng.random((30, 4)) < chance for chance in (0.4, 0.6))
    differences = after.mean(1) - before.mean(1)
    questions, both = over_questions(differences), paired_difference(before.tolist(), after.tolist())
    assert both.value == pytest.approx(differences.mean())
    assert both.high - both.low > questions.high - questions.low
    same = paired_difference(before[:, :1].tolist(), after[:, :1].tolist())
    assert same == pytest.approx(over_questions((after[:, 0] * 1.0 - before[:, 0]).tolist()))


def test_intervals_over_questions_are_scipys():
    x = np.random.default_rng(1).random(200) < 0.3
    figure = over_questions(x.astype(float))
    expected = stats.bootstrap((x.astype(float),), np.mean, n_resamples=9999, method="percentile", rng=3)
    assert figure.value == pytest.approx(x.mean())
    assert figure.low == pytest.approx(expected.confidence_interval.low, abs=0.006)
    assert figure.high == pytest.approx(expected.confidence_interval.high, abs=0.006)


def test_the_interval_over_samples_too_is_wider_and_covers_the_truth():
    """30 questions, 4 samples: over 100 simulated evaluations the 95 % interval holds the expected accuracy."""
    rng = np.random.default_rng(0)
    covered, wider = 0, 0
    for _ in range(100):
        chances = rng.beta(0.6, 1.4, 30)
        drawn = (rng.random((30, 4)) < chances[:, None]).astype(float)
        both, questions = over_questions_and_samples(drawn.tolist()), over_questions(drawn.mean(1))
        covered += both.low <= 0.3 <= both.high
        wider += both.high - both.low > questions.high - questions.low
    assert covered >= 90
    assert wider >= 95
    assert both.value == pytest.approx(drawn.mean())


def test_nothing_gives_nan():
    assert np.isnan(over_questions([]).value)
    assert np.isnan(over_questions_and_samples([]).value)
