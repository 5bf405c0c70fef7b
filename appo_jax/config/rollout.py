"""Rollouts: how many, how long, how they are drawn."""

from __future__ import annotations

import dataclasses
from typing import Annotated

from annotated_types import Interval
from pydantic import NonNegativeInt, PositiveInt

from appo_jax.config.bounds import Seconds


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """How many rollouts a prompt has, how long they are, and how they are sampled."""

    num_initial: PositiveInt = 4
    """N: full rollouts per prompt from the policy at the start of the step. Paper: 4. Algorithms that do not branch draw M."""
    budget: PositiveInt = 16
    """M: rollouts per prompt, branches included. Paper: 16."""
    max_prompt_tokens: PositiveInt = 1024
    """Tokens of a prompt, system prompt included. Longer ones are malformed (`data.malformed`)."""
    max_response_tokens: PositiveInt = 4096
    """Sampled tokens and tool results together. Paper: 4096, deep search 8192."""
    max_result_tokens: PositiveInt = 512
    """A tool result is cut to this many tokens; a mark shows the cut."""
    max_tool_calls: NonNegativeInt = 6
    """Tool calls of one rollout; a further call ends the rollout."""
    max_seconds: Seconds = 600.0
    """Wall time of one rollout in seconds, with its tools and without the compilation of programs."""
    temperature: Annotated[float, Interval(ge=1e-6, le=1e6)] = 1.0
    """Logits are divided by this, in sampling and in every log-probability. Evaluation is greedy."""
    top_p: Annotated[float, Interval(gt=0, le=1)] = 1.0
    """Nucleus sampling: draw among the likeliest tokens that together have this share of the probability. 1: off. When
    top_p or top_k cut the distribution, the sampler's log-probs are those of the cut distribution."""
    top_k: NonNegativeInt = 0
    """Draw among this many likeliest tokens. 0: off."""
    decode_rows: PositiveInt = 256
    """Rows decoded together, on all devices. When a row's rollout ends, the row takes the next waiting rollout."""
    share_prefix: bool = True
    """False: every continuation prefills its whole prefix. The reference that tests and benchmarks compare with."""
