"""Rewards: a function from a finished rollout's text to a number, and to whether the answer is right."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable

from appo_jax.errors import ConfigError
from appo_jax.reward.official import official_reward
from appo_jax.reward.response import Response
from appo_jax.reward.robust import robust_reward
from appo_jax.tools.format import CallFormat
from appo_jax.types import RewardResult

__all__ = ["Response", "RewardFunction", "make_reward"]

RewardFunction = Callable[[Response], RewardResult]


def make_reward(name: str, bonus: float, call_format: CallFormat) -> RewardFunction:
    """The reward function of `RewardConfig.function`: "robust", "official", or your own as "package.module:function".

    `bonus` is `RewardConfig.tool_bonus`; `call_format` is that of the tools on offer. Your own function receives a Response and
    returns a RewardResult. Raises ConfigError when it cannot be imported or called, and, at a call, when it returns
    something else.
    """
    if name == "robust":
        return functools.partial(robust_reward, bonus=bonus, call_format=call_format)
    if name == "official":
        return functools.partial(official_reward, bonus=bonus)
    return _user_reward(name)


def _user_reward(path: str) -> RewardFunction:
    expected = "expected robust, official or package.module:function"
    module_name, _, function_name = path.partition(":")
    if not module_name or not function_name:
        raise ConfigError(f"reward = {path!r}: {expected}")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except ImportError as error:
        raise ConfigError(f"reward = {path!r}: cannot import {module_name!r} ({error}); {expected}") from error
    except AttributeError as error:
        raise ConfigError(f"reward = {path!r}: {module_name!r} has no {function_name!r}; {expected}") from error
    if not callable(function):
        raise ConfigError(f"reward = {path!r} is a {type(function).__name__}, not a function; {expected}")

    @functools.wraps(function)
    def checked(response: Response) -> RewardResult:
        result = function(response)
        if not isinstance(result, RewardResult):
            raise ConfigError(f"reward = {path!r} returned {result!r}; expected an appo_jax.types.RewardResult")
        return result

    return checked
