"""The response that a reward function receives."""

from __future__ import annotations

import dataclasses
import itertools
import re

from appo_jax.types import Kind, Segment, StopReason


@dataclasses.dataclass(frozen=True)
class Response:
    """A finished rollout as text: the policy's own words and the tool results between them, without the prompt."""

    segments: tuple[Segment, ...]
    golds: tuple[str, ...]
    kind: Kind
    tools_used: frozenset[str]  # names of the tools that were called
    stop_reason: StopReason
    question: str = ""
    opening: str = ""  # the end of the prompt that the policy continues: a template may open <think> for it

    @property
    def text(self) -> str:
        """All text, including tool results."""
        return "".join(segment.text for segment in self.segments)

    @property
    def turns(self) -> list[tuple[str, bool]]:
        """The policy's text between tool results; each piece with whether a result follows it."""
        turns = []
        for sampled, group in itertools.groupby(self.segments, key=lambda segment: segment.sampled):
            if sampled:
                turns.append(("".join(segment.text for segment in group), False))
            elif turns:
                turns[-1] = (turns[-1][0], True)
        return turns

    @property
    def framed_text(self) -> str:
        """`sampled_text` with the thoughts that the prompt, or the template after a tool result, opened for the policy."""
        opening, texts = self.opening, []
        for sampled, group in itertools.groupby(self.segments, key=lambda segment: segment.sampled):
            text = "".join(segment.text for segment in group)
            if sampled:
                texts.append(opening + text)
            opening = "" if sampled else opened_thought(text)
        return "\n".join(texts)

    @property
    def sampled_text(self) -> str:
        """The policy's text. A line break replaces each tool result, so that no tag can form across it."""
        return "\n".join(text for text, _ in self.turns)


_OPENED_THOUGHT = re.compile(r"<think>\s*(?:</think>\s*)?\Z")


def opened_thought(text: str) -> str:
    """The thought that `text` ends with, if it is open or empty: `<think>`, or `<think>` and `</think>`."""
    found = _OPENED_THOUGHT.search(text[-200:])
    return found[0] if found else ""
