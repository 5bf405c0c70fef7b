"""Demonstrations for the cold start, written with the run's tools.

A data source demonstrates how its questions are answered; a tool may bring its own examples. Both are written in the run's
call format and contain the real results of the tools. Demonstrations that the run's tools do not support are left out and
counted.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

from appo_jax.errors import DataError
from appo_jax.tools.executor import ToolExecutor
from appo_jax.tools.format import render_result
from appo_jax.tools.protocol import SKILLS, ToolExample
from appo_jax.types import Example, Outcome, Segment, Trace

logger = logging.getLogger(__name__)

TOOLS_PLACE = "{tools}"  # in a system prompt: replaced by the descriptions of the run's tools and of how to call them


class CannotDemonstrate(Exception):
    """The run's tools cannot demonstrate this question, or their results contradict its script."""


class LeftOut:
    """The demonstrations that the cold start does not train on, by reason."""

    def __init__(self) -> None:
        self._names: dict[str, list[str]] = {}

    def add(self, reason: str, name: str) -> None:
        self._names.setdefault(reason, []).append(name)

    def include(self, other: LeftOut) -> None:
        """Add those of `other`."""
        for reason, names in other._names.items():
            self._names.setdefault(reason, []).extend(names)

    @property
    def total(self) -> int:
        return sum(map(len, self._names.values()))

    def __str__(self) -> str:
        """The five most frequent reasons, with their counts."""
        reasons = sorted(self._names, key=lambda reason: -len(self._names[reason]))
        return "; ".join(f"{len(self._names[reason])}: {reason}" for reason in reasons[:5])

    def to_json(self) -> dict[str, Any]:
        """Count and first ten names for every reason."""
        return {reason: {"count": len(names), "first": names[:10]} for reason, names in self._names.items()}


class ToolKit:
    """The run's tools, for writing demonstrations. A call is made once; the same call again gets the kept result."""

    def __init__(self, executor: ToolExecutor):
        self._executor = executor
        self._format = executor.call_format
        self.run = functools.cache(self._run)

    def tool_for(self, skill: str) -> str:
        """The name of the first tool that has a skill: one of SKILLS, or one that your own tool declares.

        Raises CannotDemonstrate if no tool has it."""
        for tool in self._format.tools:
            if skill in tool.skills:
                return tool.name
        raise CannotDemonstrate(f"no tool of the run {SKILLS.get(skill, 'has this skill')} ({skill})")

    def write_call(self, tool: str, argument: str, closed: bool = True) -> str:
        """A call as the policy writes it. closed=False: without its closing tag, as if the policy forgot it."""
        try:
            return self._format.render_call(tool, argument, closed)
        except ValueError as error:
            raise CannotDemonstrate(str(error)) from error

    def write_result(self, text: str) -> str:
        """A result as the policy reads it."""
        return render_result(self._format, text)

    def _run(self, tool: str, argument: str) -> str:
        """The result of a call. Raises CannotDemonstrate if the call fails."""
        record = self._executor.run(tool, argument)
        if record.outcome not in (Outcome.OK, Outcome.ERROR):
            raise CannotDemonstrate(f"a call of {tool} ended as {record.outcome}")
        return record.result

    def tool_examples(self, system: str) -> Iterator[Callable[[], Trace]]:
        """The demonstrations that the tools bring, each as a function that makes it."""
        for tool in self._format.tools:
            for i, example in enumerate(tool.examples):
                yield functools.partial(self._trace, tool.name, example, f"{tool.name}-example-{i}", system)

    def _trace(self, tool: str, example: ToolExample, id: str, system: str) -> Trace:
        result = self.run(tool, example.argument)
        answer = example.answer if isinstance(example.answer, str) else example.answer(result)
        thought = example.thought or f"I use {tool}."
        return Trace(
            Example(id, example.question, (answer,), "qa", system),
            (
                Segment(f"<think>{thought}</think>{self.write_call(tool, example.argument)}", sampled=True),
                Segment(self.write_result(result), sampled=False),
                Segment(f"<answer>\\boxed{{{answer}}}</answer>", sampled=True),
            ),
        )


class Demonstrated(Protocol):
    """The part of a `Dataset` that `demonstrate` needs."""

    @property
    def train(self) -> Iterable[Example]: ...
    @property
    def demonstration(self) -> Callable[[int, ToolKit], Trace] | None: ...
    @property
    def num_demonstrations(self) -> int: ...


def demonstrate(
    dataset: Demonstrated, executor: ToolExecutor, limit: int | None = None, left_out: LeftOut | None = None
) -> list[Trace]:
    """The tools' examples, then the source's demonstrations; at most `limit` of them.

    Demonstrations that cannot be made are counted in `left_out`. Raises DataError, with the reasons, if none can be made."""
    return list(demonstrations(dataset, executor, limit, left_out))


def demonstrations(
    dataset: Demonstrated, executor: ToolExecutor, limit: int | None = None, left_out: LeftOut | None = None
) -> Iterator[Trace]:
    """Like `demonstrate`, but each is made only when it is asked for."""
    kit = ToolKit(executor)
    system = next((example.system for example in dataset.train), "")
    makers = list(kit.tool_examples(system))
    if dataset.demonstration is not None:
        makers += [functools.partial(dataset.demonstration, i, kit) for i in range(dataset.num_demonstrations)]
    if not makers:
        raise DataError("data.source has no demonstrations: set sft.steps to 0 and start from a policy that uses tools")
    made = 0
    left_out = LeftOut() if left_out is None else left_out
    instructions = executor.call_format.instructions()
    for number, make in enumerate(makers):
        if made == limit:
            break
        try:
            trace = make()
        except CannotDemonstrate as error:
            left_out.add(str(error), f"demonstration-{number}")
            continue
        made += 1
        yield dataclasses.replace(trace, example=introduce(trace.example, instructions))
    if left_out.total:
        message = f"{left_out.total} of {left_out.total + made} demonstrations are left out ({left_out})"
        if not made:
            raise DataError(f"{message}; change tools.enabled, or set sft.steps to 0")
        logger.warning("%s", message)


def introduce(example: Example, instructions: str) -> Example:
    """The example with the tools' instructions in place of `{tools}` in its system prompt. Without instructions, the sentence
    that announces them is left out, too."""
    if TOOLS_PLACE not in example.system:
        return example
    system = example.system if instructions else _without_announcement(example.system)
    return dataclasses.replace(example, system=system.replace(TOOLS_PLACE, instructions))


def _without_announcement(system: str) -> str:
    """A system prompt without `{tools}` and the sentence before it, if that ends in a colon: "Your tools:"."""
    before, _, after = system.partition(TOOLS_PLACE)
    text = before.rstrip()
    if not text.endswith(":"):
        return system
    starts = (end.end() for end in re.finditer(r"[.!?]\s+|\n\s*", text))
    return text[: max(starts, default=0)] + after.lstrip()
