"""Group advantages (eq. 6) and their future-aware scaling (eq. 7) against the oracle."""

import jax
import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st

from appo_jax.advantage.base import base_advantages
from appo_jax.advantage.groups import zscores
from appo_jax.advantage.procedural import procedural_advantage
from appo_jax.config import AdvantageConfig
from appo_jax.types import Example, Rollout, StopReason

EXAMPLE = Example("e", "?", ("1",), "qa", "")


def tree_of(initial, branches, forks=None, sampled=None):
    """A prompt's rollouts: one token of prompt and two of text each; branches grew from the first one."""
    sampled = np.array([False, True, True]) if sampled is None else sampled
    zeros = np.zeros(len(sampled), np.float32)
    return [
        Rollout(
            EXAMPLE, np.zeros(len(sampled), np.int32), 1, sampled, zeros, zeros, StopReason.ANSWERED, (), node,
            parent=None if node < len(initial) else 0, fork=None if node < len(initial) else 1, loop=int(node >= len(initial)),
            reward=float(reward),
        )
        for node, reward in enumerate([*initial, *branches])
    ]  # fmt: skip


def base_advantage(initial, branches, config):
    """A_base of the initial rollouts, one number each."""
    (values,) = base_advantages([tree_of(initial, branches)], None, config)
    for value in values:
        assert value[0] == 0  # the prompt
        assert value[1] == value[2]
    return np.array([value[1] for value in values[: len(initial)]])


# few values, so that groups without spread and rewards equal to a whole group are common
rewards = st.sampled_from([-1.0, 0.0, 0.1, 0.3, 1.0, 1.1])


@given(
    st.lists(rewards, min_size=1, max_size=5), st.lists(rewards, max_size=6),
    st.sampled_from(["paper", "joint", "init_only"]),
)  # fmt: skip
def test_base_advantage_is_the_oracles(initial, branches, mode):
    got = base_advantage(np.array(initial), np.array(branches), AdvantageConfig(base=mode))
    np.testing.assert_allclose(got, oracle.a_base(initial, branches, mode), atol=1e-9)


@given(st.lists(st.floats(-2, 2), min_size=1, max_size=5), st.lists(st.floats(-2, 2), max_size=6))
def test_base_advantage_is_always_a_number(initial, branches):
    for mode in ("paper", "joint", "init_only"):
        assert np.isfinite(base_advantage(np.array(initial), np.array(branches), AdvantageConfig(base=mode))).all()


@pytest.mark.parametrize(
    ("initial", "branches", "mode", "expected"),
    [
        ([1, 0], [1, 0], "paper", [1, -1]),  # each term is ±1 in both groups
        ([1, 0], [0, 0, 0, 2], "paper", [(1 + 3**-0.5) / 2, (-1 - 3**-0.5) / 2]),  # branches: mean 1/2, variance 3/4
        ([1, 0], [1, 1, 1], "paper", [0.5, -1]),  # branches: 0 for the 1, undefined and left out for the 0
        ([1, 1], [0, 0], "paper", [0, 0]),  # initial: 0; branches: undefined
        ([1, 1], [0, 2], "paper", [0, 0]),
        ([1, 0], [], "paper", [1, -1]),  # nothing could be branched
        ([1], [0, 2], "paper", [0]),
        ([2], [0, 2], "paper", [0.5]),  # a group of one: 0, and +1 among the branches
        ([1, 0], [1, 0], "joint", [1, -1]),
        ([1, 1], [0, 0], "joint", [1, 1]),
        ([1, 0], [9, 9], "init_only", [1, -1]),
    ],
)
def test_base_advantage_by_hand(initial, branches, mode, expected):
    got = base_advantage(np.array(initial, float), np.array(branches, float), AdvantageConfig(base=mode))
    np.testing.assert_allclose(got, expected, atol=1e-12)


@given(st.lists(rewards, min_size=2, max_size=5), st.lists(rewards, min_size=1, max_size=6), st.integers(-4, 4))
def test_base_advantage_does_not_see_the_scale_of_the_reward(initial, branches, power):
    initial, branches = np.array(initial), np.array(branches)
    scale = 2.0**power  # exact in binary, so that equal rewards stay equal
    one = base_advantage(initial, branches, AdvantageConfig())
    np.testing.assert_allclose(base_advantage(initial * scale, branches * scale, AdvantageConfig()), one, atol=1e-9)


def test_rewards_that_differ_by_rounding_are_equal():
    assert 0.1 + 0.2 != 0.3
    got = base_advantage(np.array([0.3, 1.0]), np.array([0.1 + 0.2, 0.3]), AdvantageConfig())
    np.testing.assert_allclose(got, [-0.5, 1])  # branches: 0 for the first, undefined for the second
    np.testing.assert_array_equal(base_advantage(np.array([0.1 + 0.2, 0.3]), np.array([]), AdvantageConfig()), 0)


def test_zscores_of_a_group_without_spread_or_members():
    np.testing.assert_array_equal(zscores(np.array([1.0]), np.array([])), [np.nan])
    np.testing.assert_array_equal(zscores(np.array([0.1, 0.2]), np.array([0.1, 0.1, 0.1])), [0, np.nan])


@given(
    st.floats(-3, 3, width=32), st.lists(st.floats(0, 4, width=32), min_size=6, max_size=6),
    st.lists(st.booleans(), min_size=6, max_size=6), st.sampled_from([0.0, 0.5, 1.0]),
)  # fmt: skip
def test_procedural_advantage_is_the_oracles(base, future, sampled, b):
    config = AdvantageConfig(future_weight=b)
    got = procedural_advantage(np.array([[base]], np.float32), np.array([future], np.float32), config)[0]
    expected = oracle.advantages(base, future, sampled, b)
    np.testing.assert_allclose(np.where(sampled, got, 0), expected, rtol=1e-5, atol=1e-6)


def test_procedural_advantage_by_hand():
    # b = 0.5, Ω clipped to [1, 1.2]: factors 1.5, 1.55, 1.6
    got = procedural_advantage(np.array([[2.0], [-1.0]]), np.array([[0.3, 1.1, 7.0]] * 2), AdvantageConfig())
    np.testing.assert_allclose(got, [[3, 3.1, 3.2], [-1.5, -1.55, -1.6]], rtol=1e-6)


def test_the_advantage_is_a_constant_for_the_gradient():
    def total(base, future):
        return procedural_advantage(base, future, AdvantageConfig()).sum()

    for gradient in jax.grad(total, (0, 1))(np.array([[2.0], [-1.0]]), np.full((2, 3), 1.1)):
        np.testing.assert_array_equal(gradient, 0)


def test_no_degenerate_case_makes_a_nan():
    with jax.debug_nans(True), np.errstate(all="raise"):
        for initial, branches in (([1.0], []), ([1.0, 1.0], [1.0]), ([1.0, 0.0], [0.5, 0.5])):
            for mode in ("paper", "joint", "init_only"):
                base = base_advantage(np.array(initial), np.array(branches), AdvantageConfig(base=mode))
                a = procedural_advantage(
                    base.astype(np.float32)[:, None], np.full((len(initial), 2), np.inf), AdvantageConfig()
                )
                assert np.isfinite(a).all()
