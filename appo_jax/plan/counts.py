"""How often a training step runs each program, and with which shapes, computed without running it.

Every mini-batch is assumed to use every branching loop, and rollouts to be as long as `RolloutLengths` says: by default
as long as allowed, with all allowed calls. The counts are then those of the longest step.
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
from appo_jax.rollout.shapes import GenerationShapes, Shapes


@dataclasses.dataclass(frozen=True)
class Generation:
    """Generations of one kind and shape."""

    name: str
    """What is drawn: initial or branches."""
    shapes: GenerationShapes
    times: int
    """Generations a step."""
    drawn: int
    """Maximal number of rollouts of one generation."""

    lengths: Lengths
    """Of its rollouts."""

    @property
    def decode_steps(self) -> int:
        """Decode steps of one generation."""
        return self.lengths.decode_steps(self.drawn, self.shapes.rows)

    @property
    def appends(self) -> int:
        """Appends of tool results in all generations."""
        return math.ceil(self.times * self.drawn * self.lengths.calls / self.shapes.append_rows)


@dataclasses.dataclass(frozen=True)
class Scoring:
    """Score passes of one shape."""

    rows: int
    """Packed rows of one pass."""
    times: int
    """Passes a step."""
    kept: int
    """Passes whose caches are kept at the same time for drawing branches; 0: none."""


@dataclasses.dataclass(frozen=True)
class Counts:
    """Everything that one training step runs."""

    prefill_rows: int
    """Prompts of one prefill pass."""
    prefills: int
    """Prefill passes a step."""
    generations: tuple[Generation, ...]
    """In their order; generations of equal shapes are one entry."""
    scorings: tuple[Scoring, ...]
    """In the order of their rows."""
    reshards: int
    """Copies of the parameters into the generating layout, where they must be made: one for each generation."""
    updates: int
    """Mini-batches."""
    trained: int
    """Rollouts of one update."""
    parts: int
    """Micro-batches that their packed rows fill."""


def count(config: Config, shapes: Shapes, lengths: RolloutLengths | None = None) -> Counts:
    """What a training step of `config` runs. `shapes`: those of its rollouts, with the branching of its algorithm."""
    algorithm, lengths = make_algorithm(config), lengths or RolloutLengths.longest(config.rollout)
    filling = _Filling(config, algorithm, lengths)
    draws = 1 + algorithm.max_resamples
    prompts, rows = config.prompts_per_step, shapes.prefill_rows(config.prompts_per_step)
    first = shapes.initial(prompts, algorithm.initial)
    generations = [
        Generation("initial", first, draws, prompts * algorithm.initial, lengths.initial),
        *_branchings(config, algorithm, shapes, lengths.branches),
    ]
    minibatches = config.prompts_per_step // config.prompts_per_minibatch
    return Counts(
        prefill_rows=rows,
        prefills=draws * -(-prompts // rows),
        generations=tuple(generations),
        scorings=_scorings(config, algorithm, shapes, filling),
        reshards=sum(generation.times for generation in generations),
        updates=minibatches,
        trained=config.prompts_per_minibatch * algorithm.trained_per_prompt,
        parts=filling.passes(range(algorithm.trained_per_prompt), shapes.update_rows(config, algorithm)),
    )


@dataclasses.dataclass(frozen=True)
class _Filling:
    """How many packed rows the rollouts of a mini-batch fill."""

    config: Config
    algorithm: Algorithm
    lengths: RolloutLengths

    def passes(self, nodes: Sequence[int], at_once: int) -> int:
        """Passes of `at_once` rows over these nodes of every prompt's tree.

        They have the prompt in common, and of branches nothing more is counted on. Prompts and tool results are the longest.
        """
        rollout, rng = self.config.rollout, np.random.default_rng(0)
        texts = []
        for prompt in range(self.config.prompts_per_minibatch):
            for node in nodes:
                kind = self.lengths.initial if node < self.algorithm.initial else self.lengths.branches
                results = round(kind.calls * rollout.max_result_tokens)
                response = min(int(rng.choice(kind.sampled)) + results, rollout.max_response_tokens)
                own = prompt * self.algorithm.budget + node
                texts.append(np.repeat([prompt, own], [rollout.max_prompt_tokens, response]))
        return len(pack(texts, rollout.max_prompt_tokens + rollout.max_response_tokens, at_once).rows.tokens) // at_once


def _branchings(config: Config, algorithm: Algorithm, shapes: Shapes, lengths: Lengths) -> list[Generation]:
    """The generations that draw branches: one for each mini-batch and loop."""
    if not algorithm.branches:
        return []
    prompts = config.prompts_per_minibatch
    scored = shapes.max_scored(prompts, algorithm.initial)
    sizes = [*scored, prompts * algorithm.budget]
    by_shape: dict[GenerationShapes, list[int]] = {}
    for before, after in itertools.pairwise(sizes):
        # By turns, the first loop may fill the budget, or leave some of it to a later one.
        by_shape.setdefault(shapes.branches(before), []).append(max(1, after - before))
    minibatches = config.prompts_per_step // prompts
    return [
        Generation("branches", shape, minibatches * len(drawn), max(drawn), lengths)
        for shape, drawn in by_shape.items()
    ]


def _scorings(config: Config, algorithm: Algorithm, shapes: Shapes, filling: _Filling) -> tuple[Scoring, ...]:
    """Every score pass of a step, by the number of its rows."""
    prompts = config.prompts_per_minibatch
    minibatches = config.prompts_per_step // prompts
    passes: dict[int, int] = {}
    kept: dict[int, int] = {}

    def score(nodes: range, keep: bool = False) -> None:
        """Count the passes over a mini-batch that score these nodes of each tree, in every mini-batch."""
        rows = shapes.packed_rows(prompts * len(nodes))
        times = filling.passes(nodes, rows)
        passes[rows] = passes.get(rows, 0) + minibatches * times
        if keep:
            kept[rows] = max(kept.get(rows, 0), times)

    score(range(algorithm.initial))  # log π_old
    if algorithm.branches:
        for most in shapes.max_scored(prompts, algorithm.initial):
            score(range(most // prompts), keep=True)
    if algorithm.branches_at_start and algorithm.needs_old_of_branches:
        score(range(algorithm.budget))
    if algorithm.scores_present:
        score(range(algorithm.trained_per_prompt))
    if algorithm.scores_reference:
        score(range(algorithm.trained_per_prompt))
    elif algorithm.keeps_reference:  # under π_ref, and branches under the policy that drew them
        score(range(algorithm.budget))
        if algorithm.branches and not algorithm.branches_at_start:
            score(range(algorithm.initial, algorithm.budget))
    return tuple(Scoring(rows, times, kept.get(rows, 0)) for rows, times in sorted(passes.items()))
