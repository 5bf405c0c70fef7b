"""Influence in games whose values are known. A sampler without a model plays them."""

import dataclasses

import numpy as np
import pytest

from appo_jax.influence.measure import after, measure, squared_difference
from appo_jax.rollout.sampler import ScorePass
from appo_jax.types import Example, Outcome, Rollout, StopReason, ToolCall

PROMPT, LENGTH = 2, 8  # tokens 2 … 7 are sampled, each 0 or 1 with equal probability


def rollout(tokens, node=0, **others):
    tokens = np.array([9, 9, *tokens], np.int32)
    sampled = np.arange(len(tokens)) >= PROMPT
    nothing = np.zeros(len(tokens), np.float32)
    fields = {
        "example": Example("0", "?", ("1",), "qa", ""), "tokens": tokens, "prompt_length": PROMPT, "sampled": sampled,
        "log_probs": nothing, "entropies": nothing, "stop_reason": StopReason.ANSWERED, "calls": (), "node": node,
    }  # fmt: skip
    return Rollout(**(fields | others))


class Coins:
    """Draws every token as a fair coin."""

    def __init__(self):
        self.rng = np.random.default_rng(0)
        self.cuts = []

    def score(self, params, rollouts, max_rollouts=None, to_branch=False):
        nothing = [np.zeros(r.length) for r in rollouts]
        return ScorePass(rollouts, nothing, nothing)

    def branches(self, params, scored, branches, draw_id):
        self.cuts = [branch.cut for some in branches for branch in some]
        return [
            [rollout([*r.tokens[PROMPT : b.cut], *self.rng.integers(0, 2, LENGTH - b.cut)], b.node) for b in some]
            for r, some in zip(scored.rollouts, branches, strict=True)
        ]


def rewarded(rule):
    def give(rollouts):
        for r in rollouts:
            r.reward = float(rule(r.tokens[PROMPT:]))

    return give


def measured(coins, rollouts, positions, continuations, give):
    return measure(coins, None, coins.score(None, rollouts), positions, continuations, give, (0,))


def test_only_the_token_that_decides_has_influence():
    """The reward is the token at position 4: it moves the value from 1/2 to 0 or 1, so its influence is 1/4."""
    give = rewarded(lambda tokens: tokens[2])
    rollouts = [rollout([0, 1, 1, 0, 1, 0])]
    give(rollouts)
    positions = {0: range(PROMPT, LENGTH)}
    found = {m.position: m for m in measured(Coins(), rollouts, positions, 2000, give)}
    assert found[4].influence == pytest.approx(0.25, abs=0.03)
    assert all(abs(found[t].influence) < 0.01 for t in (2, 3, 5, 6, 7))


def test_the_estimate_is_without_bias_at_few_draws():
    """Position 2 changes nothing: over many measurements with 4 draws, its influence is 0 on average."""
    give = rewarded(lambda tokens: tokens[2])
    rollouts = [rollout([0, 1, 1, 0, 1, 0]) for _ in range(1500)]
    give(rollouts)
    found = measured(Coins(), rollouts, {i: [2] for i in range(1500)}, 4, give)
    assert np.mean([m.influence for m in found]) == pytest.approx(0.0, abs=0.01)


def test_cuts_are_drawn_once_and_the_end_is_the_rollouts_own_reward():
    give, coins = rewarded(lambda tokens: tokens[-1]), Coins()
    rollouts = [rollout([0, 0, 0, 0, 0, 1])]
    rollouts[0].reward = 9.0
    found = measured(coins, rollouts, {0: [6, 7]}, 10, give)
    assert sorted(set(coins.cuts)) == [6, 7]
    assert len(coins.cuts) == 20
    assert found[1].influence == pytest.approx(8.5**2, rel=0.15)  # from a mean of about 1/2


def test_after_the_end_of_a_call_comes_its_result():
    call = ToolCall("search", "x", "y", Outcome.OK, 0.1, call_end=4, result_end=6, states={})
    r = dataclasses.replace(rollout([0, 1, 0, 1, 0, 1]), calls=(call,))
    assert [after(r, t) for t in (2, 3, 6)] == [3, 6, 7]


def test_continuations_without_a_reward_are_left_out():
    """The reward is the token at position 4. It fails for a third of the draws, and always where position 3 is a 0."""
    rng = np.random.default_rng(1)
    give = rewarded(lambda tokens: np.nan if rng.random() < 1 / 3 or tokens[1] == 0 else tokens[2])
    rollouts = [rollout([0, 1, 1, 0, 1, 0]), rollout([0, 0, 1, 0, 1, 0])]
    give(rollouts)
    rollouts[0].reward, rollouts[1].reward = 1.0, np.nan
    found = measured(Coins(), rollouts, {0: range(PROMPT, LENGTH), 1: range(PROMPT, LENGTH)}, 2000, give)
    by_position = {m.position: m for m in found if m.rollout == 0}
    assert by_position[4].influence == pytest.approx(0.25, abs=0.03)
    assert all(abs(by_position[t].influence) < 0.01 for t in (2, 3, 5, 6, 7))
    # From position 4 on, no continuation of the second rollout has a reward; after position 3 none.
    assert [m.position for m in found if m.rollout == 1] == [2]
    few = measured(Coins(), rollouts[:1], {0: [2, 4]}, 2, lambda some: [setattr(r, "reward", np.nan) for r in some[1:]])
    assert few == [], "one value has no variance"


def test_a_value_that_does_not_vary_adds_no_spread():
    assert squared_difference(np.array([0.0, 1.0]), np.array([1.0, 1.0])) == pytest.approx(0.25 - 0.25)
