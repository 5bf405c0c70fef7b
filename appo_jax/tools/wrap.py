"""Wraps other tools: a Python function, an OpenAI-style function, a tool of an MCP server over stdio.

A run uses them by import path: a user's module with `def my_tool(): return McpTool(["server-command"], "tool")`, and
`--tools.enabled python search my_module:my_tool`.
"""

from __future__ import annotations

import collections
import contextlib
import inspect
import itertools
import json
import queue
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from appo_jax.errors import ToolError
from appo_jax.tools.protocol import ToolResult
from appo_jax.types import Outcome

MAX_PAGES = 100  # in an MCP server's list of tools
MAX_COMPLAINT = 500  # characters of a line of its stderr


class FunctionTool:
    """A stateless tool made from a function.

    With `parameters` (the JSON schema of an OpenAI-style function), the call's text is a JSON object of keyword arguments; if
    the schema has one property, it may also be that property's bare value. Without `parameters`, the text is the function's only
    argument. A returned string is shown as it is, any other value as JSON."""

    def __init__(
        self,
        function: Callable[..., Any],
        name: str | None = None,
        parameters: Mapping[str, Any] | None = None,
        timeout: float = 30.0,
    ):
        self.name = name or function.__name__
        self.timeout = timeout
        self.description = inspect.getdoc(function) or ""
        self._function = function
        self.parameters = parameters

    def start(self) -> None:
        return None

    def call(self, state: None, argument: str) -> tuple[ToolResult, None]:
        if self.parameters is None:
            return self._run(argument.strip()), None
        arguments = read_arguments(argument, self.parameters)
        if isinstance(arguments, str):
            return ToolResult(arguments, Outcome.MALFORMED), None
        return self._run(**arguments), None

    def close(self) -> None:
        pass

    def _run(self, *arguments: Any, **named: Any) -> ToolResult:
        try:
            value = self._function(*arguments, **named)
        except (TypeError, ValueError, LookupError, ArithmeticError) as error:  # raised for wrong arguments
            return ToolResult(f"{type(error).__name__}: {error}", Outcome.ERROR)
        return ToolResult(value if isinstance(value, str) else _as_json(value), Outcome.OK)


def _as_json(value: Any) -> str:
    """A value as JSON, or as Python shows it if JSON cannot hold it (a dictionary with tuples as keys)."""
    try:
        return json.dumps(value, default=str, ensure_ascii=False)
    except (TypeError, ValueError):
        return repr(value)


def read_arguments(text: str, schema: Mapping[str, Any]) -> dict[str, Any] | str:
    """Keyword arguments of a call for a JSON schema, or an explanation of what is wrong with them."""
    properties = schema.get("properties", {})
    try:
        arguments = json.loads(text)
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        if len(properties) != 1:
            return f"Malformed arguments: expected a JSON object with {', '.join(properties) or 'no fields'}."
        (only, kind), *_ = properties.items()
        is_text = arguments is None or (isinstance(kind, Mapping) and kind.get("type", "string") == "string")
        arguments = {only: text.strip() if is_text else arguments}
    unknown = [key for key in arguments if key not in properties]
    missing = [key for key in schema.get("required", ()) if key not in arguments]
    if unknown or missing:
        problems = [f"unknown {key!r}" for key in unknown] + [f"missing {key!r}" for key in missing]
        return f"Malformed arguments: {', '.join(problems)}; expected {', '.join(properties)}."
    misfits = [found for key in arguments if (found := _misfit(key, arguments[key], properties[key]))]
    return f"Malformed arguments: {'; '.join(misfits)}." if misfits else arguments


_TYPES: dict[str, type | tuple[type, ...]] = {
    "string": str, "integer": int, "number": (int, float), "boolean": bool, "object": dict, "array": list, "null": type(None),
}  # fmt: skip


def _misfit(name: str, value: Any, schema: Any) -> str | None:
    """What is wrong with a value by the `type`, `enum`, `items` and `properties` of its JSON schema; None if nothing is."""
    if not isinstance(schema, Mapping):
        return None
    kinds = schema.get("type", ())
    kinds = [kinds] if isinstance(kinds, str) else list(kinds)
    if kinds and not any(_is_of_type(value, kind) for kind in kinds):
        return f"{name} = {json.dumps(value, ensure_ascii=False)[:80]}: expected {' or '.join(kinds)}"
    if "enum" in schema and value not in schema["enum"]:
        return (
            f"{name} = {json.dumps(value, ensure_ascii=False)[:80]}: expected {' or '.join(map(str, schema['enum']))}"
        )
    parts = enumerate(value) if isinstance(value, list) else value.items() if isinstance(value, dict) else ()
    inner = schema.get("properties", {})
    found = (
        _misfit(f"{name}[{key!r}]", part, schema.get("items") if isinstance(value, list) else inner.get(key))
        for key, part in parts
    )
    return next(filter(None, found), None)


def _is_of_type(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    if isinstance(value, float) and value.is_integer() and kind == "integer":
        return True
    return isinstance(value, _TYPES.get(kind, object))


class McpTool:
    """A tool of a Model Context Protocol server, which runs as a child process and talks over stdio (JSON-RPC 2.0, one
    message per line). Calls are sent one at a time. If the server dies, the next call starts it again."""

    max_concurrency = 1

    def __init__(self, command: Sequence[str], tool: str, name: str | None = None, timeout: float = 30.0):
        self.name = name or tool
        self.timeout = timeout
        self._command = list(command)
        self._tool = tool
        self._lock = threading.Lock()
        self._ids = itertools.count(1)
        self._process: subprocess.Popen[str] | None = None
        try:
            self._start()
        except (OSError, ConnectionError, TimeoutError) as error:
            self.close()
            raise ToolError(f"the MCP server {self._command} does not start: {error}") from error

    def start(self) -> None:
        return None

    def call(self, state: None, argument: str) -> tuple[ToolResult, None]:
        arguments = read_arguments(argument, self.parameters)
        if isinstance(arguments, str):
            return ToolResult(arguments, Outcome.MALFORMED), None
        with self._lock:
            try:
                if self._process is None or self._process.poll() is not None:
                    self._start()
                reply = self._request("tools/call", {"name": self._tool, "arguments": arguments})
            except TimeoutError:
                self._stop()  # its answer may still arrive, and must not be taken for the answer of the next call
                return ToolResult(f"The tool {self.name} did not answer in time.", Outcome.TIMEOUT), None
            except (OSError, ConnectionError, ToolError) as error:
                self._stop()
                return ToolResult(f"The tool {self.name} failed: {error}.", Outcome.UNAVAILABLE), None
        parts = reply.get("content", [])
        text = "\n".join(part["text"] for part in parts if part.get("type") == "text")
        return ToolResult(text or "(no output)", Outcome.ERROR if reply.get("isError") else Outcome.OK), None

    def close(self) -> None:
        self._stop()

    def _start(self) -> None:
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            errors="replace", start_new_session=True,
        )  # fmt: skip
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=_pump, args=(self._process, self._lines), daemon=True).start()
        self._complaint: collections.deque[str] = collections.deque(maxlen=1)  # the last line that it wrote to stderr
        self._listener = threading.Thread(target=_keep_last, args=(self._process, self._complaint), daemon=True)
        self._listener.start()
        client = {"name": "appo_jax", "version": "1"}
        self._request("initialize", {"protocolVersion": "2024-11-05", "capabilities": {}, "clientInfo": client})
        self._send({"jsonrpc": "2.0", "method": "notifications/initialized"})
        tools = self._list_tools()
        if self._tool not in tools:
            self._stop()
            raise ToolError(f"the MCP server {self._command} has no tool {self._tool!r}; it has: {', '.join(tools)}")
        self.description = tools[self._tool].get("description", "")
        self.parameters = tools[self._tool].get("inputSchema", {})

    def _list_tools(self) -> dict[str, dict[str, Any]]:
        """The server's tools by name, from all pages of its list."""
        tools: dict[str, dict[str, Any]] = {}
        cursors: list[Any] = []
        for _ in range(MAX_PAGES):
            page = self._request("tools/list", {"cursor": cursors[-1]} if cursors else {})
            if "tools" not in page:
                raise ConnectionError(f"it does not list its tools: {page['content'][0]['text'] or 'an error'}")
            tools |= {tool["name"]: tool for tool in page["tools"]}
            cursor = page.get("nextCursor")
            if not cursor or cursor in cursors:
                return tools
            cursors.append(cursor)
        raise ConnectionError(f"its list of tools has more than {MAX_PAGES} pages")

    def _request(self, method: str, parameters: dict[str, Any]) -> dict[str, Any]:
        identity = next(self._ids)
        self._send({"jsonrpc": "2.0", "id": identity, "method": method, "params": parameters})
        deadline = time.monotonic() + self.timeout
        while True:
            left = deadline - time.monotonic()
            try:
                line = self._lines.get(timeout=left) if left > 0 else None  # the server may have printed much else
            except queue.Empty:
                line = None
            if line is None:
                raise TimeoutError(f"no answer to {method} within {self.timeout} s")
            if not line:
                raise self._ended()
            try:
                message = json.loads(line)
            except ValueError:
                continue  # some servers print to stdout
            if isinstance(message, dict) and message.get("id") == identity and "method" not in message:
                if "error" in message:
                    return {"content": [{"type": "text", "text": message["error"].get("message", "")}], "isError": True}
                return message["result"]

    def _send(self, message: dict[str, Any]) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        stuck = threading.Timer(self.timeout, self._process.kill)  # a server that does not read would block this write
        stuck.start()
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise self._ended() from error
        finally:
            stuck.cancel()

    def _ended(self) -> ConnectionError:
        """The error for a server that has ended, with the last line that it wrote to stderr."""
        self._listener.join(timeout=1.0)
        return ConnectionError(": ".join(["the server has ended", *self._complaint]))

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            with contextlib.suppress(OSError):
                if self._process.stdin is not None:
                    self._process.stdin.close()


def _pump(process: subprocess.Popen[str], lines: queue.SimpleQueue[str]) -> None:
    assert process.stdout is not None
    with process.stdout as out:
        for line in out:
            lines.put(line)
    lines.put("")


def _keep_last(process: subprocess.Popen[str], last: collections.deque[str]) -> None:
    assert process.stderr is not None
    with process.stderr as errors:
        for line in iter(lambda: errors.readline(MAX_COMPLAINT), ""):
            if line.strip():
                last.append(line.strip())
