"""Valid and invalid results of reward functions, and the messages about them."""

import dataclasses
import json
import logging
import math
import time

import jax.numpy as jnp
import numpy as np
import pytest

from appo_jax import heartbeat
from appo_jax.errors import AppoError, ConfigError, TrainingError
from appo_jax.reward import Judge, Judgement, Response, require_rewards
from appo_jax.types import Example, RewardResult, Rollout, StopReason

EXAMPLE = Example("q-7", "2 + 3?", ("5",), "math", "")
RESPONSE = Response((), ("5",), "math", frozenset(), StopReason.ANSWERED)


def judge(value):
    """A judge whose function returns `value`, or raises it."""

    def function(response):
        if isinstance(value, BaseException):
            raise value
        return value

    return Judge("mine:f", function)


@pytest.mark.parametrize("number", [1, True, 0.5, np.float32(0.5), np.int64(2), np.array(0.25), jnp.float32(0.5)])
def test_numbers_of_any_library_become_plain_numbers(number):
    judgement = judge(RewardResult(number, np.bool_(True), {"f1": number}))(RESPONSE)
    assert (judgement.reward, judgement.correct, judgement.detail) == (float(number), True, {"f1": float(number)})
    assert type(judgement.reward) is float
    assert type(judgement.detail["f1"]) is float
    # as hosts tell each other
    assert Judgement(*json.loads(json.dumps(dataclasses.astuple(judgement)))) == judgement


class Unprintable:
    def __repr__(self):
        raise RuntimeError("no")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (RewardResult(float("nan"), True), "returned the reward nan"),
        (RewardResult(float("inf"), True), "returned the reward inf"),
        (RewardResult(np.float32("-inf"), True), "returned the reward .*-inf"),
        (RewardResult(10**400, True), "returned the reward 1000"),
        (RewardResult(-1e200, True), r"returned the reward -1e\+200"),
        (RewardResult(np.zeros(2), True), r"returned the reward array\(\[0\., 0\.\]\)"),
        (RewardResult("1.0", True), "returned the reward '1.0'"),
        (RewardResult(None, True), "returned the reward None"),
        (RewardResult(1.0, "yes"), "returned correct = 'yes'"),
        (RewardResult(1.0, True, {"why": "because"}), r"returned detail\['why'\] = 'because'"),
        (RewardResult(1.0, True, {"f1": float("nan")}), r"returned detail\['f1'\] = nan"),
        (RewardResult(1.0, True, {"f1": np.ones(3)}), r"returned detail\['f1'\] = array"),
        (RewardResult(1.0, True, [1.0]), r"returned detail = \[1.0\]"),
        (1.0, "returned 1.0, a float"),
        (None, "returned None, a NoneType"),
        ((1.0, True), r"returned \(1.0, True\), a tuple"),
        (Unprintable(), "returned something whose repr raises RuntimeError, a Unprintable"),
        ("x" * 10_000, "returned 'xxx"),
        (KeyError("gold"), "raised KeyError"),
        (AttributeError("no group"), "raised AttributeError.*no group"),
        (ZeroDivisionError(), "raised ZeroDivisionError"),
        (SystemExit(1), "raised SystemExit"),
    ],
)
def test_anything_else_is_an_error_of_that_rollout_by_name(value, message):
    judgement = judge(value)(RESPONSE)
    assert math.isnan(judgement.reward)
    assert len(judgement.error) < 300
    assert not judgement.correct
    with pytest.raises(
        ConfigError, match=f"reward.function = 'mine:f' {message}.*, when it was tried out on a right answer to 'q-7'"
    ):
        judge(value).try_out(EXAMPLE)


def test_a_machine_without_math_verify_is_no_fault_of_the_function():
    with pytest.raises(AppoError, match="cannot be started"):
        judge(AppoError("math-verify cannot be started"))(RESPONSE)


def test_a_function_that_needs_an_answer_is_found_out_on_an_empty_one():
    def function(response):
        return RewardResult(float(response.text.split("boxed")[1][1] == "5"), True)

    with pytest.raises(ConfigError, match=r"raised IndexError.* on an empty response to 'q-7'"):
        Judge("mine:f", function).try_out(EXAMPLE)


@pytest.mark.parametrize("golds", [("5",), ()])
def test_a_good_function_is_tried_out_in_silence(golds, caplog):
    judge(RewardResult(0.0, False)).try_out(dataclasses.replace(EXAMPLE, golds=golds))
    assert not caplog.records


GOOD, BAD = (
    Judgement(1.0, True, {}),
    Judgement(math.nan, False, {}, "reward.function = 'mine:f' returned the reward nan"),
)


def test_failures_are_counted_named_and_said_once(caplog):
    other = Judgement(math.nan, False, {}, "raised KeyError('x')")
    with caplog.at_level(logging.WARNING):
        judge(None).report([("a", GOOD), ("b", BAD), ("c", other), ("d", BAD), ("e", GOOD)])
    (record,) = caplog.records
    assert record.getMessage() == (
        "3 of 5 rollouts have no reward and are left out of their groups: reward.function = 'mine:f' returned the "
        "reward nan (2 times, first for 'b')"
    )


def test_a_step_without_any_reward_ends_the_run():
    x = np.zeros(1)
    failed = Rollout(EXAMPLE, x, 0, x, x, x, StopReason.ANSWERED, (), 0, reward_error="returned nan")
    good = dataclasses.replace(failed, reward=1.0, reward_error=None)
    with pytest.raises(
        TrainingError, match=r"none of 2 rollouts has a reward: returned nan \(2 times, first for 'q-7'\); correct"
    ):
        require_rewards([failed, failed])
    require_rewards([failed, good])
    require_rewards([])


def test_nothing_to_report(caplog):
    judge(None).report([("a", GOOD)])
    judge(None).report([])
    assert not caplog.records


def test_every_reward_is_progress():
    """Many slow rewards take longer together than a run may be silent."""

    def slow(response):
        time.sleep(0.05)
        return RewardResult(0.0, False)

    heartbeat.progress()
    began = time.monotonic()
    Judge("mine:f", slow).each([RESPONSE] * 6)
    assert time.monotonic() - heartbeat._life.progressed < (time.monotonic() - began) / 3
