"""The default reward: the format is checked on the policy's text, answers are compared by value."""

from __future__ import annotations

from collections.abc import Callable

from appo_jax.reward.format import format_error
from appo_jax.reward.grade import Grade, grade
from appo_jax.reward.response import Response
from appo_jax.tools.format import CallFormat
from appo_jax.types import RewardResult

BROKEN_FORMAT = -1.0


def robust_reward(
    response: Response, bonus: float, call_format: CallFormat, grade: Callable[[Response], Grade] = grade
) -> RewardResult:
    """−1 for a broken format, else the grade's score in [0, 1], plus `bonus` when it earned something with every tool.

    `call_format` has the run's tools; without tools there is no bonus. `correct` is that of the grade, for any format.
    """
    result = grade(response)
    detail = {"score": result.score, "format": 1.0, "bonus": 0.0, "verify_timeout": float(result.timed_out)}
    if format_error(response, call_format) is not None:
        return RewardResult(BROKEN_FORMAT, result.correct, detail | {"format": 0.0})
    tool_names = [tool.name for tool in call_format.tools]
    if result.score > 0 and tool_names and response.tools_used.issuperset(tool_names):
        detail["bonus"] = bonus
    return RewardResult(result.score + detail["bonus"], result.correct, detail)
