"""Optimizers from optax: AdamW for RL; AdamW or Muon, with a decaying rate, for the cold start."""

from __future__ import annotations

from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers, muon

from appo_jax.config import OptimizerConfig, SFTConfig
from appo_jax.policy.transformer import Params

# Which axes of a matrix take its input and which give its output; every other parameter is left to AdamW.
_MATRICES = {
    "q": MuonDimensionNumbers(0, (1, 2)),
    "k": MuonDimensionNumbers(0, (1, 2)),
    "v": MuonDimensionNumbers(0, (1, 2)),
    "o": MuonDimensionNumbers((0, 1), 2),
    "gate": MuonDimensionNumbers(0, 1),
    "up": MuonDimensionNumbers(0, 1),
    "down": MuonDimensionNumbers(0, 1),
}


def rl_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """AdamW at a constant rate after a linear warm-up, gradients clipped by their global norm."""
    schedule: Any = config.learning_rate
    if config.warmup_steps:
        schedule = optax.linear_schedule(0.0, config.learning_rate, config.warmup_steps)
    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.adamw(schedule, b1=config.b1, b2=config.b2, weight_decay=config.weight_decay),
    )


def sft_optimizer(config: SFTConfig, shared: OptimizerConfig) -> optax.GradientTransformation:
    """The cold start's optimizer: linear warm-up, then a cosine fall to 0 at its last step. `shared`: decays, clipping."""

    def schedule(peak: float) -> optax.Schedule:
        warmup = max(1, round(config.warmup_fraction * config.steps))
        return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, max(config.steps, warmup + 1))

    if config.optimizer == "adamw":
        update = optax.adamw(
            schedule(config.learning_rate), b1=shared.b1, b2=shared.b2, weight_decay=config.weight_decay
        )
    else:
        update = muon(
            schedule(config.learning_rate),
            adam_b1=shared.b1,
            adam_b2=shared.b2,
            adam_learning_rate=schedule(config.learning_rate / MUON_TO_ADAM),
            weight_decay=config.weight_decay,
            muon_weight_dimension_numbers=_dimension_numbers,
        )
    return optax.chain(optax.clip_by_global_norm(shared.max_grad_norm), update)


# Muon's steps have unit spectral norm; embeddings and norms, which AdamW moves, want smaller ones.
MUON_TO_ADAM = 7.0


def _dimension_numbers(params: Params) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: _MATRICES.get(path[-1].key), params)
