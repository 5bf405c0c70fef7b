"""From scores to branch points: rank the positions of every rollout, then take positions from the prompt's rollouts in
rounds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float

from appo_jax.config import BranchingConfig


def tree_sizes(num_initial: int, num_branch_points: int, num_loops: int, budget: int) -> list[int]:
    """Rollouts of a prompt before the first loop and after each one, when no rollout lacks positions.

    A loop multiplies a tree by B + 1 until it holds M rollouts. There are L loops, or more if M needs them: Algorithm 1
    of the paper branches while fewer than M − N branches exist.
    """
    sizes = [num_initial]
    while len(sizes) <= num_loops or sizes[-1] < budget:
        sizes.append(min(budget, sizes[-1] * (num_branch_points + 1)))
    return sizes


def rank_positions(
    score: Float[np.ndarray, " T"], preferred: Bool[np.ndarray, " T"], valid: Bool[np.ndarray, " T"],
    sampled: Bool[np.ndarray, " T"], min_spacing: int = 1,
) -> list[int]:  # fmt: skip
    """Positions of one rollout, best first: preferred ones by score, then the other valid ones by score.

    All `[T]`. Equal scores go to the earlier position. Two chosen positions lie at least `min_spacing` sampled tokens
    apart; with 1 every valid position is ranked.
    """
    positions = np.flatnonzero(valid)
    ranked = positions[np.lexsort((positions, -score[positions], ~preferred[positions]))]
    if min_spacing == 1:
        return ranked.tolist()
    count = np.cumsum(sampled).tolist()  # distances between positions are differences of this
    free = np.ones(len(sampled) + 1, bool)  # by count
    chosen: list[int] = []
    for t in ranked.tolist():
        if free[count[t]]:
            chosen.append(t)
            free[_near(count[t], min_spacing)] = False
    return chosen


def far_from(
    taken: Bool[np.ndarray, " T"], sampled: Bool[np.ndarray, " T"], min_spacing: int
) -> Bool[np.ndarray, " T"]:
    """Which sampled positions of one rollout lie at least `min_spacing` sampled tokens from every position in `taken`."""
    count = np.cumsum(sampled)
    free = np.ones(len(sampled) + 1, bool)  # by count
    for here in count[taken].tolist():
        free[_near(here, min_spacing)] = False
    return sampled & free[count]


def _near(count: int, min_spacing: int) -> slice:
    """The counts of sampled tokens that are less than `min_spacing` from `count`."""
    return slice(max(0, count - min_spacing + 1), count + min_spacing)


def serve(ranked: Sequence[Sequence[int]], per_rollout: int, budget: int) -> list[tuple[int, int]]:
    """Branch points `(rollout, position)` of one prompt, in the order of service.

    `ranked[n]` are rollout n's positions, best first. Each round takes one position from every rollout, so that all
    rollouts get equally many. A rollout asks for `per_rollout` positions, and the rounds end when `budget` is used up.
    If a rollout has too few valid positions, further rounds take more from the others. Fewer than `budget` positions
    are returned only if no position is left.
    """
    wanted = min(budget, per_rollout * len(ranked))
    points: list[tuple[int, int]] = []
    for depth in range(max(map(len, ranked), default=0)):
        for n, positions in enumerate(ranked):
            if len(points) == wanted:
                return points
            if depth < len(positions):
                points.append((n, positions[depth]))
    return points


def pooled(
    ranked: Sequence[Sequence[int]], scores: Sequence[np.ndarray], preferred: Sequence[np.ndarray], budget: int
) -> list[tuple[int, int]]:
    """The official code's selection: the best `budget` positions of all the prompt's rollouts together."""
    pool = [(not preferred[n][i], -float(scores[n][i]), n, i) for n, positions in enumerate(ranked) for i in positions]
    return [(n, i) for _, _, n, i in sorted(pool)[:budget]]


def proportional(
    ranked: Sequence[Sequence[int]], scores: Sequence[np.ndarray], preferred: Sequence[np.ndarray], per_rollout: int,
    budget: int,
) -> list[tuple[int, int]]:  # fmt: skip
    """Theorem 1: the budget goes to branch points in proportion to their score, so that one may get several branches.

    The candidates are each rollout's first `per_rollout` positions; a score of 0 or below gets nothing, and so do positions
    that are not preferred if a preferred one has a positive score. Shares are rounded by largest remainder, ties to the
    earlier rollout and position. When no score is positive, the positions are served as `serve` does. Points are returned in
    the order of rollouts and positions, each once per branch.
    """
    candidates = [(n, t) for n, positions in enumerate(ranked) for t in sorted(positions[:per_rollout])]
    weights = np.array([max(0.0, float(scores[n][t])) for n, t in candidates])
    gated = weights * np.array([bool(preferred[n][t]) for n, t in candidates])
    weights = gated if gated.any() else weights
    if weights.sum() == 0:
        return serve(ranked, per_rollout, budget)
    shares = budget * weights / weights.sum()
    counts = np.floor(shares).astype(int)
    left = budget - counts.sum()
    counts[np.argsort(counts - shares, kind="stable")[:left]] += 1
    return [point for point, count in zip(candidates, counts.tolist(), strict=True) for _ in range(count)]


def select(
    scores: Sequence[np.ndarray],
    preferred: Sequence[np.ndarray],
    valid: Sequence[np.ndarray],
    sampled: Sequence[np.ndarray],
    budget: int,
    config: BranchingConfig,
) -> list[tuple[int, int]]:
    """Branch points of one prompt from the `[T]` scores of its rollouts; at most `budget`."""
    ranked = [
        rank_positions(*arrays, config.min_spacing) for arrays in zip(scores, preferred, valid, sampled, strict=True)
    ]
    budget = min(budget, config.num_branch_points * len(ranked))
    if config.allocation == "pooled":
        return pooled(ranked, scores, preferred, budget)
    if config.allocation == "proportional":
        return proportional(ranked, scores, preferred, config.num_branch_points, budget)
    return serve(ranked, config.num_branch_points, budget)
