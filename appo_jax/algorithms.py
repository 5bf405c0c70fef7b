"""Algorithms by name. They share the loop, the budget and the logging; each is three choices:

a plan for the rollouts (how many are drawn at once, how the rest are branched, which are trained on), an advantage, and a
loss. Every choice is also a config field: a name sets the fields that make the algorithm, and the config's hold for the rest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from appo_jax.advantage.base import base_advantages
from appo_jax.advantage.procedural import procedural_advantage
from appo_jax.config import AdvantageConfig, BranchingConfig, Config, LossConfig
from appo_jax.learner.loss import sampler_correction, token_weights
from appo_jax.learner.step import TrainBatch
from appo_jax.rollout.batch import Batch
from appo_jax.types import Rollout

# What a name sets where the config leaves the field off.
KL_WEIGHT = 1e-3  # reinforce_pp
OVERLONG_SHARE = 0.2  # dapo: of the room for a response
MAX_RESAMPLES = 3  # dapo


@dataclasses.dataclass(frozen=True)
class Algorithm:
    """What `config.algorithm` stands for."""

    initial: int  # rollouts per prompt drawn at once from π_old
    branches: bool  # whether the rest of the budget M is branched
    train_branches: bool  # whether branches are trained on, or inform the advantages alone
    branching: BranchingConfig
    advantage: AdvantageConfig
    loss: LossConfig
    overlong_buffer: int
    max_resamples: int

    def trained(self, tree: Sequence[Rollout]) -> Sequence[Rollout]:
        """The rollouts of a tree that the loss sees."""
        return tree if self.train_branches else tree[: self.initial]


def make_algorithm(config: Config) -> Algorithm:
    """The algorithm that `config.algorithm` names."""
    replace, loss = dataclasses.replace, config.loss
    appo = Algorithm(
        config.rollout.num_initial, branches=True, train_branches=False, branching=config.branching,
        advantage=config.advantage, loss=loss, overlong_buffer=config.reward.overlong_buffer, max_resamples=config.max_resamples,
    )  # fmt: skip
    # GRPO: all M rollouts are initial ones; A = z-score within them; no future, so the scale 1 + b·clip(Ω) is 1.
    plain = replace(config.advantage, base="init_only", scaling="offset", future_weight=0.0)
    grpo = replace(appo, initial=config.rollout.budget, branches=False, advantage=plain)
    # Baselines that branch and train on every rollout. All are drawn at the step's start: they need log π_old.
    by_turns = replace(config.branching, refresh="step", allocation="per_rollout")
    trees = replace(appo, train_branches=True)
    match config.algorithm:
        case "appo":
            return appo
        case "grpo":
            return grpo
        case "reinforce_pp":  # advantages normalised over the mini-batch, KL per token in the reward
            weight = loss.kl_weight or KL_WEIGHT
            loss = replace(loss, kl_in="reward", kl_estimator="k1", kl_weight=weight, aggregation="token_mean")
            return replace(grpo, advantage=replace(plain, base="global"), loss=loss)
        case "dapo":  # clip-higher, token mean, dynamic sampling, overlong shaping
            return replace(
                grpo,
                loss=replace(loss, clip_low=0.2, clip_high=0.28, aggregation="token_mean"),
                overlong_buffer=config.reward.overlong_buffer
                or round(OVERLONG_SHARE * config.rollout.max_response_tokens),
                max_resamples=config.max_resamples or MAX_RESAMPLES,
            )
        case "gppo":  # clipped tokens keep a bounded gradient
            return replace(grpo, loss=replace(loss, surrogate="gppo", dual_clip=0.0, max_dual_clipped=-1))
        case "cispo":  # no lower bound of the weight, as in its paper; the upper one is the config's
            cispo = replace(loss, surrogate="cispo", clip_low=1.0, dual_clip=0.0, max_dual_clipped=-1)
            return replace(grpo, loss=replace(cispo, aggregation="token_mean"))
        case "gigpo":  # episode plus equal states
            return replace(grpo, advantage=replace(plain, base="turn"))
        case "arpo":  # branches after tool calls where the entropy rose; one group of all M
            branching = replace(by_turns, score="entropy_change")
            return replace(trees, branching=branching, advantage=replace(plain, base="joint"))
        case "tree_grpo":  # branches at random turns; advantages within and between trees
            branching = replace(by_turns, score="random_turn")
            return replace(trees, branching=branching, advantage=replace(plain, base="tree"))
        case "fipo":  # GRPO scaled by the clipped future value
            return replace(grpo, advantage=replace(plain, scaling="plain"))


def make_batch(
    trees: Sequence[Sequence[Rollout]],
    old_log_probs: Sequence[Sequence[np.ndarray]],
    ref_log_probs: Sequence[Sequence[np.ndarray]] | None,
    future_values: Sequence[Sequence[np.ndarray]] | None,
    algorithm: Algorithm,
    config: Config,
    length: int,
    penalties: Sequence[Sequence[np.ndarray]] | None = None,
) -> tuple[TrainBatch, list[np.ndarray]]:
    """The mini-batch of the loss, and A_base at the sampled tokens of each of its rollouts.

    trees: P prompts' rollouts with their rewards, initial ones first. Of the trained ones, by tree and each `[T]`:
    old_log_probs; ref_log_probs for a loss with a KL term; future_values Ω, None where the advantage does not use them.
    penalties: `[T]` of every rollout, taken off the reward. Weights follow eq. 8's normalisation; truncated rollouts have
    none with `loss.mask_truncated`.
    """
    loss = algorithm.loss
    rollouts = [rollout for tree in trees for rollout in algorithm.trained(tree)]
    rows = len(rollouts)
    batch = Batch.of(rollouts, rows, length)

    def padded(by_tree: Sequence[Sequence[np.ndarray]], fill: float = 0.0) -> np.ndarray:
        out = np.full((rows, length), fill, np.float32)
        values = (x for xs, tree in zip(by_tree, trees, strict=True) for x in xs[: len(algorithm.trained(tree))])
        for row, x in zip(out, values, strict=True):
            row[: len(x)] = x
        return out

    base = padded(base_advantages(trees, penalties, algorithm.advantage))
    future = np.ones_like(base) if future_values is None else padded(future_values, 1.0)
    old = padded(old_log_probs)
    loss_mask = batch.sampled.copy()
    if loss.mask_truncated:
        loss_mask[[rollout.truncated for rollout in rollouts]] = False
    weights = token_weights(loss_mask, config.rollout.budget, len(trees), loss.aggregation)
    if loss.sampler_cap:
        drawn = padded([[rollout.log_probs for rollout in tree] for tree in trees])
        weights *= np.where(loss_mask, sampler_correction(old, drawn, loss.sampler_cap), 0.0)
    advantages = procedural_advantage(jnp.asarray(base), jnp.asarray(future), algorithm.advantage)
    ref = None if ref_log_probs is None else jnp.asarray(padded(ref_log_probs))
    arrays = TrainBatch(jnp.asarray(batch.tokens), jnp.asarray(weights), advantages, jnp.asarray(old), ref)
    return arrays, [row[sampled] for row, sampled in zip(base, batch.sampled, strict=True)]
