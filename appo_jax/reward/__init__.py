"""Rewards: functions from a finished rollout's text to a number and to whether the answer is right."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from appo_jax import distributed
from appo_jax.config import RewardConfig
from appo_jax.errors import ConfigError
from appo_jax.reward.judge import Judge, Judgement, require_rewards
from appo_jax.reward.official import official_reward
from appo_jax.reward.response import Response
from appo_jax.reward.robust import robust_reward
from appo_jax.tools.format import CallFormat
from appo_jax.tools.user_code import imported

__all__ = ["Judge", "Judgement", "Response", "make_reward", "require_rewards"]


def make_reward(config: RewardConfig, call_format: CallFormat, folder: Path) -> Judge:
    """The reward of a run, its terms included. call_format: that of the tools on offer. folder: for the judge's verdicts.

    Your own function gets a Response and returns a RewardResult; a term returns a number. Raises ConfigError for a function
    that cannot be imported or called. Its results are checked at every call (see Judge).
    """
    name, language = config.function, None
    function: Callable[[Response], Any]
    if name == "robust":
        function = functools.partial(robust_reward, bonus=config.tool_bonus, call_format=call_format)
    elif name == "official":
        function = functools.partial(official_reward, bonus=config.tool_bonus)
    elif name == "judge":
        from appo_jax.reward.language_judge import LanguageJudge

        assert config.judge is not None  # config.rules
        cache = config.judge.cache or folder / f"verdicts-{distributed.host()}.sqlite"
        language = LanguageJudge(config.judge, Path(cache))
        function = functools.partial(
            robust_reward, bonus=config.tool_bonus, call_format=call_format, grade=language.grade
        )
    else:
        function = _function("reward.function", name, "robust, official, judge or package.module:function")
    terms = {path: _function("reward.terms", path, "package.module:function") for path in config.terms}
    # The built-in functions have their own time limits.
    timeout = None if name in ("robust", "official") and not terms else config.timeout
    return Judge(name, function, timeout, language, terms)


def _function(field: str, path: str, expected: str) -> Callable[[Response], Any]:
    function = imported(field, path, expected)
    if not callable(function):
        raise ConfigError(f"{field} = {path!r} is a {type(function).__name__}, not a function; expected {expected}")
    return function
