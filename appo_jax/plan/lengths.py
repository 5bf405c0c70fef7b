"""The lengths of rollouts from which a plan counts: the maximum lengths, or those of a real run."""

from __future__ import annotations

import dataclasses
import heapq
from pathlib import Path
from typing import Any

import numpy as np

from appo_jax.config import RolloutConfig
from appo_jax.dumps import dumped_steps, read_dump
from appo_jax.errors import DataError

MAX_STEPS = 20  # number of a run's newest steps whose rollouts are read


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Lengths and tool calls of the rollouts of one kind (initial rollouts, or branches)."""

    sampled: tuple[int, ...]
    """For each rollout, the number of tokens that it sampled. Tool results do not count: they are appended, not decoded."""
    calls: float
    """Mean number of tool calls of a rollout."""
    prefix: float
    """Mean number of tokens of the prefix that a rollout continues, over all decode steps."""
    suffix: float
    """Mean number of tokens, tool results included, that a rollout has added to its prefix, over all decode steps."""

    def decode_steps(self, drawn: int, rows: int) -> int:
        """Decode steps that `drawn` rollouts take on `rows` rows. A row whose rollout has ended begins the next one.

        The lengths of the rollouts are drawn from `sampled` with a fixed seed.
        """
        drawn_lengths = np.random.default_rng(0).choice(np.array(self.sampled), drawn)
        if len(set(self.sampled)) == 1:
            return -(-drawn // rows) * self.sampled[0]
        ends = [0] * min(rows, drawn)  # the step at which each row is free
        for length in drawn_lengths.tolist():
            heapq.heapreplace(ends, ends[0] + length)
        return max(ends)


@dataclasses.dataclass(frozen=True)
class RolloutLengths:
    """The lengths of all rollouts of a run."""

    initial: Lengths
    branches: Lengths

    @classmethod
    def longest(cls, config: RolloutConfig) -> RolloutLengths:
        """The maximum lengths: every rollout samples all tokens and makes all tool calls that `config` permits."""
        response, calls = config.max_response_tokens, config.max_tool_calls
        longest = Lengths((response,), calls, config.max_prompt_tokens, response / 2)
        return cls(longest, dataclasses.replace(longest, prefix=config.max_prompt_tokens + response))

    def without_calls(self) -> RolloutLengths:
        """The same lengths, of rollouts that call no tool."""
        return RolloutLengths(*(dataclasses.replace(x, calls=0) for x in (self.initial, self.branches)))

    @classmethod
    def of_run(cls, run: Path, config: RolloutConfig) -> RolloutLengths:
        """The lengths of the rollouts that a run dumped in its newest steps, at most those that `config` permits.

        If the run has no branches, the lengths of its initial rollouts are used for branches, too. Raises DataError if the
        directory has no rollouts.
        """
        steps = dumped_steps(run / "rollouts")
        nodes = [
            node for path in list(steps.values())[-MAX_STEPS:] for tree in read_dump(path) for node in tree["nodes"]
        ]
        if not nodes:
            raise DataError(
                f"{run}/rollouts: no rollouts found; --lengths takes the directory of a run that has made a step, e.g. runs/NAME"
            )
        initial = [node for node in nodes if node["fork"] is None]
        branches = [node for node in nodes if node["fork"] is not None]
        return cls(_lengths(initial, config), _lengths(branches or initial, config))


def _lengths(nodes: list[dict[str, Any]], config: RolloutConfig) -> Lengths:
    calls = [sum(call["result_end"] > (node["fork"] or 0) for call in node["calls"]) for node in nodes]
    sampled = tuple(min(node["sampled_tokens"], config.max_response_tokens) for node in nodes)
    starts = [node["prompt_tokens"] if node["fork"] is None else node["fork"] for node in nodes]
    added = [min(node["tokens"] - start, config.max_response_tokens) for node, start in zip(nodes, starts, strict=True)]
    # A rollout takes one decode step per sampled token. Over these steps, its suffix has on average half of its final length.
    prefix, suffix = (float(np.average(x, weights=sampled)) for x in (starts, np.array(added) / 2))
    return Lengths(sampled, min(float(np.mean(calls)), config.max_tool_calls), prefix, suffix)
