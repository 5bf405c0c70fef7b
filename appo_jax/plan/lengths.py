"""The lengths of rollouts: the longest allowed, or those of a real run."""

from __future__ import annotations

import dataclasses
import heapq
from pathlib import Path
from typing import Any

import numpy as np

from appo_jax.config import RolloutConfig
from appo_jax.dumps import dumped_steps, read_dump
from appo_jax.errors import DataError

MAX_STEPS = 20  # number of newest steps of a run whose rollouts are read


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Lengths and calls of the rollouts of one kind (initial ones, or branches)."""

    sampled: tuple[int, ...]
    """Tokens that each of them sampled; tool results are appended, not decoded."""
    calls: float
    """Tool calls of one of them, on average."""
    prefix: float
    """Tokens of the prefix that one of them continues, on average over the decode steps."""
    suffix: float
    """Tokens that it has added itself, tool results included, on average over the decode steps."""

    def decode_steps(self, drawn: int, rows: int) -> int:
        """Decode steps that `drawn` rollouts take on `rows` rows: a row that is free goes on with the next rollout.

        Rollouts have these lengths in an order that a fixed seed gives.
        """
        order = np.random.default_rng(0).choice(np.array(self.sampled), drawn)
        if len(set(self.sampled)) == 1:
            return -(-drawn // rows) * self.sampled[0]
        free = [0] * min(rows, drawn)  # when each row is free
        for length in order.tolist():
            heapq.heapreplace(free, free[0] + length)
        return max(free)


@dataclasses.dataclass(frozen=True)
class RolloutLengths:
    """Of a run's rollouts."""

    initial: Lengths
    branches: Lengths

    @classmethod
    def longest(cls, config: RolloutConfig) -> RolloutLengths:
        """Every rollout samples all the tokens and makes all the calls that it may."""
        response, calls = config.max_response_tokens, config.max_tool_calls
        longest = Lengths((response,), calls, config.max_prompt_tokens, response / 2)
        return cls(longest, dataclasses.replace(longest, prefix=config.max_prompt_tokens + response))

    @classmethod
    def of_run(cls, run: Path, config: RolloutConfig) -> RolloutLengths:
        """Those of the newest rollout trees that a run has dumped, cut where `config` ends a rollout.

        A run without branches says nothing of them: they are then as long as initial rollouts. Raises DataError for a
        directory without rollouts.
        """
        steps = dumped_steps(run / "rollouts")
        nodes = [
            node for path in list(steps.values())[-MAX_STEPS:] for tree in read_dump(path) for node in tree["nodes"]
        ]
        if not nodes:
            raise DataError(f"{run}/rollouts: no rollouts; --lengths takes the directory of a run that has made a step")
        initial = [node for node in nodes if node["fork"] is None]
        branches = [node for node in nodes if node["fork"] is not None]
        return cls(_lengths(initial, config), _lengths(branches or initial, config))


def _lengths(nodes: list[dict[str, Any]], config: RolloutConfig) -> Lengths:
    calls = [sum(call["result_end"] > (node["fork"] or 0) for call in node["calls"]) for node in nodes]
    sampled = tuple(min(node["sampled_tokens"], config.max_response_tokens) for node in nodes)
    start = [node["prompt_tokens"] if node["fork"] is None else node["fork"] for node in nodes]
    added = [min(node["tokens"] - first, config.max_response_tokens) for node, first in zip(nodes, start, strict=True)]
    # A rollout takes a decode step for each token that it samples; half-way it has half of what it adds.
    prefix, suffix = (float(np.average(x, weights=sampled)) for x in (start, np.array(added) / 2))
    return Lengths(sampled, min(float(np.mean(calls)), config.max_tool_calls), prefix, suffix)
