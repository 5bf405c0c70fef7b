"""Generation against the teacher-forced pass, and invariants of rollouts."""

import dataclasses
import itertools
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from growing import draw_and_grow, log_probs, make_trees

from appo_jax.config import Architecture, BranchingConfig, RolloutConfig, ToolsConfig
from appo_jax.errors import ConfigError
from appo_jax.policy.parameters import Params, init_params
from appo_jax.rollout.engine import Engine
from appo_jax.rollout.growth import TreeGrower
from appo_jax.rollout.prefixes import Prefix
from appo_jax.rollout.scoring import scores
from appo_jax.rollout.tree_sampler import TreeSampler
from appo_jax.text.tokenizer import SentencePieceTokenizer
from appo_jax.tools.executor import ToolExecutor
from appo_jax.tools.protocol import ToolResult
from appo_jax.tools.search import LocalSearch
from appo_jax.types import Document, Example, Rollout, StopReason


def teacher_forced_error(sampler: TreeSampler, params: Params, rollouts: list[Rollout]) -> float:
    """Largest difference between the sampler's and the score pass's log-probabilities and entropies."""
    worst, scored = 0.0, sampler.score(params, rollouts)
    for rollout, teacher, entropies in zip(rollouts, scored.log_probs, scored.entropies, strict=True):
        own = rollout.sampled
        worst = max(worst, np.abs(teacher - rollout.log_probs)[own].max())
        worst = max(worst, np.abs(entropies - rollout.entropies)[own].max())
    return float(worst)


def test_sampler_agrees_with_teacher_forcing_after_tools_and_in_branches(
    sampler: TreeSampler, grower: TreeGrower, params: Params, examples: list[Example]
) -> None:
    trees = sampler.initial(params, examples, 3, (0, 0))
    flat = [rollout for tree in trees for rollout in tree]
    old = log_probs(sampler, params, flat)
    growth = grower.grow(params, trees, [old[0:3], old[3:6], old[6:9]], (1, 0))
    everything = [rollout for tree in growth.trees for rollout in tree]
    assert len(everything) == 27
    assert sum(len(r.calls) for r in flat) > 0, "the case must contain tool results"
    assert any(r.calls and r.calls[-1].result_end > r.fork for r in everything if r.fork is not None)
    assert teacher_forced_error(sampler, params, everything) < 1e-4


def test_scores_of_trees_that_lack_branches_compile_nothing(
    sampler: TreeSampler, params: Params, examples: list[Example]
) -> None:
    trees = sampler.initial(params, examples[:1], 4, (0, 0))
    compiled: list[str] = []
    jax.clear_caches()
    jax.monitoring.register_event_duration_secs_listener(lambda event, seconds, **more: compiled.append(event))
    try:
        whole = scores(sampler, params, trees, per_tree=4)
        assert compiled
        compiled.clear()
        fewer = scores(sampler, params, [trees[0][:2]], per_tree=4)
        assert not [event for event in compiled if event.startswith("/jax/core/compile")]
    finally:
        jax.monitoring.clear_event_listeners()
    for some, all_of_them in zip(fewer, whole, strict=True):
        np.testing.assert_allclose(np.concatenate(some[0]), np.concatenate(all_of_them[0][:2]), atol=1e-5)


def test_the_time_of_a_prefill_is_not_counted_as_decoding(
    sampler: TreeSampler, params: Params, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    @jax.jit
    def late(keys: jax.Array) -> jax.Array:  # JAX returns at once, and computes the array in the background
        x = jax.lax.fori_loop(0, 2000, lambda _, x: jnp.tanh(x @ x), jnp.full((256, 256), 0.01))
        return keys + 0 * x[0, 0]

    prefill, stats = sampler.engine.prefill, []

    def slow(*args: Any) -> Iterator[Prefix]:
        for prefix in prefill(*args):
            (keys, values), *others = prefix.cache
            yield prefix._replace(cache=[(late(keys), values), *others])

    monkeypatch.setattr(sampler.engine, "prefill", slow)
    for _ in range(2):  # the first compiles
        sampler.initial(params, examples, 1, (0, 0))
        stats.append(sampler.take_stats())
    assert stats[1].prefill_s > stats[1].decode_s > 0


def test_rollouts_are_well_formed(sampler: TreeSampler, params: Params, examples: list[Example]) -> None:
    tokenizer, config = sampler.engine.tokenizer, sampler.engine.config
    for rollout in (r for tree in sampler.initial(params, examples, 4, (0, 1)) for r in tree):
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


def test_same_keys_same_tokens_other_keys_other_tokens(
    sampler: TreeSampler, params: Params, examples: list[Example]
) -> None:
    first, again, other = (sampler.initial(params, examples, 3, (0, step)) for step in (5, 5, 6))
    for a, b, c in zip(*(itertools.chain(*trees) for trees in (first, again, other)), strict=True):
        assert a.tokens.tolist() == b.tokens.tolist()
        assert a.tokens.tolist() != c.tokens.tolist()
    for tree in first:  # a group's samples are independent
        assert len({tuple(r.tokens.tolist()) for r in tree}) == len(tree)


def test_greedy_is_the_argmax(sampler: TreeSampler, params: Params, examples: list[Example]) -> None:
    rollout = sampler.initial(params, examples, 1, (2,), temperature=0.0)[1][0]
    # Every alternative last token of every prefix must be no more likely than the one that was taken.
    for t in np.flatnonzero(rollout.sampled)[::7]:
        for token in range(0, sampler.engine.arch.vocab_size, 5):
            changed = rollout.tokens[: t + 1].copy()
            changed[t] = token
            stub = Rollout(
                rollout.example, changed, rollout.prompt_length, rollout.sampled[: t + 1], rollout.log_probs[: t + 1],
                rollout.entropies[: t + 1], StopReason.LENGTH, (), 0,
            )  # fmt: skip
            assert log_probs(sampler, params, [stub])[0][t] <= rollout.log_probs[t] + 1e-4


def test_a_long_result_is_cut_with_a_mark(engine: Engine) -> None:
    short, long = engine.results.encode("a b"), engine.results.encode("fox " * 100)
    assert engine.tokenizer.decode(short) == " <result>\na b\n</result>"
    text = engine.tokenizer.decode(long)
    assert len(long) <= engine.config.max_result_tokens
    assert text.startswith(" <result>\nfox")
    assert text.endswith("\n</result>")


@pytest.mark.parametrize("written", ["fox </sea", "dog", "x </search>"])
def test_automaton_state_of_a_fork_is_that_of_its_text(engine: Engine, written: str) -> None:
    ids = engine.tokenizer.encode(written)
    state = engine.automaton_state(np.array(ids))
    rest = engine.tokenizer.encode("rch>")
    for token in rest:
        state = int(engine.automaton.next_state[state, token])
    assert (engine.automaton.hit[state] >= 0) == (written == "fox </sea")


Grow = Callable[[RolloutConfig], list[Rollout]]


@pytest.fixture
def grow(
    arch: Architecture, tokenizer: SentencePieceTokenizer, executor: ToolExecutor, params: Params, examples: list[Example]
) -> Grow:  # fmt: skip
    """Initial rollouts and branches under a config, tree after tree."""

    def grow(config: RolloutConfig) -> list[Rollout]:
        sampler, grower = make_trees(arch, tokenizer, executor, config, BranchingConfig(num_branch_points=2))
        growth = draw_and_grow(sampler, grower, params, examples)[2]
        return [rollout for tree in growth.trees for rollout in tree]

    return grow


def test_few_rows_draw_what_many_rows_draw(grow: Grow, rollout_config: RolloutConfig) -> None:
    """Other shapes change only the rounding."""
    many, few = (grow(dataclasses.replace(rollout_config, decode_rows=rows)) for rows in (32, 4))
    assert len(many) == len(few) == 27
    for a, b in zip(many, few, strict=True):
        assert a.tokens.tolist() == b.tokens.tolist()
        assert np.abs(a.log_probs - b.log_probs).max() < 1e-5
        assert (a.stop_reason, a.node, a.parent, a.fork) == (b.stop_reason, b.node, b.parent, b.fork)


def test_shared_prefixes_agree_with_prefixes_of_their_own(grow: Grow, rollout_config: RolloutConfig) -> None:
    shared, own = (grow(dataclasses.replace(rollout_config, share_prefix=share)) for share in (True, False))
    for a, b in zip(shared, own, strict=True):
        assert a.tokens.tolist() == b.tokens.tolist()
        assert np.abs(a.log_probs - b.log_probs).max() < 1e-5
        assert np.abs(a.entropies - b.entropies).max() < 1e-5


class Unsteady(LocalSearch):
    """The search tool with random delays, so that rows finish in another order each time."""

    def call(self, state: None, argument: str) -> tuple[ToolResult, None]:
        time.sleep(random.SystemRandom().uniform(0, 0.03))
        return super().call(state, argument)


@pytest.mark.usefixtures("optimized")
def test_a_rollout_does_not_depend_on_the_tools_timing(
    arch: Architecture, tokenizer: SentencePieceTokenizer, params: Params, examples: list[Example],
    rollout_config: RolloutConfig,
) -> None:  # fmt: skip
    """A rollout has the same bits in any row, after and next to any other rollouts. An exact resume relies on this."""
    config = dataclasses.replace(rollout_config, decode_rows=5)
    tool = Unsteady([Document("fox", "the fox is quick"), Document("dog", "the dog is lazy")], top_k=1)
    with ToolExecutor([tool], ToolsConfig(enabled=("search",))) as executor:
        sampler, _ = make_trees(arch, tokenizer, executor, config, BranchingConfig())
        runs = [sampler.initial(params, examples, 4, (0, 0)) for _ in range(4)]
    assert sum(len(rollout.calls) for tree in runs[0] for rollout in tree) > 3
    for run in runs[1:]:
        for a, b in zip(itertools.chain(*runs[0]), itertools.chain(*run), strict=True):
            assert a.tokens.tolist() == b.tokens.tolist()
            assert (a.log_probs == b.log_probs).all()
            assert (a.entropies == b.entropies).all()


def test_a_rollout_out_of_time_is_the_beginning_of_what_it_would_have_been(
    arch: Architecture, tokenizer: SentencePieceTokenizer, params: Params, examples: list[Example],
    rollout_config: RolloutConfig,
) -> None:  # fmt: skip
    """Whether it ends while it decodes, while its tool runs or while the result waits to be appended."""
    tool = Unsteady([Document("fox", "the fox is quick"), Document("dog", "the dog is lazy")], top_k=1)
    reasons = set()
    with ToolExecutor([tool], ToolsConfig(enabled=("search",))) as executor:

        def drawn(seconds: float) -> list[Rollout]:
            config = dataclasses.replace(rollout_config, max_seconds=seconds)
            sampler, _ = make_trees(arch, tokenizer, executor, config, BranchingConfig())
            return list(itertools.chain(*sampler.initial(params, examples, 8, (0, 0))))

        whole = drawn(120)
        for limit in (0, 0.002, 0.004, 0.006, 0.008, 0.012, 0.016, 0.02, 0.03, 0.04, 0.05, 0.07):
            for long, short in zip(whole, drawn(limit), strict=True):
                end = short.length
                reasons.add(short.stop_reason)
                assert short.stop_reason in (StopReason.TIME, long.stop_reason)
                assert short.tokens.tolist() == long.tokens[:end].tolist()
                assert (short.log_probs == long.log_probs[:end]).all()
                assert (short.sampled == long.sampled[:end]).all()
                assert all(call.result_end <= end for call in short.calls)
                long_calls = [dataclasses.replace(call, seconds=0, states={}) for call in long.calls]
                calls = [dataclasses.replace(call, seconds=0, states={}) for call in short.calls]
                assert calls == long_calls[: len(calls)]
    assert StopReason.TIME in reasons


def test_the_time_of_a_rollout_is_not_spent_on_compiling(
    arch: Architecture, tokenizer: SentencePieceTokenizer, executor: ToolExecutor, examples: list[Example],
    rollout_config: RolloutConfig,
) -> None:  # fmt: skip
    """A policy of many layers, which no other test has: its programs take longer to compile than its rollouts may last."""
    deep = dataclasses.replace(arch, num_layers=8)
    params = init_params(deep, seed=1)

    def drawn(seconds: float) -> list[Rollout]:
        config = dataclasses.replace(rollout_config, max_seconds=seconds)
        sampler, _ = make_trees(deep, tokenizer, executor, config, BranchingConfig())
        return list(itertools.chain(*sampler.initial(params, examples, 2, (0, 0))))

    began = time.monotonic()
    first = drawn(limit := 1.0)
    assert time.monotonic() - began > limit, "the case must compile for longer than a rollout may last"
    assert StopReason.TIME not in {rollout.stop_reason for rollout in first}
    for a, b in zip(first, drawn(120), strict=True):
        assert a.tokens.tolist() == b.tokens.tolist()
        assert (a.log_probs == b.log_probs).all()


def test_a_result_that_has_no_room_is_refused_by_name(
    arch: Architecture, tokenizer: SentencePieceTokenizer, executor: ToolExecutor, rollout_config: RolloutConfig
) -> None:
    config = dataclasses.replace(rollout_config, max_result_tokens=4)
    with pytest.raises(ConfigError, match=r"rollout\.max_result_tokens = 4"):
        Engine(arch, tokenizer, executor, config, seed=0, dtype=jnp.float32)
