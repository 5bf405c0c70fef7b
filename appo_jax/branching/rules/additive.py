"""A weighted sum of Z(H) and Z(clip(Ω)): the ablation that adds instead of multiplying."""

from __future__ import annotations

from appo_jax.branching.rule import ByScore, Ranking, ZScores
from appo_jax.config import BranchingConfig


def score(z: ZScores, config: BranchingConfig) -> Ranking:
    return Ranking.by(config.entropy_weight * z.entropy + config.future_weight * z.future)


RULE = ByScore(score)
