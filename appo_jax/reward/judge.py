"""A reward function at work: tried out before a run begins, and watched while it lasts."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from appo_jax.errors import AppoError, ConfigError, TrainingError
from appo_jax.reward.response import Response
from appo_jax.types import Example, RewardResult, Segment, StopReason

log = logging.getLogger(__name__)

MAX_SHOWN = 200  # characters of a value in a message
NO_REWARD = float("nan")
"""The reward of a rollout that the function gave none; groups leave it out."""


@dataclasses.dataclass(frozen=True)
class Judgement:
    """What a reward function said of one response, in plain numbers that can be sent between hosts."""

    reward: float  # finite, or NO_REWARD with `error`
    correct: bool
    detail: dict[str, float]
    error: str | None = None  # why there is no reward: what the function returned or raised


@dataclasses.dataclass(frozen=True)
class Judge:
    """A reward function by its name in the config. Calling it never fails for what the function returns or raises."""

    name: str
    function: Callable[[Response], RewardResult]

    def __call__(self, response: Response) -> Judgement:
        """The function's judgement, its numbers as Python's own. An AppoError, which is no fault of the function, passes."""
        try:
            result = self.function(response)
        except AppoError:
            raise
        except (Exception, SystemExit) as error:
            return _failed(f"raised {_shown(error)}")
        return _checked(result)

    def try_out(self, example: Example) -> None:
        """Call the function as a run will: on a right answer to `example`, and on a policy that wrote nothing.

        Raises ConfigError that says what it returned or raised, so that a mistake is found before the run begins."""
        right = f"<think> </think> <answer> \\boxed{{{example.golds[0] if example.golds else ''}}} </answer>"
        for what, segments in (("a right answer", (Segment(right, True),)), ("an empty response", ())):
            response = Response(
                segments, example.golds, example.kind, frozenset(), StopReason.ANSWERED, example.question
            )
            if error := self(response).error:
                raise ConfigError(
                    f"reward.function = {self.name!r}, tried out on {what} to {example.id!r}, {error}; expected an "
                    "appo_jax.types.RewardResult with a finite reward and numbers in detail"
                )

    def report(self, judgements: Sequence[tuple[str, Judgement]]) -> None:
        """Say which rollouts, by the id of their question, have no reward and why.

        Raises TrainingError when none of them has one."""
        errors = Counter(judgement.error for _, judgement in judgements if judgement.error)
        if not errors:
            return
        [(error, count)] = errors.most_common(1)
        example = next(identity for identity, judgement in judgements if judgement.error == error)
        problem = f"reward.function = {self.name!r} {error} ({count} times, first for {example!r})"
        if errors.total() == len(judgements):
            raise TrainingError(f"none of {len(judgements)} rollouts has a reward: {problem}; mend the function")
        log.warning(
            "%d of %d rollouts have no reward and are left out of their groups: %s",
            errors.total(), len(judgements), problem,
        )  # fmt: skip


def _checked(result: Any) -> Judgement:
    if not isinstance(result, RewardResult):
        return _failed(f"returned {_shown(result)}, a {type(result).__name__}")
    reward = _number(result.reward)
    if reward is None or not math.isfinite(reward):
        return _failed(f"returned the reward {_shown(result.reward)}")
    if not isinstance(result.correct, bool | np.bool_):
        return _failed(f"returned correct = {_shown(result.correct)}")
    if not isinstance(result.detail, Mapping):
        return _failed(f"returned detail = {_shown(result.detail)}")
    detail: dict[str, float] = {}
    for name, value in result.detail.items():
        number = _number(value)
        if number is None:
            return _failed(f"returned detail[{name!r}] = {_shown(value)}")
        detail[str(name)] = number
    return Judgement(reward, bool(result.correct), detail)


def _number(value: Any) -> float | None:
    """A number of Python's, or a scalar of an array library, as a float; None for anything else."""
    if not isinstance(value, bool | int | float) and getattr(value, "shape", None) != ():
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except Exception as error:
        text = f"something whose repr raises {type(error).__name__}"
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "…"


def _failed(error: str) -> Judgement:
    return Judgement(NO_REWARD, False, {}, error)
