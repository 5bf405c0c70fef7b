"""What the training loop, evaluation and the growing of trees need of a sampler. Another engine is a class with these methods.

`TreeSampler` is ours. Nothing outside of it knows how it decodes, batches or caches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from appo_jax.policy.parameters import Params
from appo_jax.types import Example, Rollout, Tree


@dataclasses.dataclass(frozen=True)
class Branch:
    """A branch to be drawn from a rollout."""

    cut: int  # it keeps this many of the rollout's tokens
    node: int  # its own node in the tree
    loop: int  # the branching loop that draws it


@dataclasses.dataclass(frozen=True)
class ScorePass:
    """What a policy says of finished rollouts, in their order. Arrays are `[T]`, T being the rollout's own length."""

    rollouts: Sequence[Rollout]
    log_probs: list[np.ndarray]  # float32: of each token given the tokens before it, at the sampling temperature
    entropies: list[np.ndarray]  # float32, nats: of the distribution at the position that produced the token
    prefixes: Any = None  # what the sampler branches from; its own affair, and None where no branches were announced


@dataclasses.dataclass
class GenerationStats:
    """What generations did, added up since they were last taken."""

    sampled_tokens: int = 0
    decode_steps: int = 0
    row_steps: int = 0  # decode steps × rows: the capacity that was paid for
    decode_s: float = 0.0
    append_s: float = 0.0  # tool results into the caches
    wait_s: float = 0.0  # nothing to decode, tools still running


class Sampler(Protocol):
    """Draws rollouts, tools and all, and scores them. On several hosts, all of them call it alike and get the same rollouts."""

    def initial(
        self, params: Params, examples: Sequence[Example], copies: int, draw_id: Sequence[int],
        temperature: float | None = None, max_examples: int | None = None,
    ) -> list[Tree]:  # fmt: skip
        """`copies` full rollouts of each example, as nodes 0 … copies − 1 of a tree.

        `draw_id` separates the random draws of this call from all others (phase, step …): the same numbers, parameters and
        examples draw the same tokens. `temperature`: default, the configured one; 0 is greedy. `max_examples`: a bound on the
        number of examples over all calls of this kind, for a sampler that compiles for fixed shapes; default, their number.
        """
        ...

    def score(
        self, params: Params, rollouts: Sequence[Rollout], max_rollouts: int | None = None, to_branch: bool = False
    ) -> ScorePass:
        """Log-probabilities and entropies of finished rollouts under `params`.

        It is the same computation whether or not branches follow: the same policy gives the same numbers, so Ω is exactly 1
        where the policy has not moved. `to_branch`: keep what `branches` needs. `max_rollouts`: as `max_examples`.
        """
        ...

    def branches(
        self, params: Params, scored: ScorePass, branches: Sequence[Sequence[Branch]], draw_id: Sequence[int]
    ) -> list[list[Rollout]]:
        """Draw branches of scored rollouts: `branches[i]` are those of `scored.rollouts[i]`, and so are the results.

        A branch begins with its parent's tokens, calls and tool states at the cut. `scored` must have been made with
        `to_branch`, under the same `params`.
        """
        ...

    def take_stats(self) -> GenerationStats:
        """What has been generated since the last time that this was asked."""
        ...
