"""The scatter of A_base against a game in which the variance of a branch's reward is known at every position."""

import numpy as np
import pytest
from test_measure import Coins, rewarded, rollout

from appo_jax.advantage.groups import dual_group
from appo_jax.config import BranchingConfig
from appo_jax.influence.allocation import advantage_scatter
from appo_jax.influence.ranking import Ranked


def ranked(r, score):
    valid = r.sampled
    nothing = np.zeros(r.length, bool)
    return Ranked(
        "?",
        {"product": np.array(score, float)},
        {"product": valid},
        np.ones(r.length),
        valid,
        r.sampled,
        None,
        nothing,
        [""] * r.length,
    )


def play(score, draws=4000, failed=0.0, **branching):
    """Two rollouts of one prompt; the reward is the first sampled token, which only a branch at position 2 draws again."""
    rollouts = [rollout([0, 1, 1, 0, 1, 0], node=0), rollout([1, 0, 0, 0, 1, 0], node=1)]
    rng = np.random.default_rng(2)
    give = rewarded(lambda tokens: np.nan if rng.random() < failed else tokens[0])
    rewarded(lambda tokens: tokens[0])(rollouts)
    coins = Coins()
    scored = coins.score(None, rollouts)

    def draw_branches(branches, number):
        drawn = coins.branches(None, scored, branches, (number,))
        give([r for some in drawn for r in some])
        return drawn

    scored_by = [ranked(r, score) for r in rollouts]
    if failed:
        rollouts[1].reward = np.nan
    config = BranchingConfig(num_branch_points=2, **branching)
    return advantage_scatter(rollouts, scored_by, config, 2, 6, draws, draw_branches), coins.cuts


def test_branches_that_change_nothing_scatter_nothing():
    """All points lie after the token that decides: every draw has the rewards 0, 0, 1, 1."""
    found, _ = play([0, 0, 0, 1, 1, 0, 0, 0], draws=50)
    assert found.variance["per_rollout"].value == found.variance["proportional"].value == 0.0


def test_the_variance_is_that_of_the_rewards_by_enumeration():
    """per_rollout draws one branch of each rollout at position 2 (a fair coin) and one at 3 (the parent's reward); in proportion
    to scores of 1 and 0, both branches of a rollout begin at position 2."""
    found, _ = play([0, 0, 1, 0, 0, 0, 0, 0])
    first = np.array([0.0, 1.0])

    def variance(outcomes):
        return np.var([dual_group(first, first, np.array(x, float), "population") for x in outcomes], axis=0).mean()

    one_coin = [(a, 0, b, 1) for a in (0, 1) for b in (0, 1)]
    two_coins = [(a, b, c, d) for a in (0, 1) for b in (0, 1) for c in (0, 1) for d in (0, 1)]
    assert found.variance["per_rollout"].value == pytest.approx(variance(one_coin), rel=0.1)
    assert found.variance["proportional"].value == pytest.approx(variance(two_coins), rel=0.1)
    assert found.difference.value == pytest.approx(variance(two_coins) - variance(one_coin), rel=0.1)


def test_with_include_token_a_branch_keeps_the_scored_token():
    _, cuts = play([0, 0, 3, 0, 1, 0, 0, 0], draws=3, include_token=True)
    assert set(cuts) == {3, 5}


def test_one_question_gives_no_end_to_the_interval():
    found, _ = play([0, 0, 1, 0, 0, 0, 0, 0], draws=50)
    for interval in found.variance.values():
        assert (interval.low, interval.high) == pytest.approx((0.025 * interval.value, np.inf))
    assert (found.difference.low, found.difference.high) == (-np.inf, np.inf)


def test_rollouts_without_a_reward_have_no_variance():
    """A fifth of the branches fail. If the second initial rollout fails too, the variance is that of the first one."""
    without, _ = play([0, 0, 1, 0, 0, 0, 0, 0], draws=2000, failed=0.2)
    assert all(x.value > 0.05 for x in without.variance.values()), "0 for the failed rollout would halve it"
    assert np.isfinite(without.difference.value)
