"""Calls a reward function: tries it before the run begins, and checks every result."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
import math
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from appo_jax import distributed, heartbeat
from appo_jax.errors import AppoError, ConfigError, TrainingError
from appo_jax.reward.response import Response
from appo_jax.types import Example, RewardResult, Rollout, Segment, StopReason

if TYPE_CHECKING:
    from appo_jax.reward.language_judge import LanguageJudge

log = logging.getLogger(__name__)

MAX_REWARD = 1e30  # in size: the square of a larger one may overflow, and the advantages of its group would be 0
MAX_SHOWN = 200  # characters of a value in a message
MAX_HANGING = 64  # threads that never came back
NO_REWARD = float("nan")
"""The reward of a rollout for which the function failed; groups leave it out."""


@dataclasses.dataclass(frozen=True)
class Judgement:
    """The result of a reward function for a response, in plain numbers that can be sent between hosts."""

    reward: float  # at most MAX_REWARD in size, or NO_REWARD with `error`
    correct: bool
    detail: dict[str, float]
    error: str | None = None  # the reason for no reward: which function, and what it returned or raised


@dataclasses.dataclass(frozen=True)
class Judge:
    """A reward function and its terms, with their names in the config. Whatever they return or raise, calling a Judge does
    not fail."""

    name: str
    function: Callable[[Response], RewardResult]
    timeout: float | None = None
    """Seconds for one rollout. None: the function keeps to a limit of its own."""
    language: LanguageJudge | None = None
    """The language model that the function asks, if it asks one."""
    terms: Mapping[str, Callable[[Response], float]] = dataclasses.field(default_factory=dict)
    """Functions whose numbers are added to the reward, by their paths in `reward.terms`."""

    def __call__(self, response: Response) -> Judgement:
        """The function's result and the terms in plain Python numbers. An AppoError is raised further: it is not a
        function's fault."""
        judgement = _judged(self._subject, lambda: _checked(self.function(response)))
        terms: dict[str, float] = {}
        for path, term in self.terms.items():
            if judgement.error is not None:
                return judgement
            found = _judged(f"reward.terms = {path!r}", functools.partial(_called_term, term, response))
            name = path.partition(":")[2]
            if found.error is not None:
                return found
            if name in judgement.detail:
                return _failed(
                    f"reward.terms = {path!r} has the name of a part of {self._subject}; give it another name"
                )
            terms[name] = found.reward
        return dataclasses.replace(
            judgement, reward=judgement.reward + sum(terms.values()), detail=judgement.detail | terms
        )

    @property
    def _subject(self) -> str:
        return f"reward.function = {self.name!r}"

    def each(self, responses: Sequence[Response]) -> list[Judgement]:
        """The judgements of many rollouts, in order. If a call takes longer than `timeout`, only its rollout has no reward.

        A user's function is called once at a time, the language model by as many threads as its endpoint allows. Raises
        TrainingError if MAX_HANGING calls hang."""
        if self.timeout is None:
            judgements = []
            for response in responses:
                judgements.append(self(response))
                heartbeat.progress()
            return judgements
        workers = self.language.config.concurrency if self.language else 1
        who = f"{self._subject} with reward.terms" if self.terms else self._subject
        late = _failed(f"{who} did not return within reward.timeout = {self.timeout:g} s")
        return limited(self, responses, workers, self.timeout, late)

    def metrics(self) -> dict[str, float]:
        """Requests and tokens of the language model since the last call of this method, on all hosts together."""
        if self.language is None:
            return {}
        by_host = distributed.exchange(dataclasses.asdict(self.language.take_counts()))
        return {f"judge/{name}": float(sum(counts[name] for counts in by_host)) for name in by_host[0]}

    def close(self) -> None:
        if self.language is not None:
            self.language.close()

    def try_out(self, example: Example) -> None:
        """Call the functions as a run will: with a right answer to `example`, and with an empty response. Raises
        ConfigError with what it returned or raised, so that a mistake is found before the run begins."""
        right = f"<think> </think> <answer> \\boxed{{{example.golds[0] if example.golds else ''}}} </answer>"
        for what, segments in (("a right answer", (Segment(right, True),)), ("an empty response", ())):
            response = Response(
                segments, example.golds, example.kind, frozenset(), StopReason.ANSWERED, example.question
            )
            if error := self.each([response])[0].error:
                raise ConfigError(
                    f"{error}, when it was tried out on {what} to {example.id!r}; expected an appo_jax.types.RewardResult with a "
                    f"finite reward of at most {MAX_REWARD:g} and finite numbers in detail; from a term, a number"
                )

    def report(self, judgements: Sequence[tuple[str, Judgement]]) -> None:
        """Log which rollouts have no reward and why, by the id of their question."""
        failed, problem = _most_common_error([(identity, judgement.error) for identity, judgement in judgements])
        if failed:
            log.warning(
                "%d of %d rollouts have no reward and are left out of their groups: %s",
                failed,
                len(judgements),
                problem,
            )


def require_rewards(rollouts: Sequence[Rollout]) -> None:
    """Raise TrainingError if none of these rollouts has a reward. They are those of a step or an evaluation: one question whose
    reward always fails ends nothing."""
    failed, problem = _most_common_error([(rollout.example.id, rollout.reward_error) for rollout in rollouts])
    if failed and failed == len(rollouts):
        raise TrainingError(f"none of {failed} rollouts has a reward: {problem}; correct the function")


def _most_common_error(errors: Sequence[tuple[str, str | None]]) -> tuple[int, str]:
    """How many rollouts, each with the id of its question, have an error; and the most common error, in words."""
    counts = Counter(error for _, error in errors if error)
    if not counts:
        return 0, ""
    [(error, count)] = counts.most_common(1)
    return counts.total(), f"{error} ({count} times, first for {next(id for id, e in errors if e == error)!r})"


def limited(
    function: Callable[[Response], Judgement], items: Sequence[Response], workers: int, seconds: float, late: Judgement
) -> list[Judgement]:
    """`function` of every item, at most `workers` at a time; `late` for one that takes longer than `seconds`.

    Its thread cannot be ended: it is left behind, and another takes its place. What a call raises is raised here."""
    ended: queue.SimpleQueue[tuple[int, Judgement | BaseException]] = queue.SimpleQueue()

    def call(i: int) -> None:
        try:
            ended.put((i, function(items[i])))
        except BaseException as error:
            ended.put((i, error))

    results: dict[int, Judgement] = {}
    running: dict[int, float] = {}  # item -> when its time is over
    waiting = iter(range(len(items)))
    while len(results) < len(items):
        for i in itertools.islice(waiting, workers - len(running)):
            running[i] = time.monotonic() + seconds
            threading.Thread(target=call, args=(i,), name="reward", daemon=True).start()
        try:
            i, outcome = ended.get(timeout=max(0.0, min(running.values()) - time.monotonic()))
        except queue.Empty:
            i, outcome = min(running, key=lambda i: running[i]), late
        if i not in running:
            continue  # it was given up before
        if isinstance(outcome, BaseException):
            raise outcome
        del running[i]
        results[i] = outcome
        heartbeat.progress()
    if sum(thread.name == "reward" for thread in threading.enumerate()) > MAX_HANGING:
        raise TrainingError(f"more than {MAX_HANGING} calls of reward.function hang; correct the function")
    return [results[i] for i in range(len(items))]


def _judged(subject: str, call: Callable[[], Judgement]) -> Judgement:
    """What `call` returns. Its failure, or what it raises, with `subject`, the function."""
    try:
        judgement = call()
    except AppoError:
        raise
    except (Exception, SystemExit) as error:
        judgement = _failed(f"raised {_shown(error)}")
    return judgement if judgement.error is None else _failed(f"{subject} {judgement.error}")


def _checked(result: Any) -> Judgement:
    if not isinstance(result, RewardResult):
        return _failed(f"returned {_shown(result)}, a {type(result).__name__}")
    reward = _number(result.reward)
    if reward is None or not abs(reward) <= MAX_REWARD:
        return _failed(f"returned the reward {_shown(result.reward)}")
    if not isinstance(result.correct, bool | np.bool_):
        return _failed(f"returned correct = {_shown(result.correct)}")
    if not isinstance(result.detail, Mapping):
        return _failed(f"returned detail = {_shown(result.detail)}")
    detail: dict[str, float] = {}
    for name, value in result.detail.items():
        number = _number(value)
        if number is None or not math.isfinite(number):
            return _failed(f"returned detail[{name!r}] = {_shown(value)}")
        detail[str(name)] = number
    return Judgement(reward, bool(result.correct), detail)


def _called_term(term: Callable[[Response], Any], response: Response) -> Judgement:
    number = _number(result := term(response))
    if number is None or not abs(number) <= MAX_REWARD:
        return _failed(f"returned {_shown(result)}")
    return Judgement(number, False, {})


def _number(value: Any) -> float | None:
    """A Python number or a scalar of an array library as a float; None for anything else."""
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
