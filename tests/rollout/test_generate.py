"""Generation against the teacher-forced pass, and what a rollout must be."""

import itertools

import numpy as np
import pytest

from appo_jax.policy.transformer import Params
from appo_jax.rollout.engine import Engine
from appo_jax.rollout.tree import TreeGrower
from appo_jax.types import Example, Rollout, StopReason


def teacher_forced_error(grower: TreeGrower, params: Params, rollouts: list[Rollout]) -> float:
    """Largest difference between the sampler's and the score pass's log-probabilities and entropies."""
    worst = 0.0
    for (wave, _), first in zip(
        grower._score(params, rollouts, False), range(0, len(rollouts), grower.parents), strict=True
    ):
        for rollout, (log_probs, entropies) in zip(rollouts[first:], wave, strict=False):
            own = rollout.sampled
            worst = max(worst, np.abs(log_probs - rollout.log_probs)[own].max())
            worst = max(worst, np.abs(entropies - rollout.entropies)[own].max())
    return float(worst)


def test_sampler_agrees_with_teacher_forcing_after_tools_and_in_branches(
    engine: Engine, grower: TreeGrower, params: Params, examples: list[Example]
) -> None:
    trees = engine.initial(params, examples, 3, (0, 0))
    flat = [rollout for tree in trees for rollout in tree]
    old = grower.log_probs(params, flat)
    growth = grower.grow(params, trees, [old[0:3], old[3:6], old[6:9]], (1, 0))
    everything = [rollout for tree in growth.trees for rollout in tree]
    assert len(everything) == 27
    assert sum(len(r.calls) for r in flat) > 0, "the case must contain tool results"
    assert any(r.calls and r.calls[-1].result_end > r.fork for r in everything if r.fork is not None)
    assert teacher_forced_error(grower, params, everything) < 1e-4


def test_rollouts_are_well_formed(engine: Engine, params: Params, examples: list[Example]) -> None:
    tokenizer, config = engine.tokenizer, engine.config
    for rollout in (r for tree in engine.initial(params, examples, 4, (0, 1)) for r in tree):
        prompt = tokenizer.render_prompt("", rollout.example.question)
        assert rollout.tokens[: rollout.prompt_length].tolist() == prompt
        assert not rollout.sampled[: rollout.prompt_length].any()
        response = rollout.length - rollout.prompt_length
        assert 0 < response <= config.max_response_tokens
        assert len(rollout.calls) <= config.max_tool_calls
        for call in rollout.calls:
            assert not rollout.sampled[call.call_end : call.result_end].any()
            assert rollout.sampled[call.call_end - 1]
            assert tokenizer.decode(rollout.tokens[: call.call_end].tolist()).endswith("</search>")
            if call.result_end > call.call_end:
                shown = tokenizer.decode(rollout.tokens[call.call_end : call.result_end].tolist())
                assert shown.startswith(" <result>\n")
                assert shown.endswith("\n</result>")
        outside = np.ones(response, bool)
        for call in rollout.calls:
            outside[call.call_end - rollout.prompt_length : call.result_end - rollout.prompt_length] = False
        assert (rollout.sampled[rollout.prompt_length :] == outside).all()
        ended = rollout.tokens[-1] == tokenizer.eos_id
        assert ended == (rollout.stop_reason is StopReason.ANSWERED)
        if rollout.stop_reason is StopReason.CALLS:
            assert len(rollout.calls) == config.max_tool_calls


def test_same_keys_same_tokens_other_keys_other_tokens(engine: Engine, params: Params, examples: list[Example]) -> None:
    first, again, other = (engine.initial(params, examples, 3, (0, step)) for step in (5, 5, 6))
    for a, b, c in zip(*(itertools.chain(*trees) for trees in (first, again, other)), strict=True):
        assert a.tokens.tolist() == b.tokens.tolist()
        assert a.tokens.tolist() != c.tokens.tolist()
    for tree in first:  # a group's samples are independent
        assert len({tuple(r.tokens.tolist()) for r in tree}) == len(tree)


def test_greedy_is_the_argmax(engine: Engine, grower: TreeGrower, params: Params, examples: list[Example]) -> None:
    rollout = engine.initial(params, examples, 1, (2,), temperature=0.0)[1][0]
    # Every alternative last token of every prefix must be no more likely than the one that was taken.
    for t in np.flatnonzero(rollout.sampled)[::7]:
        for token in range(0, engine.arch.vocab_size, 5):
            changed = rollout.tokens[: t + 1].copy()
            changed[t] = token
            stub = Rollout(
                rollout.example, changed, rollout.prompt_length, rollout.sampled[: t + 1], rollout.log_probs[: t + 1],
                rollout.entropies[: t + 1], StopReason.LENGTH, (), 0,
            )  # fmt: skip
            assert grower.log_probs(params, [stub])[0][t] <= rollout.log_probs[t] + 1e-4


def test_a_long_result_is_cut_with_a_mark(engine: Engine) -> None:
    short, long = engine.encode_result("a b"), engine.encode_result("fox " * 100)
    assert engine.tokenizer.decode(short) == " <result>\na b\n</result>"
    text = engine.tokenizer.decode(long)
    assert len(long) <= engine.config.max_result_tokens
    assert text.startswith(" <result>\nfox")
    assert text.endswith("\n</result>")


@pytest.mark.parametrize("text", ["fox </sea", "dog", "x </search>"])
def test_automaton_state_of_a_fork_is_that_of_its_text(engine: Engine, text: str) -> None:
    ids = engine.tokenizer.encode(text)
    state = engine.automaton_state(np.array(ids))
    rest = engine.tokenizer.encode("rch>")
    for token in rest:
        state = int(engine.automaton.next_state[state, token])
    assert (engine.automaton.hit[state] >= 0) == (text == "fox </sea")
