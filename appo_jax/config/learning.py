"""Learning: the optimizer of RL, and the cold start before it."""

from __future__ import annotations

import dataclasses
from typing import Literal

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from appo_jax.config.bounds import BelowOne, Fraction

Remat = Literal["none", "matmuls", "layers"]


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW of the RL updates, and the size of micro-batches. max_grad_norm, b1, b2 and remat apply to the cold start too."""

    learning_rate: PositiveFloat = 1e-6
    """Rate after the warm-up; constant from then on. Official code: 1e-6."""
    warmup_steps: NonNegativeInt = 0
    """Updates (mini-batches) over which the rate rises linearly from 0. 0: none."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay, per unit of rate. 0: off."""
    max_grad_norm: PositiveFloat = 1.0
    """A gradient with a larger norm is scaled down to it."""
    b1: BelowOne = 0.9
    """Adam's decay of the first moment."""
    b2: BelowOne = 0.999
    """Adam's decay of the second moment."""
    micro_batch: NonNegativeInt = 0
    """Rows per forward-backward pass, each as long as the longest rollout and filled with several; gradients are accumulated.
    Short rows are joined to fewer, longer ones with the same number of tokens. 0: as many as hold about 500 tokens on each
    device."""
    remat: Remat = "none"
    """What the backward pass computes again instead of keeping it. none: nothing; matmuls: all except each layer's matrix
    products; layers: all except each layer's input. Each choice needs less memory and more time than the one before."""


@dataclasses.dataclass(frozen=True)
class SFTConfig:
    """The cold start: supervised fine-tuning on tool-use traces, before RL."""

    steps: NonNegativeInt = 0
    """Updates of the cold start. 0: no cold start."""
    traces: tuple[str, ...] = ()
    """Files of traces (docs/traces.md) to train on. Empty: the demonstrations of the data source and of the tools."""
    batch_size: PositiveInt = 128
    """Rows of `max_tokens` tokens per update; whole traces are packed into them. Paper: 128."""
    max_tokens: PositiveInt = 4096
    """Tokens of a row. Longer traces are left out and counted. Paper: 4096."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: for policies that start from random weights; it needs half the steps there."""
    learning_rate: PositiveFloat = 7e-6
    """Highest rate: after the warm-up, before the cosine fall to 0 at the last step. Paper: 7e-6."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay, per unit of rate. Paper: 0.1."""
    warmup_fraction: Fraction = 0.05
    """Share of `steps` over which the rate rises linearly from 0. 0: the first step has the highest rate. So has a single step."""
    micro_batch: NonNegativeInt = 0
    """Rows per forward-backward pass. Divides batch_size. 0: the whole batch at once."""
    checkpoint_every: PositiveInt = 500
    """Updates between two checkpoints of the cold start."""
