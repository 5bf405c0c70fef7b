"""The host side of generation: rows decode on the device, tools run on the host, neither waits for the other.

Token ids go in and out; a rollout's history is never tokenised again. A row that asks for a tool leaves the decode loop,
its call runs in the executor while other rows go on, and its result is appended when it has come.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from appo_jax.config import Architecture, RolloutConfig
from appo_jax.policy.attention import LayerCache
from appo_jax.policy.score import prefill
from appo_jax.policy.transformer import Params
from appo_jax.rollout.decode import DecodeState, SamplingSpec, append_tokens, decode_segment, new_state, row_keys
from appo_jax.text.automaton import StopAutomaton
from appo_jax.text.tokenizer import Tokenizer
from appo_jax.tools.executor import CallRecord, ToolExecutor
from appo_jax.types import Example, Rollout, StopReason, ToolCall

# The host looks in when this share of the decoding rows has left off, or after SEGMENT_STEPS tokens, whichever is first:
# often enough that finished tools are not kept waiting, seldom enough that the look costs little.
ATTENTION_SHARE = 0.25
SEGMENT_STEPS = 32
# Tool results are appended for this many rows at a time. A fixed number: a row's arithmetic must not depend, even in
# the last bit, on how many other tools happened to finish at the same moment.
APPEND_ROWS = 8
CUT_MARK = " […]"


@dataclasses.dataclass(frozen=True)
class Fork:
    """Where a new rollout begins: after `tokens`, which are a prompt or the head of a parent."""

    example: Example
    tokens: np.ndarray  # [t] int32: everything before the first new token
    prompt_length: int
    sampled: np.ndarray  # [t] bool
    log_probs: np.ndarray  # [t] float32
    entropies: np.ndarray  # [t] float32
    calls: tuple[ToolCall, ...]
    states: Mapping[str, Any]  # tool states at the fork
    node: int
    parent: int | None = None
    loop: int = 0

    @property
    def boundary(self) -> int:
        """Index after the last tool result, or after the prompt: where the policy's own current text begins."""
        return self.calls[-1].result_end if self.calls else self.prompt_length


@dataclasses.dataclass
class _Row:
    """A row's host-side progress."""

    fork: Fork
    calls: list[ToolCall]
    states: Mapping[str, Any]
    boundary: int
    deadline: float
    future: concurrent.futures.Future[CallRecord] | None = None
    stop_reason: StopReason | None = None

    @property
    def decoding(self) -> bool:
        return self.future is None and self.stop_reason is None


@dataclasses.dataclass
class GenerationStats:
    """What a generation did; added up over the generations of a step."""

    sampled_tokens: int = 0
    decode_steps: int = 0
    row_steps: int = 0  # decode steps × rows: the capacity that was paid for
    decode_s: float = 0.0
    append_s: float = 0.0
    wait_s: float = 0.0  # nothing to decode, tools still running


class Engine:
    """Generates rollouts under given parameters. One per process; holds no parameters itself."""

    def __init__(
        self, arch: Architecture, tokenizer: Tokenizer, executor: ToolExecutor, config: RolloutConfig, seed: int, dtype: Any
    ):  # fmt: skip
        self.arch, self.tokenizer, self.executor, self.config, self.dtype = arch, tokenizer, executor, config, dtype
        padding = [b""] * (
            arch.vocab_size - tokenizer.vocab_size
        )  # embeddings may have more rows than there are tokens
        self.automaton = StopAutomaton.build(executor.stop_strings, tokenizer.token_bytes() + padding)
        self._tables = jnp.asarray(self.automaton.next_state), jnp.asarray(self.automaton.hit)
        self._key = jax.random.key(seed)
        self._row_keys = jax.jit(row_keys)
        head, tail = executor.call_format.render_result("\0").split("\0")
        self._result_head, self._result_tail = tokenizer.encode(head), tokenizer.encode(tail)
        self._cut_tail = tokenizer.encode(CUT_MARK + tail)
        self.stats = GenerationStats()

    def take_stats(self) -> GenerationStats:
        stats, self.stats = self.stats, GenerationStats()
        return stats

    def spec(self, temperature: float) -> SamplingSpec:
        c = self.config
        return SamplingSpec(temperature, c.top_k, c.top_p, self.tokenizer.eos_id)

    def initial(
        self, params: Params, examples: Sequence[Example], copies: int, salt: Sequence[int], temperature: float | None = None
    ) -> list[list[Rollout]]:  # fmt: skip
        """`copies` full rollouts of each example, in waves of at most `rollout.decode_rows` rows.

        `salt` separates this call's random draws from all others (phase, step, position of the first prompt);
        `temperature` defaults to the configured one, 0 is greedy.
        """
        width = max(1, min(len(examples), self.config.decode_rows // copies))
        trees: list[list[Rollout]] = []
        for first in range(0, len(examples), width):
            wave = examples[first : first + width]
            prompts = [np.asarray(self.tokenizer.render_prompt(e.system, e.question), np.int32) for e in wave]
            tokens = np.zeros((width, self.config.max_prompt_tokens), np.int32)
            for row, prompt in zip(tokens, prompts, strict=False):
                row[: len(prompt)] = prompt
            cache = prefill(params, jnp.asarray(tokens), arch=self.arch, dtype=self.dtype)
            forks = [
                [
                    Fork(
                        example=example, tokens=prompt, prompt_length=len(prompt), sampled=np.zeros(len(prompt), bool),
                        log_probs=np.zeros(len(prompt), np.float32), entropies=np.zeros(len(prompt), np.float32),
                        calls=(), states=self.executor.start(), node=node,
                    )
                    for node in range(copies)
                ]
                for example, prompt in zip(wave, prompts, strict=True)
            ]  # fmt: skip
            forks += [[] for _ in range(width - len(wave))]
            trees += self.generate(params, cache, forks, copies, [*salt, first], temperature)[: len(wave)]
        return trees

    def generate(
        self, params: Params, prefix: list[LayerCache], forks: Sequence[Sequence[Fork]], columns: int,
        salt: Sequence[int], temperature: float | None = None,
    ) -> list[list[Rollout]]:  # fmt: skip
        """Continue every fork to its end. `forks[r]` (at most `columns`) share row r of the prefix cache."""
        temperature = self.config.temperature if temperature is None else temperature
        state = self._start(forks, columns, salt)
        deadline = time.monotonic() + self.config.max_seconds
        rows = {
            (r, c): _Row(fork, list(fork.calls), fork.states, fork.boundary, deadline)
            for r, group in enumerate(forks)
            for c, fork in enumerate(group)
        }
        spec = self.spec(temperature)
        active = len(rows)
        waiting: dict[concurrent.futures.Future[CallRecord], tuple[int, int]] = {}
        while active or waiting:
            if active:
                began = time.perf_counter()
                state, steps = decode_segment(
                    params, prefix, state, *self._tables, int(active * (1 - ATTENTION_SHARE)), SEGMENT_STEPS,
                    arch=self.arch, spec=spec, dtype=self.dtype,
                )  # fmt: skip
                is_active, length, automaton = jax.device_get((state.active, state.length, state.automaton))
                self.stats.decode_s += time.perf_counter() - began
                self.stats.decode_steps += int(steps)
                self.stats.row_steps += int(steps) * is_active.size
                stopped = [at for at, row in rows.items() if row.decoding and not is_active[at]]
                tokens = np.asarray(state.tokens) if stopped else np.empty(0)
                for at in stopped:
                    if future := self._on_stop(rows[at], tokens[at][: length[at]], int(automaton[at])):
                        waiting[future] = at
            else:
                began = time.perf_counter()
                concurrent.futures.wait(waiting, timeout=1.0, return_when=concurrent.futures.FIRST_COMPLETED)
                self.stats.wait_s += time.perf_counter() - began
            state = self._append_finished(params, prefix, state, rows, waiting)
            state = self._expire(state, rows, waiting)
            active = sum(row.decoding for row in rows.values())
        return self._collect(state, rows, len(forks))

    def _start(self, forks: Sequence[Sequence[Fork]], columns: int, salt: Sequence[int]) -> DecodeState:
        """A fresh decode state with every row at its fork; rows without a fork never become active."""
        shape = (len(forks), columns)
        last, start, limit, automaton = (np.zeros(shape, np.int32) for _ in range(4))
        active, ids = np.zeros(shape, bool), np.zeros((*shape, len(salt) + 2), np.int32)
        for r, group in enumerate(forks):
            for c, fork in enumerate(group):
                start[r, c] = len(fork.tokens) - 1
                last[r, c] = fork.tokens[-1]
                limit[r, c] = fork.prompt_length + self.config.max_response_tokens - start[r, c]
                automaton[r, c] = self.automaton_state(fork.tokens[fork.boundary :])
                active[r, c] = True
                ids[r, c] = *salt, r, fork.node
        return new_state(
            self.arch, last, start, limit, automaton, active, self._row_keys(self._key, ids),
            slots=self.config.max_response_tokens + 1, dtype=self.dtype,
        )  # fmt: skip

    def automaton_state(self, tokens: np.ndarray) -> int:
        """State of the stop automaton after `tokens`; a completed stop string does not carry over."""
        state = 0
        for token in tokens:
            state = int(self.automaton.next_state[state, token])
        return 0 if self.automaton.hit[state] >= 0 else state

    def _on_stop(self, row: _Row, suffix: np.ndarray, automaton: int) -> concurrent.futures.Future[CallRecord] | None:
        """A row left the decode loop: it is over, or it asks for a tool, whose future is returned."""
        text = np.concatenate([row.fork.tokens, suffix[1:]])
        if suffix[-1] == self.tokenizer.eos_id:
            row.stop_reason = StopReason.ANSWERED
        elif self.automaton.hit[automaton] < 0:
            row.stop_reason = StopReason.LENGTH
        elif len(row.calls) >= self.config.max_tool_calls:
            row.stop_reason = StopReason.CALLS
        else:
            row.future = self.executor.submit(
                row.states, self.tokenizer.decode(text[row.boundary :].tolist()), bound=row.deadline - time.monotonic()
            )
        return row.future

    def _append_finished(
        self, params: Params, prefix: list[LayerCache], state: DecodeState, rows: dict[tuple[int, int], _Row],
        waiting: dict[concurrent.futures.Future[CallRecord], tuple[int, int]],
    ) -> DecodeState:  # fmt: skip
        """Record the calls that have finished and append their results, a few rows of similar length at a time."""
        if not any(future.done() for future in waiting):
            return state
        began = time.perf_counter()
        length = np.asarray(state.length)
        by_bucket: dict[int, list[tuple[tuple[int, int], list[int]]]] = {}
        for future in [f for f in waiting if f.done()]:
            at = waiting.pop(future)
            row, record = rows[at], future.result()
            row.future, row.states = None, record.states
            ids = self.encode_result(record.result)
            call_end = len(row.fork.tokens) - 1 + int(length[at])
            room = row.fork.prompt_length + self.config.max_response_tokens - call_end
            if len(ids) >= room:  # no place left to go on: the result stays unread
                ids, row.stop_reason = [], StopReason.LENGTH
            row.boundary = call_end + len(ids)
            row.calls.append(
                ToolCall(
                    record.name, record.argument, record.result, record.outcome, record.seconds, call_end, row.boundary,
                    record.states,
                )
            )  # fmt: skip
            if ids:
                by_bucket.setdefault(self._bucket(len(ids)), []).append((at, ids))
        for bucket, items in by_bucket.items():
            for first in range(0, len(items), APPEND_ROWS):
                some = items[first : first + APPEND_ROWS]
                index = np.full((APPEND_ROWS, 2), state.tokens.shape[0], np.int32)
                chunk, count = np.zeros((APPEND_ROWS, bucket), np.int32), np.zeros(APPEND_ROWS, np.int32)
                for i, (at, ids) in enumerate(some):
                    index[i], chunk[i, : len(ids)], count[i] = at, ids, len(ids)
                state = append_tokens(params, prefix, state, index, chunk, count, arch=self.arch, dtype=self.dtype)
        self.stats.append_s += time.perf_counter() - began
        return state

    def encode_result(self, text: str) -> list[int]:
        """Token ids of a tool result as it enters the rollout, cut to `rollout.max_result_tokens` with a visible mark."""
        ids, most = self.tokenizer.encode(text), self.config.max_result_tokens
        if len(self._result_head) + len(ids) + len(self._result_tail) <= most:
            return [*self._result_head, *ids, *self._result_tail]
        keep = max(0, most - len(self._result_head) - len(self._cut_tail))
        return [*self._result_head, *ids[:keep], *self._cut_tail]

    def _bucket(self, count: int) -> int:
        """Appended chunks come in lengths 32, 128, 512, … up to what a result may have."""
        bucket = 32
        while bucket < count:
            bucket *= 4
        return min(bucket, max(self.config.max_result_tokens, count))

    def _expire(
        self, state: DecodeState, rows: dict[tuple[int, int], _Row],
        waiting: dict[concurrent.futures.Future[CallRecord], tuple[int, int]],
    ) -> DecodeState:  # fmt: skip
        """End the rows that are past their time, those that wait for a tool included."""
        late = [at for at, row in rows.items() if row.stop_reason is None and time.monotonic() > row.deadline]
        if not late:
            return state
        for at in late:
            row = rows[at]
            row.stop_reason = StopReason.TIME
            if row.future is not None:
                row.future.cancel()
                waiting.pop(row.future)
                row.future = None
        index = np.array(late).T
        return dataclasses.replace(state, active=state.active.at[index[0], index[1]].set(False))

    def _collect(self, state: DecodeState, rows: dict[tuple[int, int], _Row], groups: int) -> list[list[Rollout]]:
        """Rollouts from the device's arrays, grouped by prefix."""
        tokens, log_probs, entropies, length = jax.device_get(
            (state.tokens, state.log_probs, state.entropies, state.length)
        )
        out: list[list[Rollout]] = [[] for _ in range(groups)]
        for at, row in rows.items():
            fork, end = row.fork, int(length[at])
            own = np.ones(end - 1, bool)  # slot 0 belongs to the prefix
            for call in row.calls[len(fork.calls) :]:
                own[call.call_end - len(fork.tokens) : call.result_end - len(fork.tokens)] = False
            assert row.stop_reason is not None
            out[at[0]].append(
                Rollout(
                    example=fork.example,
                    tokens=np.concatenate([fork.tokens, tokens[at][1:end]]),
                    prompt_length=fork.prompt_length,
                    sampled=np.concatenate([fork.sampled, own]),
                    log_probs=np.concatenate([fork.log_probs, log_probs[at][1:end]]),
                    entropies=np.concatenate([fork.entropies, entropies[at][1:end]]),
                    stop_reason=row.stop_reason,
                    calls=tuple(row.calls),
                    node=fork.node,
                    parent=fork.parent,
                    fork=None if fork.parent is None else len(fork.tokens),
                    loop=fork.loop,
                )
            )
            self.stats.sampled_tokens += int(own.sum())
        return out
