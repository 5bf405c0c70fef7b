"""Endless batches, reshuffled every epoch. The iterators are grain's, and grain.checkpoint saves them.

An iterator's state is a position in a stream that depends on the seed only, so a resumed run draws the same batches.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence

import grain
import numpy as np

from appo_jax.config import Config, OnMalformed
from appo_jax.data.demonstrations import LeftOut
from appo_jax.errors import DataError
from appo_jax.reward.response import prompt_opening, text_after
from appo_jax.text.tokenizer import Tokenizer
from appo_jax.types import Example, Trace

logger = logging.getLogger(__name__)


EncodeResult = Callable[[str], list[int]]
Encoded = tuple[np.ndarray, np.ndarray]  # a trace: tokens [T] int32, and whether the policy writes them [T] bool

# No threads: a batch costs microseconds, and read-ahead threads would compete with XLA for the cores.
READ = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)


@dataclasses.dataclass(frozen=True)
class TraceBatch:
    """Demonstrations for the cold start: R rows of T = max_tokens. A row holds several whole traces."""

    tokens: np.ndarray  # [R, T] int32
    loss_mask: np.ndarray  # [R, T] bool: the policy is trained to write this token
    segments: np.ndarray  # [R, T] int32: 1, 2, … for the row's traces, 0 for padding
    positions: np.ndarray  # [R, T] int32: index within the trace


def prompt_batches(
    examples: Sequence[Example], batch_size: int, seed: int, weights: Mapping[str, float] | None = None
) -> grain.DatasetIterator[list[Example]]:
    """Endless batches of `batch_size` examples. Every example comes once an epoch, and each epoch has another order.

    weights: from `Example.source` to the share of the stream that comes from it; each source then has its own epochs. The stream
    depends on the examples and the seed only. So a resumed run needs only the iterator's position, also on another number of hosts:
    every host reads the whole stream (a prompt's tools and rewards belong to one host). Raises DataError for a source without
    examples."""
    if not weights:
        stream = grain.MapDataset.source(examples).shuffle(seed).repeat()
    else:
        groups = {name: [example for example in examples if example.source == name] for name in weights}
        if empty := [name for name, group in groups.items() if not group]:
            raise DataError(f"data.mixture: no question is left of {', '.join(empty)}; remove it, or correct its data")
        parts = [grain.MapDataset.source(group).shuffle(seed).repeat() for group in groups.values()]
        stream = grain.MapDataset.mix(parts, weights=list(weights.values()))
    batches = stream.batch(batch_size, drop_remainder=True, batch_fn=list)
    return iter(batches.to_iter_dataset(READ))


def encode_traces(
    traces: Sequence[Trace],
    tokenizer: Tokenizer,
    config: Config,
    encode_result: EncodeResult | None = None,
    left_out: LeftOut | None = None,
) -> list[Encoded]:
    """The traces as tokens, without those that the run's limits exclude.

    A rollout of the run could not hold such a trace, so training on it would teach the policy what ends a rollout without an
    answer. A longer trace than `sft.max_tokens` is not truncated, because that would teach the policy to stop in the middle. The
    traces left out are logged, and counted in `left_out`. Raises DataError if no trace is left."""
    encoded, over, longest = [], LeftOut(), 0
    for trace in traces:
        tokens, sampled = encode_trace(trace, tokenizer, encode_result)
        reason = _over_a_limit(trace, int(sampled.argmax()), len(tokens), config)
        if reason is None:
            encoded.append((tokens, sampled))
            continue
        over.add(reason, trace.example.id)
        longest = max(longest, len(tokens))
    if over.total:
        message = (
            f"{over.total} of {len(traces)} traces are left out ({over}); the longest of them has {longest} tokens"
        )
        if not encoded:
            raise DataError(f"{message}; raise these limits, or give other traces")
        logger.warning("%s", message)
    if left_out is not None:
        left_out.include(over)
    if not encoded:
        raise DataError("there are no traces to train on; set sft.steps to 0 to go without a cold start")
    return encoded


def _over_a_limit(trace: Trace, prompt_length: int, length: int, config: Config) -> str | None:
    """Why the run's limits exclude a trace; None if they do not. Lengths in tokens."""
    rollout = config.rollout
    calls = sum(not segment.sampled for segment in trace.segments)
    measured = (
        ("it is longer than sft.max_tokens", length, config.sft.max_tokens),
        ("its prompt is longer than rollout.max_prompt_tokens", prompt_length, rollout.max_prompt_tokens),
        (
            "its response is longer than rollout.max_response_tokens",
            length - prompt_length,
            rollout.max_response_tokens,
        ),
        ("it makes more calls than rollout.max_tool_calls", calls, rollout.max_tool_calls),
    )
    return next((f"{reason} = {limit}" for reason, value, limit in measured if value > limit), None)


def trace_batches(
    encoded: Sequence[Encoded], batch_size: int, max_tokens: int, pad_id: int, seed: int
) -> grain.DatasetIterator[TraceBatch]:
    """Endless batches of encoded traces, packed into `batch_size` rows of `max_tokens` (grain's first-fit packing)."""
    total = sum(len(tokens) for tokens, _ in encoded)
    logger.info("%d traces of %d tokens: an epoch is about %d rows", len(encoded), total, -(-total // max_tokens))
    stream = grain.MapDataset.source(encoded).shuffle(seed).repeat()
    unpacked = stream.map(lambda pair: {"tokens": pair[0], "loss_mask": pair[1].astype(np.int32)})
    packed = grain.experimental.FirstFitPackIterDataset(
        unpacked.to_iter_dataset(READ), length_struct={"tokens": max_tokens, "loss_mask": max_tokens},
        num_packing_bins=batch_size, seed=seed, padding_struct={"tokens": pad_id, "loss_mask": 0},
    )  # fmt: skip

    def batch(rows: Sequence[dict[str, np.ndarray]]) -> TraceBatch:
        def stack(name: str) -> np.ndarray:
            return np.stack([row[name] for row in rows]).astype(np.int32)

        return TraceBatch(
            stack("tokens"), stack("loss_mask").astype(bool), stack("tokens_segment_ids"), stack("tokens_positions")
        )

    return iter(packed.batch(batch_size, drop_remainder=True, batch_fn=batch))


def encode_trace(trace: Trace, tokenizer: Tokenizer, encode_result: EncodeResult | None = None) -> Encoded:
    """The tokens of prompt, segments and EOS. Each segment is tokenised by itself, as in a rollout.

    Where the prompt, or the template after a tool result, opens a thought for the policy, the text after it goes on in that
    thought. encode_result: token ids of a tool result in the run's call format; None: those of its text."""
    tokens = list(tokenizer.render_prompt(trace.example.system, trace.example.question))
    sampled = [False] * len(tokens)
    opening = prompt_opening(tokens, tokenizer)
    for segment in trace.segments:
        if segment.sampled:
            ids = tokenizer.encode(text_after(opening, segment.text))
            opening = ""
        else:
            ids = (encode_result or tokenizer.encode)(segment.text)
            opening = prompt_opening(ids, tokenizer)
        tokens += ids
        sampled += [segment.sampled] * len(ids)
    return np.array([*tokens, tokenizer.eos_id], np.int32), np.array([*sampled, True])


def check_prompts(
    examples: Sequence[Example], tokenizer: Tokenizer, max_prompt_tokens: int, malformed: OnMalformed
) -> tuple[Example, ...]:
    """The examples whose prompt has at most `max_prompt_tokens` tokens.

    A longer prompt: with "fatal", DataError that names it; with "skip", it is left out with a warning. Raises DataError if no
    prompt fits."""
    fitting = []
    for example in examples:
        length = len(tokenizer.render_prompt(example.system, example.question))
        if length <= max_prompt_tokens:
            fitting.append(example)
            continue
        problem = f"prompt {example.id} has {length} tokens, more than rollout.max_prompt_tokens = {max_prompt_tokens}"
        if malformed == "fatal":
            raise DataError(f"{problem}; raise that field, or set data.malformed to skip")
        logger.warning("%s; skipped", problem)
    if len(fitting) < len(examples):
        logger.warning("skipped %d of %d prompts: too long", len(examples) - len(fitting), len(examples))
    if not fitting:
        raise DataError(f"no prompt fits rollout.max_prompt_tokens = {max_prompt_tokens}; raise that field")
    return tuple(fitting)
