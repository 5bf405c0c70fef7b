"""How a call is written by the policy and how its result is written back.

`tags` is the paper's: `<python>print(1)</python>`, answered by ` <result>\\n1\\n</result>`. `json` is the format of
Qwen and Hermes: `<tool_call>{"name": "python", "arguments": {"code": "print(1)"}}</tool_call>`.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from typing import Protocol

from appo_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Call:
    """One call as the policy meant it."""

    name: str
    argument: str


class CallFormat(Protocol):
    """A notation for calls. `parse` never raises: what it cannot read it explains to the policy."""

    def stop_strings(self, tool_names: Sequence[str]) -> tuple[str, ...]:
        """Strings that end a call; sampling pauses after each."""

    def parse(self, text: str) -> Call | str:
        """Read the call that `text` ends with: the policy's own text from the prompt or the last result up to and
        including a stop string. Returns the call, or an explanation of what is wrong with it."""

    def render_call(self, name: str, argument: str) -> str:
        """The text a policy writes to make this call (for demonstrations)."""

    def render_result(self, text: str) -> str:
        """The text appended to the rollout for a result."""


def make_format(name: str) -> CallFormat:
    """The call format of `ToolsConfig.call_format`. Raises ConfigError for an unknown name."""
    if name == "tags":
        return TagFormat()
    if name == "json":
        return JsonFormat()
    raise ConfigError(f"tools.call_format = {name!r}: expected 'tags' or 'json'")


_CLOSING_TAG = re.compile(r"</([\w.-]+)>\s*\Z")


class TagFormat:
    """`<name>argument</name>`, results in `<result>`, as in the paper."""

    def stop_strings(self, tool_names: Sequence[str]) -> tuple[str, ...]:
        return tuple(f"</{name}>" for name in tool_names)

    def parse(self, text: str) -> Call | str:
        match = _CLOSING_TAG.search(text)
        if match is None:
            return "Malformed call: it must end in the tool's closing tag."
        name, body = match[1], text[: match.start()]
        for tag in (
            f"</{name}>",
            "</think>",
        ):  # an earlier call or a closed thought cannot hold this call's opening tag
            body = body.rpartition(tag)[2]
        start = body.rfind(f"<{name}>")
        if start < 0:
            return f"Malformed call: </{name}> has no <{name}> before it. Write <{name}>…</{name}>."
        argument = body[start + len(f"<{name}>") :]
        if not argument.strip():
            return f"Empty call: nothing stands between <{name}> and </{name}>."
        return Call(name, argument)

    def render_call(self, name: str, argument: str) -> str:
        return f"<{name}>{argument}</{name}>"

    def render_result(self, text: str) -> str:
        return f" <result>\n{_shield(text, 'result')}\n</result>"


class JsonFormat:
    """A JSON object with `name` and `arguments` in `<tool_call>`, results in `<tool_response>`."""

    def stop_strings(self, tool_names: Sequence[str]) -> tuple[str, ...]:
        return ("</tool_call>",)

    def parse(self, text: str) -> Call | str:
        text = text.rstrip()
        if not text.endswith("</tool_call>"):
            return "Malformed call: it must end in </tool_call>."
        start = text.rfind("<tool_call>")
        if start < 0:
            return "Malformed call: </tool_call> has no <tool_call> before it."
        body = text[start + len("<tool_call>") : -len("</tool_call>")].strip()
        if not body:
            return "Empty call: nothing stands between <tool_call> and </tool_call>."
        try:
            call = json.loads(body, strict=False)  # strict=False: real newlines inside code strings are accepted
        except (json.JSONDecodeError, RecursionError) as error:
            return f"Malformed call: the text in <tool_call> is not valid JSON ({error})."
        if not isinstance(call, dict) or not isinstance(call.get("name"), str) or "arguments" not in call:
            return 'Malformed call: expected {"name": "…", "arguments": {…}}.'
        name, arguments = call["name"], call["arguments"]
        if isinstance(arguments, dict):
            if len(arguments) == 1 and isinstance(only := next(iter(arguments.values())), str):
                arguments = only
            else:  # several arguments, or one that is no string: the tool reads them as JSON
                arguments = json.dumps(arguments, ensure_ascii=False)
        if not isinstance(arguments, str):
            return f"Malformed call: arguments must be an object or a string, not {type(arguments).__name__}."
        if not arguments.strip() or arguments == "{}":
            return f"Empty call: {name} was given no argument."
        return Call(name, arguments)

    def render_call(self, name: str, argument: str) -> str:
        key = {"python": "code", "search": "query"}.get(name, "input")
        body = json.dumps({"name": name, "arguments": {key: argument}}, ensure_ascii=False)
        return f"<tool_call>\n{body}\n</tool_call>"

    def render_result(self, text: str) -> str:
        return f"\n<tool_response>\n{_shield(text, 'tool_response')}\n</tool_response>\n"


def _shield(text: str, tag: str) -> str:
    """Keep a result from closing its own block."""
    return text.replace(f"</{tag}>", f"</ {tag}>")
