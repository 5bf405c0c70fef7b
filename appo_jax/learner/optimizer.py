"""Optimizers from optax: AdamW for RL; AdamW or Muon, with a decaying rate, for the cold start."""

from __future__ import annotations

from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers, muon

from appo_jax.config import OptimizerConfig, SFTConfig
from appo_jax.policy.parameters import Params, row_of


def rl_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """AdamW: a linear warm-up, then a constant rate. Gradients are clipped by their global norm."""
    schedule: Any = config.learning_rate
    if config.warmup_steps:
        schedule = optax.linear_schedule(0.0, config.learning_rate, config.warmup_steps)
    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.adamw(schedule, b1=config.b1, b2=config.b2, weight_decay=config.weight_decay),
    )


def sft_optimizer(config: SFTConfig, shared: OptimizerConfig) -> optax.GradientTransformation:
    """The cold start's optimizer: a linear warm-up from 0, then a cosine decay to 0 at its last step. Without a warm-up, and in a
    cold start of one step, the first step has the highest rate.

    `shared`: the moments' decay rates and the gradient clipping, which RL uses too. The weight decay is `config`'s own.
    """

    def schedule(peak: float) -> optax.Schedule:
        if config.warmup_fraction == 0 or config.steps <= 1:
            return optax.cosine_decay_schedule(peak, max(config.steps, 1))
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


# Muon's rate over AdamW's. Muon's updates have unit spectral norm; embeddings and norms, which AdamW updates, need smaller ones.
MUON_TO_ADAM = 7.0


def _dimension_numbers(params: Params) -> Any:
    """For each parameter, which axes are a matrix's inputs and which its outputs; None: AdamW updates it."""

    def numbers(path: tuple[Any, ...], x: jax.Array) -> MuonDimensionNumbers | None:
        row = row_of(path)
        if row.kind != "matrix":
            return None
        return MuonDimensionNumbers(tuple(range(row.inputs)), tuple(range(row.inputs, x.ndim)))

    return jax.tree_util.tree_map_with_path(numbers, params)
