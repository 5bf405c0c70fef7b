"""Metrics of a step's trees. docs/method.md explains each."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from appo_jax.rollout.growth import Growth
from appo_jax.rollout.sampler import GenerationStats
from appo_jax.types import Rollout, StopReason, Tree


def mean(values: Sequence[float] | np.ndarray) -> float:
    """Mean; NaN for no values (the log writes null)."""
    return float(np.mean(values)) if len(values) else float("nan")


def rollout_metrics(trees: Sequence[Tree], stats: GenerationStats) -> dict[str, Any]:
    """Rewards, lengths, stop reasons and tool calls of a step's rollouts, and the cost of the generation."""
    rollouts = [rollout for tree in trees for rollout in tree]
    initial = [r for r in rollouts if r.is_initial]
    branches = [r for r in rollouts if not r.is_initial]
    record: dict[str, Any] = {
        "reward/initial": mean(_rewards(initial)),
        "reward/branch": mean(_rewards(branches)),
        "reward/initial_std": mean(
            [float(np.std(x)) for tree in trees if (x := _rewards(t for t in tree if t.is_initial))]
        ),
        "reward/failed": sum(r.reward_error is not None for r in rollouts),
        "accuracy/initial": accuracy(initial),
        "accuracy/branch": accuracy(branches),
        "rollout/count": len(rollouts),
        "rollout/response_tokens": mean([r.length - r.prompt_length for r in initial]),
        "rollout/response_tokens_max": max(r.length - r.prompt_length for r in rollouts),
        "rollout/truncated": mean([r.truncated for r in rollouts]),
        "rollout/sampled_tokens": stats.sampled_tokens,
        "rollout/entropy": mean(np.concatenate([r.entropies[r.sampled] for r in initial])),
        "rollout/useful_rows": stats.sampled_tokens / max(1, stats.row_steps),
        "time/prefill_s": stats.prefill_s,
        "time/decode_s": stats.decode_s,
        "time/append_s": stats.append_s,
        "time/tool_wait_s": stats.wait_s,
    }
    stops = Counter(r.stop_reason for r in rollouts)
    record |= {f"stop/{reason}": stops[reason] / len(rollouts) for reason in StopReason}
    new_calls = [call for r in rollouts for call in r.calls if r.fork is None or call.result_end > r.fork]
    calls = Counter((call.name, call.outcome) for call in new_calls)
    record |= {f"calls/{name}/{outcome}": count for (name, outcome), count in sorted(calls.items())}
    record["calls/per_rollout"] = mean([len(r.calls) for r in initial])
    return record


def accuracy(rollouts: Iterable[Rollout]) -> float:
    """The share of right answers. Rollouts without a reward are left out, because nothing says whether they are right."""
    return mean([rollout.correct for rollout in rollouts if rollout.reward_error is None])


def _rewards(rollouts: Iterable[Rollout]) -> list[float]:
    """The rewards of the rollouts that have one."""
    return [rollout.reward for rollout in rollouts if rollout.reward_error is None]


def update_metrics(
    results: Mapping[str, np.ndarray], base: Sequence[np.ndarray], growth: Growth | None, num_initial: int
) -> dict[str, float]:
    """One mini-batch's update: the loss's metrics, the advantages, and how its branching went.

    `base`: A_base at the sampled tokens of each trained rollout.
    """
    record = {f"update/{name}": float(value) for name, value in results.items()}
    record["advantage/abs_mean"] = mean([np.abs(a).mean() for a in base if a.size])
    record["advantage/zero_share"] = mean([not a.any() for a in base])
    if growth is None:
        return record
    scores = [s for tree in growth.scores for s in tree[:num_initial]]
    future = np.concatenate([s.future_value[s.valid] for s in scores])
    record |= {
        "branching/future_std": float(np.std(future)) if future.size else float("nan"),
        "branching/future_mean": mean(future),
        "branching/constant_future_share": mean([s.constant_future for s in scores]),
        "branching/position": mean(_relative_positions(growth.trees)),
        "branching/missing": growth.missing_branches,
    }
    return record


def over_updates(updates: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The means of `update_metrics` over a step's mini-batches. A mini-batch without a figure (NaN) is left out, except from
    those of the update: there NaN is a fault that the mean must show."""

    def over(name: str) -> float:
        values = [update[name] for update in updates]
        return mean(values if name.startswith("update/") else [x for x in values if not math.isnan(x)])

    return {name: over(name) for name in updates[0]}


def _relative_positions(trees: Sequence[Tree]) -> list[float]:
    """Where branches begin, as a share of their parent's response: 0 at its first token, 1 at its end."""

    def share(parent: Rollout, fork: int) -> float:
        return (fork - parent.prompt_length) / (parent.length - parent.prompt_length)

    return [
        share(tree[r.parent], r.fork) for tree in trees for r in tree if r.parent is not None and r.fork is not None
    ]
