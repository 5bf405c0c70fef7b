"""Future value, Branching Score and what a branch starts from, against the oracle and cases worked by hand."""

import dataclasses
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appo_jax.branching.score import branching_scores, future_value
from appo_jax.config import Architecture, BranchingConfig, RolloutConfig, ToolsConfig
from appo_jax.rollout.engine import Engine
from appo_jax.rollout.growth import blank_tokens, valid_positions
from appo_jax.rollout.rows import fork_of
from appo_jax.rollout.sampler import Branch
from appo_jax.text.tokenizer import load_tokenizer
from appo_jax.tools.executor import ToolExecutor
from appo_jax.tools.protocol import ToolResult
from appo_jax.types import Example, Outcome, Rollout, StopReason, ToolCall

R, T = 3, 14
GOLDEN = Path(__file__).parent.parent / "golden"
omega = jax.jit(future_value, static_argnames="tau")
scores = jax.jit(branching_scores, static_argnames="config")


@st.composite
def ragged_masks(draw):
    """[R, T] sampled: a prompt, own text with tool results in it, and padding; and valid, a part of sampled."""
    sampled, valid = np.zeros((R, T), bool), np.zeros((R, T), bool)
    for r in range(R):
        start, end = draw(st.integers(1, 4)), draw(st.integers(5, T))
        own = draw(st.lists(st.booleans(), min_size=end - start, max_size=end - start))
        keep = draw(st.lists(st.booleans(), min_size=end - start, max_size=end - start))
        sampled[r, start:end] = own
        valid[r, start:end] = np.array(own) & np.array(keep)
    return sampled, valid


def table(low: int, high: int):
    return st.lists(st.integers(low, high), min_size=R * T, max_size=R * T).map(
        lambda xs: np.array(xs, np.float32).reshape(R, T)
    )


# ---------------------------------------------------------------- Ω


@given(table(-30, 0), table(-30, 0), ragged_masks(), st.sampled_from([1.0, 4.0, 32.0]))
def test_future_value_is_the_oracles(new, old, masks, tau):
    new, old, (sampled, _) = new / 20, old / 20, masks
    got = omega(new, old, sampled, tau=tau)
    for r in range(R):
        expected = oracle.omega(oracle.log_ratio(new[r], old[r], sampled[r]), sampled[r], tau)
        np.testing.assert_allclose(got[r], expected, rtol=1e-4)


def test_large_ratios_leave_the_sum_and_keep_their_place():
    """Ratios 1, 2, 4 with a half-life of one token: 4 is left out of the sum, and distances do not change."""
    zeros, sampled = jnp.zeros((1, 3), jnp.float32), jnp.ones((1, 3), bool)
    new = jnp.log(jnp.array([[1.0, 4.0, 2.0]]))
    plain, official = omega(new, zeros, sampled, tau=1.0), future_value(new, zeros, sampled, 1.0, max_ratio=3.0)
    np.testing.assert_allclose(np.log2(plain), [[1.25, 2.5, 1]], rtol=1e-5)
    np.testing.assert_allclose(np.log2(official), [[0.25, 0.5, 1]], rtol=1e-5)
    clamped = future_value(jnp.array([[0.0, -30.0, 25.0]]), zeros, sampled, 1.0, max_log_ratio=20.0)
    np.testing.assert_allclose(np.log(clamped), [[-20 / 2 + 20 / 4, -20 + 20 / 2, 20]], rtol=1e-5)


def test_future_value_of_the_unmoved_policy_is_exactly_one():
    log_probs = np.random.default_rng(0).normal(size=(R, T)).astype(np.float32)
    assert (np.asarray(omega(log_probs, log_probs, np.ones((R, T), bool), tau=32.0)) == 1).all()


def test_tool_tokens_have_no_say_in_the_future_value():
    rng = np.random.default_rng(1)
    new, old = rng.normal(size=(2, R, T)).astype(np.float32)
    sampled = rng.random((R, T)) < 0.6
    noise = np.where(sampled, 0, 50).astype(np.float32)
    np.testing.assert_array_equal(omega(new, old, sampled, tau=4.0), omega(new + noise, old, sampled, tau=4.0))


# ---------------------------------------------------------------- the score


@given(
    table(10, 40), table(0, 12), ragged_masks(), st.sampled_from(["product", "entropy", "future", "additive"]),
    st.sampled_from([(1.0, 1.2), (0.8, 1.2)]),
)  # fmt: skip
def test_branching_score_is_the_oracles(future, entropies, masks, kind, clip):
    # Grids of 1/20 and 1/4, and bounds in float32 for the oracle too: so float32 and float64 agree on what is constant.
    future, entropies, (_, valid) = future / 20, entropies / 4, masks
    low, high = map(float, np.float32(clip))
    config = BranchingConfig(score=kind, clip_low=clip[0], clip_high=clip[1], entropy_weight=2.0, future_weight=0.5)
    got = scores(future, entropies, valid, config=config)
    for r in range(R):
        expected, z_h, z_o, constant = oracle.branching_score(
            entropies[r], future[r], valid[r], low, high, score=kind, entropy_weight=2.0, future_weight=0.5
        )
        np.testing.assert_allclose(got.score[r], expected, atol=1e-4)
        assert bool(got.constant_future[r]) == constant
        clear = valid[r] & (np.abs(z_h) > 1e-4) & (constant | (np.abs(z_o) > 1e-4))  # signs that rounding cannot turn
        gate = (z_h > 0) & (z_o > 0) if kind == "product" and not constant else np.ones(T, bool)
        np.testing.assert_array_equal(np.asarray(got.preferred)[r][clear], gate[clear])
        assert not np.asarray(got.preferred)[r][~valid[r]].any()


@given(table(10, 40), table(0, 12), ragged_masks())
def test_literal_gate_prefers_every_valid_position(future, entropies, masks):
    _, valid = masks
    got = scores(future / 20, entropies / 4, valid, config=BranchingConfig(gate="literal"))
    np.testing.assert_array_equal(got.preferred, valid)


def test_score_of_two_by_two_tokens_by_hand():
    # clip Ω to [1, 1.2]: 1 1 1.2 1.2, Z = − − + +;  H = 0 2 2 0, Z = − + + −
    future = np.array([[0.5, 1.0, 1.2, 9.0]], np.float32)
    entropies, valid = np.array([[0, 2, 2, 0]], np.float32), np.ones((1, 4), bool)
    got = scores(future, entropies, valid, config=BranchingConfig())
    np.testing.assert_allclose(got.score, [[1, -1, 1, -1]], atol=1e-5)
    np.testing.assert_array_equal(got.preferred, [[False, False, True, False]])  # position 0 is minus times minus


def test_nothing_degenerate_makes_a_nan():
    future = np.array([[1, 1, 1], [0.9, 1.1, 1.3], [1, 1.1, 1.2], [0, 3e38, np.inf]], np.float32)
    entropies = np.array([[0, 1, 2], [1, 1, 1], [0, 1, 2], [0, 1, 2]], np.float32)
    valid = np.array([[1, 1, 1], [1, 1, 1], [0, 0, 0], [0, 1, 0]], bool)
    with jax.debug_nans(True):
        for kind in ("product", "entropy", "future", "additive"):
            got = scores(future, entropies, valid, config=BranchingConfig(score=kind))
            assert np.isfinite(got.score).all()
            assert not np.asarray(got.score)[~valid].any()
        never = omega(np.zeros((2, 3), np.float32), np.full((2, 3), -100, np.float32), np.zeros((2, 3), bool), tau=1.0)
        assert (np.asarray(never) == 1).all()


def test_first_mini_batch_ranks_by_entropy():
    entropies = np.array([[0, 3, 1, 2]], np.float32)
    got = scores(np.ones((1, 4), np.float32), entropies, np.array([[0, 1, 1, 1]], bool), config=BranchingConfig())
    assert bool(got.constant_future[0])
    np.testing.assert_allclose(got.score, [[0, 1.5**0.5, -(1.5**0.5), 0]], atol=1e-5)


# ---------------------------------------------------------------- valid positions and forks


class Ledger:
    """A stateful tool: its state is the tuple of all arguments of its calls in this rollout."""

    name = "python"
    timeout = 5.0

    def start(self):
        return ()

    def call(self, state, argument):
        state = (*state, argument)
        return ToolResult(f"told {'; '.join(state)}", Outcome.OK), state

    def close(self):
        pass


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    shutil.copyfile(GOLDEN / "tokenizer.json", folder / "tokenizer.json")
    shutil.copyfile(GOLDEN / "templates" / "chatml.jinja", folder / "chat_template.jinja")
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}')
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def engine(tokenizer):
    arch = Architecture(tokenizer.vocab_size, 8, 1, 1, 1, 8, 8)
    with ToolExecutor([Ledger()], ToolsConfig(enabled=("python",))) as executor:
        yield Engine(arch, tokenizer, executor, RolloutConfig(), seed=0, dtype=jnp.float32)


@pytest.fixture(scope="module")
def parent(engine):
    """A rollout with two calls, made by the real executor and laid out as the engine does."""
    tokenizer, tokens, sampled, calls = engine.tokenizer, [], [], []

    def write(ids, own):
        tokens.extend(ids)
        sampled.extend([own] * len(ids))

    write(tokenizer.encode("Tell it two words."), False)
    prompt_length = len(tokens)
    states = engine.executor.start()
    for text in ("I say <python>apple</python>", " and then <python>banana</python>"):
        write(tokenizer.encode(text), True)
        call_end = len(tokens)
        record = engine.executor.submit(states, text).result(timeout=10)
        states = record.states
        write(engine.results.encode(record.result), False)
        calls.append(
            ToolCall("python", record.argument, record.result, record.outcome, 0.0, call_end, len(tokens), states)
        )
    write(tokenizer.encode(" so that is all."), True)
    write([tokenizer.eos_id], True)
    n = len(tokens)
    return Rollout(
        example=Example("q", "Tell it two words.", ("x",), "qa", ""), tokens=np.array(tokens, np.int32),
        prompt_length=prompt_length, sampled=np.array(sampled), log_probs=-np.arange(n, dtype=np.float32),
        entropies=np.arange(n, dtype=np.float32), stop_reason=StopReason.ANSWERED, calls=tuple(calls), node=1,
    )  # fmt: skip


def test_fork_of_every_cut_has_the_calls_and_states_of_that_moment(engine, parent):
    for cut in (np.flatnonzero(parent.sampled)).tolist():
        fork = fork_of(parent, Branch(cut, node=7, loop=2), engine.start)
        done = [call for call in parent.calls if call.call_end <= cut]
        told = ("apple", "banana")[: len(done)]
        assert [call.argument for call in fork.calls] == list(told)
        assert fork.states["python"] == told
        assert fork.boundary == (done[-1].result_end if done else parent.prompt_length)
        for name in ("tokens", "sampled", "log_probs", "entropies"):
            np.testing.assert_array_equal(getattr(fork, name), getattr(parent, name)[:cut])
        assert (fork.node, fork.parent, fork.loop) == (7, 1, 2)
        assert (fork.prompt_length, fork.example) == (parent.prompt_length, parent.example)


def test_fork_inside_a_call_knows_nothing_of_its_result(engine, parent):
    second = parent.calls[1]
    inside = [t for t in range(second.call_end - 8, second.call_end) if parent.sampled[t]]
    for cut in inside:
        fork = fork_of(parent, Branch(cut, 4, 1), engine.start)
        text = engine.tokenizer.decode(fork.tokens.tolist())
        assert "told apple;" not in text
        assert text.count("</result>") == len(fork.calls) == 1
        assert fork.states["python"] == ("apple",)
        # The continuation writes the rest of another call: it reads what this branch said, not what the parent said.
        own = engine.tokenizer.decode(fork.tokens[fork.boundary :].tolist())
        written = own.split("<python>")[0] + "<python>cherry</python>"
        record = engine.executor.submit(fork.states, written).result(timeout=10)
        assert record.result == "told apple; cherry"
    assert parent.calls[1].states["python"] == ("apple", "banana"), "a branch must not change its parent"


def test_fork_before_the_first_call_starts_with_fresh_tools(engine, parent):
    fork = fork_of(parent, Branch(parent.prompt_length, 4, 1), engine.start)
    assert fork.calls == ()
    assert fork.states == engine.executor.start()
    assert len(fork.tokens) == fork.boundary == parent.prompt_length


@pytest.fixture(scope="module")
def cut_short(parent):
    """The parent, if the result of its second call had not fitted into the rollout."""
    end = parent.calls[1].call_end
    return dataclasses.replace(
        parent, calls=(parent.calls[0], dataclasses.replace(parent.calls[1], result_end=end)),
        stop_reason=StopReason.LENGTH,
        **{name: getattr(parent, name)[:end] for name in ("tokens", "sampled", "log_probs", "entropies")},
    )  # fmt: skip


def test_call_whose_result_was_never_read_belongs_to_no_branch(engine, cut_short):
    """The empty result of that call is at the rollout's end, after every possible fork."""
    assert len(fork_of(cut_short, Branch(cut_short.length - 1, 4, 1), engine.start).calls) == 1


def test_blank_tokens_are_those_without_a_letter_or_digit(tokenizer):
    blank = blank_tokens(tokenizer)
    assert blank.shape == (tokenizer.vocab_size,)
    assert blank[tokenizer.eos_id]
    for text, expected in ((" ", True), (".", True), ("\n", True), ("a", False), ("7", False)):
        ids = tokenizer.encode(text)
        assert len(ids) == 1
        assert bool(blank[ids[0]]) is expected
    # one byte of a longer character is neither space nor punctuation
    assert not blank[tokenizer.encode("é")].any()


def test_valid_positions(engine, parent):
    blank, eos = blank_tokens(engine.tokenizer), engine.tokenizer.eos_ids
    every = valid_positions(parent, blank, BranchingConfig(skip_blank=False), eos)
    np.testing.assert_array_equal(every, parent.sampled)
    wordy = valid_positions(parent, blank, BranchingConfig(), eos)
    assert not (wordy & ~parent.sampled).any()
    kept = {engine.tokenizer.decode([token]) for token in parent.tokens[wordy].tolist()}
    left_out = {engine.tokenizer.decode([token]) for token in parent.tokens[parent.sampled & ~wordy].tolist()}
    assert all(any(c.isalnum() for c in text) for text in kept)
    assert not any(c.isalnum() for text in left_out for c in text)
    after = valid_positions(parent, blank, BranchingConfig(skip_blank=False, include_token=True), eos)
    np.testing.assert_array_equal(np.flatnonzero(every & ~after), [parent.length - 1])  # EOS ends a rollout


def test_after_the_last_token_of_a_full_rollout_nothing_can_branch(engine, cut_short):
    config = BranchingConfig(skip_blank=False, include_token=True)
    valid = valid_positions(cut_short, blank_tokens(engine.tokenizer), config, engine.tokenizer.eos_ids)
    np.testing.assert_array_equal(np.flatnonzero(cut_short.sampled & ~valid), [cut_short.length - 1])


@settings(max_examples=25)
@given(st.data())
def test_valid_positions_never_touch_prompt_or_results(engine, parent, data):
    config = BranchingConfig(skip_blank=data.draw(st.booleans()), include_token=data.draw(st.booleans()))
    blank = np.array(data.draw(st.lists(st.booleans(), min_size=8, max_size=8)))
    blank = np.resize(blank, engine.tokenizer.vocab_size)
    valid = valid_positions(parent, blank, config, engine.tokenizer.eos_ids)
    assert not valid[: parent.prompt_length].any()
    for call in parent.calls:
        assert not valid[call.call_end : call.result_end].any()
