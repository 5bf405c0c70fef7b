"""Pads rollouts of different lengths to arrays for jit."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from appo_jax.types import Rollout


@dataclasses.dataclass(frozen=True)
class Batch:
    """Rollouts padded on the right to T tokens, and with empty rows to R."""

    tokens: np.ndarray  # [R, T] int32
    sampled: np.ndarray  # [R, T] bool

    @classmethod
    def of(cls, rollouts: Sequence[Rollout], rows: int, length: int) -> Batch:
        """Raises ValueError for a rollout longer than `length` or more rollouts than `rows`."""
        if len(rollouts) > rows or any(r.length > length for r in rollouts):
            longest = max(r.length for r in rollouts)
            raise ValueError(f"{len(rollouts)} rollouts of up to {longest} tokens do not fit in [{rows}, {length}]")
        tokens, sampled = np.zeros((rows, length), np.int32), np.zeros((rows, length), bool)
        for i, rollout in enumerate(rollouts):
            tokens[i, : rollout.length] = rollout.tokens
            sampled[i, : rollout.length] = rollout.sampled
        return cls(tokens, sampled)
