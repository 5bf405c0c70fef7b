"""Rewards: a function from a finished rollout's text to a number, and to whether the answer is right."""

from __future__ import annotations

import functools
import importlib

from appo_jax.errors import ConfigError
from appo_jax.reward.judge import Judge, Judgement
from appo_jax.reward.official import official_reward
from appo_jax.reward.response import Response
from appo_jax.reward.robust import robust_reward
from appo_jax.tools.format import CallFormat

__all__ = ["Judge", "Judgement", "Response", "make_reward"]


def make_reward(name: str, bonus: float, call_format: CallFormat) -> Judge:
    """The reward function of `RewardConfig.function`: "robust", "official", or your own as "package.module:function".

    `bonus` is `RewardConfig.tool_bonus`; `call_format` is that of the tools on offer. Your own function receives a Response and
    returns a RewardResult. Raises ConfigError when it cannot be imported or called; what it returns is checked at every
    call (see Judge).
    """
    if name == "robust":
        return Judge(name, functools.partial(robust_reward, bonus=bonus, call_format=call_format))
    if name == "official":
        return Judge(name, functools.partial(official_reward, bonus=bonus))
    return _user_reward(name)


def _user_reward(path: str) -> Judge:
    expected = "expected robust, official or package.module:function"
    module_name, _, function_name = path.partition(":")
    if not module_name or not function_name:
        raise ConfigError(f"reward.function = {path!r}: {expected}")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except ImportError as error:
        raise ConfigError(f"reward.function = {path!r}: cannot import {module_name!r} ({error}); {expected}") from error
    except AttributeError as error:
        raise ConfigError(
            f"reward.function = {path!r}: {module_name!r} has no {function_name!r}; {expected}"
        ) from error
    if not callable(function):
        raise ConfigError(f"reward.function = {path!r} is a {type(function).__name__}, not a function; {expected}")
    return Judge(path, function)
