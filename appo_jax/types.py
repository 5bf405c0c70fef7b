"""Types and terms that all modules use: axis letters, examples, rollouts, stop reasons.

Axis letters, used in every array comment and public signature:

    P  prompts of a mini-batch          R  shared prefixes (rows that own a prefix KV cache)
    N  initial rollouts per prompt      C  continuations per prefix
    B  branches per rollout             T  tokens of a rollout (prompt and response)
    M  rollout budget per prompt        S  tokens of a suffix (what a continuation adds to its prefix)
    V  vocabulary   L  layers           H  query heads   K  key/value heads   D  model width   E  head width

In every array with one entry per token, entry t belongs to token t. `log_probs[t]` is the log-probability of
token t given the tokens before it, `entropies[t]` is the entropy of the distribution that token t was drawn from.
"""

from __future__ import annotations

import dataclasses
import enum
import itertools
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import numpy as np

Kind = Literal["math", "qa"]


@dataclasses.dataclass(frozen=True)
class Example:
    """One question with its accepted answers."""

    id: str
    question: str
    golds: tuple[str, ...]
    kind: Kind  # how golds are compared: "math" (equal values) or "qa" (equal strings, token F1)
    system: str  # the system prompt it is asked under
    source: str = ""  # the set it is from
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False)  # what else its record says


@dataclasses.dataclass(frozen=True)
class Document:
    """What a search tool searches and finds: an article, a paragraph, a page."""

    title: str
    text: str


@dataclasses.dataclass(frozen=True)
class Segment:
    """A stretch of a response. `sampled` is True for the policy's own text, False for a tool result."""

    text: str
    sampled: bool


@dataclasses.dataclass(frozen=True)
class Trace:
    """A demonstration for the cold start: tool results are segments with `sampled=False` and are never trained on."""

    example: Example
    segments: tuple[Segment, ...]


class StopReason(enum.StrEnum):
    """Why a rollout ended. Every rollout has exactly one."""

    ANSWERED = "answered"  # the policy wrote EOS
    LENGTH = "length"  # the maximum length is reached
    CALLS = "calls"  # asked for a tool after `max_tool_calls`
    TIME = "time"  # the rollout's wall-clock limit


class Outcome(enum.StrEnum):
    """The outcome of a tool call."""

    OK = "ok"
    ERROR = "error"  # the tool ran and reports an error that the policy caused (an exception in its code)
    MALFORMED = "malformed"  # the call could not be parsed
    TIMEOUT = "timeout"
    LIMIT = "limit"  # a resource limit (memory, output, processes) was hit
    UNAVAILABLE = "unavailable"  # the tool is down or its backend failed


@dataclasses.dataclass(frozen=True)
class ToolCall:
    """One tool call of a rollout, as it happened."""

    name: str
    argument: str
    result: str  # the text the policy read, before tokenisation
    outcome: Outcome
    seconds: float
    call_end: int  # index of the first token after the call's closing tag
    result_end: int  # index of the first token after the tool result
    # Tool states after the call; none on hosts that the rollout does not belong to.
    states: Mapping[str, Any] = dataclasses.field(repr=False, compare=False)

    def to_json(self) -> dict[str, Any]:
        """The fields worth keeping in a dump (`states` are live handles and stay out)."""
        record = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "states"}
        return record | {"outcome": str(self.outcome), "seconds": round(self.seconds, 4)}


@dataclasses.dataclass
class Rollout:
    """One node of a rollout tree, on the host, ragged. Arrays are `[T]` with T the rollout's own length."""

    example: Example
    tokens: np.ndarray  # [T] int32: prompt, then sampled tokens and tool results
    prompt_length: int
    sampled: np.ndarray  # [T] bool: the policy chose this token (never prompt or tool result)
    log_probs: np.ndarray  # [T] float32: under the policy that drew the token; 0 where not sampled
    entropies: np.ndarray  # [T] float32: of the distribution the token was drawn from; 0 where not sampled
    stop_reason: StopReason
    calls: tuple[ToolCall, ...]
    node: int  # index within the prompt's tree: 0..N-1 are initial rollouts
    parent: int | None = None  # node it was branched from
    fork: int | None = None  # index of the first token that is its own (the parent's token there is drawn again)
    loop: int = 0  # 0 for initial rollouts, else the branching loop that made it
    host: int = 0  # which host runs its tools and gives its reward: that of its prompt
    reward: float = float("nan")  # NaN: none yet, or none at all
    correct: bool = False
    reward_detail: dict[str, float] = dataclasses.field(default_factory=dict)
    reward_error: str | None = None  # why the reward function gave it no reward

    @property
    def is_initial(self) -> bool:
        return self.parent is None

    @property
    def length(self) -> int:
        return len(self.tokens)

    @property
    def truncated(self) -> bool:
        """It did not end of its own will."""
        return self.stop_reason is not StopReason.ANSWERED


def release_states(rollouts: Iterable[Rollout]) -> None:
    """Drop the tool states of rollouts from which no branch will begin any more: a state may be a live process."""
    for rollout in rollouts:
        rollout.calls = tuple(dataclasses.replace(call, states={}) for call in rollout.calls)


Tree = list[Rollout]  # one prompt's rollouts; a rollout's `node` is its index, initial rollouts come first


def stretches(sampled: np.ndarray, start: int) -> list[tuple[int, int]]:
    """(first token, end) of the stretches of tokens from `start` on that are all sampled or all not, from `sampled [T]`."""
    meetings = start + 1 + np.flatnonzero(np.diff(sampled[start:]))
    return list(itertools.pairwise(sorted({start, *meetings.tolist(), len(sampled)})))


def turn_starts(sampled: np.ndarray) -> np.ndarray:
    """First tokens of a rollout's turns, the stretches of the policy's own text, from its `sampled [T]`."""
    return np.array([first for first, _ in stretches(sampled, 0) if sampled[first]], int)


@dataclasses.dataclass(frozen=True)
class RewardResult:
    """The result of a reward function for one response."""

    reward: float
    correct: bool  # the figure accuracy counts
    detail: Mapping[str, float] = dataclasses.field(
        default_factory=dict
    )  # e.g. {"f1": 1.0, "format": 1.0, "bonus": 0.1}
