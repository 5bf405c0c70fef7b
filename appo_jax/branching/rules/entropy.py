"""Z(H) alone: the ablation without the future value."""

from __future__ import annotations

from appo_jax.branching.rule import ByScore, Ranking, ZScores
from appo_jax.config import BranchingConfig


def score(z: ZScores, config: BranchingConfig) -> Ranking:
    return Ranking.by(z.entropy)


RULE = ByScore(score)
