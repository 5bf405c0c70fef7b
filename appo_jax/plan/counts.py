"""How often a training step runs each program, and with which shapes. No program is run for this.

It is assumed that every mini-batch uses every branching loop, and that rollouts have the lengths of `RolloutLengths`. By
default every rollout has the maximum length and makes all its tool calls; the counts are then those of the longest step.
`tests/rollout/test_planned_steps.py` compares them with real steps.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np

from appo_jax.algorithms import Algorithm, make_algorithm
from appo_jax.config import Config
from appo_jax.plan.lengths import Lengths, RolloutLengths
from appo_jax.policy.packing import pack
from appo_jax.rollout.shapes import GenerationShapes, PackedShape, Shapes


@dataclasses.dataclass(frozen=True)
class PlannedGeneration:
    """Generations of one kind and shape."""

    name: str
    """What is drawn, in the names of programs: "initial" (initial rollouts), "branches" or "evaluation"."""
    shapes: GenerationShapes
    prefill_rows: int
    """Prompts of one prefill pass. 0: the prefixes come from score passes."""
    prefills: int
    """Prefill passes of one generation."""
    times: int
    """Number of these generations in a step. 0: those of an evaluation, which is no part of a step."""
    drawn: int
    """Maximum number of rollouts of one generation."""
    lengths: Lengths
    """The lengths of its rollouts."""

    @property
    def decode_steps(self) -> int:
        """Decode steps of one generation: each draws one token of every row."""
        return self.lengths.decode_steps(self.drawn, self.shapes.rows)

    @property
    def appends(self) -> int:
        """Appends of tool results in all these generations of a step; one append takes the results of several rows."""
        return math.ceil(self.times * self.drawn * self.lengths.calls / self.shapes.append_rows)


@dataclasses.dataclass(frozen=True)
class Scoring:
    """Score passes of one shape."""

    shape: PackedShape
    """The shape of the packed rows of one pass."""
    times: int
    """Passes in a step."""
    kept: int
    """Number of passes whose KV caches are held at the same time, because branches are drawn from them."""


@dataclasses.dataclass(frozen=True)
class Counts:
    """The numbers of everything that one training step runs."""

    evaluation: PlannedGeneration
    """The generation that draws a greedy rollout of each held-out question."""
    initial: PlannedGeneration
    """The generations that draw initial rollouts."""
    branches: tuple[PlannedGeneration, ...]
    """Those that draw branches, by their shapes, in the order in which they run."""
    scorings: tuple[Scoring, ...]
    """By rising size of their shapes."""
    reshards: int
    """Copies of the parameters into the generating layout: one for each generation. None is made if the parameters
    already have this layout."""
    updates: int
    """Mini-batches in a step, each with one update."""
    trained: int
    """Rollouts that one update trains on."""
    update: PackedShape
    """The shape of the packed rows of a micro-batch."""
    parts: int
    """Micro-batches of one update, which their packed rows fill."""

    @property
    def generations(self) -> tuple[PlannedGeneration, ...]:
        """All generations of a step."""
        return (self.initial, *self.branches)


def count(config: Config, shapes: Shapes, lengths: RolloutLengths | None = None) -> Counts:
    """What a training step of `config` runs.

    `shapes`: of its rollouts, with the branching of its algorithm. `lengths`: of its rollouts; None: the longest allowed.
    """
    algorithm, lengths = make_algorithm(config), lengths or RolloutLengths.longest(config.rollout)
    if not config.tools.enabled:
        lengths = lengths.without_calls()
    packing = _Packing(config, algorithm, lengths)
    draws = 1 + algorithm.max_resamples  # each replacement of prompts is another generation

    def from_prompts(name: str, prompts: int, copies: int, times: int) -> PlannedGeneration:
        rows, shape = shapes.prefill_rows(prompts), shapes.initial(prompts, copies)
        return PlannedGeneration(name, shape, rows, -(-prompts // rows), times, prompts * copies, lengths.initial)

    initial = from_prompts("initial", config.prompts_per_step, algorithm.initial, draws)
    # How many held-out questions there are is not known: if all are asked, they are taken for more than one prefill pass.
    questions = config.eval.num_prompts or 2 * shapes.rounded_up(config.rollout.decode_rows)
    branches = tuple(_branch_generations(config, algorithm, shapes, lengths.branches))
    minibatches = config.prompts_per_step // config.prompts_per_minibatch
    return Counts(
        evaluation=from_prompts("evaluation", questions, 1, times=0),
        initial=initial,
        branches=branches,
        scorings=_scorings(config, algorithm, shapes, packing),
        reshards=sum(generation.times for generation in (initial, *branches)),
        updates=minibatches,
        trained=config.prompts_per_minibatch * algorithm.trained_per_prompt,
        update=shapes.update(config, algorithm),
        parts=packing.passes(range(algorithm.trained_per_prompt), shapes.update(config, algorithm)),
    )


@dataclasses.dataclass(frozen=True)
class _Packing:
    """Packs made-up rollouts of a mini-batch into rows, to count the passes over these rows."""

    config: Config
    algorithm: Algorithm
    lengths: RolloutLengths

    def passes(self, nodes: Sequence[int], shape: PackedShape) -> int:
        """Number of passes of packed rows of this shape over these nodes of every prompt's tree.

        The rollouts of a prompt share the slots of the prompt. The slots that a branch shares with its parent are counted
        again. Prompts and tool results have their maximum length.
        """
        rollout, rng = self.config.rollout, np.random.default_rng(0)
        texts = []
        for prompt in range(self.config.prompts_per_minibatch):
            for node in nodes:
                lengths = self.lengths.initial if node < self.algorithm.initial else self.lengths.branches
                results = round(lengths.calls * rollout.max_result_tokens)
                response = min(int(rng.choice(lengths.sampled)) + results, rollout.max_response_tokens)
                node_id = prompt * self.algorithm.budget + node
                # Token ids only say which tokens are equal: those of the prompt are, those of two responses are not.
                texts.append(np.repeat([prompt, node_id], [rollout.max_prompt_tokens, response]))
        packing = pack(texts, shape.length, shape.rows)
        return len(packing.rows.tokens) // shape.rows


def _branch_generations(
    config: Config, algorithm: Algorithm, shapes: Shapes, lengths: Lengths
) -> list[PlannedGeneration]:
    """The generations that draw branches: one for each mini-batch and loop."""
    if not algorithm.branches:
        return []
    prompts = config.prompts_per_minibatch
    max_scored = shapes.max_scored(prompts, algorithm.initial)
    sizes = [*max_scored, prompts * algorithm.budget]  # rollouts before each loop, and after the last
    by_shape: dict[GenerationShapes, list[int]] = {}
    for before, after in itertools.pairwise(sizes):
        # With a rule by turns, `before` may be the whole budget already. As this is a maximum, the loop may still draw a branch.
        by_shape.setdefault(shapes.branches(before), []).append(max(1, after - before))
    minibatches = config.prompts_per_step // prompts
    return [
        PlannedGeneration("branches", shape, 0, 0, minibatches * len(drawn), max(drawn), lengths)
        for shape, drawn in by_shape.items()
    ]


def _scorings(config: Config, algorithm: Algorithm, shapes: Shapes, packing: _Packing) -> tuple[Scoring, ...]:
    """All score passes of a step, grouped by their shape."""
    prompts = config.prompts_per_minibatch
    minibatches = config.prompts_per_step // prompts
    passes: dict[PackedShape, int] = {}
    kept: dict[PackedShape, int] = {}

    def add_passes(nodes: range, keep: bool = False) -> None:
        """Count the passes that score these nodes of each tree, for every mini-batch. `keep`: branches are drawn from their
        caches."""
        shape = shapes.packed(prompts * len(nodes))
        times = packing.passes(nodes, shape)
        passes[shape] = passes.get(shape, 0) + minibatches * times
        if keep:
            kept[shape] = max(kept.get(shape, 0), times)

    add_passes(range(algorithm.initial))  # log π_old
    if algorithm.branches:
        for max_rollouts in shapes.max_scored(prompts, algorithm.initial):
            add_passes(range(max_rollouts // prompts), keep=True)
    if algorithm.branches_at_start and algorithm.needs_old_of_branches:
        add_passes(range(algorithm.budget))
    if algorithm.scores_present:
        add_passes(range(algorithm.initial if algorithm.trains_later_branches else 0, algorithm.trained_per_prompt))
    if algorithm.scores_reference:
        add_passes(range(algorithm.trained_per_prompt))
    elif algorithm.keeps_reference:  # all under π_ref, and later branches under the policy that drew them
        add_passes(range(algorithm.budget))
        if algorithm.branches_later:
            add_passes(range(algorithm.initial, algorithm.budget))
    return tuple(
        Scoring(shape, passes[shape], kept.get(shape, 0)) for shape in sorted(passes, key=lambda s: (math.prod(s), s))
    )
