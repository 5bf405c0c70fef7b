"""Wrapped tools: functions, OpenAI-style functions, and a real MCP server as a child process."""

import json
import sys
import time

import pytest

from appo_jax.config import ToolsConfig
from appo_jax.errors import ToolError
from appo_jax.tools import lanes
from appo_jax.tools.executor import ToolExecutor
from appo_jax.tools.protocol import ToolResult
from appo_jax.tools.wrap import FunctionTool, McpTool, read_arguments
from appo_jax.types import Outcome

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}, "required": ["a"]}

SERVER = """
import json, sys, time
for line in sys.stdin:
    m = json.loads(line)
    if "id" not in m: continue
    p = m.get("params", {})
    while "talks on" in sys.argv: print("noise")
    if m["method"] == "tools/list" and "no list" in sys.argv:
        print(json.dumps({"jsonrpc": "2.0", "id": m["id"], "error": {"message": "no list"}}), flush=True)
        continue
    if m["method"] == "tools/list":
        if "endless" in sys.argv:
            r = {"tools": [], "nextCursor": str(int(p.get("cursor", 0)) + 1)}
        elif "circle" in sys.argv:
            r = {"tools": [], "nextCursor": {"a": "b"}.get(p.get("cursor"), "a")}
        elif p.get("cursor") == "2":
            r = {"tools": [{"name": "add", "inputSchema": {"properties": {"a": {}, "b": {}}, "required": ["a", "b"]}}]}
        else:
            r = {"tools": [{"name": "other"}], "nextCursor": "2"}
    elif m["method"] == "tools/call":
        a = p["arguments"]
        if a["a"] == "die": sys.exit()
        if a["a"] == "hang": time.sleep(60)
        if a["a"] == "bad":
            print(json.dumps({"jsonrpc": "2.0", "id": m["id"], "error": {"code": -1, "message": "no such number"}}), flush=True)
            continue
        if a["a"] == "slow": time.sleep(0.6); a["a"] = 0
        r = {"content": [{"type": "text", "text": str(a["a"] + a["b"])}]}
    else:
        r = {}
    print("noise on stdout")
    print(json.dumps({"jsonrpc": "2.0", "id": m["id"], "result": r}), flush=True)
    if "deaf" in sys.argv and "cursor" in p: time.sleep(60)
"""


def test_a_function_of_text():
    tool = FunctionTool(lambda text: text.upper(), name="shout")
    assert tool.call(None, " hi ")[0] == ToolResult("HI", Outcome.OK)


def test_an_openai_style_function():
    tool = FunctionTool(lambda a, b=1: {"quotient": a // b}, name="divide", parameters=SCHEMA)
    assert tool.call(None, '{"a": 6, "b": 3}')[0] == ToolResult('{"quotient": 2}', Outcome.OK)
    assert tool.call(None, '{"a": 6, "b": 0}')[0].outcome is Outcome.ERROR
    assert tool.call(None, '{"b": 1, "c": 2}')[0] == ToolResult(
        "Malformed arguments: unknown 'c', missing 'a'; expected a, b.", Outcome.MALFORMED
    )
    assert tool.call(None, "6")[0].outcome is Outcome.MALFORMED


@pytest.mark.parametrize(
    "call",
    [
        '<tool_call>{"name": "inches_to_cm", "arguments": {"input": 3}}</tool_call>',
        '<tool_call>{"name": "inches_to_cm", "arguments": 3}</tool_call>',
        '<tool_call>{"name": "inches_to_cm", "arguments": {"input": "3"}}</tool_call>',
    ],
)
def test_a_function_of_text_reads_a_number_in_a_json_call(call):
    """The tool `unit` of docs/tools.md: 3 inches are 7.62 cm."""
    unit = FunctionTool(lambda text: str(float(text) * 2.54), name="inches_to_cm")
    with ToolExecutor([unit], ToolsConfig(call_format="json")) as executor:
        assert executor.submit(executor.start(), call).result(10).result == "7.62"


@pytest.mark.parametrize(
    ("call_format", "call", "shown"),
    [
        ("tags", "<list_files></list_files>", "files of ."), ("tags", "<list_files>/data</list_files>", "files of /data"),
        ("json", '<tool_call>{"name": "list_files", "arguments": {}}</tool_call>', "files of ."),
        ("json", '<tool_call>{"name": "list_files", "arguments": {"path": ""}}</tool_call>', "files of "),
    ],
)  # fmt: skip
def test_an_optional_only_argument_has_its_default(call_format, call, shown):
    schema = {"type": "object", "properties": {"path": {"type": "string"}}}
    files = FunctionTool(lambda path=".": f"files of {path}", name="list_files", parameters=schema)
    with ToolExecutor([files], ToolsConfig(call_format=call_format)) as executor:
        record = executor.submit(executor.start(), call).result(10)
    assert (record.result, record.outcome) == (shown, Outcome.OK)


def test_a_single_property_takes_the_bare_text():
    assert read_arguments("who is it", {"properties": {"query": {"type": "string"}}}) == {"query": "who is it"}
    assert read_arguments("12", {"properties": {"query": {"type": "string"}}}) == {"query": "12"}
    assert read_arguments("12", {"properties": {"n": {"type": "integer"}}}) == {"n": 12}


@pytest.mark.parametrize(
    ("text", "explained"),
    [
        ('{"n": "3"}', 'n = "3": expected integer'), ("abc", 'n = "abc": expected integer'), ("3", None), ("3.0", None),
        ("3.5", "expected integer"), ("true", "expected integer"), ('{"n": null}', "n = null: expected integer"),
    ],
)  # fmt: skip
def test_an_argument_of_another_type_is_explained(text, explained):
    found = read_arguments(text, {"properties": {"n": {"type": "integer"}}})
    assert found == {"n": 3} if explained is None else explained in found


@pytest.mark.parametrize(
    ("schema", "value", "fits"),
    [
        ({"type": "string"}, ["a"], False), ({"type": ["string", "null"]}, None, True), ({"enum": ["a", "b"]}, "c", False),
        ({"enum": ["a", "b"]}, "b", True), (True, {"x": 1}, True), ({}, None, True), ({"type": "number"}, 3, True),
        ({"type": "array", "items": {"type": "string"}}, ["a", 1], False), ({"type": "unheard-of"}, 1, True),
        ({"type": "object", "properties": {"x": {"type": "integer"}}}, {"x": "1"}, False),
    ],
)  # fmt: skip
def test_arguments_fit_their_schema(schema, value, fits):
    arguments = {"a": value, "b": 1}
    assert (read_arguments(json.dumps(arguments), {"properties": {"a": schema, "b": {}}}) == arguments) == fits


@pytest.mark.parametrize(("value", "text"), [({"city": "Zürich"}, '{"city": "Zürich"}'), ({(1, 2): 3}, "{(1, 2): 3}")])
def test_what_a_function_returns_is_readable(value, text):
    assert FunctionTool(lambda _: value, name="f").call(None, "x")[0] == ToolResult(text, Outcome.OK)


@pytest.fixture
def mcp():
    tool = McpTool([sys.executable, "-c", SERVER], "add", timeout=5.0)
    yield tool
    tool.close()


def test_an_mcp_tool(mcp):
    assert mcp.call(None, '{"a": 2, "b": 3}')[0] == ToolResult("5", Outcome.OK)
    assert mcp.call(None, '{"a": "bad", "b": 3}')[0] == ToolResult("no such number", Outcome.ERROR)
    assert mcp.call(None, '{"a": 2}')[0].outcome is Outcome.MALFORMED


def test_an_mcp_server_that_dies_is_started_again(mcp):
    assert mcp.call(None, '{"a": "die", "b": 3}')[0].outcome is Outcome.UNAVAILABLE
    assert mcp.call(None, '{"a": 2, "b": 3}')[0].text == "5"


def test_an_mcp_server_that_hangs_is_left(mcp):
    mcp.timeout = 1.0
    began = time.monotonic()
    assert mcp.call(None, '{"a": "hang", "b": 3}')[0].outcome is Outcome.TIMEOUT
    assert time.monotonic() - began < 3
    mcp.timeout = 5.0
    assert mcp.call(None, '{"a": 2, "b": 3}')[0].text == "5"


def test_calls_of_an_mcp_tool_wait_for_each_other_outside_their_time_limit(mcp, monkeypatch):
    monkeypatch.setattr(lanes, "GRACE", 0.1)
    mcp.timeout = 1.5
    with ToolExecutor([mcp], ToolsConfig(max_concurrency=8)) as executor:
        calls = [
            executor.submit(executor.start(), f'<add>{{"a": "slow", "b": {i}}}</add>') for i in range(lanes.TRIP_AFTER)
        ]
        assert [call.result(10).result for call in calls] == [str(i) for i in range(lanes.TRIP_AFTER)]


def test_an_mcp_server_that_cannot_be_used_is_an_error():
    with pytest.raises(ToolError, match="does not start"):
        McpTool(["/no/such/server"], "add")
    with pytest.raises(ToolError, match="the server has ended: ModuleNotFoundError: No module named 'no_such_sdk'"):
        McpTool([sys.executable, "-c", "import no_such_sdk"], "add")
    with pytest.raises(ToolError, match="it has: other, add"):
        McpTool([sys.executable, "-c", SERVER], "multiply")


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("no list", "no list"), ("endless", "its list of tools has more than 100 pages"), ("circle", "has no tool 'add'"),
        ("talks on", r"no answer to initialize within 1\.0 s"),
    ],
)  # fmt: skip
def test_an_mcp_server_without_a_list_is_an_error(fault, message):
    with pytest.raises(ToolError, match=message):
        McpTool([sys.executable, "-c", SERVER, fault], "add", timeout=1.0 if fault == "talks on" else 30.0)


def test_an_mcp_server_that_does_not_read_is_left():
    tool = McpTool([sys.executable, "-c", SERVER, "deaf"], "add", timeout=1.0)
    assert tool.call(None, json.dumps({"a": "x" * 1_000_000, "b": 1}))[0].outcome is Outcome.UNAVAILABLE
    tool.close()
