"""Branch points of the baselines that branch where a turn begins."""

import itertools
import math
from collections import Counter

import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st

from appo_jax.branching import rules
from appo_jax.branching.rule import rollouts_from_the_prompt
from appo_jax.branching.rules.entropy_change import after_tool_calls, branch_probabilities
from appo_jax.branching.rules.random_turn import random_turns, turns
from appo_jax.branching.tree import Loop, TreeView
from appo_jax.config import BranchingConfig
from appo_jax.errors import ConfigError
from appo_jax.types import stretches, turn_starts

V = 50


def loop(budget: int, rng: np.random.Generator) -> Loop:
    return Loop(number=1, budget=budget, vocab_size=V, rng=rng)


@st.composite
def rollouts(draw):
    """(entropies, sampled) of one rollout: a prompt of one token, then turns and results."""
    lengths = draw(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 4)), min_size=1, max_size=4))
    sampled = np.array([False] + [own for a, b in lengths for own in [True] * a + [False] * b])
    entropies = np.array(draw(st.lists(st.floats(0, 4), min_size=len(sampled), max_size=len(sampled))))
    return entropies, sampled


@given(st.lists(st.booleans(), max_size=20), st.data())
def test_stretches_are_runs_of_equal_marks(marks, data):
    start = data.draw(st.integers(0, len(marks)))
    sampled = np.array(marks, bool)
    runs = [len(list(run)) for _, run in itertools.groupby(marks[start:])]
    ends = list(itertools.accumulate(runs, initial=start))
    assert stretches(sampled, start) == list(itertools.pairwise(ends))
    begin = [i for i, own in enumerate(marks) if own and not (i and marks[i - 1])]
    assert turn_starts(sampled).tolist() == begin


@given(rollouts())
def test_probabilities_are_the_oracles(rollout):
    entropies, sampled = rollout
    got, expected = branch_probabilities(entropies, sampled, V), oracle.arpo_probabilities(entropies, sampled, V)
    assert got.keys() == expected.keys()
    np.testing.assert_allclose(list(got.values()), list(expected.values()), atol=1e-12)


def test_probability_by_hand():
    # the first turn has H = 0, the second the full ln V in its first 20 tokens, whatever comes after them
    sampled = np.array([False, True, False] + [True] * 22)
    entropies = np.array([9.0, 0.0, 9.0] + [math.log(V)] * 20 + [0.0] * 2)
    assert branch_probabilities(entropies, sampled, V) == {3: 0.7}
    assert branch_probabilities(entropies, np.zeros(25, bool), V) == {}


@given(st.lists(rollouts(), min_size=1, max_size=4), st.integers(0, 8), st.integers(0, 5))
def test_arpo_branches_after_tool_calls_within_the_budget(prompt, budget, seed):
    entropies, sampled = zip(*prompt, strict=True)
    points = after_tool_calls(entropies, sampled, [0] * len(prompt), loop(budget, np.random.default_rng(seed)))
    assert len(points) <= budget
    assert len(set(points)) == len(points)
    for n, t in points:
        assert sampled[n][t]
        assert not sampled[n][t - 1]
        assert sampled[n][:t].any()
    done = after_tool_calls(entropies, sampled, [len(s) for s in sampled], loop(8, np.random.default_rng(seed)))
    assert done == [], "lots are drawn once"


def test_arpo_branches_as_often_as_its_probability_says():
    sampled, entropies = np.array([False, True, False, True]), np.array([0.0, 0.0, 0.0, math.log(V)])
    rng = np.random.default_rng(0)
    hits = sum(len(after_tool_calls([entropies], [sampled], [0], loop(9, rng))) for _ in range(4000))
    assert abs(hits / 4000 - 0.7) < 4 * math.sqrt(0.7 * 0.3 / 4000)


def test_aepo_branches_less_often_after_a_branch():
    """Three turns of P = 0.5: after l branches in a row, the probability is 0.5 · (1 − 0.3 · l)."""
    sampled, entropies = np.array([False] + [True, False] * 3 + [True]), np.zeros(8)
    rng, drawn = np.random.default_rng(0), Counter()
    for _ in range(8000):
        cuts = after_tool_calls([entropies], [sampled], [0], loop(9, rng), penalty=0.3)
        drawn[tuple(t in {cut.length for cut in cuts} for t in (3, 5, 7))] += 1
    for branched in itertools.product((True, False), repeat=3):
        expected, in_a_row = 1.0, 0
        for turn in branched:
            probability = 0.5 * (1 - 0.3 * in_a_row)
            expected *= probability if turn else 1 - probability
            in_a_row = in_a_row + 1 if turn else 0
        assert abs(drawn[branched] / 8000 - expected) < 4 * math.sqrt(expected * (1 - expected) / 8000)


def test_aepo_counts_the_branches_of_earlier_loops():
    """A rollout of turns at 1, 3, 5, 7 was branched at 3 and 5 (l = 2 at 7), and its branch begins at 5 (l = 2 at 7, too); a third
    one was branched at 3 alone (l = 0)."""
    sampled = np.array([False] + [True, False] * 3 + [True])
    branched = [np.isin(np.arange(8), taken) for taken in ([3, 5], [3, 5], [3], [1])]
    rng, drawn = np.random.default_rng(0), Counter()
    for _ in range(4000):
        cuts = after_tool_calls([np.zeros(8)] * 4, [sampled] * 4, [5, 5, 5, 1], loop(99, rng), 0.3, branched)
        drawn.update(cut.node for cut in cuts if cut.length == (3 if cut.node == 3 else 7))
    for node, expected in enumerate([0.5 * 0.4, 0.5 * 0.4, 0.5, 0.5]):  # the first turn follows no call
        assert abs(drawn[node] / 4000 - expected) < 4 * math.sqrt(expected * (1 - expected) / 4000)


@pytest.mark.parametrize("seed", range(20))
def test_tree_grpo_takes_no_turn_twice(seed):
    """Turns at 1, 3, 5. The first loop has branched rollout 0 at 3: both its turn 3 and its branch's are that point."""
    sampled = np.array([False, True, False, True, False, True])
    zeros = [np.zeros(6)] * 2
    tree = TreeView(1, [None, 0], [None, 3], [0, 1], [sampled] * 2, zeros, zeros, zeros, zeros)
    cuts = turns(tree, loop(9, np.random.default_rng(seed)), BranchingConfig(num_branch_points=3))
    assert set(cuts) == {(0, 1), (1, 1), (0, 5), (1, 5)}


@given(st.lists(rollouts(), min_size=1, max_size=4), st.integers(1, 3), st.integers(0, 8), st.integers(0, 5))
def test_tree_grpo_serves_random_turns_in_rounds(prompt, per_rollout, budget, seed):
    sampled = [s for _, s in prompt]
    starts = [[turn[0] for turn in oracle.turns(s)] for s in sampled]
    points = random_turns([np.array(s, int) for s in starts], per_rollout, loop(budget, np.random.default_rng(seed)))
    assert len(points) == min(budget, sum(min(per_rollout, len(s)) for s in starts))
    assert len(set(points)) == len(points)
    assert all(t in starts[n] for n, t in points)
    counts = [sum(m == n for m, _ in points) for n in range(len(sampled))]
    for count, s in zip(counts, starts, strict=True):
        assert count >= min(len(s), max(counts) - 1)


def test_every_turn_is_as_likely():
    rng = np.random.default_rng(0)
    first = [random_turns([np.array([1, 3, 5])], 1, loop(1, rng))[0].length for _ in range(3000)]
    for t in (1, 3, 5):
        assert abs(first.count(t) / 3000 - 1 / 3) < 4 * math.sqrt(2 / 9 / 3000)


def test_what_is_left_goes_to_whole_new_rollouts():
    assert rollouts_from_the_prompt(2, 7, 5) == [(0, 7), (1, 7), (0, 7), (1, 7), (0, 7)]
    assert rollouts_from_the_prompt(2, 7, 0) == []


def test_a_file_without_a_rule_is_named(monkeypatch, tmp_path):
    (tmp_path / "without_rule.py").touch()
    monkeypatch.setattr(rules, "__path__", [str(tmp_path)])
    with pytest.raises(ConfigError, match=r"without_rule\.py: expected `RULE = ByScore"):
        rules._rule("without_rule")
