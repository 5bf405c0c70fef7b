"""The interface of a sampler, for the training loop, evaluation and the growing of trees. Another engine is a class
with these methods; `TreeSampler` is the built-in one. No other code depends on how it decodes, batches or caches.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from appo_jax.policy.parameters import Params
from appo_jax.types import Example, Rollout, Tree


class Purpose(enum.IntEnum):
    """What rollouts are drawn for: the first number of every `draw_id`. So draws for two purposes are independent."""

    INITIAL = 0
    BRANCH = 1
    EVALUATION = 2
    RESAMPLE = 3
    EVALUATION_SET = 4
    COLLECT = 5
    ASK = 6
    INFLUENCE = 7


@dataclasses.dataclass(frozen=True)
class Branch:
    """A branch to draw from a rollout."""

    cut: int  # it keeps this many of the rollout's tokens
    node: int  # the branch's node in the tree
    loop: int  # the branching loop that draws it


@dataclasses.dataclass(frozen=True)
class ScorePass:
    """Log-probs and entropies of finished rollouts under a policy, in their order. Arrays are `[T]`, T being the
    rollout's length."""

    rollouts: Sequence[Rollout]
    log_probs: list[np.ndarray]  # float32: of each token given the tokens before it, at the sampling temperature
    entropies: list[np.ndarray]  # float32, nats: of the distribution at the position that produced the token
    prefixes: Any = None  # what the sampler branches from: only the sampler knows its type; None without `to_branch`


@dataclasses.dataclass
class GenerationStats:
    """Counts of what generations did since the last `take_stats`."""

    sampled_tokens: int = 0
    decode_steps: int = 0
    row_steps: int = 0  # decode steps × rows: the capacity that was paid for
    prefill_s: float = 0.0
    decode_s: float = 0.0
    append_s: float = 0.0  # tool results into the caches
    wait_s: float = 0.0  # nothing to decode, tools still running


class Sampler(Protocol):
    """Draws rollouts, with tool calls, and scores them. With several hosts, all make the same calls and get the same
    rollouts."""

    def initial(
        self, params: Params, examples: Sequence[Example], copies: int, draw_id: Sequence[int],
        temperature: float | None = None, max_examples: int | None = None,
    ) -> list[Tree]:  # fmt: skip
        """`copies` full rollouts of each example, as nodes 0 … copies − 1 of a tree. `draw_id` (a Purpose, step …)
        separates the random draws of this call from all others: the same numbers, parameters and examples draw the same
        tokens. `temperature`: by default the configured one; 0 is greedy. `max_examples`: the largest number of
        examples in any call of this kind, for a sampler that compiles for fixed shapes; by default their number.
        """
        ...

    def score(
        self, params: Params, rollouts: Sequence[Rollout], max_rollouts: int | None = None, to_branch: bool = False
    ) -> ScorePass:
        """Log-probabilities and entropies of finished rollouts, at least one, under `params`.

        The computation is the same whether or not branches follow, so that the same policy gives the same numbers and Ω
        is exactly 1 while the policy has not moved. `to_branch`: keep what `branches` needs. `max_rollouts`: like
        `max_examples`.
        """
        ...

    def branches(
        self, params: Params, scored: ScorePass, branches: Sequence[Sequence[Branch]], draw_id: Sequence[int]
    ) -> list[list[Rollout]]:
        """Draw branches of scored rollouts, at least one in all: `branches[i]` and the i-th result belong to
        `scored.rollouts[i]`.

        A branch begins with its parent's tokens, calls and tool states at the cut. `scored` must have been made with
        `to_branch`, under the same `params`.
        """
        ...

    def take_stats(self) -> GenerationStats:
        """What has been generated since the last call."""
        ...
