"""The host's state of a row: where its rollout begins, what it waits for, why it ends, and the finished rollout."""

from __future__ import annotations

import concurrent.futures
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from appo_jax import distributed
from appo_jax.rollout.sampler import Branch
from appo_jax.tools.executor import CallRecord
from appo_jax.types import Example, Outcome, Rollout, StopReason, ToolCall


@dataclasses.dataclass(frozen=True)
class Fork:
    """The start of a new rollout: it begins after `tokens`, a prompt or the first tokens of a parent."""

    example: Example
    tokens: np.ndarray  # [t] int32: everything before the first new token
    prompt_length: int
    sampled: np.ndarray  # [t] bool
    log_probs: np.ndarray  # [t] float32
    entropies: np.ndarray  # [t] float32
    calls: tuple[ToolCall, ...]
    states: Mapping[str, Any]  # tool states at the fork
    node: int
    parent: int | None = None
    loop: int = 0
    host: int = 0  # of the rollout

    @property
    def boundary(self) -> int:
        """Index after the last tool result, or after the prompt: the policy's current turn begins there."""
        return self.calls[-1].result_end if self.calls else self.prompt_length


def fork_of_prompt(example: Example, prompt: np.ndarray, states: Mapping[str, Any], node: int, host: int) -> Fork:
    """The beginning of an initial rollout: `prompt [t]`, nothing sampled yet."""
    zeros = np.zeros(len(prompt), np.float32)
    return Fork(
        example=example, tokens=prompt, prompt_length=len(prompt), sampled=np.zeros(len(prompt), bool), log_probs=zeros,
        entropies=zeros, calls=(), states=states, node=node, host=host,
    )  # fmt: skip


def fork_of(parent: Rollout, branch: Branch, start: Callable[[int], Mapping[str, Any]]) -> Fork:
    """The start of a branch: the parent's tokens up to the cut, with the calls and the tool states at the cut.

    `start`: the tool states of a new rollout of a host.
    """
    cut = branch.cut
    calls = tuple(call for call in parent.calls if call.result_end <= cut)
    return Fork(
        example=parent.example, tokens=parent.tokens[:cut], prompt_length=parent.prompt_length,
        sampled=parent.sampled[:cut], log_probs=parent.log_probs[:cut], entropies=parent.entropies[:cut], calls=calls,
        states=calls[-1].states if calls else start(parent.host), node=branch.node, parent=parent.node,
        loop=branch.loop, host=parent.host,
    )  # fmt: skip


class EndedCall(NamedTuple):
    """A finished tool call in the form that hosts exchange: the fields of CallRecord except `states`."""

    row: int
    name: str
    argument: str
    result: str
    outcome: str
    seconds: float

    @classmethod
    def of(cls, row: int, record: CallRecord) -> EndedCall:
        return cls(row, record.name, record.argument, record.result, str(record.outcome), record.seconds)


@dataclasses.dataclass
class Row:
    """The rollout that a row decodes."""

    fork: Fork
    group: int  # of the generation
    deadline: float  # time.monotonic()
    calls: list[ToolCall] = dataclasses.field(init=False)  # including those before the fork
    states: Mapping[str, Any] = dataclasses.field(init=False)  # tool states now
    boundary: int = dataclasses.field(init=False)  # where the policy's current text begins
    calling: bool = False  # waits for a tool, or with its result
    future: concurrent.futures.Future[CallRecord] | None = None  # the running call, on the host that makes it
    ended: EndedCall | None = None  # the call has ended and its result waits to be appended …
    ended_at: float = 0.0  # … since this time.monotonic()
    stop_reason: StopReason | None = None

    def __post_init__(self) -> None:
        self.calls, self.states, self.boundary = list(self.fork.calls), self.fork.states, self.fork.boundary

    @property
    def tools_run_here(self) -> bool:
        """Whether this host makes the row's calls."""
        return self.fork.host == distributed.host()

    @property
    def decoding(self) -> bool:
        return not self.calling and self.stop_reason is None

    def begin_call(self, future: concurrent.futures.Future[CallRecord] | None) -> None:
        self.calling, self.future = True, future

    def take_finished_call(self, row: int) -> EndedCall | None:
        """The call that has ended on this host since the last time; its tool states become the row's."""
        if self.future is None or not self.future.done():
            return None
        record, self.future = self.future.result(), None
        self.states = record.states
        return EndedCall.of(row, record)

    def end_call(self, ids: list[int], suffix_length: int, max_response_tokens: int) -> list[int]:
        """Record the finished call with its result of tokens `ids`; returns the tokens to append. `suffix_length`:
        tokens of the row's suffix, including slot 0. If the rollout could not continue after the result, the result is
        not appended and the rollout ends.
        """
        ended, self.calling, self.ended = self.ended, False, None
        assert ended is not None
        call_end = len(self.fork.tokens) - 1 + suffix_length
        if len(ids) >= self.fork.prompt_length + max_response_tokens - call_end:
            ids, self.stop_reason = [], StopReason.LENGTH
        self.boundary = call_end + len(ids)
        call = ToolCall(
            ended.name, ended.argument, ended.result, Outcome(ended.outcome), ended.seconds, call_end, self.boundary,
            self.states,
        )  # fmt: skip
        self.calls.append(call)
        return ids

    def expire(self) -> bool:
        """End the rollout because its time is over. Returns whether it was still active."""
        if self.stop_reason is not None:
            return False
        self.stop_reason = StopReason.TIME
        if self.future is not None:
            self.future.cancel()
        return True

    def rollout(self, tokens: np.ndarray, log_probs: np.ndarray, entropies: np.ndarray) -> Rollout:
        """The finished rollout, from the row's suffix on the device, each `[t]`; slot 0 belongs to the prefix."""
        fork = self.fork
        sampled = np.ones(len(tokens) - 1, bool)
        for call in self.calls[len(fork.calls) :]:
            sampled[call.call_end - len(fork.tokens) : call.result_end - len(fork.tokens)] = False
        assert self.stop_reason is not None
        return Rollout(
            example=fork.example,
            tokens=np.concatenate([fork.tokens, tokens[1:]]),
            prompt_length=fork.prompt_length,
            sampled=np.concatenate([fork.sampled, sampled]),
            log_probs=np.concatenate([fork.log_probs, np.where(sampled, log_probs[1:], 0)]),
            entropies=np.concatenate([fork.entropies, np.where(sampled, entropies[1:], 0)]),
            stop_reason=self.stop_reason,
            calls=tuple(self.calls),
            node=fork.node,
            parent=fork.parent,
            fork=None if fork.parent is None else len(fork.tokens),
            loop=fork.loop,
            host=fork.host,
        )
