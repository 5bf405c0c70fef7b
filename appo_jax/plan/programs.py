"""Every program of a training step, as the run compiles it: the same jitted functions get shapes instead of arrays.

Programs with little work are left out: loading a prefix into its slot, starting rows, Branching Scores, advantages.
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
from appo_jax.plan.counts import Counts, PlannedGeneration, Scoring, count
from appo_jax.plan.lengths import RolloutLengths
from appo_jax.policy import sharding
from appo_jax.policy.attention import SEEN_PREFIX, SEEN_SUFFIX
from appo_jax.policy.constraints import row_shards
from appo_jax.policy.score import prefill, score
from appo_jax.policy.seen_keys import block_of, query_blocks
from appo_jax.rollout.decode import AppendBatch, DecodeSpec, StopTables, Until, append_tokens, decode_segment
from appo_jax.rollout.engine import SEGMENT_STEPS
from appo_jax.rollout.shapes import Shapes

# States of the stop automaton for each tool: as many as its closing tag has characters. Most tags are shorter.
AUTOMATON_STATES = 16
# The fields that `search` changes and on which every program depends; those of a generation; those of the update.
_MESH = ("mesh.data", "mesh.fsdp", "mesh.tensor", "mesh.slices")
_ROWS = (*_MESH, "rollout.decode_rows")
_UPDATE = (*_MESH, "optimizer.micro_batch", "optimizer.remat")


@dataclasses.dataclass(frozen=True)
class Program:
    """One program, how often a training step runs it, and what lies in memory at the same time."""

    name: str
    trace: Callable[[], Any]  # -> jax.stages.Traced
    times: int  # runs in one training step
    counted: str  # the calculation of `times`, in words
    resident: int  # bytes per device that the run holds at the same time and that are no argument of the program
    kept: int  # bytes per device of weights and optimizer state, in `resident` and in the arguments; only the mesh lowers them
    fields: str  # config fields whose lower values make the program's other memory smaller
    depends_on: tuple[str, ...]  # the fields that `search` changes and on which the program or `resident` depends
    steps: int = 1  # iterations of the program's loop of unknown length; `times` counts iterations, not calls
    # Name of a kernel's calls -> how often it reads its KV caches; below 1: the share of them that it reads.
    seen: Mapping[str, float] = dataclasses.field(default_factory=dict)


def programs(
    config: Config, arch: Architecture, mesh: Mesh, lengths: RolloutLengths | None = None
) -> Iterator[Program]:
    """The programs of the cold start and of one training step, in the order in which they run.

    Shapes, and so memory, are those of the longest rollouts. `lengths`: the lengths from which `times` is computed; None: the
    maximum lengths, too.
    """
    return _StepPrograms(config, arch, mesh, lengths).all()


class _StepPrograms:
    """Makes the programs of a training step from the arrays that they share."""

    def __init__(self, config: Config, arch: Architecture, mesh: Mesh, lengths: RolloutLengths | None):
        self.config, self.arch, self.mesh = config, arch, mesh
        self.algorithm = make_algorithm(config)
        self.shapes = Shapes.of(self.algorithm, row_shards(mesh))
        self.counts: Counts = count(config, self.shapes, lengths)
        self.arrays = Arrays(config, arch, mesh)
        # ---- arrays that exist during the whole run, and their bytes per device
        self.state, self.generating_params = self.arrays.state(), self.arrays.generating()
        self.base, self.policy = self.arrays.base(), self.arrays.policy()
        # With adapters, the frozen weights are the reference policy, and no copy is needed.
        keeps_copy = self.algorithm.keeps_reference and self.base is None
        self.reference_bytes = on_chip(self.state.params) if keeps_copy else 0
        self.optimizer_and_reference = on_chip(self.state.opt_state) + self.reference_bytes
        self.in_place = sharding.generates_in_place(self.policy, mesh, self.arrays.dtype)
        # Programs of a generation take its copy of the parameters as an argument, or, without a copy, the parameters.
        self.resident_in_generation = self.optimizer_and_reference + (0 if self.in_place else on_chip(self.policy))
        # Before RL, an evaluation reads a copy of all parameters in float32, which with adapters are larger than those of RL.
        self.resident_in_evaluation = self.resident_in_generation
        if self.base is not None:
            self.resident_in_evaluation = max(self.resident_in_evaluation, self._resident_before_rl())
        self.kept_training = self.optimizer_and_reference + on_chip(self.policy)

    def all(self) -> Iterator[Program]:
        if self._has_cold_start:
            yield self.cold_start()
        if not self.in_place:
            yield self.reshard()
        evaluation, initial = self.counts.evaluation, self.counts.initial
        # Two prefill passes need more memory than one, though they have the same shapes.
        shapes = [(generation.shapes, generation.prefills > 1) for generation in (evaluation, initial)]
        if shapes[0] != shapes[1] or self.resident_in_evaluation > self.resident_in_generation:
            yield self.prefill(evaluation)
            yield self.decode(evaluation)
            yield self.append(evaluation)
        yield self.prefill(initial)
        yield self.decode(initial)
        for scoring in self.counts.scorings:
            yield self.score(scoring)
        for generation in self.counts.branches:
            yield self.decode(generation)
        for generation in self.counts.generations:
            yield self.append(generation)
        yield self.train()

    def cold_start(self) -> Program:
        """Updates all parameters on demonstrations, before the first step: it is no part of a step."""
        config, sft, state = self.config, self.config.sft, self.arrays.cold_start_state()
        rows = sft.micro_batch or sft.batch_size
        parts = sft.batch_size // rows
        step: Any = make_train_step(
            self.arrays.sft_optimizer, StepSpec.of_cold_start(config, self.arch, self.arrays.dtype)
        )
        batch = self.arrays.demonstrations(parts, rows, sft.max_tokens)
        return Program(
            "cold start",
            lambda: step.trace(state, batch),
            0,
            f"before the first step: {sft.steps} updates × {parts} micro-batches of {rows} rows",
            0,
            on_chip(state),
            "sft.micro_batch, sft.max_tokens"
            if sft.micro_batch
            else "sft.micro_batch (0: all rows at once), sft.max_tokens",
            (*_MESH, "optimizer.remat"),
            parts,
        )

    def reshard(self) -> Program:
        """Makes the copy of the parameters that a generation reads. For branches, the caches that they continue exist already."""
        sources = [self._source_bytes(g) for g in self.counts.branches]
        return Program(
            "reshard",
            lambda: sharding.reshard.trace(self.policy, self.mesh, self.arrays.dtype),
            self.counts.reshards,
            "generations",
            self.optimizer_and_reference + max(sources, default=0),
            self.kept_training,
            "",
            _MESH,
        )

    def prefill(self, generation: PlannedGeneration) -> Program:
        """Computes the KV caches of the prompts. The caches of the generation exist already, and those of the pass before, if there
        was one, still do."""
        rows, length = generation.prefill_rows, self.config.rollout.max_prompt_tokens
        before = self._source_bytes(generation) if generation.prefills > 1 else 0
        tokens = self.arrays.rows((rows, length), jnp.int32)
        return Program(
            "prefill" if generation is self.counts.initial else f"prefill, {generation.name}",
            lambda: prefill.trace(
                self.generating_params, tokens, arch=self.arrays.generating_arch, dtype=self.arrays.dtype
            ),
            generation.times * generation.prefills,
            f"passes of {rows} prompts",
            self._resident(generation) + on_chip(self.arrays.generation(generation.shapes)) + before,
            self._kept(generation),
            "rollout.max_prompt_tokens, rollout.decode_rows",
            _ROWS,
        )

    def decode(self, generation: PlannedGeneration) -> Program:
        """Draws one token of every row. The program is a segment of SEGMENT_STEPS such steps."""
        shapes, rollout, scalar = generation.shapes, self.config.rollout, self.arrays.of((), jnp.int32)

        def trace() -> Any:
            prefixes, rows = self.arrays.generation(shapes)
            temperature = 0.0 if generation is self.counts.evaluation else rollout.temperature
            spec = DecodeSpec.of(rollout, self.arrays.generating_arch, self.arrays.dtype, temperature, (0,))
            states = 1 + AUTOMATON_STATES * len(self.config.tools.enabled)
            stops = StopTables(
                self.arrays.of((states, self.arch.vocab_size), np.min_scalar_type(states - 1)),
                self.arrays.of((states,), jnp.int32),
            )
            return decode_segment.trace(self.generating_params, prefixes, rows, stops, Until(scalar, scalar), spec=spec)

        return Program(
            f"decode, {self._label(generation)}",
            trace,
            generation.times * generation.decode_steps,
            f"{generation.times} generations × {generation.decode_steps} steps of {shapes.rows} rows",
            self._resident(generation) + self._source_bytes(generation),
            self._kept(generation),
            "rollout.decode_rows, rollout.max_response_tokens",
            _ROWS,
            SEGMENT_STEPS,
            self._reads(generation, shapes.columns, 1),
        )

    def append(self, generation: PlannedGeneration) -> Program:
        """Appends a batch of tool results, of the maximum length, to the KV caches of their rows."""
        shapes, rollout = generation.shapes, self.config.rollout
        width, length = shapes.append_rows, rollout.max_result_tokens

        def trace() -> Any:
            prefixes, rows = self.arrays.generation(shapes)
            per_result = self.arrays.of((width,), jnp.int32)
            batch = AppendBatch(per_result, self.arrays.of((width, length), jnp.int32), per_result)
            return append_tokens.trace(
                self.generating_params, prefixes, rows, batch, arch=self.arrays.generating_arch, dtype=self.arrays.dtype
            )

        return Program(
            f"append, {self._label(generation)}",
            trace,
            generation.appends,
            f"{generation.times * generation.drawn} rollouts × {generation.lengths.calls:g} calls / {width}",
            self._resident(generation) + self._source_bytes(generation),
            self._kept(generation),
            "rollout.max_result_tokens, rollout.decode_rows",
            _ROWS,
            seen=self._reads(generation, 1, length),
        )

    def score(self, scoring: Scoring) -> Program:
        """Computes log-probs, entropies and KV caches of finished rollouts in one pass."""
        shape = scoring.shape
        rows = self.arrays.packed(*shape)
        cache = on_chip(self.arrays.caches(*shape))
        return Program(
            "score" if len(self.counts.scorings) == 1 else f"score, {shape.rows} × {shape.length}",
            lambda: score.trace(
                self.policy,
                rows,
                arch=self.arch,
                temperature=self.config.rollout.temperature,
                dtype=self.arrays.dtype,
            ),
            scoring.times,
            f"passes of {shape.rows} packed rows of {shape.length} tokens",
            self.optimizer_and_reference + max(0, scoring.kept - 1) * cache,
            self.kept_training,
            "prompts_per_minibatch, rollout.max_response_tokens",
            _MESH,
        )

    def train(self) -> Program:
        """Updates the parameters on one mini-batch. `times` counts micro-batches."""
        config, counts, shape = self.config, self.counts, self.counts.update
        spec = StepSpec.of_update(config, self.algorithm.loss, self.arch, self.arrays.dtype)
        step: Any = make_train_step(self.arrays.optimizer, spec)  # jitted
        parts = shape.max_passes(counts.trained, self.shapes.rollout_length)
        batch = self.arrays.batch(parts, shape, self.algorithm)
        return Program(
            "train",
            lambda: step.trace(self.state, batch, self.base),
            counts.updates * counts.parts,
            f"{counts.updates} mini-batches × {counts.parts} micro-batches of {shape.rows} packed rows of {shape.length} tokens",
            self.reference_bytes,
            self.kept_training,
            "optimizer.micro_batch",
            _UPDATE,
            counts.parts,
        )

    def _label(self, generation: PlannedGeneration) -> str:
        """The kind of a generation, and what tells its shapes from those of other generations of this kind: rows, or also slots."""
        shapes = generation.shapes
        others = [g.shapes for g in self.counts.generations if g.name == generation.name and g is not generation]
        if not others:
            return generation.name
        slots = f", {shapes.slots} slots" if any(other.rows == shapes.rows for other in others) else ""
        return f"{generation.name}, {shapes.rows} rows{slots}"

    def _reads(self, generation: PlannedGeneration, columns: int, tokens: int) -> dict[str, float]:
        """For each kernel's part, how often it reads its KV caches: to the end of the block with the last key, for each block of
        queries. Each row has `tokens` new tokens; `columns` rows share a prefix."""
        arch, dtype, shapes = self.arrays.generating_arch, self.arrays.dtype, generation.shapes
        heads = -(-arch.num_kv_heads // self.mesh.shape["tensor"])
        queries = tokens * (arch.num_heads // arch.num_kv_heads)  # of a row and key/value head

        def reads(seen: float, length: int, queries: int) -> float:
            block = block_of(heads, length, arch.head_dim, dtype.itemsize)
            times = query_blocks(heads, queries) if length > block else 1  # a cache of one block is read once
            return times * min(1.0, (seen + block / 2) / length)

        return {
            SEEN_PREFIX: reads(generation.lengths.prefix, shapes.prefix_length, columns * queries),
            SEEN_SUFFIX: reads(generation.lengths.suffix, shapes.suffix_length - 1, queries),
        }

    def _source_bytes(self, generation: PlannedGeneration) -> int:
        """Bytes per device of the KV caches from which a generation's prefixes are loaded."""
        if generation.prefill_rows:
            return on_chip(self.arrays.caches(generation.prefill_rows, self.config.rollout.max_prompt_tokens))
        return max(s.kept * on_chip(self.arrays.caches(*s.shape)) for s in self.counts.scorings)

    def _resident(self, generation: PlannedGeneration) -> int:
        """Bytes per device of the parameters and optimizer state that a generation does not read."""
        return self.resident_in_evaluation if generation is self.counts.evaluation else self.resident_in_generation

    def _kept(self, generation: PlannedGeneration) -> int:
        """Bytes per device of all weights and of the optimizer state during a generation."""
        return self._resident(generation) + on_chip(self.generating_params)

    def _resident_before_rl(self) -> int:
        """`_resident` in an evaluation of the policy with which RL begins. After a cold start, the moments of its optimizer still
        exist."""
        state = self.arrays.cold_start_state()
        optimizer = on_chip(state.opt_state) if self._has_cold_start else 0
        in_place = sharding.generates_in_place(state.params, self.mesh, self.arrays.dtype)
        return optimizer + (0 if in_place else on_chip(state.params))

    @property
    def _has_cold_start(self) -> bool:
        return bool(self.config.sft.steps) and self.config.init_from is None
