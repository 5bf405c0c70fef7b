"""Figures of rankings, by hand and against scipy."""

import numpy as np
import pytest
from scipy import stats

from appo_jax.influence.ranking import Ranked, chance, correlation, precision, share_after_tools, top_words


def ranked(score, decisions, valid=None, words=None):
    score, decisions = np.array(score, float), np.array(decisions, bool)
    valid = np.ones(len(score), bool) if valid is None else np.array(valid, bool)
    after_tool = np.arange(len(score)) == 0
    return Ranked(
        {"x": score}, {"x": valid}, np.ones(len(score)), valid, np.ones(len(score), bool), decisions, after_tool,
        words or ["a"] * len(score),
    )  # fmt: skip


def test_precision_is_the_share_of_decisions_among_the_best():
    rollouts = [
        ranked([3, 2, 1, 0], [1, 0, 1, 0]),  # best two: a decision and none
        ranked([0, 1, 2, 3], [0, 0, 1, 1]),  # two decisions
        ranked([9, 1, 2, 3], [1, 0, 0, 0], valid=[0, 1, 1, 1]),  # the best is not valid
    ]
    assert precision(rollouts, "x", 2).value == pytest.approx((0.5 + 1.0 + 0.0) / 3)
    assert precision(rollouts, "x", 1).value == pytest.approx(2 / 3)
    assert chance(rollouts).value == pytest.approx((0.5 + 0.5 + 0.0) / 3)


def test_correlation_is_spearmans_and_its_interval_covers_it():
    rng = np.random.default_rng(0)
    pairs = [[(x, x + rng.normal()) for x in rng.normal(size=6)] for _ in range(40)]
    x, y = np.array([pair for row in pairs for pair in row]).T
    found = correlation(pairs)
    assert found.value == pytest.approx(stats.spearmanr(x, y).statistic)
    assert found.low < found.value < found.high
    assert correlation([[(1.0, 2.0), (1.0, 3.0)]]).value == 0.0  # a score that does not vary ranks nothing


def test_what_stands_on_top():
    rollouts = [
        ranked([5, 1, 4], [0, 0, 0], words=["the", "so", " Next"]),
        ranked([1, 5, 4], [0, 0, 0], words=["a", "Next", "b"]),
    ]
    assert top_words(rollouts, "x", 2)[0] == ("Next", 2)
    assert share_after_tools(rollouts, "x", 1) == 0.5
    assert np.isnan(precision([], "x", 1).value)
