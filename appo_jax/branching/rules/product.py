"""BS = Z(H) · Z(clip(Ω)), the paper's Branching Score (eq. 5)."""

from __future__ import annotations

import jax.numpy as jnp

from appo_jax.branching.rule import ByScore, Ranking, ZScores
from appo_jax.config import BranchingConfig


def score(z: ZScores, config: BranchingConfig) -> Ranking:
    """A clip(Ω) that does not vary says nothing and leaves Z(H), as in the first mini-batch, where π_θ = π_old.

    With the gate `both_positive`, positions where both factors are positive are preferred: a product of two negatives is no
    reason to branch. Where Ω does not vary, the gate is not needed.
    """
    constant = z.constant_future[:, None]
    value = jnp.where(constant, z.entropy, z.entropy * z.future)
    both = (z.entropy > 0) & (z.future > 0)
    everywhere = jnp.ones(value.shape, bool)
    return Ranking(value, jnp.where(constant | (config.gate == "literal"), everywhere, both))


RULE = ByScore(score)
