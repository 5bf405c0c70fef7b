"""Statistics on how well scores find influential positions: rank correlation with influence, precision against known
decisions, and the words of the first positions.

Figures with an interval are means over questions, because the rollouts of a question are not independent."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import inf
from typing import Any, TypeVar

import numpy as np
from scipy import stats

from appo_jax.benchmark.statistics import over_questions
from appo_jax.branching.select import rank_positions

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean over questions and its 95 % interval, from resampled questions."""

    value: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Place:
    """A measured position: where a score ranks it, and its influence."""

    preferred: bool  # preferred positions rank before all others
    score: float
    influence: float


@dataclasses.dataclass(frozen=True)
class Ranked:
    """The scores of a rollout's positions, and facts about the positions. Arrays are `[T]`."""

    question: str
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
    """The share of decisions among the first `count` positions of a rollout by a score."""
    return _share(rollouts, lambda r: r.top(name, count))


def chance(rollouts: Sequence[Ranked]) -> Interval:
    """The precision of a random choice: the share of decisions among valid positions."""
    return _share(rollouts, lambda r: r.valid)


def _share(rollouts: Sequence[Ranked], chosen: Callable[[Ranked], Any]) -> Interval:
    """The share of decisions among the positions that `chosen` gives of each rollout."""
    shares = [[r.decisions[chosen(r)].mean()] if r.decisions is not None and r.valid.any() else [] for r in rollouts]
    return mean_over_questions(shares, [r.question for r in rollouts], (0.0, 1.0))


def correlation(places: Sequence[Sequence[Place]], questions: Sequence[str]) -> Interval:
    """Spearman's correlation of a score's ranking with influence, among the measured positions of a question.

    `places`: those of each rollout; `questions`: that of each rollout. All positions of a question are ranked together, preferred
    ones first, by score. A score that ranks all of them equally has correlation 0. A question whose positions all have the same
    influence has nothing to find, and is left out.
    """
    found = [_spearman([place for row in rows for place in row]) for rows in _by_question(places, questions)]
    return Interval(*over_questions([value for value in found if value is not None], (-1.0, 1.0)))


def _spearman(places: Sequence[Place]) -> float | None:
    influence = np.array([place.influence for place in places])
    if len(places) < 2 or np.ptp(influence) == 0:
        return None
    # The number of a pair (preferred, score) in their order; equal pairs have one number.
    order = np.unique([(place.preferred, place.score) for place in places], axis=0, return_inverse=True)[1].ravel()
    return float(stats.spearmanr(order, influence).statistic) if np.ptp(order) else 0.0


def mean_over_questions(
    rows: Sequence[Sequence[float]], questions: Sequence[str], bounds: tuple[float, float] = (-inf, inf)
) -> Interval:
    """The mean over questions of the mean of a question's entries, with the interval of `appo-jax eval`.

    `rows`: the entries of each rollout; `questions`: that of each rollout. Questions without entries are left out. `bounds`: the
    smallest and the largest entry there can be. Without bounds, the interval of equal values has no ends.
    """
    entries = [[entry for row in some for entry in row] for some in _by_question(rows, questions)]
    return Interval(*over_questions([float(np.mean(some)) for some in entries if some], bounds))


def _by_question(rows: Sequence[Sequence[T]], questions: Sequence[str]) -> Iterable[list[Sequence[T]]]:
    """The rows of each question."""
    found: dict[str, list[Sequence[T]]] = {}
    for row, question in zip(rows, questions, strict=True):
        found.setdefault(question, []).append(row)
    return found.values()


def share_after_tools(rollouts: Sequence[Ranked], name: str, count: int) -> float:
    """The share of positions that begin a turn after a tool result, among each rollout's first `count` by a score."""
    return float(np.mean([r.after_tool[t] for r in rollouts for t in r.top(name, count)]))


def top_words(rollouts: Sequence[Ranked], name: str, count: int) -> list[tuple[str, int]]:
    """The 20 most frequent words among each rollout's first `count` positions by a score."""
    return Counter(r.words[t].strip() for r in rollouts for t in r.top(name, count)).most_common(20)
