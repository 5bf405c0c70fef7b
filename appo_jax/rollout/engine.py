"""The host side of generation: rows decode on the device, tools run on the host, neither waits for the other.

Token ids go in and out; a rollout's history is never tokenised again. A row that asks for a tool leaves the decode loop,
its call runs in the executor while other rows go on, and its result is appended when it has come.

With several hosts, all of them run this loop in step: what it does follows from the device's arrays and from `News`, which
the hosts exchange once a round. A row's tools run on one host alone, the one its prompt belongs to.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from appo_jax import distributed
from appo_jax.config import Architecture, MeshConfig, RolloutConfig
from appo_jax.policy.attention import Blocks, LayerCache, Places, room
from appo_jax.policy.constraints import platform, row_shards
from appo_jax.policy.parameters import Params, turned
from appo_jax.policy.sharding import generating, make_mesh, place
from appo_jax.rollout.decode import (
    DecodeState,
    NewRows,
    SamplingSpec,
    append_tokens,
    begin_rows,
    decode_segment,
    empty_prefixes,
    empty_state,
    halt_rows,
    load_prefix,
)
from appo_jax.rollout.prefixes import CacheRows, prompt_caches
from appo_jax.rollout.seating import Fork, Seating
from appo_jax.rollout.tool_results import ToolResults
from appo_jax.text.automaton import StopAutomaton
from appo_jax.text.tokenizer import Tokenizer
from appo_jax.tools.executor import CallRecord, ToolExecutor
from appo_jax.types import Example, Outcome, Rollout, StopReason, ToolCall

# The host looks in when this share of the decoding rows has left off, or after SEGMENT_STEPS tokens, whichever is first:
# often enough that finished rows give their place to waiting ones, seldom enough that the look costs little.
REFILL_SHARE = 0.0625  # while forks wait for a row
ATTENTION_SHARE = 0.25  # when only tool calls can want the host
SEGMENT_STEPS = 32
# While tools run, segments are kept to this many seconds, so that a result is not kept waiting by slow steps.
TOOL_POLL_S = 0.05
# Tool results are appended for this many rows at a time. A fixed number: a row's arithmetic must not depend, even in
# the last bit, on how many other tools happened to finish at the same moment. On a mesh, so many that it can split them;
# each device takes rows of its own.
APPEND_ROWS = 8
# An append holds up every row, be it for one result or for APPEND_ROWS. So results wait for each other until there are
# that many, or until the first has waited this many times as long as an append takes. More would save appends and lose
# more by rows that wait: benchmarks/sampler.py's tool_overlap was 0.69 at ten and 0.73 at three.
APPEND_WAIT = 3.0

# A call that has ended, as hosts tell it to each other: its row, then the fields of CallRecord but `states`.
_Ended = tuple[int, str, str, str, str, float]


@dataclasses.dataclass
class _Row:
    """A row's host-side progress."""

    fork: Fork
    group: int
    calls: list[ToolCall]
    states: Mapping[str, Any]
    boundary: int
    deadline: float
    calling: bool = False  # waits for a tool, or with its result
    future: concurrent.futures.Future[CallRecord] | None = None  # of the call, on the host that makes it
    ended: _Ended | None = None  # the call has, and its result waits to be appended …
    ended_at: float = 0.0  # … since then
    stop_reason: StopReason | None = None

    @property
    def own(self) -> bool:
        """Whether its tools run here."""
        return self.fork.host == distributed.host()


@dataclasses.dataclass
class _News:
    """What a host has to tell the others after a round; plain JSON, and rows by their index."""

    calls: list[_Ended]
    late: list[int]  # rows past their time
    append: bool  # results have waited long enough
    step_s: float  # how long a decode step took


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
    """Generates rollouts under given parameters. One per process; holds no parameters itself.

    Parameters may come in the training layout; they are resharded when a generation begins. `mesh`: the one in use; None:
    a single device.
    """

    def __init__(
        self, arch: Architecture, tokenizer: Tokenizer, executor: ToolExecutor, config: RolloutConfig, seed: int, dtype: Any,
        mesh: Mesh | None = None,
    ):  # fmt: skip
        self.arch, self.tokenizer, self.executor, self.config, self.dtype = arch, tokenizer, executor, config, dtype
        self.mesh = make_mesh(MeshConfig(), jax.devices()[:1]) if mesh is None else mesh
        self._shards = row_shards(self.mesh)
        self.append_rows = self.whole(APPEND_ROWS)
        padding = [b""] * (
            arch.vocab_size - tokenizer.vocab_size
        )  # embeddings may have more rows than there are tokens
        self.automaton = StopAutomaton.build(executor.stop_strings, tokenizer.token_bytes() + padding)
        tables = jnp.asarray(self.automaton.next_state), jnp.asarray(self.automaton.hit)
        self._tables = place(tables, NamedSharding(self.mesh, PartitionSpec()), self.mesh)
        self.seed = seed
        self.results = ToolResults(tokenizer, executor.call_format, config.max_result_tokens)
        self._compiled: set[tuple[int, ...]] = set()
        self.stats = GenerationStats()
        self._append_s = 0.0  # how long the last append took

    def whole(self, rows: int) -> int:
        """`rows`, rounded up to what the mesh can split; the rows more stay empty."""
        return -(-rows // self._shards) * self._shards

    def start(self, host: int) -> Mapping[str, Any]:
        """Tool states of a new rollout that belongs to a host; a host has none of another's."""
        return self.executor.start() if host == distributed.host() else {}

    def take_stats(self) -> GenerationStats:
        stats, self.stats = self.stats, GenerationStats()
        return stats

    def spec(self, temperature: float) -> SamplingSpec:
        c = self.config
        return SamplingSpec(temperature, c.top_k, c.top_p, self.tokenizer.eos_id)

    def initial(
        self, params: Params, examples: Sequence[Example], copies: int, salt: Sequence[int],
        temperature: float | None = None, most: int | None = None,
    ) -> list[list[Rollout]]:  # fmt: skip
        """`copies` full rollouts of each example.

        `salt` separates this call's random draws from all others (phase, step …); `temperature` defaults to the configured
        one, 0 is greedy. `most` is what the number of examples can never exceed, by default their number: shapes follow from it.
        """
        params = generating(params, self.mesh, self.dtype)
        groups = []
        for index, example in enumerate(examples):
            host = index % distributed.num_hosts()
            prompt = np.asarray(self.tokenizer.render_prompt(example.system, example.question), np.int32)
            nothing = np.zeros(len(prompt), np.float32)
            groups.append(
                [
                    Fork(
                        example=example, tokens=prompt, prompt_length=len(prompt), sampled=nothing > 0, log_probs=nothing,
                        entropies=nothing, calls=(), states=self.start(host), node=node, host=host,
                    )
                    for node in range(copies)
                ]
            )  # fmt: skip
        prompts = [group[0].tokens for group in groups]
        most = most or len(groups)
        caches = self.prompt_caches(params, prompts, self.config.max_prompt_tokens, most)
        return self.generate(params, caches, groups, copies, most, salt, temperature)

    def generate(
        self, params: Params, caches: Iterator[list[LayerCache]], groups: Sequence[Sequence[Fork]], columns: int,
        most_groups: int, salt: Sequence[int], temperature: float | None = None,
    ) -> list[list[Rollout]]:  # fmt: skip
        """Continue every fork to its end; the rollouts of each group in the order of its forks.

        Group g shares a prefix: the next row of `caches`, an iterator of caches that is drawn from as rows
        become free. `columns` (C) rows at most decode one prefix at a time. `most_groups` is what the number of groups
        can never exceed; shapes follow from it, from `columns` and from `rollout.decode_rows`.
        """
        params = generating(params, self.mesh, self.dtype)
        one_cpu = self.mesh.size == 1 and platform() == "cpu"
        stepping = turned(params) if one_cpu else params  # what decode steps multiply by
        temperature = self.config.temperature if temperature is None else temperature
        indexed = list(enumerate(groups))
        if not self.config.share_prefix:
            indexed = [(g, [fork]) for g, group in indexed for fork in group]
            heads = [group[0].tokens for _, group in indexed]
            fresh = all(len(head) <= self.config.max_prompt_tokens for head in heads)
            length = self.config.max_prompt_tokens + (0 if fresh else self.config.max_response_tokens)
            most_groups, columns = most_groups * columns, 1
            caches = self.prompt_caches(params, heads, length, most_groups)
        rows_at_once = self.whole(min(self.config.decode_rows, most_groups * columns))
        seating = Seating(indexed, columns, rows_at_once, most_groups, self._shards)
        spec, slots = self.spec(temperature), self.config.max_response_tokens + 1
        state = empty_state(self.arch, seating.num_rows, slots, self.dtype)
        prefixes: list[Blocks] = []
        rows: dict[int, _Row] = {}
        out: list[list[Rollout]] = [[] for _ in groups]
        source = CacheRows(caches)
        step_s = 0.0
        while True:
            # ---- free places go to waiting forks
            opened, seated = seating.seat()
            for slot, index in opened:
                cache, row = source.at(index)
                if not prefixes:
                    prefixes = empty_prefixes(self.arch, seating.num_slots, cache[0][1].shape[2], self.dtype)
                prefixes = load_prefix(prefixes, cache, row, slot)
            if seated:
                state = self._begin(state, rows, seated, salt)
            if not rows:
                break
            places = seating.places()
            state = self._compile_appends(params, prefixes, places, state)

            # ---- decode, or wait for a tool
            decoding = sum(not row.calling for row in rows.values())
            if decoding:
                share = REFILL_SHARE if seating.queued else ATTENTION_SHARE
                enough = max(1, int(decoding * share))
                steps_at_once = SEGMENT_STEPS
                if decoding < len(rows) and step_s > 0:
                    steps_at_once = int(np.clip(TOOL_POLL_S / step_s, 1, SEGMENT_STEPS))
                began = time.perf_counter()
                state, steps = decode_segment(
                    stepping, prefixes, places, state, *self._tables, decoding - enough, steps_at_once, arch=self.arch,
                    spec=spec, dtype=self.dtype,
                )  # fmt: skip
                self._read_stops(state, rows)
                seconds = time.perf_counter() - began
                step_s = seconds / max(1, int(steps))
                self.stats.decode_s += seconds
                self.stats.decode_steps += int(steps)
                self.stats.row_steps += int(steps) * seating.num_rows
            else:
                began = time.perf_counter()
                futures = [row.future for row in rows.values() if row.future]
                concurrent.futures.wait(futures, TOOL_POLL_S, return_when=concurrent.futures.FIRST_COMPLETED)
                self.stats.wait_s += time.perf_counter() - began

            # ---- what happened on the hosts, in one order on all of them
            told = [_News(**news) for news in distributed.exchange(dataclasses.asdict(self._news(rows, step_s)))]
            step_s = max(news.step_s for news in told)
            late = [w for news in told for w in news.late]
            for ended in (call for news in told for call in news.calls):
                rows[ended[0]].ended, rows[ended[0]].ended_at = ended, time.monotonic()
            if self._append_now(rows, any(news.append for news in told), late):
                state = self._append_results(params, prefixes, seating, state, rows)
            state = self._expire(state, rows, late)

            # ---- rollouts that are over leave
            over = [w for w, row in rows.items() if row.stop_reason is not None]
            for w, rollout in zip(over, self._collect(state, rows, over), strict=True):
                out[rows.pop(w).group].append(rollout)
                seating.release(w)
        return [sorted(rollouts, key=lambda rollout: rollout.node) for rollouts in out]

    def prompt_caches(
        self, params: Params, prompts: Sequence[np.ndarray], length: int, most: int
    ) -> Iterator[list[LayerCache]]:
        """Caches of at most `most` prompts, right-padded to `length`."""
        width = self.whole(min(self.config.decode_rows, most))
        return prompt_caches(params, prompts, width, length, self.arch, self.dtype)

    def _begin(
        self, state: DecodeState, rows: dict[int, _Row], seated: Sequence[tuple[int, int, Fork]], salt: Sequence[int]
    ) -> DecodeState:
        """Start the forks that were given a row: `seated` holds (row, group, fork)."""
        new = NewRows.none(len(state.active), len(salt) + 2)
        deadline = time.monotonic() + self.config.max_seconds
        for w, group, fork in seated:
            rows[w] = _Row(fork, group, list(fork.calls), fork.states, fork.boundary, deadline)
            start = len(fork.tokens) - 1
            new.on[w], new.last_token[w], new.start[w] = True, fork.tokens[-1], start
            new.limit[w] = fork.prompt_length + self.config.max_response_tokens - start
            new.automaton[w] = self.automaton_state(fork.tokens[fork.boundary :])
            new.ids[w] = *salt, group, fork.node
        return begin_rows(state, new, self.seed)

    def _read_stops(self, state: DecodeState, rows: dict[int, _Row]) -> None:
        """See which rows have left off: their rollout is over, or they ask for a tool."""
        active, length, automaton = jax.device_get((state.active, state.length, state.automaton))
        stopped = [w for w, row in rows.items() if not row.calling and not active[w]]
        if not stopped:
            return
        tokens = np.asarray(state.tokens)
        for w in stopped:
            self._on_stop(rows[w], tokens[w, : length[w]], int(automaton[w]))

    def automaton_state(self, tokens: np.ndarray) -> int:
        """State of the stop automaton after `tokens`; a completed stop string does not carry over."""
        state = 0
        for token in tokens:
            state = int(self.automaton.next_state[state, token])
        return 0 if self.automaton.hit[state] >= 0 else state

    def _on_stop(self, row: _Row, suffix: np.ndarray, automaton: int) -> None:
        """A row left the decode loop: it is over, or it asks for a tool."""
        text = np.concatenate([row.fork.tokens, suffix[1:]])
        if suffix[-1] == self.tokenizer.eos_id:
            row.stop_reason = StopReason.ANSWERED
        elif self.automaton.hit[automaton] < 0:
            row.stop_reason = StopReason.LENGTH
        elif len(row.calls) >= self.config.max_tool_calls:
            row.stop_reason = StopReason.CALLS
        else:
            row.calling = True
            if row.own:
                call = self.tokenizer.decode(text[row.boundary :].tolist())
                row.future = self.executor.submit(row.states, call, bound=row.deadline - time.monotonic())

    def _news(self, rows: Mapping[int, _Row], step_s: float) -> _News:
        """What has happened here. The calls that have ended leave their rows' tool states behind."""
        now, news = time.monotonic(), _News([], [], False, step_s)
        for w, row in rows.items():
            news.append |= row.ended is not None and now - row.ended_at >= APPEND_WAIT * self._append_s
            if row.future is not None and row.future.done():
                record, row.future = row.future.result(), None
                row.states = record.states
                news.calls.append((w, record.name, record.argument, record.result, record.outcome, record.seconds))
            if row.own and row.stop_reason is None and now > row.deadline:
                news.late.append(w)
        return news

    def _append_now(self, rows: Mapping[int, _Row], waited: bool, late: Sequence[int]) -> bool:
        """Whether the results that wait are appended in this round: the same on all hosts."""
        waiting = sum(row.ended is not None for row in rows.values())
        decoding = any(not row.calling and row.stop_reason is None for row in rows.values())
        leaving = any(rows[w].ended is not None for w in late)
        return waiting > 0 and (waited or waiting >= self.append_rows or not decoding or leaving)

    def _append_results(
        self, params: Params, prefixes: list[Blocks], seating: Seating, state: DecodeState, rows: Mapping[int, _Row]
    ) -> DecodeState:
        """Record the calls that have ended and append their results, a few rows of similar length at a time."""
        began = time.perf_counter()
        length = np.asarray(state.length)
        by_bucket: dict[int, list[tuple[int, list[int]]]] = {}
        for row in rows.values():
            if row.ended is None:
                continue
            w, name, argument, result, outcome, seconds = row.ended
            row.calling, row.ended = False, None
            ids = self.results.encode(result)
            call_end = len(row.fork.tokens) - 1 + int(length[w])
            room = row.fork.prompt_length + self.config.max_response_tokens - call_end
            if len(ids) >= room:  # no place left to go on: the result stays unread
                ids, row.stop_reason = [], StopReason.LENGTH
            row.boundary = call_end + len(ids)
            row.calls.append(
                ToolCall(name, argument, result, Outcome(outcome), seconds, call_end, row.boundary, row.states)
            )
            if ids:
                by_bucket.setdefault(self.results.bucket(len(ids)), []).append((w, ids))
        places = seating.places()
        for bucket, items in by_bucket.items():
            by_shard = [deque(item for item in items if seating.shard(item[0]) == s) for s in range(seating.shards)]
            while any(by_shard):
                index = np.full(self.append_rows, len(length), np.int32)
                chunk, count = np.zeros((len(index), bucket), np.int32), np.zeros(len(index), np.int32)
                for i in range(len(index)):
                    if own := by_shard[i * seating.shards // len(index)]:
                        w, ids = own.popleft()
                        index[i], chunk[i, : len(ids)], count[i] = w, ids, len(ids)
                state = append_tokens(
                    params, prefixes, places, state, index, chunk, count, arch=self.arch, dtype=self.dtype
                )
        state.length.block_until_ready()
        self._append_s = time.perf_counter() - began
        self.stats.append_s += self._append_s
        return state

    def _compile_appends(
        self, params: Params, prefixes: list[Blocks], places: Places, state: DecodeState
    ) -> DecodeState:
        """Append nothing to nobody in every bucket, once per shape: no program shall be compiled in mid-run because a
        result is the first of its length."""
        shape = (*state.tokens.shape, room(prefixes[0]), *places.members.shape)
        if shape not in self._compiled:
            self._compiled.add(shape)
            for bucket in self.results.buckets:
                nobody = np.full(self.append_rows, len(state.active), np.int32)
                chunk, count = np.zeros((len(nobody), bucket), np.int32), np.zeros(len(nobody), np.int32)
                state = append_tokens(
                    params, prefixes, places, state, nobody, chunk, count, arch=self.arch, dtype=self.dtype
                )
            state = halt_rows(state, np.zeros(len(state.active), bool))
        return state

    def _expire(self, state: DecodeState, rows: Mapping[int, _Row], late: Sequence[int]) -> DecodeState:
        """End the rows that are past their time, those that wait for a tool included."""
        halted = np.zeros(len(state.active), bool)
        for w in late:
            row = rows[w]
            if row.stop_reason is None:
                halted[w], row.stop_reason = True, StopReason.TIME
                if row.future is not None:
                    row.future.cancel()
        return halt_rows(state, halted) if halted.any() else state

    def _collect(self, state: DecodeState, rows: Mapping[int, _Row], over: Sequence[int]) -> Iterator[Rollout]:
        """The rollouts of the rows that are over, from the device's arrays."""
        if not over:
            return
        tokens, log_probs, entropies, length = jax.device_get(
            (state.tokens, state.log_probs, state.entropies, state.length)
        )
        for w in over:
            row, fork, end = rows[w], rows[w].fork, int(length[w])
            own = np.ones(end - 1, bool)  # slot 0 belongs to the prefix
            for call in row.calls[len(fork.calls) :]:
                own[call.call_end - len(fork.tokens) : call.result_end - len(fork.tokens)] = False
            assert row.stop_reason is not None
            self.stats.sampled_tokens += int(own.sum())
            yield Rollout(
                example=fork.example,
                tokens=np.concatenate([fork.tokens, tokens[w, 1:end]]),
                prompt_length=fork.prompt_length,
                sampled=np.concatenate([fork.sampled, own]),
                log_probs=np.concatenate([fork.log_probs, np.where(own, log_probs[w, 1:end], 0)]),
                entropies=np.concatenate([fork.entropies, np.where(own, entropies[w, 1:end], 0)]),
                stop_reason=row.stop_reason,
                calls=tuple(row.calls),
                node=fork.node,
                parent=fork.parent,
                fork=None if fork.parent is None else len(fork.tokens),
                loop=fork.loop,
                host=fork.host,
            )
