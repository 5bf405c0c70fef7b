"""Measures how much a position of a rollout changes the expected reward, by Monte Carlo over continuations from before and
after it.

V(t) is the expected reward of a continuation of the first t tokens. The influence of position t is (V(t+1) − V(t))², the
squared change caused by the token that was drawn there. Both values are means of K continuations under the current policy. The
squared difference of the means is too large by the variance of the means; this variance is estimated from the same draws and
subtracted. So the estimate is unbiased, and it may be negative.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from appo_jax.policy.parameters import Params
from appo_jax.rollout.sampler import Branch, Sampler, ScorePass
from appo_jax.types import Rollout


@dataclasses.dataclass(frozen=True)
class Influence:
    """The measured influence of one position of one rollout."""

    rollout: int
    position: int
    influence: float
    """Unbiased estimate of (V(t+1) − V(t))². V(t): mean reward of the continuations that draw the token again; V(t+1): of those
    that keep it."""


def measure(
    sampler: Sampler, params: Params, scored: ScorePass, positions: Mapping[int, Sequence[int]], continuations: int,
    give_rewards: Callable[[Sequence[Rollout]], None], draw_id: Sequence[int],
) -> list[Influence]:  # fmt: skip
    """The influence of `positions` (keys: indices into `scored.rollouts`), with K = `continuations` draws at each cut, at least 2.

    `scored`: rollouts with their rewards, scored under `params` with `to_branch`. A cut that several positions share is drawn
    once. The value at the end of a rollout is the rollout's own reward. Continuations without a reward (NaN) are left out, and
    so are positions for which fewer than two are left at a cut: one value has no variance to subtract.
    """
    rollouts = scored.rollouts
    cuts = [
        sorted({cut for t in positions.get(i, ()) for cut in (t, after(r, t))} - {r.length})
        for i, r in enumerate(rollouts)
    ]
    branches = [
        [Branch(cut, 1 + at * continuations + k, 1) for at, cut in enumerate(of_rollout) for k in range(continuations)]
        for of_rollout in cuts
    ]
    drawn = sampler.branches(params, scored, branches, draw_id)
    give_rewards([rollout for of_rollout in drawn for rollout in of_rollout])
    values: dict[tuple[int, int], np.ndarray] = {}
    for i, (wanted, found) in enumerate(zip(branches, drawn, strict=True)):
        rewards = {rollout.node: rollout.reward for rollout in found}
        for cut in cuts[i]:
            of_cut = np.array([rewards[branch.node] for branch in wanted if branch.cut == cut])
            values[i, cut] = of_cut[~np.isnan(of_cut)]
        values[i, rollouts[i].length] = np.full(2, rollouts[i].reward)  # two equal values: it is known without error
    out = []
    for i, chosen in positions.items():
        for t in chosen:
            before, later = values[i, t], values[i, after(rollouts[i], t)]
            if min(len(before), len(later)) >= 2 and not np.isnan(later).any():
                out.append(Influence(i, t, squared_difference(before, later)))
    return out


def after(rollout: Rollout, position: int) -> int:
    """The cut that keeps the token at `position`, and also the tool result after it if the token ends a call."""
    cut = position + 1
    return next((call.result_end for call in rollout.calls if call.call_end == cut), cut)


def squared_difference(a: np.ndarray, b: np.ndarray) -> float:
    """Unbiased estimate of (E[b] − E[a])² from independent draws, at least two of each."""
    spread = sum(float(x.var(ddof=1)) / len(x) for x in (a, b))
    return float((b.mean() - a.mean()) ** 2) - spread
