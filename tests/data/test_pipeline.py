"""Batches: every epoch a permutation, resumable at any point; traces masked token by token."""

import json
import random

import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appo_jax.config import Config, RolloutConfig, SFTConfig
from appo_jax.data.demonstrations import LeftOut
from appo_jax.data.pipeline import check_prompts, encode_trace, encode_traces, prompt_batches, trace_batches
from appo_jax.errors import DataError
from appo_jax.types import Example, Segment, Trace


class Letters:
    """A tokenizer with one token per character: 0 is padding, 1 EOS, 2 begins the question, 3 begins the answer."""

    vocab_size, pad_id, eos_id = 10_000, 0, 1

    def encode(self, text):
        return [ord(letter) for letter in text]

    def decode(self, ids):
        return "".join(chr(token) for token in ids)

    def token_bytes(self):
        return [chr(token).encode() if token > 3 else b"" for token in range(self.vocab_size)]

    def render_prompt(self, system, question):
        return [*self.encode(system), 2, *self.encode(question), 3]


def examples(count):
    return [Example(f"e{i}", f"question {i}", ("1",), "math", "") for i in range(count)]


def ids(batches, count):
    return [example.id for _ in range(count) for example in next(batches)]


@settings(deadline=None, max_examples=12)
@given(count=st.integers(3, 12), batch_size=st.integers(1, 9), seed=st.integers(0, 2**31))
def test_each_epoch_is_a_permutation(count, batch_size, seed):
    drawn = ids(prompt_batches(examples(count), batch_size, seed), 3 * count)
    everything = sorted(example.id for example in examples(count))
    epochs = [drawn[start : start + count] for start in range(0, len(drawn), count)]
    assert all(sorted(epoch) == everything for epoch in epochs)
    assert drawn == ids(prompt_batches(examples(count), batch_size, seed), 3 * count)


def test_epochs_and_seeds_differ_in_order():
    drawn = ids(prompt_batches(examples(50), 10, seed=3), 15)
    assert len({tuple(drawn[start : start + 50]) for start in (0, 50, 100)}) == 3
    assert drawn != ids(prompt_batches(examples(50), 10, seed=4), 15)


def test_grain_checkpoint_resumes_the_shuffle(tmp_path):
    batches = prompt_batches(examples(7), 3, seed=1)
    ids(batches, 4)  # into the second epoch
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(4, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(batches)))
        manager.wait_until_finished()
        rest = ids(batches, 10)
        resumed = prompt_batches(examples(7), 3, seed=1)
        manager.restore(4, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(resumed)))
    assert ids(resumed, 10) == rest


def mixed(counts):
    return [Example(f"{name}{i}", "?", ("1",), "qa", "", name) for name, count in counts.items() for i in range(count)]


@settings(deadline=None, max_examples=8)
@given(
    counts=st.fixed_dictionaries({"a": st.integers(1, 9), "b": st.integers(1, 9), "c": st.integers(1, 9)}),
    weights=st.fixed_dictionaries({"a": st.integers(1, 4), "b": st.integers(1, 4), "c": st.integers(1, 4)}),
    seed=st.integers(0, 2**31 - 1),
)
def test_a_mixture_holds_its_weights_and_each_sources_epochs(counts, weights, seed):
    total = sum(weights.values())
    drawn = ids(prompt_batches(mixed(counts), 1, seed, weights=weights), 12 * total)
    for name, count in counts.items():
        own = [id for id in drawn if id[0] == name]
        assert abs(len(own) - 12 * weights[name]) <= 1
        for start in range(0, len(own) - count + 1, count):
            assert len(set(own[start : start + count])) == count


def test_iterators_that_are_stopped_at_fifty_points_go_on_with_the_same_stream():
    """Prompts of a mixture, and packed traces. A new iterator is given the saved state, as a checkpoint keeps it (JSON). (Runs on
    one and two hosts by turns: tests/matrix/prompts.py.)"""
    questions, weights = mixed({"a": 7, "b": 5}), {"a": 2.0, "b": 1.0}
    encoded = [encode_trace(trace(("a" * length, True)), Letters()) for length in range(1, 9)]

    def prompts():
        return prompt_batches(questions, 4, 3, weights=weights)

    def traces():
        return trace_batches(encoded, batch_size=2, max_tokens=16, pad_id=0, seed=3)

    for stream, read in (
        (prompts, lambda batch: [each.id for each in batch]),
        (traces, lambda batch: batch.tokens.tolist()),
    ):
        draw, drawn, batches = random.Random(0), [], stream()
        for _ in range(50):
            drawn += [read(next(batches)) for _ in range(draw.randint(1, 2))]
            state = json.loads(json.dumps(batches.get_state()))
            batches = stream()
            batches.set_state(state)
        assert len(drawn) > 60
        whole = stream()
        assert drawn == [read(next(whole)) for _ in drawn]


def test_a_mixture_without_questions_of_a_source_is_refused():
    with pytest.raises(DataError, match=r"data\.mixture: no question is left of b"):
        prompt_batches(mixed({"a": 3}), 1, 0, weights={"a": 1.0, "b": 1.0})


def trace(*segments, question="q"):
    example = Example("e", question, ("1",), "math", "s")
    return Trace(example, tuple(Segment(text, sampled) for text, sampled in segments))


def test_encode_trace_by_hand():
    tokens, sampled = encode_trace(trace(("ab", True), ("R", False), ("c", True)), Letters())
    #                        s    <  q    >  a   b   R   c   eos
    assert tokens.tolist() == [115, 2, 113, 3, 97, 98, 82, 99, 1]
    assert sampled.tolist() == [False, False, False, False, True, True, False, True, True]
    assert (tokens.dtype, sampled.dtype) == (np.int32, bool)


def test_traces_are_packed_whole():
    short, long = trace(("a", True)), trace(("b", True), ("RR", False), ("c", True))
    encoded = [encode_trace(each, Letters()) for each in (short, long)]
    batch = next(trace_batches(encoded, batch_size=1, max_tokens=18, pad_id=0, seed=0))
    first = batch.positions[0].tolist().index(0, 1)  # where the second trace begins
    rows = {
        6: ([115, 2, 113, 3, 97, 1], [4, 5]),
        9: ([115, 2, 113, 3, 98, 82, 82, 99, 1], [4, 7, 8]),
    }
    lengths = [first, 15 - first] if first in rows and 15 - first in rows else [first, first]
    end = sum(lengths)
    tokens = [token for length in lengths for token in rows[length][0]]
    assert batch.tokens[0].tolist() == tokens + [0] * (18 - end)
    assert batch.segments[0].tolist() == [1] * lengths[0] + [2] * lengths[1] + [0] * (18 - end)
    assert batch.positions[0, :end].tolist() == [*range(lengths[0]), *range(lengths[1])]
    trained = [*rows[lengths[0]][1], *(lengths[0] + i for i in rows[lengths[1]][1])]
    assert np.flatnonzero(batch.loss_mask[0]).tolist() == trained


def test_traces_that_a_rollout_could_not_hold_are_left_out_and_counted(caplog):
    fits = trace(("a", True), ("R", False), ("b", True))  # a prompt of 4 tokens, a response of 4 with the EOS
    calls = trace(("a", True), ("R", False), ("b", True), ("R", False), ("c", True))
    traces = [fits, trace(("a" * 7, True)), calls, trace(("a", True), question="long"), trace(("a" * 20, True))]
    config = Config(
        sft=SFTConfig(max_tokens=20),
        rollout=RolloutConfig(max_prompt_tokens=4, max_response_tokens=7, max_tool_calls=1),
    )
    left_out = LeftOut()
    encoded = encode_traces(traces, Letters(), config, left_out=left_out)
    assert [tokens.tolist() for tokens, _ in encoded] == [[115, 2, 113, 3, 97, 82, 98, 1]]
    assert left_out.to_json() == {
        reason: {"count": 1, "first": ["e"]}
        for reason in (
            "its response is longer than rollout.max_response_tokens = 7",
            "it makes more calls than rollout.max_tool_calls = 1",
            "its prompt is longer than rollout.max_prompt_tokens = 4",
            "it is longer than sft.max_tokens = 20",
        )
    }
    assert "4 of 5 traces are left out (1: " in caplog.text
    assert "longest of them has 25 tokens" in caplog.text
    with pytest.raises(
        DataError, match=r"1 of 1 traces .*rollout\.max_tool_calls = 1.*has 10 tokens; raise these limits"
    ):
        encode_traces([calls], Letters(), config)
    with pytest.raises(DataError, match=r"sft\.steps"):
        encode_traces([], Letters(), config)


def test_check_prompts(caplog):
    short, long = Example("short", "ab", ("1",), "qa", ""), Example("long", "abcdef", ("1",), "qa", "")
    assert check_prompts([short, long], Letters(), 8, "fatal") == (short, long)
    with pytest.raises(DataError, match=r"long has 8 tokens, more than rollout\.max_prompt_tokens = 7"):
        check_prompts([short, long], Letters(), 7, "fatal")
    assert check_prompts([short, long], Letters(), 7, "skip") == (short,)
    assert "prompt long" in caplog.text
    assert "skipped 1 of 2" in caplog.text
    with pytest.raises(DataError, match="no prompt fits"):
        check_prompts([long], Letters(), 7, "skip")
