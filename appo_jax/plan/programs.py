"""Every program of a training step, as the run compiles it: the very jitted functions, given shapes instead of arrays.

Left out are programs that move next to nothing: a prefix into its slot, the start of rows, scores of positions, advantages.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from appo_jax.algorithms import make_algorithm
from appo_jax.config import Architecture, Config
from appo_jax.learner.step import StepSpec, make_train_step
from appo_jax.plan.abstract import Arrays, on_chip
from appo_jax.plan.counts import Counts, Generation, Scoring, count
from appo_jax.plan.lengths import RolloutLengths
from appo_jax.policy import sharding
from appo_jax.policy.attention import SEEN_PREFIX, SEEN_SUFFIX
from appo_jax.policy.constraints import row_shards
from appo_jax.policy.score import prefill, score
from appo_jax.policy.seen_keys import block_of
from appo_jax.rollout.decode import AppendBatch, DecodeSpec, StopTables, Until, append_tokens, decode_segment
from appo_jax.rollout.engine import SEGMENT_STEPS
from appo_jax.rollout.shapes import Shapes

AUTOMATON_STATES = 32  # of the stop strings of two tools, and some more


@dataclasses.dataclass(frozen=True)
class Program:
    """One program, what a training step does with it, and what lies in memory beside it."""

    name: str
    trace: Callable[[], Any]  # -> jax.stages.Traced
    times: int  # runs in one training step
    counted: str  # how `times` is made up
    beside: int  # bytes per chip that the run keeps meanwhile and that are no argument of the program
    kept: int  # bytes per chip of weights and optimizer state, in its arguments and beside it: only the mesh makes them less
    fields: str  # config fields that, lowered, make the rest of it smaller
    steps: int = 1  # of the loop of unknown length in it: its work is counted by the step
    # What part of its caches a kernel reads, by the name of its calls.
    seen: Mapping[str, float] = dataclasses.field(default_factory=dict)


def programs(
    config: Config, arch: Architecture, mesh: Mesh, lengths: RolloutLengths | None = None
) -> Iterator[Program]:
    """The programs of one training step, in their order.

    Memory is that of the longest rollouts. `lengths`: of the rollouts that `times` counts; None: the longest too.
    """
    return _StepPrograms(config, arch, mesh, lengths).all()


class _StepPrograms:
    """The programs of a training step, and what they share."""

    def __init__(self, config: Config, arch: Architecture, mesh: Mesh, lengths: RolloutLengths | None):
        self.config, self.arch, self.mesh = config, arch, mesh
        self.algorithm = make_algorithm(config)
        self.shapes = Shapes(config.rollout, self.algorithm.branching, row_shards(mesh))
        self.counts: Counts = count(config, self.shapes, lengths)
        self.arrays = Arrays(config, arch, mesh)
        # ---- what lives as long as the run
        self.state, self.copy = self.arrays.state(), self.arrays.generating()
        self.base, self.policy = self.arrays.base(), self.arrays.policy()
        # Beside adapters, the weights are the reference policy.
        keeps_copy = self.algorithm.keeps_reference and self.base is None
        self.reference = on_chip(self.state.params) if keeps_copy else 0
        self.moments = on_chip(self.state.opt_state) + self.reference
        self.in_place = sharding.generates_in_place(self.policy, mesh, self.arrays.dtype)
        # While generation runs, its copy of the parameters is an argument; so are the parameters where they serve themselves.
        self.resident = self.moments + (0 if self.in_place else on_chip(self.policy))
        self.generating = self.resident + on_chip(self.copy)
        self.training = self.moments + on_chip(self.policy)

    def all(self) -> Iterator[Program]:
        if not self.in_place:
            yield self.reshard()
        yield self.prefill()
        for generation in self.counts.generations:
            if generation.name == "initial":
                yield self.decode(generation)
        for scoring in self.counts.scorings:
            yield self.score(scoring)
        for generation in self.counts.generations:
            if generation.name != "initial":
                yield self.decode(generation)
        for generation in self.counts.generations:
            yield self.append(generation)
        yield self.train()

    def reshard(self) -> Program:
        """The copy of the parameters that a generation reads."""
        return Program(
            "reshard",
            lambda: sharding.reshard.trace(self.policy, self.mesh, self.arrays.dtype),
            self.counts.reshards,
            "generations",
            self.moments,
            self.training,
            "",
        )

    def prefill(self) -> Program:
        """The prompts' caches."""
        rows, length = self.counts.prefill_rows, self.config.rollout.max_prompt_tokens
        tokens = self.arrays.rows((rows, length), jnp.int32)
        return Program(
            "prefill",
            lambda: prefill.trace(self.copy, tokens, arch=self.arrays.generating_arch, dtype=self.arrays.dtype),
            self.counts.prefills,
            f"passes of {rows} prompts",
            self.resident,
            self.generating,
            "rollout.max_prompt_tokens, rollout.decode_rows",
        )

    def decode(self, generation: Generation) -> Program:
        """One token of every row."""
        shapes, rollout, number = generation.shapes, self.config.rollout, self.arrays.of((), jnp.int32)

        def trace() -> Any:
            prefixes, rows = self.arrays.generation(shapes)
            spec = DecodeSpec(
                self.arrays.generating_arch, self.arrays.dtype, rollout.temperature, rollout.top_k, rollout.top_p, (0,)
            )
            stops = StopTables(
                self.arrays.of((AUTOMATON_STATES, self.arch.vocab_size), np.uint8),
                self.arrays.of((AUTOMATON_STATES,), jnp.int32),
            )
            return decode_segment.trace(self.copy, prefixes, rows, stops, Until(number, number), spec=spec)

        return Program(
            f"decode, {self._named(generation)}",
            trace,
            generation.times * generation.decode_steps,
            f"{generation.times} generations × {generation.decode_steps} steps of {shapes.rows} rows",
            self.resident + self._sources(generation),
            self.generating,
            "rollout.decode_rows, rollout.max_response_tokens",
            SEGMENT_STEPS,
            self._seen(generation),
        )

    def append(self, generation: Generation) -> Program:
        """A batch of tool results, of the greatest length, into the caches of their rows."""
        shapes, rollout = generation.shapes, self.config.rollout
        width, length = shapes.append_rows, rollout.max_result_tokens

        def trace() -> Any:
            prefixes, rows = self.arrays.generation(shapes)
            some = self.arrays.of((width,), jnp.int32)
            batch = AppendBatch(some, self.arrays.of((width, length), jnp.int32), some)
            return append_tokens.trace(
                self.copy, prefixes, rows, batch, arch=self.arrays.generating_arch, dtype=self.arrays.dtype
            )

        return Program(
            f"append, {self._named(generation)}",
            trace,
            generation.appends,
            f"{generation.times * generation.drawn} rollouts × {generation.lengths.calls:g} calls / {width}",
            self.resident + self._sources(generation),
            self.generating,
            "rollout.max_result_tokens, rollout.decode_rows",
        )

    def score(self, scoring: Scoring) -> Program:
        """A teacher-forced pass over finished rollouts."""
        rows = self.arrays.packed(scoring.rows, self.shapes.rollout_length)
        cache = on_chip(self.arrays.caches(scoring.rows, self.shapes.rollout_length))
        return Program(
            "score" if len(self.counts.scorings) == 1 else f"score, {scoring.rows} rows",
            lambda: score.trace(
                self.policy,
                rows,
                arch=self.arch,
                temperature=self.config.rollout.temperature,
                dtype=self.arrays.dtype,
            ),
            scoring.times,
            f"passes of {scoring.rows} packed rows",
            self.moments + max(0, scoring.kept - 1) * cache,
            self.training,
            "rollout.decode_rows, rollout.max_response_tokens",
        )

    def train(self) -> Program:
        """One update."""
        config, counts, rows = self.config, self.counts, self.shapes.update_rows(self.config, self.algorithm)
        spec = StepSpec(
            self.arch, self.algorithm.loss, config.rollout.temperature, self.arrays.dtype, config.optimizer.remat
        )
        step: Any = make_train_step(self.arrays.optimizer, spec)  # jitted
        batch = self.arrays.batch(-(-counts.trained // rows), rows, self.shapes.rollout_length, self.algorithm)
        return Program(
            "train",
            lambda: step.trace(self.state, batch, self.base),
            counts.updates * counts.parts,
            f"{counts.updates} mini-batches × {counts.parts} micro-batches of {rows} packed rows",
            self.reference,
            self.training,
            "optimizer.micro_batch",
            counts.parts,
        )

    def _named(self, generation: Generation) -> str:
        """The kind of a generation, and its rows where there are several of the kind."""
        same = [other for other in self.counts.generations if other.name == generation.name]
        return generation.name if len(same) == 1 else f"{generation.name}, {generation.shapes.rows} rows"

    def _seen(self, generation: Generation) -> dict[str, float]:
        """What part of their caches the kernels of decoding read, which go on to the end of a block of keys."""
        arch, dtype, shapes = self.arrays.generating_arch, self.arrays.dtype, generation.shapes
        heads = -(-arch.num_kv_heads // self.mesh.shape["tensor"])

        def share(tokens: float, room: int) -> float:
            return min(1.0, (tokens + block_of(heads, room, arch.head_dim, dtype.itemsize) / 2) / room)

        return {
            SEEN_PREFIX: share(generation.lengths.prefix, shapes.prefix_length),
            SEEN_SUFFIX: share(generation.lengths.suffix, shapes.suffix_length - 1),
        }

    def _sources(self, generation: Generation) -> int:
        """Bytes per chip of the caches that a generation's prefixes are taken from."""
        if generation.name == "initial":
            return on_chip(self.arrays.caches(self.counts.prefill_rows, self.config.rollout.max_prompt_tokens))
        length = self.shapes.rollout_length
        return max(s.kept * on_chip(self.arrays.caches(s.rows, length)) for s in self.counts.scorings)
