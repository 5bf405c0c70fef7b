"""Algorithms by name. They share the loop, the budget and the logging; each is three choices:

how many of the M rollouts are drawn from π_old at once, whether the rest are branches, and the advantage.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from appo_jax.advantage.groups import base_advantage
from appo_jax.advantage.procedural import procedural_advantage
from appo_jax.config import AdvantageConfig, Config
from appo_jax.learner.loss import token_weights
from appo_jax.learner.step import TrainBatch
from appo_jax.rollout.batch import Batch
from appo_jax.rollout.tree import NodeScores
from appo_jax.types import Rollout


@dataclasses.dataclass(frozen=True)
class Algorithm:
    """`initial` rollouts per prompt; `branches`: fill the budget M by branching; `advantage`: None for no future scaling."""

    initial: int
    branches: bool
    advantage: AdvantageConfig


def make_algorithm(config: Config) -> Algorithm:
    """The algorithm that `config.algorithm` names."""
    if config.algorithm == "appo":
        return Algorithm(config.rollout.num_initial, branches=True, advantage=config.advantage)
    # GRPO: all M rollouts are initial ones; A = z-score within them; no future, so the scale 1 + b·clip(Ω) is 1.
    advantage = dataclasses.replace(config.advantage, base="init_only", future_weight=0.0)
    return Algorithm(config.rollout.budget, branches=False, advantage=advantage)


def make_batch(
    trees: Sequence[Sequence[Rollout]],
    old_log_probs: Sequence[Sequence[np.ndarray]],
    ref_log_probs: Sequence[Sequence[np.ndarray]] | None,
    scores: Sequence[Sequence[NodeScores]] | None,
    algorithm: Algorithm,
    config: Config,
    length: int,
) -> tuple[TrainBatch, np.ndarray]:
    """The mini-batch of the loss (initial rollouts only) and the base advantages `[P, N]`.

    trees: P prompts' rollouts with their rewards, initial ones first; old_log_probs (and, for a loss with a KL term,
    ref_log_probs) of the initial ones; scores from the growth, None without branches. Weights follow eq. 8's
    normalisation; truncated rollouts have none with `loss.mask_truncated`.
    """
    N = algorithm.initial
    initial = [rollout for tree in trees for rollout in tree[:N]]
    rows = len(initial)
    batch = Batch.of(initial, rows, length)
    base = np.stack(
        [
            base_advantage(
                np.array([r.reward for r in tree[:N]], np.float64), np.array([r.reward for r in tree[N:]], np.float64),
                algorithm.advantage,
            )
            for tree in trees
        ]
    )  # fmt: skip

    def padded(per_tree: Sequence[Sequence[np.ndarray]], fill: float) -> np.ndarray:
        out = np.full((rows, length), fill, np.float32)
        for i, values in enumerate(values for tree in per_tree for values in tree[:N]):
            out[i, : len(values)] = values
        return out

    future = np.ones((rows, length), np.float32)
    if scores is not None:
        future = padded([[s.future_value for s in tree] for tree in scores], 1.0)
    loss_mask = batch.sampled.copy()
    if config.loss.mask_truncated:
        loss_mask[[rollout.truncated for rollout in initial]] = False
    weights = token_weights(loss_mask, config.rollout.budget, len(trees), config.loss.aggregation)
    advantages = procedural_advantage(
        jnp.asarray(base.reshape(-1), jnp.float32), jnp.asarray(future), algorithm.advantage
    )
    ref = None if ref_log_probs is None else jnp.asarray(padded(ref_log_probs, 0.0))
    old = jnp.asarray(padded(old_log_probs, 0.0))
    return TrainBatch(jnp.asarray(batch.tokens), jnp.asarray(weights), advantages, old, ref), base
