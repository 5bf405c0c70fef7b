"""Z(clip(Ω)) alone: the ablation without the entropy."""

from __future__ import annotations

from appo_jax.branching.rule import ByScore, Ranking, ZScores
from appo_jax.config import BranchingConfig


def score(z: ZScores, config: BranchingConfig) -> Ranking:
    return Ranking.by(z.future)


RULE = ByScore(score)
