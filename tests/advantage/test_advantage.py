"""Group advantages (eq. 6) and their future-aware scaling (eq. 7) against the oracle."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st

from appo_jax.advantage.base import base_advantages
from appo_jax.advantage.groups import zscores
from appo_jax.advantage.procedural import procedural_advantage
from appo_jax.config import AdvantageConfig
from appo_jax.reward.overlong import overlong_penalty
from appo_jax.types import Example, Outcome, Rollout, StopReason, ToolCall

EXAMPLE = Example("e", "?", ("1",), "qa", "")


def tree_of(initial, branches, forks=None, sampled=None):
    """A prompt's rollouts: each has one prompt token and two text tokens; branches grow from the first one."""
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
    st.sampled_from(["paper", "joint", "init_only"]), st.sampled_from(["population", "sample"]),
)  # fmt: skip
def test_base_advantage_is_the_oracles(initial, branches, mode, std):
    got = base_advantage(np.array(initial), np.array(branches), AdvantageConfig(base=mode, std=std))
    np.testing.assert_allclose(got, oracle.a_base(initial, branches, mode, int(std == "sample")), atol=1e-9)


def test_the_sample_std_by_hand():
    """Official GRPO: (R − mean) / (std + 1e-6), the std of two rewards that differ by 1 being 1/√2."""
    config = AdvantageConfig(base="init_only", std="sample")
    one = 0.5 / (2**-0.5 + 1e-6)
    np.testing.assert_allclose(base_advantage(np.array([1.0, 0.0]), np.array([]), config), [one, -one], rtol=1e-12)
    np.testing.assert_array_equal(base_advantage(np.array([1.0]), np.array([]), config), [0])
    # rewards 1, 0, 0, 0: mean 1/4, sum of squares 3/4, over three
    joint = base_advantage(np.array([1.0, 0.0]), np.array([0.0, 0.0]), dataclasses.replace(config, base="joint"))
    np.testing.assert_allclose(joint, [0.75 / (0.5 + 1e-6), -0.25 / (0.5 + 1e-6)], rtol=1e-12)


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
    np.testing.assert_array_equal(zscores(np.array([1.0]), np.array([]), "population"), [np.nan])
    np.testing.assert_array_equal(zscores(np.array([0.1, 0.2]), np.array([0.1, 0.1, 0.1]), "population"), [0, np.nan])


@given(
    st.floats(-3, 3, width=32), st.lists(st.floats(0, 4, width=32), min_size=6, max_size=6),
    st.lists(st.booleans(), min_size=6, max_size=6), st.sampled_from([0.0, 0.5, 1.0]),
)  # fmt: skip
def test_procedural_advantage_is_the_oracles(base, future, sampled, b):
    config = AdvantageConfig(future_weight=b)
    got = procedural_advantage(jnp.array([[base]]), jnp.array([future]), config)[0]
    expected = oracle.advantages(base, future, sampled, b)
    np.testing.assert_allclose(np.where(sampled, got, 0), expected, rtol=1e-5, atol=1e-6)


def test_procedural_advantage_by_hand():
    # b = 0.5, Ω clipped to [1, 1.2]: factors 1.5, 1.55, 1.6
    got = procedural_advantage(jnp.array([[2.0], [-1.0]]), jnp.array([[0.3, 1.1, 7.0]] * 2), AdvantageConfig())
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
                future = jnp.full((len(initial), 2), jnp.inf)
                a = procedural_advantage(jnp.array(base, jnp.float32)[:, None], future, AdvantageConfig())
                assert np.isfinite(a).all()


# ---------------------------------------------------------------- per-token bases


@st.composite
def trees(draw):
    """One prompt's rollouts with tool gaps, branches of branches, rewards with ties."""
    initial = draw(st.integers(1, 3))
    tree = []
    for node in range(initial + draw(st.integers(0, 5))):
        length = draw(st.integers(3, 9))
        parent, fork, head = None, None, np.array([False])
        if node >= initial:
            parent = draw(st.integers(0, node - 1))
            fork = draw(st.integers(1, tree[parent].length - 1))
            head = tree[parent].sampled[:fork]
        own = np.array(draw(st.lists(st.booleans(), min_size=length, max_size=length)))
        sampled = np.concatenate([head, own])
        ends = [t for t in range(1, len(sampled)) if sampled[t] and not sampled[t - 1] and sampled[:t].any()]
        calls = tuple(ToolCall("search", "q", draw(st.sampled_from("ab")), Outcome.OK, 0.0, t - 1, t, {}) for t in ends)
        zeros = np.zeros(len(sampled), np.float32)
        tree.append(
            Rollout(
                EXAMPLE, np.zeros(len(sampled), np.int32), 1, sampled, zeros, zeros, StopReason.ANSWERED, calls, node,
                parent=parent, fork=fork, loop=int(node >= initial), reward=draw(rewards),
            )
        )  # fmt: skip
    return tree


def root_and_fork(tree, node):
    """A rollout's initial ancestor, and the number of tokens that they share."""
    shared = tree[node].length
    while tree[node].parent is not None:
        shared = min(shared, tree[node].fork)
        node = tree[node].parent
    return node, shared


@given(trees())
def test_shared_prefix_is_the_oracles(tree):
    initial = [r for r in tree if r.is_initial]
    branches = tree[len(initial) :]
    ancestry = [root_and_fork(tree, r.node) for r in branches]
    expected = oracle.a_base_shared_prefix(
        [r.reward for r in initial], [r.reward for r in branches], [root for root, _ in ancestry],
        [fork for _, fork in ancestry], [r.length for r in initial],
    )  # fmt: skip
    (got,) = base_advantages([tree], None, AdvantageConfig(base="shared_prefix"))
    for rollout, a, b in zip(initial, got, expected, strict=False):
        np.testing.assert_allclose(a, np.where(rollout.sampled, b, 0), atol=1e-9)
    assert not any(a.any() for a in got[len(initial) :])


@given(trees())
def test_tree_groups_are_the_oracles(tree):
    expected = oracle.a_tree([r.reward for r in tree], [root_and_fork(tree, r.node)[0] for r in tree])
    (got,) = base_advantages([tree], None, AdvantageConfig(base="tree"))
    for rollout, a, b in zip(tree, got, expected, strict=True):
        np.testing.assert_allclose(a, np.where(rollout.sampled, b, 0), atol=1e-9)


@given(trees())
def test_turn_groups_are_the_oracles(tree):
    turns = [oracle.turns(r.sampled) for r in tree]
    states = [
        ["prompt" if k == 0 else r.calls[k - 1].result for k in range(len(t))] for r, t in zip(tree, turns, strict=True)
    ]
    expected = oracle.a_turns([r.reward for r in tree], states)
    (got,) = base_advantages([tree], None, AdvantageConfig(base="turn"))
    for rollout, a, segments, values in zip(tree, got, turns, expected, strict=True):
        for segment, value in zip(segments, values, strict=True):
            np.testing.assert_allclose(a[segment], value, atol=1e-6)
        assert not a[~rollout.sampled].any()


def test_turn_groups_by_hand():
    """Two rollouts of two turns that read the same result: both groups compare 1 with 0."""
    sampled = np.array([False, True, False, True])
    one, two = (dataclasses.replace(r, calls=(CALL,)) for r in tree_of([1, 0], [], sampled=sampled))
    (got,) = base_advantages([[one, two]], None, AdvantageConfig(base="turn"))
    np.testing.assert_allclose(got, [[0, 2, 0, 2], [0, -2, 0, -2]])
    alone = dataclasses.replace(two, calls=(dataclasses.replace(CALL, result="else"),))
    (got,) = base_advantages([[one, alone]], None, AdvantageConfig(base="turn"))
    np.testing.assert_allclose(got, [[0, 2, 0, 1], [0, -2, 0, -1]])  # the second turn is alone in its state


CALL = ToolCall("search", "q", "same", Outcome.OK, 0.0, 2, 3, {})


@given(st.lists(trees(), min_size=1, max_size=3), st.booleans(), st.integers(0, 5))
def test_global_returns_are_the_oracles(minibatch, with_penalties, seed):
    rng = np.random.default_rng(seed)
    penalties = [
        [with_penalties * np.where(r.sampled, rng.integers(0, 8, r.length) / 8, 0) for r in tree] for tree in minibatch
    ]
    flat = [r for tree in minibatch for r in tree]
    expected = oracle.a_global(
        [r.reward for r in flat], [x for row in penalties for x in row], [r.sampled for r in flat]
    )
    got = base_advantages(minibatch, penalties if with_penalties else None, AdvantageConfig(base="global"))
    for a, b in zip([x for row in got for x in row], expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_a_penalty_in_the_reward_is_taken_off_the_whole_rollout():
    tree = tree_of([1, 1], [])
    penalties = [[np.array([0, 0.5, 0.5]), np.zeros(3)]]
    (got,) = base_advantages([tree], penalties, AdvantageConfig(base="init_only"))
    np.testing.assert_allclose(got, [[0, -1, -1], [0, 1, 1]])


@given(trees())
def test_joint_gives_branches_their_own(tree):
    (got,) = base_advantages([tree], None, AdvantageConfig(base="joint"))
    all_rewards = [r.reward for r in tree]
    for rollout, a in zip(tree, got, strict=True):
        expected = oracle.group_term(rollout.reward, all_rewards) or 0.0
        np.testing.assert_allclose(a, np.where(rollout.sampled, expected, 0), atol=1e-9)


def test_plain_scaling_and_two_sided_clip_by_hand():
    base, future = jnp.array([[2.0]]), jnp.array([[0.3, 1.1, 7.0]])
    plain = AdvantageConfig(scaling="plain")
    np.testing.assert_allclose(procedural_advantage(base, future, plain), [[2, 2.2, 2.4]], rtol=1e-6)
    both = AdvantageConfig(scaling="plain", clip_low=0.8)
    np.testing.assert_allclose(procedural_advantage(base, future, both), [[1.6, 2.2, 2.4]], rtol=1e-6)


@given(st.integers(0, 60), st.integers(1, 50), st.data())
def test_overlong_penalty_is_the_oracles(length, limit, data):
    buffer = data.draw(st.integers(1, limit))
    assert overlong_penalty(length, limit, buffer) == pytest.approx(oracle.overlong(length, limit, buffer))
    assert overlong_penalty(length, limit, 0) == 0


@given(
    st.lists(rewards, min_size=1, max_size=4), st.lists(rewards, max_size=4),
    st.sampled_from(["paper", "joint", "init_only", "shared_prefix", "global", "tree", "turn"]),
)  # fmt: skip
def test_a_rollout_without_a_reward_counts_in_no_group_and_learns_nothing(initial, branches, rule):
    config = AdvantageConfig(base=rule)
    (without,) = base_advantages([tree_of(initial, branches)], None, config)
    (found,) = base_advantages([tree_of([*initial, np.nan], [*branches, np.nan])], None, config)
    n = len(initial)
    assert not found[n].any()
    assert not found[-1].any()
    np.testing.assert_allclose([*found[:n], *found[n + 1 : -1]], without, atol=1e-12)


def test_a_root_without_a_reward_learns_nothing_from_its_branches():
    """Official code's rule: the branches' rewards 1 and 0 are ±1 of their own group, on the prefix that they share."""
    tree = tree_of([np.nan, 1, 0], [1, 0])
    tree[4].parent = 1
    for r in tree[3:]:
        r.fork = 2
    (found,) = base_advantages([tree], None, AdvantageConfig(base="shared_prefix"))
    np.testing.assert_allclose(found[:3], [[0, 0, 0], [0, 0, 1], [0, -1, -1]])
