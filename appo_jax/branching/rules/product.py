"""BS = Z(H) · Z(clip(Ω)), the paper's Branching Score (eq. 5)."""

from __future__ import annotations

import jax.numpy as jnp

from appo_jax.branching.rule import ByScore, Ranking, ZScores
from appo_jax.config import BranchingConfig


def score(z: ZScores, config: BranchingConfig) -> Ranking:
    """Where clip(Ω) does not vary over the rollout, the score is Z(H); so it is in the first mini-batch, where π_θ =
    π_old. The gate `both_positive` prefers positions where both factors are positive, because a product of two
    negatives is no reason to branch. It does not apply where Ω does not vary.
    """
    constant = z.constant_future[:, None]
    value = jnp.where(constant, z.entropy, z.entropy * z.future)
    both = (z.entropy > 0) & (z.future > 0)
    everywhere = jnp.ones(value.shape, bool)
    return Ranking(value, jnp.where(constant | (config.gate == "literal"), everywhere, both))


RULE = ByScore(score)
