"""The executor: every call is answered in time, and no fault of a tool raises an exception in the caller."""

import re
import sys
import threading
import time

import pytest

from appo_jax.config import PythonToolConfig, ToolsConfig
from appo_jax.errors import ConfigError, ToolError
from appo_jax.tools import lanes
from appo_jax.tools.build import build_executor, import_tool
from appo_jax.tools.executor import ToolExecutor
from appo_jax.tools.protocol import ToolResult
from appo_jax.tools.sandbox.system import descendants
from appo_jax.types import Document, Outcome


class Echo:
    """A stateless tool that does what its argument says."""

    name = "echo"
    timeout = 0.2

    def __init__(self):
        self.asked = []
        self.running = self.most = 0
        self.lock = threading.Lock()
        self.release = threading.Event()
        self.closed = False

    def start(self):
        return None

    def call(self, state, argument):
        with self.lock:
            self.asked.append(argument)
            self.running += 1
            self.most = max(self.most, self.running)
        try:
            if argument.startswith("raise"):
                raise RuntimeError("broken")
            if argument.startswith("slow"):
                time.sleep(0.05)
            if "down" in argument:
                return ToolResult("down", Outcome.UNAVAILABLE), None
            if argument.startswith("hang"):
                self.release.wait(20)
            return ToolResult(f"echo {argument}", Outcome.OK), None
        finally:
            with self.lock:
                self.running -= 1

    def close(self):
        self.release.set()
        self.closed = True


class Counter:
    """A tool with state: a number that every call adds to."""

    name = "counter"

    def start(self):
        return 0

    def call(self, state, argument):
        state += int(argument)
        return ToolResult(str(state), Outcome.OK), state

    def close(self):
        pass


@pytest.fixture
def echo():
    return Echo()


@pytest.fixture
def executor(echo, monkeypatch):
    monkeypatch.setattr(lanes, "GRACE", 0.1)
    with ToolExecutor([echo, Counter()], ToolsConfig(max_concurrency=3)) as executor:
        yield executor


def ask(executor, text, states=None, **options):
    return executor.submit(executor.start() if states is None else states, text, **options).result(5)


def test_a_call_is_answered(executor):
    record = ask(executor, "<think>t</think><echo>hi</echo>")
    assert (record.name, record.argument, record.result, record.outcome) == ("echo", "hi", "echo hi", Outcome.OK)
    assert 0 <= record.seconds < 5


def test_stop_strings_name_every_tool(executor):
    assert executor.stop_strings == ("</echo>", "</counter>")


@pytest.mark.parametrize("text", ["</echo>", "<echo></echo>", "<other>x</other>", "nothing"])
def test_malformed_calls_are_explained(executor, echo, text):
    states = executor.start()
    record = ask(executor, text, states)
    assert record.outcome is Outcome.MALFORMED
    assert record.result
    assert record.states == states
    assert echo.asked == []


def test_states_fork(executor):
    first = ask(executor, "<counter>5</counter>")
    left = ask(executor, "<counter>1</counter>", first.states)
    right = ask(executor, "<counter>2</counter>", first.states)
    assert (first.result, left.result, right.result) == ("5", "6", "7")
    assert ask(executor, "<counter>10</counter>", left.states).result == "16"


def test_a_repeated_query_is_answered_from_memory_of_the_same_rollout(executor, echo):
    first = ask(executor, "<echo>who</echo>")
    again = ask(executor, "<echo>who</echo>", first.states)
    assert echo.asked == ["who"]
    assert again.result.endswith("\necho who")
    assert "asked this before" in again.result
    assert ask(executor, "<echo>who</echo>").result == "echo who"  # another rollout has no such memory
    assert echo.asked == ["who", "who"]
    assert executor.metrics()["tools/echo/repeated"] == 1


def test_failures_are_not_remembered(executor, echo):
    first = ask(executor, "<echo>down</echo>")
    assert first.outcome is Outcome.UNAVAILABLE
    ask(executor, "<echo>down</echo>", first.states)
    assert echo.asked == ["down", "down"]


def test_an_exception_of_a_tool_is_text(executor):
    record = ask(executor, "<echo>raise</echo>")
    assert record.outcome is Outcome.UNAVAILABLE
    assert "broken" in record.result


def test_no_more_calls_run_at_once_than_allowed(executor, echo):
    futures = [executor.submit(executor.start(), f"<echo>slow {i}</echo>") for i in range(12)]
    assert {future.result(5).outcome for future in futures} == {Outcome.OK}
    assert echo.most == 3
    assert executor.metrics()["tools/echo/queue_max"] >= 6


def test_a_hanging_call_is_answered_and_its_place_is_taken(executor, echo):
    began = time.monotonic()
    futures = [executor.submit(executor.start(), f"<echo>hang {i}</echo>") for i in range(3)]
    records = [future.result(5) for future in futures]
    assert {record.outcome for record in records} == {Outcome.UNAVAILABLE}
    assert time.monotonic() - began < 2
    assert ask(executor, "<echo>hi</echo>").outcome is Outcome.OK


def test_a_bound_holds(executor):
    began = time.monotonic()
    record = ask(executor, "<echo>hang</echo>", bound=0.05)
    assert record.outcome is Outcome.TIMEOUT
    assert time.monotonic() - began < 0.2
    assert ask(executor, "<counter>1</counter>", bound=0.0).outcome in (Outcome.TIMEOUT, Outcome.OK)


def test_a_tool_that_is_down_is_left_alone_for_a_while(executor, echo, monkeypatch):
    monkeypatch.setattr(lanes, "COOL_DOWN", (0.3, 0.3))
    for i in range(lanes.TRIP_AFTER):
        ask(executor, f"<echo>down {i}</echo>")
    asked = len(echo.asked)
    record = ask(executor, "<echo>hi</echo>")
    assert record.outcome is Outcome.UNAVAILABLE
    assert len(echo.asked) == asked
    assert ask(executor, "<counter>1</counter>").outcome is Outcome.OK  # other tools go on
    time.sleep(0.35)
    assert ask(executor, "<echo>hi</echo>").outcome is Outcome.OK


class Wrong:
    """A tool with a mistake: `behave` is called in place of a correct `call`."""

    name = "wrong"

    def __init__(self, behave):
        self.behave = behave

    def start(self):
        return 1

    def call(self, state, argument):
        return (ToolResult("right", Outcome.OK), state) if argument == "right" else self.behave()

    def close(self):
        pass


def leave():
    raise SystemExit(3)


@pytest.mark.parametrize(
    "behave",
    [
        lambda: ("text", None), lambda: (ToolResult(42, Outcome.OK), None), lambda: (ToolResult("x", "fine"), None),
        lambda: None, lambda: ToolResult("x", Outcome.OK), lambda: (ToolResult("no state", Outcome.OK), None), leave,
    ],
)  # fmt: skip
def test_a_tool_with_a_mistake_keeps_its_workers(behave, monkeypatch):
    monkeypatch.setattr(lanes, "TRIP_AFTER", 100)
    with ToolExecutor([Wrong(behave)], ToolsConfig(max_concurrency=1)) as executor:
        for i in range(3):
            record = ask(executor, f"<wrong>{i}</wrong>")
            assert record.outcome is (Outcome.OK if record.result == "no state" else Outcome.UNAVAILABLE)
        assert ask(executor, "<wrong>right</wrong>").result == "right"
        assert executor._lanes["wrong"]._started == 1


def test_calls_that_fail_together_open_the_circuit_once(echo, monkeypatch):
    """A server that was gone for a moment is asked again after the first cool-down, however many calls were under way."""
    monkeypatch.setattr(lanes, "COOL_DOWN", (0.3, 60.0))
    with ToolExecutor([echo], ToolsConfig(max_concurrency=2 * lanes.TRIP_AFTER)) as executor:
        calls = [executor.submit(executor.start(), f"<echo>slow down {i}</echo>") for i in range(8 * lanes.TRIP_AFTER)]
        assert {call.result(5).outcome for call in calls} == {Outcome.UNAVAILABLE}
        assert len(echo.asked) > 2 * lanes.TRIP_AFTER
        time.sleep(0.35)
        assert ask(executor, "<echo>hi</echo>").outcome is Outcome.OK


def test_a_success_closes_the_circuit(echo, monkeypatch):
    monkeypatch.setattr(lanes, "COOL_DOWN", (60.0, 60.0))
    echo.timeout = 5.0
    with ToolExecutor([echo], ToolsConfig(max_concurrency=2)) as executor:
        under_way = executor.submit(executor.start(), "<echo>hang</echo>")
        for i in range(lanes.TRIP_AFTER):
            ask(executor, f"<echo>down {i}</echo>")
        assert ask(executor, "<echo>hi</echo>").outcome is Outcome.UNAVAILABLE
        echo.release.set()
        assert under_way.result(5).outcome is Outcome.OK
        assert ask(executor, "<echo>hi</echo>").outcome is Outcome.OK


def test_metrics_count_by_tool_and_outcome_and_start_anew(executor):
    for text in ("<echo>a</echo>", "<echo>b</echo>", "<echo>raise</echo>", "<counter>1</counter>", "bad"):
        ask(executor, text)
    metrics = executor.metrics()
    assert metrics["tools/echo/calls"] == 3
    assert metrics["tools/echo/ok"] == 2
    assert metrics["tools/echo/unavailable"] == 1
    assert metrics["tools/counter/ok"] == 1
    assert metrics["tools/malformed/malformed"] == 1
    assert 0 <= metrics["tools/echo/seconds_p50"] <= metrics["tools/echo/seconds_p99"]
    assert executor.metrics() == {}


def test_closing_answers_what_waits_and_closes_the_tools(echo):
    executor = ToolExecutor([echo], ToolsConfig(max_concurrency=1))
    futures = [executor.submit(executor.start(), f"<echo>hang {i}</echo>") for i in range(3)]
    executor.close()
    executor.close()
    outcomes = [future.result(5).outcome for future in futures]
    assert outcomes.count(Outcome.UNAVAILABLE) >= 2
    assert echo.closed
    assert executor.submit({}, "<echo>late</echo>").result(5).outcome is Outcome.UNAVAILABLE


def test_what_has_ended_is_released_at_once():
    """Finished rollouts leave no interpreter behind, although the time limits of their calls end seconds later."""
    config = ToolsConfig(enabled=("python",), python=PythonToolConfig(isolation="process", preload=("math",)))
    with build_executor(config) as executor:
        (tool,) = executor._tools.values()
        alone = len(descendants(tool.pid))
        for i in range(12):
            first = ask(executor, f"<python>x = {i}</python>", bound=600.0)
            second = ask(executor, "<python>x * 2</python>", first.states, bound=600.0)
            assert second.result == str(2 * i)
        del first, second
        end = time.monotonic() + 2.0
        while len(descendants(tool.pid)) > alone:
            assert time.monotonic() < end, "finished rollouts are still alive"
            time.sleep(0.05)


def test_cancelled_alarms_take_no_room():
    clock = lanes.Clock()
    rung = threading.Event()
    try:
        for _ in range(10_000):
            clock.at(time.monotonic() + 600.0, print).cancel()
        assert len(clock._heap) <= 1024
        clock.at(time.monotonic() + 0.01, rung.set)
        assert rung.wait(2.0)
    finally:
        clock.close()


def test_an_alarm_far_away_delays_no_other():
    clock = lanes.Clock()
    rung = threading.Event()
    try:
        clock.at(time.monotonic() + 1e10, print)
        time.sleep(0.05)  # the clock waits for it
        clock.at(time.monotonic() + 0.01, rung.set)
        assert rung.wait(2.0)
    finally:
        clock.close()


def test_two_tools_of_one_name_are_refused(echo):
    with pytest.raises(ConfigError, match="named alike"):
        ToolExecutor([echo, Echo()], ToolsConfig())


@pytest.mark.parametrize(
    "name", ["<lambda>", "my tool", "files/search", "answer", "Result", "malformed", "", "a" * 65, "1st", "näme", None]
)
def test_a_name_that_cannot_be_a_tag_is_refused(echo, name):
    echo.name = name
    with pytest.raises(ConfigError, match=r"tools\.enabled: a tool is named .*Give it another `name`"):
        ToolExecutor([echo], ToolsConfig())


@pytest.mark.parametrize("name", ["files.search-2", "_x", "a" * 64])
@pytest.mark.parametrize("call_format", ["tags", "json", "chat"])
def test_a_name_that_is_allowed_can_be_called(echo, name, call_format):
    echo.name = name
    with ToolExecutor([echo], ToolsConfig(call_format=call_format)) as executor:
        assert executor.run(name, "hi").result == "echo hi"


def make_echo():
    return Echo()


def make_wrong():
    tool = Echo()
    tool.max_concurrency = 0
    return tool


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("name", ""), ("timeout", 0), ("timeout", "30"), ("max_concurrency", 0), ("max_concurrency", 1.5), ("description", None),
        ("argument_name", 3), ("parameters", ["city"]), ("parameters", {"properties": ["city"]}), ("skills", "compute"),
        ("examples", ("x",)),
    ],
)  # fmt: skip
def test_what_a_tool_says_about_itself_is_checked(monkeypatch, name, value):
    """A tool with max_concurrency = 0 would answer no call, and the policy would be blamed for the time that it takes."""
    monkeypatch.setattr(Echo, name, value, raising=False)
    monkeypatch.syspath_prepend(__file__.rpartition("/")[0])
    monkeypatch.setitem(sys.modules, "test_executor", sys.modules[__name__])
    with pytest.raises(ConfigError, match=rf"gave a Echo with {name} = {re.escape(repr(value))}; expected a"):
        import_tool("test_executor:make_echo")


def test_tools_by_import_path(monkeypatch):
    monkeypatch.syspath_prepend(__file__.rpartition("/")[0])
    assert import_tool("test_executor:make_echo").name == "echo"
    with pytest.raises(ConfigError, match="no_such_module"):
        import_tool("no_such_module:f")
    with pytest.raises(ConfigError, match="without name, start, call, close"):
        import_tool("builtins:list")
    with pytest.raises(
        ConfigError, match=r"test_executor:make_wrong' gave a Echo with max_concurrency = 0; expected a whole"
    ):
        import_tool("test_executor:make_wrong")
    with pytest.raises(ConfigError, match="unknown tool 'calculator'"):
        build_executor(ToolsConfig(enabled=("calculator",)))
    with pytest.raises(ConfigError, match=r"'executor': .*/tools/executor\.py is no tool; expected `make_tool"):
        build_executor(ToolsConfig(enabled=("executor",)))


def test_the_built_in_tools_together():
    config = ToolsConfig(python=PythonToolConfig(isolation="process", preload=("math",)))
    pages = [Document("Ada", "Ada lives in Bern."), Document("Bob", "Bob lives in Rome.")]
    with build_executor(config, pages) as executor:
        assert executor.stop_strings == ("</python>", "</search>")
        first = ask(executor, "<search>Where does Ada live?</search>")
        assert first.result.startswith("Page 1: Ada. Ada lives in Bern.")
        second = ask(executor, "<python>x = 20 + 1\nx</python>", first.states)
        third = ask(executor, "<python>x * 2</python>", second.states)
        assert (second.result, third.result) == ("21", "42")
        assert ask(executor, "<python>x</python>", first.states).outcome is Outcome.ERROR


SESSIONS = """
import itertools
from appo_jax.tools.protocol import ToolResult
from appo_jax.types import Outcome
class Sessions:
    name = "sessions"
    def __init__(self, failures):
        self.failures, self.made = failures, itertools.count()
    def start(self):
        if (number := next(self.made)) in self.failures:
            raise ConnectionError("503 from the session server")
        return number
    def call(self, state, argument):
        return ToolResult(f"{argument} in {state}", Outcome.OK), state
    def close(self):
        pass
    def faults(self):
        raise OSError("no connection")
def later():
    return Sessions({1})
def always():
    return Sessions(range(9))
"""


def test_a_state_that_cannot_be_made_makes_the_calls_of_its_rollout_unavailable(tmp_path, monkeypatch):
    (tmp_path / "own_sessions.py").write_text(SESSIONS)
    monkeypatch.syspath_prepend(tmp_path)
    text = "<sessions>x</sessions>"
    with build_executor(ToolsConfig(enabled=("own_sessions:later",))) as executor:  # tries a first start
        without, with_one = executor.start(), executor.start()
        for _ in range(2):
            record = executor.submit(without, text).result(5)
            assert record.outcome is Outcome.UNAVAILABLE
            assert "sessions is not available (ConnectionError: 503 from the session server)" in record.result
            without = record.states
        assert executor.submit(with_one, text).result(5).result == "x in 2"
        assert executor.metrics()["tools/sessions/unavailable"] == 2  # and faults() raises
    with pytest.raises(ToolError, match=r"'own_sessions:always': start\(\) raised ConnectionError: 503 .* correct it"):
        build_executor(ToolsConfig(enabled=("own_sessions:always",)))
