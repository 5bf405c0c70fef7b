"""One training step (paper, algorithm 1): sample, score, branch, learn.

N rollouts per prompt are drawn from π_old. Then, for each mini-batch: score them under the current π_θ, branch where the
Branching Score is highest, give rewards, compute procedural advantages, update. A baseline leaves some of these parts out.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from appo_jax.advantage.groups import without_spread
from appo_jax.algorithms import Algorithm
from appo_jax.components import Components, give_rewards
from appo_jax.config import LossConfig
from appo_jax.digests import identity
from appo_jax.learner.batch import Measured, make_batch, make_terms
from appo_jax.learner.loss import kl_estimate
from appo_jax.learner.step import TrainBatch, TrainState
from appo_jax.policy.adapters import with_adapters
from appo_jax.policy.constraints import row_shards
from appo_jax.policy.parameters import Params
from appo_jax.policy.sharding import batch_shardings, place
from appo_jax.reward import require_rewards
from appo_jax.rollout.growth import Growth, TreeGrower
from appo_jax.rollout.sampler import Purpose, Sampler
from appo_jax.rollout.scoring import log_probs, of_drawers, scores
from appo_jax.rollout.shapes import Shapes
from appo_jax.rollout.stats import over_updates, rollout_metrics, update_metrics
from appo_jax.text.tokenizer import vocabulary
from appo_jax.timing import Timer
from appo_jax.types import Example, Rollout, Tree, release_states

Update = Callable[[TrainState, TrainBatch], tuple[TrainState, dict[str, jax.Array]]]


@dataclasses.dataclass(frozen=True)
class Trainer:
    """The objects that every step of a run uses."""

    components: Components
    algorithm: Algorithm
    grower: TreeGrower
    update: Update
    reference: Params | None
    """The parameters of π_ref, for a KL term."""
    base: Params | None = None
    """The frozen weights of a policy whose adapters are trained."""

    def policy(self, state: TrainState) -> Params:
        """The parameters of the policy."""
        return with_adapters(self.base, state.params)

    @functools.cached_property
    def origin(self) -> dict[str, str]:
        """What a run that is continued finds again: digests of the frozen weights, of a π_ref of its own ("": it has none) and of
        the tokenizer's vocabulary, and the dtype of matrix products. A checkpoint keeps it."""
        parts = {"base": self.base, "reference": None if self.reference is self.base else self.reference}
        digests = {name: "" if params is None else identity(params) for name, params in parts.items()}
        return digests | {
            "tokenizer": vocabulary(self.components.tokenizer), "dtype": str(self.components.dtype),
        }  # fmt: skip


def train_step(
    trainer: Trainer, index: int, state: TrainState, examples: Sequence[Example], more: Iterator[Sequence[Example]]
) -> tuple[TrainState, dict[str, Any], list[Tree]]:
    """One step on `examples`: sample under π_old, which is the current policy; then score, branch and learn for each mini-batch.

    Consumes `state`. `index`: the number of earlier steps. `more`: further batches of prompts for dynamic sampling. Returns the
    new state, the metrics and all trees.
    """
    algorithm, size = trainer.algorithm, trainer.components.config.prompts_per_minibatch
    step = Step(trainer, index)
    trees = step.sample(trainer.policy(state), examples, more)
    minibatches = [Minibatch(i, trees[first : first + size]) for i, first in enumerate(range(0, len(trees), size))]
    # log π_old is computed here once, by the program that computes log π_θ later. So their difference is caused only by the
    # policy's updates, and not by the rounding of two different programs.
    for minibatch in minibatches:
        minibatch.old_log_probs = step.score(trainer.policy(state), minibatch.trees, algorithm.initial)
    if algorithm.branches_at_start:
        for minibatch in minibatches:
            step.branch(trainer.policy(state), minibatch)
    if algorithm.branches_at_start and algorithm.needs_old_of_branches:
        for minibatch in minibatches:
            scored = step.score(trainer.policy(state), minibatch.trees, algorithm.budget)
            if not algorithm.train_branches:  # `measure` packs the initial rollouts alone: their old numbers stay
                later = [values[algorithm.initial :] for values in scored]
                scored = of_drawers(minibatch.trees, minibatch.old_log_probs, later)
            minibatch.old_log_probs = scored
    for minibatch in minibatches:
        if algorithm.branches_later:
            step.branch(trainer.policy(state), minibatch)
        state = step.learn(state, minibatch, step.measure(trainer.policy(state), minibatch))
    return state, step.record(minibatches), [tree for minibatch in minibatches for tree in minibatch.trees]


@dataclasses.dataclass
class Minibatch:
    """The prompts of one update, and what the step has computed for them so far."""

    index: int
    trees: list[Tree]
    """Their rollouts: at first the initial ones, after `Step.branch` also the branches."""
    old_log_probs: list[list[np.ndarray]] = dataclasses.field(default_factory=list)
    """log π_old `[T]` of each tree's first rollouts: the initial ones, and the branches that π_old drew."""
    growth: Growth | None = None
    """The result of branching."""
    update: dict[str, float] = dataclasses.field(default_factory=dict)
    """The metrics of the update."""


class Step:
    """The parts of one training step. They share a timer."""

    def __init__(self, trainer: Trainer, index: int):
        self.trainer, self.index = trainer, index
        self.components, self.algorithm, self.grower = trainer.components, trainer.algorithm, trainer.grower
        self.sampler = self.components.sampler
        self.shapes = Shapes.of(self.algorithm, row_shards(self.components.mesh))
        self.timer = Timer()
        self.resampled = 0

    def sample(self, params: Params, examples: Sequence[Example], more: Iterator[Sequence[Example]]) -> list[Tree]:
        """The initial rollouts of every prompt, with rewards. Raises TrainingError if no rollout has one.

        Dynamic sampling: a prompt whose rewards are all equal gives no gradient. It is replaced by another prompt, at most
        `max_resamples` times. Batches of `more` are taken as they are needed. A step begins with a new batch: what is left of
        them at its end is not used, because a checkpoint holds the position of `more` only.
        """
        trees = self._draw(params, examples, (Purpose.INITIAL, self.index))
        require_rewards([rollout for tree in trees for rollout in tree])
        unused: list[Example] = []
        attempts = self.algorithm.max_resamples
        for attempt in range(attempts):
            flat = [i for i, tree in enumerate(trees) if without_spread(np.array([r.reward for r in tree]))]
            if len(unused) < len(flat):
                unused += next(more, ())
            others, unused = unused[: len(flat)], unused[len(flat) :]
            draw_id = (Purpose.RESAMPLE, self.index * attempts + attempt)
            drawn = self._draw(params, others, draw_id) if others else []
            for i, tree in zip(flat, drawn, strict=False):
                trees[i] = tree
            self.resampled += len(drawn)
        return trees

    def score(self, params: Params, trees: Sequence[Tree], per_tree: int) -> list[list[np.ndarray]]:
        """The log-probabilities `[T]` of every rollout's tokens under a policy, for each tree. `per_tree`: see `scores`."""
        with self.timer("score"):
            return log_probs(self.sampler, params, trees, per_tree)

    def branch(self, params: Params, minibatch: Minibatch) -> None:
        """Fill the budget of every prompt with branches, and give them their rewards."""
        with self.timer("branch"):
            draw_id = (Purpose.BRANCH, self.index, minibatch.index)
            minibatch.growth = self.grower.grow(params, minibatch.trees, minibatch.old_log_probs, draw_id)
            minibatch.trees = minibatch.growth.trees
            release_states(rollout for tree in minibatch.trees for rollout in tree)
        self._reward([r for tree in minibatch.trees for r in tree if not r.is_initial])

    def measure(self, params: Params, minibatch: Minibatch) -> Measured:
        """The log-probs, entropies and penalties of the trained tokens that the loss needs, under the current policy and π_ref."""
        algorithm, reference, growth = self.algorithm, self.trainer.reference, minibatch.growth
        trained = [list(algorithm.trained(tree)) for tree in minibatch.trees]
        present = ref = penalties = entropies = None
        old: Sequence[Sequence[np.ndarray]] = minibatch.old_log_probs
        with self.timer("score"):
            if algorithm.trains_later_branches:
                assert growth is not None
                # Branching has scored the initial rollouts, packed as for log π_old: in other company their last bits differ.
                first = [tree[: algorithm.initial] for tree in growth.scores]
                branches = [tree[algorithm.initial :] for tree in minibatch.trees]
                later, of_branches = scores(self.sampler, params, branches, algorithm.budget - algorithm.initial)
                old = of_drawers(trained, old, later)
                present = of_drawers(trained, [[node.log_probs for node in tree] for tree in first], later)
                known = [[node.entropies for node in tree] for tree in first]
                entropies = [[*a, *b] for a, b in zip(known, of_branches, strict=True)]
            elif algorithm.scores_present:
                present, entropies = scores(self.sampler, params, trained, algorithm.trained_per_prompt)
            elif algorithm.needs_present and growth is not None:  # branching has scored them under the current policy
                present = [[node.log_probs for node in tree] for tree in growth.scores]
                entropies = [[node.entropies for node in tree] for tree in growth.scores]
            if reference is not None and algorithm.scores_reference:
                ref = log_probs(self.sampler, reference, trained, algorithm.trained_per_prompt)
            elif reference is not None:
                penalties = _kl_penalties(
                    self.sampler, params, reference, minibatch.trees, minibatch.old_log_probs, algorithm.loss, self.shapes
                )  # fmt: skip
        return Measured(old, present, ref, penalties, entropies)

    def learn(self, state: TrainState, minibatch: Minibatch, measured: Measured) -> TrainState:
        """One update on the trained rollouts of the mini-batch. Consumes `state`."""
        mesh = self.components.mesh
        with self.timer("update"):
            length = self.shapes.rollout_length
            terms, base = make_terms(minibatch.trees, measured, self.algorithm, length)
            tokens = [rollout.tokens for tree in minibatch.trees for rollout in self.algorithm.trained(tree)]
            batch = make_batch(tokens, terms, self.shapes.update(self.components.config, self.algorithm))
            state, results = self.trainer.update(state, place(batch, batch_shardings(batch, mesh), mesh))
            results = jax.device_get(results)
            minibatch.update = update_metrics(results, base, minibatch.growth, self.algorithm.initial)
        return state

    def record(self, minibatches: Sequence[Minibatch]) -> dict[str, Any]:
        """The step's metrics. docs/method.md explains them."""
        trees = [tree for minibatch in minibatches for tree in minibatch.trees]
        record = rollout_metrics(trees, self.sampler.take_stats()) | self.components.executor.metrics()
        record |= self.components.reward.metrics()
        if self.algorithm.max_resamples:
            record["rollout/resampled_prompts"] = self.resampled
        record |= over_updates([minibatch.update for minibatch in minibatches]) | self.timer.metrics()
        record["time/tokens_per_s"] = record["rollout/sampled_tokens"] / record["time/step_s"]
        return record

    def _draw(self, params: Params, examples: Sequence[Example], draw_id: Sequence[int]) -> list[Tree]:
        with self.timer("rollout"):
            trees = self.sampler.initial(
                params,
                examples,
                self.algorithm.initial,
                draw_id,
                max_examples=self.components.config.prompts_per_step,
            )
        if not self.algorithm.branches:
            release_states(rollout for tree in trees for rollout in tree)
        self._reward([rollout for tree in trees for rollout in tree])
        return trees

    def _reward(self, rollouts: Sequence[Rollout]) -> None:
        with self.timer("reward"):
            give_rewards(rollouts, self.components, self.algorithm.overlong_buffer)


def _kl_penalties(
    sampler: Sampler, params: Params, reference: Params, trees: Sequence[Tree], old: Sequence[Sequence[np.ndarray]],
    loss: LossConfig, shapes: Shapes,
) -> list[list[np.ndarray]]:  # fmt: skip
    """β·KL(π‖π_ref) at each sampled token `[T]` of every rollout, where π is the policy that drew the token.

    `old`: the log-probs under π_old of each tree's first rollouts. `params` drew the other rollouts, which are branches, from
    their forks on; the tokens before a fork were drawn by the policy that drew the parent.
    """
    budget = shapes.rollout.budget
    later = [tree[len(known) :] for tree, known in zip(trees, old, strict=True)]
    branches = log_probs(sampler, params, later, budget - min(map(len, old)))
    by_drawer = of_drawers(trees, old, branches)
    by_reference = log_probs(sampler, reference, trees, budget)

    def penalty(rollout: Rollout, drawn: np.ndarray, ref: np.ndarray) -> np.ndarray:
        padding = (0, shapes.rollout_length - rollout.length)  # so that all rollouts have one shape and use one program
        drawn, ref = (np.pad(x, padding) for x in (drawn, ref))
        kl = kl_estimate(jnp.asarray(drawn), jnp.asarray(ref), loss.kl_estimator, loss.max_k3)
        return np.where(rollout.sampled, loss.kl_weight * np.asarray(kl)[: rollout.length], 0.0)

    return [
        [penalty(*x) for x in zip(tree, drawn, refs, strict=True)]
        for tree, drawn, refs in zip(trees, by_drawer, by_reference, strict=True)
    ]
