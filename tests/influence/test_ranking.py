"""Figures of rankings, by hand and against scipy."""

import dataclasses

import numpy as np
import pytest
from scipy import stats

from appo_jax.benchmark import statistics
from appo_jax.influence.ranking import (
    Place,
    Ranked,
    chance,
    correlation,
    mean_over_questions,
    precision,
    share_after_tools,
    top_words,
)


def ranked(score, decisions, valid=None, words=None, question="?"):
    score, decisions = np.array(score, float), np.array(decisions, bool)
    valid = np.ones(len(score), bool) if valid is None else np.array(valid, bool)
    after_tool = np.arange(len(score)) == 0
    return Ranked(
        question, {"x": score}, {"x": valid}, np.ones(len(score)), valid, np.ones(len(score), bool), decisions, after_tool,
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
    # one question's mean is 0.75 and the other's 0
    rollouts[2] = dataclasses.replace(rollouts[2], question="another")
    assert precision(rollouts, "x", 2).value == pytest.approx(0.375)
    assert chance(rollouts).value == pytest.approx(0.25)


def places(score, influence, preferred=True):
    preferred = np.broadcast_to(preferred, len(score))
    return [Place(bool(p), float(x), float(y)) for p, x, y in zip(preferred, score, influence, strict=True)]


def test_correlation_is_the_mean_of_spearmans_of_questions():
    rng = np.random.default_rng(0)
    score, noise = rng.normal(size=(2, 12, 4, 6)).round(
        1
    )  # 12 questions of 4 rollouts of 6 positions; some scores are equal
    influence = score + noise
    rows = [places(*row) for row in zip(score.reshape(48, 6), influence.reshape(48, 6), strict=True)]
    found = correlation(rows, [str(i // 4) for i in range(48)])
    by_question = [stats.spearmanr(x.ravel(), y.ravel()).statistic for x, y in zip(score, influence, strict=True)]
    assert found.value == pytest.approx(np.mean(by_question))
    assert found.low < found.value < found.high


def test_what_has_no_order_correlates_with_nothing():
    assert correlation([places([1, 1], [2, 3])], ["a"]).value == 0.0  # this score ranks nothing
    # b has nothing to find, and c a single position
    rows = [places([1, 2], [3, 4]), places([1, 2], [0, 0]), places([1], [1])]
    assert correlation(rows, ["a", "b", "c"]).value == pytest.approx(1.0)
    assert np.isnan(correlation(rows[1:], ["b", "c"]).value)


def test_no_hit_does_not_exclude_a_hit():
    """Of 16 questions, 0.025^(1/16) = 0.7941; so a share of 0.2059 may have hits. The interval once had no width."""
    rollouts = [ranked([1, 0], [0, 0], question=str(i // 4)) for i in range(64)]
    found = precision(rollouts, "x", 1)
    assert (found.value, found.low, found.high) == pytest.approx((0.0, 0.0, 0.2059), abs=1e-4)


@pytest.mark.parametrize("beta", [(1.0, 1.0), (0.2, 0.2), (2e4, 98e4)])
def test_intervals_of_precision_cover_the_truth(monkeypatch, beta):
    """16 questions of 4 rollouts. The rate of hits varies by question, or is 2 % for all. With rollouts resampled instead of
    questions and plain percentiles, 83 and 66 to 70 % were covered. Rates near 0 are covered more often than in 95 %."""
    monkeypatch.setattr(statistics, "RESAMPLES", 500)
    by_hit = [[ranked([1, 0], [hit, 0], question=str(question)) for hit in (False, True)] for question in range(16)]
    rng, covered = np.random.default_rng(0), 0
    for _ in range(300):
        hits = rng.random((16, 4)) < rng.beta(*beta, 16)[:, None]
        found = precision([by_hit[i][int(hit)] for i in range(16) for hit in hits[i]], "x", 1)
        assert found.value == pytest.approx(hits.mean())
        covered += found.low <= beta[0] / sum(beta) <= found.high
    assert covered >= 0.93 * 300


def test_intervals_of_means_and_correlations_cover_the_truth(monkeypatch):
    """Values of a question share a part, as influence does; scores are independent of influence, so no correlation is there."""
    monkeypatch.setattr(statistics, "RESAMPLES", 500)
    rng, covered = np.random.default_rng(0), np.zeros(2)
    questions = [str(i // 2) for i in range(24)]
    for _ in range(300):
        influence = np.repeat(rng.normal(size=12), 2)[:, None] + rng.normal(size=(24, 4))
        score = np.repeat(rng.normal(size=12), 2)[:, None] + rng.normal(size=(24, 4))
        mean = mean_over_questions(influence.tolist(), questions)
        order = correlation([places(*row) for row in zip(score, influence, strict=True)], questions)
        covered += mean.low <= 0 <= mean.high, order.low <= 0 <= order.high
    assert ((covered >= 0.92 * 300) & (covered <= 0.98 * 300)).all()


def test_what_stands_on_top():
    rollouts = [
        ranked([5, 1, 4], [0, 0, 0], words=["the", "so", " Next"]),
        ranked([1, 5, 4], [0, 0, 0], words=["a", "Next", "b"]),
    ]
    assert top_words(rollouts, "x", 2)[0] == ("Next", 2)
    assert share_after_tools(rollouts, "x", 1) == 0.5
    assert np.isnan(precision([], "x", 1).value)
