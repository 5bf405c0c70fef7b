"""Statistics on how well scores find influential positions: rank correlation with influence, precision against known
decisions, and the words of the first positions."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from appo_jax.branching.select import rank_positions

RESAMPLES = 2000


@dataclasses.dataclass(frozen=True)
class Interval:
    """An estimate and its 95 % interval, from resampled rollouts."""

    value: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Ranked:
    """The scores of a rollout's positions, and facts about the positions. Arrays are `[T]`."""

    scores: Mapping[str, np.ndarray]
    preferred: Mapping[str, np.ndarray]  # by score: the preferred positions, which rank before all others
    future_value: np.ndarray  # Ω
    valid: np.ndarray  # positions where a branch may begin
    sampled: np.ndarray
    decisions: np.ndarray | None  # positions that are decisions, if the data source knows them
    after_tool: np.ndarray  # first tokens after a tool result
    words: Sequence[str]  # the text of each token

    def top(self, name: str, count: int) -> list[int]:
        return rank_positions(self.scores[name], self.preferred[name], self.valid, self.sampled)[:count]


def precision(rollouts: Sequence[Ranked], name: str, count: int) -> Interval:
    """The share of decisions among the first `count` positions by a score, averaged over rollouts."""
    hits = [np.mean(r.decisions[r.top(name, count)]) for r in rollouts if r.decisions is not None and r.valid.any()]
    return over_rollouts([[hit] for hit in hits], lambda rows: float(np.mean(rows)))


def chance(rollouts: Sequence[Ranked]) -> Interval:
    """The precision of a random choice: the share of decisions among valid positions."""
    shares = [r.decisions[r.valid].mean() for r in rollouts if r.decisions is not None and r.valid.any()]
    return over_rollouts([[share] for share in shares], lambda rows: float(np.mean(rows)))


def correlation(pairs: Sequence[Sequence[tuple[float, float]]]) -> Interval:
    """Spearman's rank correlation of (score, influence) over all measured positions. `pairs`: for each rollout."""

    def spearman(rows: Sequence[tuple[float, float]]) -> float:
        x, y = np.array(rows, float).T
        if np.ptp(x) == 0 or np.ptp(y) == 0:
            return 0.0
        return float(stats.spearmanr(x, y).statistic)

    return over_rollouts(pairs, spearman)


def over_rollouts(rows: Sequence[Sequence[Any]], figure: Callable[[Sequence[Any]], float]) -> Interval:
    """A statistic of all entries, with its percentile-bootstrap interval over rollouts."""
    rows = [row for row in rows if len(row)]
    if not rows:
        return Interval(*[float("nan")] * 3)
    rng = np.random.default_rng(0)
    resampled = [
        figure([entry for i in rng.integers(len(rows), size=len(rows)) for entry in rows[i]]) for _ in range(RESAMPLES)
    ]
    return Interval(
        figure([entry for row in rows for entry in row]), *map(float, np.quantile(resampled, (0.025, 0.975)))
    )


def share_after_tools(rollouts: Sequence[Ranked], name: str, count: int) -> float:
    """The share of positions that begin a turn after a tool result, among each rollout's first `count` by a score."""
    return float(np.mean([r.after_tool[t] for r in rollouts for t in r.top(name, count)]))


def top_words(rollouts: Sequence[Ranked], name: str, count: int) -> list[tuple[str, int]]:
    """The 20 most frequent words among each rollout's first `count` positions by a score."""
    return Counter(r.words[t].strip() for r in rollouts for t in r.top(name, count)).most_common(20)
