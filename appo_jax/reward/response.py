"""What a reward function sees of a rollout."""

from __future__ import annotations

import dataclasses

from appo_jax.types import Kind, Segment, StopReason


@dataclasses.dataclass(frozen=True)
class Response:
    """A finished rollout as text: the policy's own words and the tool results between them, without the prompt."""

    segments: tuple[Segment, ...]
    golds: tuple[str, ...]
    kind: Kind
    tools_used: frozenset[str]  # names of the tools that were really called
    stop_reason: StopReason
    question: str = ""

    @property
    def text(self) -> str:
        """Everything, tool results included."""
        return "".join(segment.text for segment in self.segments)

    @property
    def sampled_text(self) -> str:
        """The policy's own words. A line break stands where a tool result was, so that no tag forms across it."""
        return "\n".join(segment.text for segment in self.segments if segment.sampled)
