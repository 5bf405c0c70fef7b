"""From scores to branch points, against the oracle. Scores are small integers: no rounding, many ties."""

import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st

from appo_jax.branching.select import far_from, pooled, proportional, rank_positions, select, serve
from appo_jax.config import BranchingConfig

gates = st.sampled_from(["both_positive", "literal"])


@st.composite
def rollouts(draw):
    """One prompt's rollouts: z-scores as integers, where a branch may start, which tokens were sampled."""
    result = []
    for _ in range(draw(st.integers(1, 4))):
        length = draw(st.integers(1, 10))

        def row(elements, length=length):
            return np.array(draw(st.lists(elements, min_size=length, max_size=length)))

        sampled = row(st.booleans())
        valid = sampled & row(st.booleans())
        result.append((row(st.integers(-2, 2)) * valid, row(st.integers(-2, 2)) * valid, valid, sampled))
    return result


def as_arrays(prompt, gate):
    scores = [(z_h * z_o).astype(np.float32) for z_h, z_o, _, _ in prompt]
    preferred = [v & ((z_h > 0) & (z_o > 0) | (gate == "literal")) for z_h, z_o, v, _ in prompt]
    return scores, preferred, [v for *_, v, _ in prompt], [s for *_, s in prompt]


def expected_orders(prompt, gate, min_spacing):
    return [
        oracle.spaced(oracle.ranking(z_h * z_o, z_h, z_o, v, False, gate), s, min_spacing) for z_h, z_o, v, s in prompt
    ]


def by_rollout(points, count):
    return [[t for n, t in points if n == rollout] for rollout in range(count)]


@given(
    rollouts(), st.integers(1, 4), st.integers(0, 20), st.integers(1, 4), st.sampled_from(["both_positive", "literal"])
)
def test_select_is_the_oracles(prompt, num_branch_points, budget, min_spacing, gate):
    config = BranchingConfig(num_branch_points=num_branch_points, min_spacing=min_spacing, gate=gate)
    points = select(*as_arrays(prompt, gate), budget, config)
    wanted = min(budget, num_branch_points * len(prompt))
    expected = oracle.round_robin(expected_orders(prompt, gate, min_spacing), wanted)
    assert by_rollout(points, len(prompt)) == expected
    assert len(points) <= wanted
    assert len(set(points)) == len(points)


@given(rollouts(), st.integers(0, 12), st.integers(1, 3))
def test_pooled_is_the_oracles(prompt, budget, min_spacing):
    config = BranchingConfig(num_branch_points=3, min_spacing=min_spacing, gate="literal", allocation="pooled")
    arrays = as_arrays(prompt, "literal")
    points = select(*arrays, budget, config)
    orders = expected_orders(prompt, "literal", min_spacing)
    assert by_rollout(points, len(prompt)) == oracle.pooled(arrays[0], orders, min(budget, 3 * len(prompt)))


@given(rollouts(), st.integers(1, 3), st.integers(0, 12), gates)
def test_proportional_is_the_oracles(prompt, num_branch_points, budget, gate):
    config = BranchingConfig(num_branch_points=num_branch_points, gate=gate, allocation="proportional")
    arrays = as_arrays(prompt, gate)
    points = select(*arrays, budget, config)
    counts = {point: points.count(point) for point in points}
    orders = expected_orders(prompt, gate, 1)
    assert counts == oracle.proportional(arrays[0], orders, num_branch_points, budget, arrays[1])


def test_proportional_by_hand():
    # top 2 of each: 6, 2 and 4 (the other has no positive score): shares of 6 branches 3, 1, 2
    scores = [np.array([6.0, 2.0, 1.0]), np.array([-1.0, 4.0, -2.0])]
    ranked, every = [[0, 1, 2], [1, 0, 2]], [np.ones(3, bool)] * 2
    assert proportional(ranked, scores, every, 2, 6) == [(0, 0)] * 3 + [(0, 1)] + [(1, 1)] * 2
    assert proportional(ranked, scores, every, 2, 2) == [(0, 0), (1, 1)]  # 1, 1/3 and 2/3
    nothing = [np.zeros(3), np.full(3, -1.0)]
    assert proportional(ranked, nothing, every, 2, 3) == [(0, 0), (1, 1), (0, 1)]
    assert proportional([[], []], nothing, every, 2, 3) == []


def test_proportional_heeds_the_gate():
    """A product of two negatives gets branches only if no position has two positive factors."""
    scores, ranked = [np.array([0.2, 3.0, 2.8])], [[0, 1, 2]]
    gate, nobody = [np.array([True, False, False])], [np.zeros(3, bool)]
    assert proportional(ranked, scores, gate, 3, 3) == [(0, 0)] * 3
    assert proportional(ranked, scores, nobody, 2, 3) == [(0, 1)] * 3  # shares of 3/16 and 45/16


def test_pooled_may_take_all_from_one_rollout_and_heeds_the_gate():
    scores = [np.array([9.0, 8.0, 7.0]), np.array([1.0, 2.0, 3.0])]
    every = [np.ones(3, bool)] * 2
    ranked = [rank_positions(s, e, e, e) for s, e in zip(scores, every, strict=True)]
    assert pooled(ranked, scores, every, 3) == [(0, 0), (0, 1), (0, 2)]
    gate = [np.array([False, True, False]), np.array([True, False, False])]
    ranked = [rank_positions(s, g, e, e) for s, g, e in zip(scores, gate, every, strict=True)]
    assert pooled(ranked, scores, gate, 3) == [(0, 1), (1, 0), (0, 0)]


@pytest.mark.parametrize(
    ("ranked", "per_rollout", "budget", "expected"),
    [
        ([[5, 6], [7, 8]], 2, 4, [(0, 5), (1, 7), (0, 6), (1, 8)]),  # rounds, not rollout by rollout
        ([[5, 6], [7, 8]], 2, 3, [(0, 5), (1, 7), (0, 6)]),  # the budget truncates the last round
        ([[5], [7, 8, 9]], 2, 4, [(0, 5), (1, 7), (1, 8), (1, 9)]),  # what the first cannot use goes to the second
        ([[], []], 2, 4, []),  # nowhere to branch
        ([[5, 6, 7, 8]], 2, 8, [(0, 5), (0, 6)]),  # B per rollout, budget or not
        ([[5, 6]], 2, 0, []),
        ([], 2, 4, []),
    ],
)
def test_serve_by_hand(ranked, per_rollout, budget, expected):
    assert serve(ranked, per_rollout, budget) == expected


def test_preferred_come_first_then_score_then_position():
    score = np.array([4, 1, 9, 1, 9, 0], np.float32)
    preferred, valid = np.array([0, 1, 0, 1, 0, 0], bool), np.array([1, 1, 1, 1, 1, 0], bool)
    assert rank_positions(score, preferred, valid, valid) == [1, 3, 2, 4, 0]


def test_spacing_counts_sampled_tokens_blank_ones_included_and_tool_results_not():
    score = np.array([5, 4, 3, 2, 1], np.float32)
    sampled, valid = np.array([1, 1, 0, 1, 1], bool), np.array([1, 0, 0, 1, 1], bool)
    # sampled tokens are numbered 1 2 _ 3 4: from the first to the fourth place there are two
    assert rank_positions(score, valid, valid, sampled, min_spacing=2) == [0, 3]
    assert rank_positions(score, valid, valid, sampled, min_spacing=3) == [0, 4]


def test_a_spacing_beyond_the_rollout_leaves_one_position_and_no_memory_is_taken_for_it():
    score, every = np.array([1, 3, 2], np.float32), np.ones(3, bool)
    for spacing in (3, 10**10, 10**30):
        assert rank_positions(score, every, every, every, min_spacing=spacing) == [1]
        assert not far_from(np.array([0, 0, 1], bool), every, spacing).any()


def test_far_from_by_hand():
    """Sampled tokens are numbered 1 2 _ 3 4 5, the branch point is number 3."""
    sampled = np.array([1, 1, 0, 1, 1, 1], bool)
    taken = np.array([0, 0, 0, 1, 0, 0], bool)
    assert far_from(taken, sampled, 1).tolist() == [True, True, False, False, True, True]
    assert far_from(taken, sampled, 2).tolist() == [True, False, False, False, False, True]
    assert far_from(~sampled & sampled, sampled, 4).tolist() == sampled.tolist()


@pytest.mark.parametrize(
    ("n", "b", "loops", "m"), [(4, 3, 1, 16), (1, 2, 3, 16), (1, 4, 2, 16), (3, 1, 2, 12), (2, 3, 2, 17)]
)
def test_trees_of_any_shape_fill_the_budget_in_equal_shares(n, b, loops, m):
    rng = np.random.default_rng(0)
    tree = [None] * n  # parents
    for size in oracle.tree_sizes(n, b, loops, m)[1:]:
        every = [np.ones(20, bool)] * len(tree)
        points = select(
            [rng.normal(size=20).astype(np.float32) for _ in tree], every, every, every, m - len(tree),
            BranchingConfig(num_branch_points=b, num_loops=loops),
        )  # fmt: skip
        shares = [len(ts) for ts in by_rollout(points, len(tree))]
        assert max(shares) - min(shares) <= 1
        tree += points
        assert len(tree) == size
