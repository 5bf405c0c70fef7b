"""A tool that is down: after one bad step or evaluation the run waits, after two in a row it stops, and in no other case."""

import dataclasses
import time

import pytest

from appo_jax.config import ToolsConfig
from appo_jax.errors import ToolError
from appo_jax.tools.outage import OutageWatch, ToolsDown, with_tools

CONFIG = ToolsConfig(pause_seconds=0.3)


def step(search=(20, 0), python=(20, 0)):
    return {
        "tools/search/calls": float(search[0]), "tools/search/unavailable": float(search[1]),
        "tools/python/calls": float(python[0]), "tools/python/unavailable": float(python[1]), "reward/initial": 0.5,
    }  # fmt: skip


def test_a_tool_that_stays_down_stops_the_run_after_one_pause(caplog):
    watch = OutageWatch(CONFIG)
    watch.see(1, step())
    began = time.monotonic()
    watch.see(2, step(search=(709, 694)))
    assert time.monotonic() - began >= 0.3
    assert "search: 694 of 709 calls were unavailable. Waiting 0 s" in caplog.text
    with pytest.raises(ToolError, match="the tool 'search' is down: 18 of 20 calls were unavailable in step 3"):
        watch.see(3, step(search=(20, 18)))


@pytest.mark.parametrize(
    "steps",
    [
        [step(search=(20, 10)), step(search=(20, 10))],  # half of them is the limit itself
        [step(search=(20, 20)), step(), step(search=(20, 20))],  # it came back
        [step(search=(20, 20)), step(python=(20, 20))],  # another one
        [step(search=(7, 7)), step(search=(7, 7))],  # too few to tell
        [{"tools/search/calls": 20.0, "tools/search/error": 20.0}] * 2,  # answered
        [{}, {}],
    ],
)
def test_what_does_not_stop_it(steps):
    watch = OutageWatch(dataclasses.replace(CONFIG, pause_seconds=0.0))
    for number, metrics in enumerate(steps, start=1):
        watch.see(number, metrics)


def test_a_request_to_stop_ends_the_pause():
    asked = iter([False, True])
    watch = OutageWatch(dataclasses.replace(CONFIG, pause_seconds=600.0), lambda: next(asked))
    began = time.monotonic()
    watch.see(1, step(search=(20, 20)))
    assert time.monotonic() - began < 5


def test_a_request_to_stop_ends_the_pause_of_an_evaluation_which_is_not_made_again():
    asked, draws = iter([False, True]), iter(range(1, 3))
    config = dataclasses.replace(CONFIG, pause_seconds=600.0)
    began = time.monotonic()
    with pytest.raises(ToolsDown, match="'search' is down"):
        with_tools(lambda: next(draws), lambda: step(search=(20, 20)), "an evaluation", config, lambda: next(asked))
    assert time.monotonic() - began < 5
    assert next(draws) == 2


@pytest.mark.parametrize(
    ("calls", "drawn"),
    [
        ([step(), step()], 1),
        ([step(search=(20, 20)), step()], 1),  # calls before the evaluation do not count
        ([step(), step(search=(20, 20)), step()], 2),
        ([step(), step(search=(20, 20)), step(search=(20, 11))], None),
    ],
)
def test_an_evaluation_without_a_tool_is_made_again_or_refused(calls, drawn):
    told, draws = iter(calls), iter(range(1, 4))

    def evaluate():
        return with_tools(lambda: next(draws), lambda: next(told), "an evaluation", CONFIG)

    if drawn is None:
        with pytest.raises(
            ToolError, match="'search' is down: 11 of 20 calls were unavailable in an evaluation, after a pause"
        ):
            evaluate()
    else:
        assert evaluate() == drawn
