"""The host side of generation: rows decode on the device while tools run on the host.

Token ids go in and out; a rollout's history is never tokenised again. A row that calls a tool leaves the decode loop;
the call runs in the executor while other rows decode; then its result is appended.

With several hosts, all run this loop together: their decisions depend only on the device's arrays and on `News`, which
the hosts exchange once per round. A row's tools run only on the host to which its prompt belongs.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from appo_jax import distributed, heartbeat
from appo_jax.config import Architecture, MeshConfig, RolloutConfig
from appo_jax.policy.attention import Blocks
from appo_jax.policy.sharding import GeneratingPolicy, generating_architecture, make_mesh, place
from appo_jax.rollout.appends import Result, append_batches, append_now, waited_long_enough
from appo_jax.rollout.decode import AppendBatch, DecodeSpec, StopTables, Until, append_tokens, decode_segment
from appo_jax.rollout.prefixes import Prefix, Source, prompt_prefixes
from appo_jax.rollout.rows import EndedCall, Fork, Row
from appo_jax.rollout.sampler import GenerationStats
from appo_jax.rollout.seating import Seating
from appo_jax.rollout.shapes import GenerationShapes
from appo_jax.rollout.state import (
    DecodeState,
    NewRows,
    Prefixes,
    begin_rows,
    empty_prefixes,
    empty_state,
    halt_rows,
    load_prefix,
)
from appo_jax.rollout.tool_results import ToolResults
from appo_jax.text.automaton import StopAutomaton
from appo_jax.text.tokenizer import Tokenizer
from appo_jax.tools.executor import ToolExecutor
from appo_jax.types import Rollout, StopReason

# Decoding pauses when this share of the rows has stopped, or after SEGMENT_STEPS tokens, whichever comes first: often
# enough that waiting rollouts soon get the places of finished ones, and rarely enough that the pauses cost little.
REFILL_SHARE = 0.0625  # if forks wait for a row
ATTENTION_SHARE = 0.25  # if the host is needed only for tool calls
SEGMENT_STEPS = 32
# While tools run, segments last at most this many seconds, so that results do not wait for slow steps.
TOOL_POLL_S = 0.05


class Draw(NamedTuple):
    """How the tokens of a generation are sampled."""

    id: Sequence[int]  # separates its random draws from those of every other generation (Purpose, step …)
    temperature: float  # 0: greedy


@dataclasses.dataclass
class News:
    """What a host sends to the others after a round, as plain JSON; rows are given by index."""

    calls: list[EndedCall]
    late: list[int]  # rows past their time
    append: bool  # results have waited long enough
    step_s: float  # how long a decode step took


@dataclasses.dataclass
class Generation:
    """The state of one generation: what the host keeps of it, and what the device holds."""

    policy: GeneratingPolicy
    shapes: GenerationShapes
    draw: Draw
    spec: DecodeSpec
    seating: Seating
    source: Iterator[tuple[int, Prefix]]  # the prefixes that are still to be loaded, with the indices of their groups
    state: DecodeState
    slots: list[Blocks]  # the prefixes that are loaded
    finished: list[list[Rollout]]  # by group, in the order in which they ended
    rows: dict[int, Row] = dataclasses.field(default_factory=dict)  # rows that hold a rollout, by their index
    step_s: float = 0.0  # how long a decode step takes, by the slowest host

    @property
    def prefixes(self) -> Prefixes:
        return Prefixes(self.slots, self.seating.places())

    @property
    def num_decoding(self) -> int:
        return sum(row.decoding for row in self.rows.values())


class Engine:
    """Continues forks to their end under given parameters. One per process; it holds no parameters. `mesh`: the mesh in
    use; None: a single device. Raises ConfigError if the marks of a tool result exceed its limit of tokens.
    """

    def __init__(
        self, arch: Architecture, tokenizer: Tokenizer, executor: ToolExecutor, config: RolloutConfig, seed: int, dtype: Any,
        mesh: Mesh | None = None,
    ):  # fmt: skip
        self.arch, self.tokenizer, self.executor, self.config, self.dtype = arch, tokenizer, executor, config, dtype
        self.mesh = make_mesh(MeshConfig(), jax.devices()[:1]) if mesh is None else mesh
        self.generating_arch = generating_architecture(arch, self.mesh)  # of the parameters that generation reads
        self.seed = seed
        # Embeddings may have more rows than the tokenizer has tokens.
        padding = [b""] * (arch.vocab_size - tokenizer.vocab_size)
        self.automaton = StopAutomaton.build(executor.stop_strings, tokenizer.token_bytes() + padding)
        tables = StopTables(jnp.asarray(self.automaton.next_state), jnp.asarray(self.automaton.hit))
        self.stop_tables = place(tables, NamedSharding(self.mesh, PartitionSpec()), self.mesh)
        self.results = ToolResults(tokenizer, executor.call_format, config.max_result_tokens)
        self.stats = GenerationStats()
        self._compiled: set[tuple[GenerationShapes, DecodeSpec]] = set()  # whose programs are compiled
        self._append_s = 0.0  # how long the last append took

    def start(self, host: int) -> Mapping[str, Any]:
        """Tool states of a new rollout of a host; empty on the other hosts."""
        return self.executor.start() if host == distributed.host() else {}

    def take_stats(self) -> GenerationStats:
        stats, self.stats = self.stats, GenerationStats()
        return stats

    def spec(self, temperature: float) -> DecodeSpec:
        """The static arguments of this engine's decode programs."""
        return DecodeSpec.of(self.config, self.generating_arch, self.dtype, temperature, self.tokenizer.eos_ids)

    def prefill(self, policy: GeneratingPolicy, prompts: Sequence[np.ndarray], length: int, rows: int) -> Source:
        """Prefixes of the prompts, right-padded to `length`, `rows` prompts at a time."""
        return prompt_prefixes(policy.params, prompts, rows, length, self.generating_arch, self.dtype)

    def generate(
        self,
        policy: GeneratingPolicy,
        groups: Sequence[Sequence[Fork]],
        source: Source,
        shapes: GenerationShapes,
        draw: Draw,
    ) -> list[list[Rollout]]:
        """Continue every fork to its end; the rollouts of each group in the order of their nodes.

        Group g shares a prefix, number g of `source`, which is drawn from as rows become free.
        """
        g = self._start(policy, groups, source, shapes, draw)
        while self._seat(g):
            self._compile(g)
            if g.num_decoding:
                self._decode(g)
            else:
                self._wait_for_tools(g)
            # The news of all hosts, in the same order on each.
            news = [News(**n) for n in distributed.exchange(dataclasses.asdict(self._news(g)))]
            g.step_s = max(n.step_s for n in news)
            late = [w for n in news for w in n.late]
            for call in (EndedCall(*call) for n in news for call in n.calls):
                g.rows[call.row].ended, g.rows[call.row].ended_at = call, time.monotonic()
            if append_now(g.rows, any(n.append for n in news), late, shapes.append_rows):
                self._append_results(g)
            self._expire(g, late)
            self._collect(g)
            heartbeat.detail(f"{sum(map(len, g.finished))} of {sum(map(len, groups))} rollouts")
        return [sorted(rollouts, key=lambda rollout: rollout.node) for rollouts in g.finished]

    def _start(
        self,
        policy: GeneratingPolicy,
        groups: Sequence[Sequence[Fork]],
        source: Source,
        shapes: GenerationShapes,
        draw: Draw,
    ) -> Generation:
        named = list(enumerate(groups))
        if not self.config.share_prefix:  # every fork becomes a separate group, and its prefix is computed again
            named = [(name, [fork]) for name, group in named for fork in group]
            source = self.prefill(policy, [group[0].tokens for _, group in named], shapes.prefix_length, shapes.rows)
        return Generation(
            policy=policy,
            shapes=shapes,
            draw=draw,
            spec=self.spec(draw.temperature),
            seating=Seating(named, shapes),
            source=enumerate(source),
            state=empty_state(self.generating_arch, shapes.rows, shapes.suffix_length, self.dtype),
            slots=empty_prefixes(self.generating_arch, shapes.slots, shapes.prefix_length, self.dtype),
            finished=[[] for _ in groups],
        )

    def _seat(self, g: Generation) -> bool:
        """Give free rows to waiting forks and start them; whether any row holds a rollout."""
        opened, seated = g.seating.seat()
        for slot, index in opened:
            g.slots = load_prefix(g.slots, *self._prefix(g, index), slot)
        if seated:
            new = NewRows.none(g.shapes.rows, len(g.draw.id) + 2)
            deadline = time.monotonic() + self.config.max_seconds
            for w, group, fork in seated:
                g.rows[w] = Row(fork, group, deadline)
                start = len(fork.tokens) - 1
                new.on[w], new.last_token[w], new.start[w] = True, fork.tokens[-1], start
                new.limit[w] = fork.prompt_length + self.config.max_response_tokens - start
                new.automaton[w] = self.automaton_state(fork.tokens[fork.boundary :])
                new.ids[w] = *g.draw.id, group, fork.node
            g.state = begin_rows(g.state, new, self.seed)
        return bool(g.rows)

    def _prefix(self, g: Generation, index: int) -> Prefix:
        """The prefix of a group. Its prefill, if it is the first of its pass, ends here and not in the next decode step, whose time
        says how long segments may be while tools run."""
        began = time.perf_counter()
        prefix = next(prefix for i, prefix in g.source if i == index)  # indices rise
        jax.block_until_ready(prefix.cache)
        self.stats.prefill_s += time.perf_counter() - began
        return prefix

    def automaton_state(self, tokens: np.ndarray) -> int:
        """State of the stop automaton after `tokens`; a completed stop string does not carry over."""
        state = 0
        for token in tokens:
            state = int(self.automaton.next_state[state, token])
        return 0 if self.automaton.hit[state] >= 0 else state

    def _decode(self, g: Generation) -> None:
        """Decode until enough rows have stopped, and handle the stopped rows."""
        decoding = g.num_decoding
        enough = max(1, int(decoding * (REFILL_SHARE if g.seating.queued else ATTENTION_SHARE)))
        max_steps = SEGMENT_STEPS
        if decoding < len(g.rows) and g.step_s > 0:
            max_steps = int(np.clip(TOOL_POLL_S / g.step_s, 1, SEGMENT_STEPS))
        began = time.perf_counter()
        until = Until(decoding - enough, max_steps)
        g.state, steps = decode_segment(g.policy.step, g.prefixes, g.state, self.stop_tables, until, spec=g.spec)
        self._read_stops(g)
        seconds = time.perf_counter() - began
        g.step_s = seconds / max(1, int(steps))
        self.stats.decode_s += seconds
        self.stats.decode_steps += int(steps)
        self.stats.row_steps += int(steps) * g.shapes.rows

    def _read_stops(self, g: Generation) -> None:
        """Handle the rows that have stopped: their rollout is over, or they call a tool."""
        active, length, automaton = jax.device_get((g.state.active, g.state.length, g.state.automaton))
        stopped = [w for w, row in g.rows.items() if not row.calling and not active[w]]
        if not stopped:
            return
        tokens = np.asarray(g.state.tokens)
        for w in stopped:
            self._on_stop(g.rows[w], tokens[w, : length[w]], int(automaton[w]))

    def _on_stop(self, row: Row, suffix: np.ndarray, automaton: int) -> None:
        """Handle a row that has stopped: its rollout is over, or it calls a tool."""
        if suffix[-1] in self.tokenizer.eos_ids:
            row.stop_reason = StopReason.ANSWERED
        elif self.automaton.hit[automaton] < 0:
            row.stop_reason = StopReason.LENGTH
        elif len(row.calls) >= self.config.max_tool_calls:
            row.stop_reason = StopReason.CALLS
        elif row.tools_run_here:
            text = np.concatenate([row.fork.tokens, suffix[1:]])
            call = self.tokenizer.decode(text[row.boundary :].tolist())
            row.begin_call(self.executor.submit(row.states, call, bound=row.deadline - time.monotonic()))
        else:
            row.begin_call(None)

    def _wait_for_tools(self, g: Generation) -> None:
        """No row decodes: wait up to TOOL_POLL_S for the next result."""
        began = time.perf_counter()
        futures = [row.future for row in g.rows.values() if row.future]
        concurrent.futures.wait(futures, TOOL_POLL_S, return_when=concurrent.futures.FIRST_COMPLETED)
        self.stats.wait_s += time.perf_counter() - began

    def _news(self, g: Generation) -> News:
        """What has happened on this host since the last round."""
        now = time.monotonic()
        calls = [call for w, row in g.rows.items() if (call := row.take_finished_call(w)) is not None]
        late = [w for w, row in g.rows.items() if row.tools_run_here and row.stop_reason is None and now > row.deadline]
        return News(calls, late, waited_long_enough(g.rows, now, self._append_s), g.step_s)

    def _append_results(self, g: Generation) -> None:
        """Record the calls that have ended and append their results."""
        began = time.perf_counter()
        length = np.asarray(g.state.length)
        results = []
        for w, row in g.rows.items():
            if row.ended is not None:
                ids = self.results.encode(row.ended.result)
                if ids := row.end_call(ids, int(length[w]), self.config.max_response_tokens):
                    results.append(Result(w, ids))
        for batch in append_batches(results, g.shapes):
            self._append(g, batch)
        g.state.length.block_until_ready()
        self._append_s = time.perf_counter() - began
        self.stats.append_s += self._append_s

    def _append(self, g: Generation, batch: AppendBatch) -> None:
        g.state = append_tokens(
            g.policy.params, g.prefixes, g.state, batch, arch=self.generating_arch, dtype=self.dtype
        )

    def _compile(self, g: Generation) -> None:
        """Compile the append of every padded length and the decode loop in the first round of a generation, by running
        them on nothing. Otherwise an append would compile when the first result of a length arrives, in the middle of a
        run. The rows' time begins afterwards: compiling can take minutes, in which no rollout gets on.
        """
        if (g.shapes, g.spec) in self._compiled:
            return
        self._compiled.add((g.shapes, g.spec))
        for length in g.shapes.result_lengths:
            self._append(g, AppendBatch.empty(g.shapes.append_rows, length, g.shapes.rows))
        g.state = halt_rows(g.state, np.zeros(g.shapes.rows, bool))
        g.state, steps = decode_segment(g.policy.step, g.prefixes, g.state, self.stop_tables, Until(0, 0), spec=g.spec)
        steps.block_until_ready()
        deadline = time.monotonic() + self.config.max_seconds
        for row in g.rows.values():
            row.deadline = deadline

    def _expire(self, g: Generation, late: Sequence[int]) -> None:
        """End the rows that are past their time, including those that wait for a tool."""
        halted = np.zeros(g.shapes.rows, bool)
        for w in late:
            halted[w] = g.rows[w].expire()
        if halted.any():
            g.state = halt_rows(g.state, halted)

    def _collect(self, g: Generation) -> None:
        """Read the finished rollouts from the device, and free their rows."""
        over = [w for w, row in g.rows.items() if row.stop_reason is not None]
        if not over:
            return
        s = g.state
        tokens, log_probs, entropies, length = jax.device_get((s.tokens, s.log_probs, s.entropies, s.length))
        for w in over:
            row, end = g.rows.pop(w), int(length[w])
            rollout = row.rollout(tokens[w, :end], log_probs[w, :end], entropies[w, :end])
            self.stats.sampled_tokens += int(rollout.sampled[len(row.fork.tokens) :].sum())
            g.finished[row.group].append(rollout)
            g.seating.release(w)
