"""The formats of tool calls and their results. No other file writes these tags; `data/trace_files.py` also finds those of
published traces.

`tags` is the paper's format: `<python>print(1)</python>`, answered by ` <result>\\n1\\n</result>`. `json` is the format of
Qwen and Hermes: `<tool_call>{"name": "python", "arguments": {"code": "print(1)"}}</tool_call>`, answered in
`<tool_response>`. `chat` writes calls like `json`, and leaves the rest to the model's chat template.
"""

from __future__ import annotations

import dataclasses
import json
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from appo_jax.errors import ConfigError
from appo_jax.text.tokenizer import TAG_NAMES, JsonTokenizer, Tokenizer
from appo_jax.tools.arguments import Problem, decode, read_argument
from appo_jax.tools.protocol import Tool, ToolSpec


@dataclasses.dataclass(frozen=True)
class Call:
    """A call by the policy."""

    name: str
    argument: str


class CallFormat(Protocol):
    """A format for the calls of some tools."""

    @property
    def tools(self) -> tuple[ToolSpec, ...]:
        """The tools on offer."""

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """Strings that end a call; sampling pauses after each."""

    @property
    def pieces(self) -> tuple[str, ...]:
        """The fixed texts around arguments and results. In a tokenizer that is trained for the format, each is one
        token; every tokenizer must be able to encode them."""

    @property
    def result_marks(self) -> tuple[str, str]:
        """The texts before and after a result in the rollout."""

    def parse(self, text: str) -> Call | str:
        """Read the call at the end of `text`, which is the policy's own text from the prompt or the last result up to and
        including a stop string. Returns the call, or an explanation for the policy of what is wrong with it. It never
        raises, and never guesses a call that is not written."""

    def render_call(self, name: str, argument: str, closed: bool = True) -> str:
        """The text that a policy writes to make this call (for demonstrations). closed=False: without the end of the call.
        Raises ValueError for an argument that the format cannot write."""

    def invented_result(self, text: str) -> str | None:
        """The first mark of a result, in any spelling, in the policy's `text`; None if there is none."""

    def turn_error(self, turn: str, answered: bool) -> str | None:
        """What is wrong with the calls of a turn; None if nothing is wrong or the turn has no call. A turn is the policy's
        own text up to the next result (`answered`) or to the end of the rollout."""

    def instructions(self) -> str:
        """Sentences for a system prompt that describe the tools and how to call them."""


def make_format(name: str, tools: Sequence[Tool] = ()) -> CallFormat:
    """The call format of `ToolsConfig.call_format` for these tools. Raises ConfigError for an unknown name."""
    specs = tuple(ToolSpec.of(tool) for tool in tools)
    if name == "tags":
        return TagFormat(specs)
    if name == "json":
        return JsonFormat(specs)
    if name == "chat":
        return ChatFormat(specs)
    raise ConfigError(f"tools.call_format = {name!r}: expected 'tags', 'json' or 'chat'")


def offer_tools(call_format: CallFormat, tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer that the run uses. In the chat format, its template describes the tools in every prompt.

    Raises ConfigError for a tokenizer whose template cannot do that."""
    if not isinstance(call_format, ChatFormat):
        return tokenizer
    if not isinstance(tokenizer, JsonTokenizer):
        raise ConfigError(
            "tools.call_format = 'chat' needs a chat template, which this tokenizer does not have: use tags or json, or a "
            "policy.tokenizer with tokenizer.json"
        )
    return tokenizer.with_tools([tool.schema() for tool in call_format.tools])


def result_ids(call_format: CallFormat, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Token ids of the texts before and after a result in a rollout."""
    if isinstance(call_format, ChatFormat):
        assert isinstance(tokenizer, JsonTokenizer)  # offer_tools
        return tokenizer.result_turn("</tool_call>")
    head, tail = call_format.result_marks
    return tokenizer.encode(head), tokenizer.encode(tail)


def bare_result(call_format: CallFormat, rendered: str) -> str:
    """The text between the marks that `render_result` added."""
    before, after = call_format.result_marks
    return rendered.removeprefix(before).removesuffix(after)


def render_result(call_format: CallFormat, text: str) -> str:
    """The text that is appended to the rollout for a result: the shielded result between the format's marks."""
    head, tail = call_format.result_marks
    return head + shield(text) + tail


def shield(text: str) -> str:
    """A tool's text with `<` replaced by `&lt;` in every tag that could be mistaken for the rollout's. This covers the
    tags of results, thoughts and answers, in all formats and any spelling, so that a page or a program's output cannot
    close its block or answer for the policy. Tags of calls stay: calls are read only from the policy's text, and
    explanations of malformed calls contain such tags."""
    return _STRUCTURE.sub(lambda found: "&lt;" + found[0][1:], text)


def _any_spelling(names: Iterable[str]) -> re.Pattern[str]:
    """Matches the tags of these names in any case, with spaces, attributes or a slash at either end. Linear in the text."""
    return re.compile(rf"<\s*+(?:/\s*+)?(?:{'|'.join(map(re.escape, names))})(?![\w.-])[^<>]*+>", re.IGNORECASE)


_STRUCTURE = _any_spelling(name for name in TAG_NAMES if name != "tool_call")


def _first_tag(pattern: re.Pattern[str], text: str) -> str | None:
    """The first match, ignoring invisible characters and look-alike forms of letters and brackets."""
    if not text.isascii():
        text = "".join(char for char in unicodedata.normalize("NFKC", text) if unicodedata.category(char) != "Cf")
    found = pattern.search(text)
    return found[0] if found else None


_CLOSING_TAG = re.compile(r"</([\w.-]+)>\s*\Z")
_RESULT = _any_spelling(["result"])
_RESPONSE = _any_spelling(["tool_response"])


@dataclasses.dataclass(frozen=True)
class TagFormat:
    """`<name>argument</name>`; results in `<result>`, as in the paper."""

    tools: tuple[ToolSpec, ...]

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return tuple(f"</{tool.name}>" for tool in self.tools)

    @property
    def pieces(self) -> tuple[str, ...]:
        # Sorted, so that a tokenizer does not depend on the order of tools.enabled.
        names = (*sorted((tool.name for tool in self.tools), reverse=True), "result")
        return tuple(f"<{slash}{name}>" for name in names for slash in ("", "/"))

    @property
    def result_marks(self) -> tuple[str, str]:
        return " <result>\n", "\n</result>"

    def parse(self, text: str) -> Call | str:
        match = _CLOSING_TAG.search(text.rstrip()[-200:])
        if match is None:
            return "Malformed call: it must end in the tool's closing tag."
        name, body = match[1], text.rstrip()[: -len(match[0].rstrip())]
        opening, closing = f"<{name}>", f"</{name}>"
        names = {name, *(tool.name for tool in self.tools)}
        whole = body
        for tag in ("</think>", *(f"</{known}>" for known in names)):
            body = body.rpartition(tag)[2]  # the call began after the end of any earlier call or thought
        openings = re.findall(f"<(?:{'|'.join(map(re.escape, names))})>", body)
        if opening not in openings:
            before = whole.removesuffix(body)
            ended = before[before.rfind("</") :] if opening in before else ""
            hint = f" since {ended}, which an argument in tags cannot hold" if ended else ""
            return f"Malformed call: {closing} has no {opening} before it{hint}. Write {opening}…{closing}."
        if len(openings) > 1:  # it is ambiguous which tag begins the call and which belongs to its argument
            return f"Malformed call: {' and '.join(openings[:4])} stand before {closing}. Write one tag, where the call begins."
        argument = body.partition(opening)[2]
        if argument.strip():
            return Call(name, argument)
        if any(tool.name == name and tool.no_argument_needed for tool in self.tools):
            return Call(name, "{}")
        return f"Empty call: nothing stands between {opening} and {closing}."

    def render_call(self, name: str, argument: str, closed: bool = True) -> str:
        text = f"<{name}>{argument}</{name}>"
        if self.parse(text) != Call(name, argument):
            raise ValueError(f"a call of {name} in tags cannot hold {argument[:80]!r}")
        return text if closed else text.removesuffix(f"</{name}>")

    def invented_result(self, text: str) -> str | None:
        return _first_tag(_RESULT, text)

    def turn_error(self, turn: str, answered: bool) -> str | None:
        names = "|".join(re.escape(tool.name) for tool in self.tools)
        tags = re.findall(f"</?(?:{names})>", turn) if names else []
        if not tags and not answered:
            return None
        if len(tags) != 2 or tags[1] != tags[0].replace("<", "</") or not turn.rstrip().endswith(tags[1]):
            return "a tool call is not one opening tag, its argument and its closing tag at the end of the turn"
        return None if answered else "a tool call without a result"

    def instructions(self) -> str:
        ways = [(tool, f"<{tool.name}>{_object_of(tool) or tool.key}</{tool.name}>") for tool in self.tools]
        return _instructions(ways, "<result> and </result>")


@dataclasses.dataclass(frozen=True)
class JsonFormat:
    """A JSON object with `name` and `arguments` in `<tool_call>`; results in `<tool_response>`."""

    tools: tuple[ToolSpec, ...]

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return ("</tool_call>",) if self.tools else ()

    @property
    def pieces(self) -> tuple[str, ...]:
        names = sorted(tool.name for tool in self.tools if not tool.several_arguments)
        openings = tuple(self._around(name)[0] for name in names)
        marks = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
        return (*openings, '"}}\n</tool_call>', *marks) if openings else marks

    @property
    def result_marks(self) -> tuple[str, str]:
        return "\n<tool_response>\n", "\n</tool_response>\n"

    def parse(self, text: str) -> Call | str:
        text = text.rstrip()
        if not text.endswith("</tool_call>"):
            return "Malformed call: it must end in </tool_call>."
        text = text.removesuffix("</tool_call>")
        openings = [found.end() for found in re.finditer("<tool_call>", text)]
        if not openings:
            return "Malformed call: </tool_call> has no <tool_call> before it."
        # The call begins at the last opening tag, unless that tag is inside a JSON string that began after an earlier
        # tag.
        objects = [start for start in openings if text[start : start + 20].lstrip().startswith("{")]
        call = _read_json(text[openings[-1] :])
        for start in objects[:-5:-1]:
            if isinstance(call, dict):
                break
            earlier = _read_json(text[start:])
            call = earlier if isinstance(earlier, dict) else call
        if isinstance(call, str):
            return call
        if not isinstance(call.get("name"), str) or "arguments" not in call:
            return 'Malformed call: expected {"name": "…", "arguments": {…}}.'
        return self._read_arguments(call["name"], call["arguments"])

    def _read_arguments(self, name: str, arguments: Any) -> Call | str:
        tool = next((tool for tool in self.tools if tool.name == name), ToolSpec(name))
        argument = read_argument(tool, arguments)
        if isinstance(argument, Problem):
            return f"Malformed call: {argument}."
        empty = not argument.strip() or (argument == "{}" and not tool.several_arguments)
        if empty and not tool.no_argument_needed:
            return f"Empty call: {name} was given no argument."
        return Call(name, "{}" if empty else argument)

    def render_call(self, name: str, argument: str, closed: bool = True) -> str:
        tool = next((tool for tool in self.tools if tool.name == name), ToolSpec(name))
        value = decode(argument)
        as_object = isinstance(value, dict) and (tool.several_arguments or (tool.no_argument_needed and not value))
        opening, closing = self._around(name, as_object)
        text = argument if as_object else json.dumps(argument, ensure_ascii=False)[1:-1]
        for tag in ("<tool_call>", "</tool_call>"):  # JSON's escape for any character
            text = text.replace(tag, "\\u003c" + tag[1:])
        return opening + text + (closing if closed else "")

    def _around(self, name: str, as_object: bool = False) -> tuple[str, str]:
        tool = next((tool for tool in self.tools if tool.name == name), ToolSpec(name))
        parts = (json.dumps(part, ensure_ascii=False) for part in (name, tool.key))
        opening = '<tool_call>\n{{"name": {}, "arguments": {{{}: "'.format(*parts)
        return (opening.rpartition("{")[0], "}\n</tool_call>") if as_object else (opening, '"}}\n</tool_call>')

    def invented_result(self, text: str) -> str | None:
        return _first_tag(_RESPONSE, text)

    def turn_error(self, turn: str, answered: bool) -> str | None:
        openings, closings = turn.count("<tool_call>"), turn.count("</tool_call>")
        if not openings and not closings and not answered:
            return None
        closed = turn.rstrip().endswith("</tool_call>") and openings > 0 and closings == 1
        if closed and openings > 1:  # the other tags are inside the call's JSON, or the turn is not a single call
            body = turn.rstrip().removesuffix("</tool_call>").partition("<tool_call>")[2]
            closed = not isinstance(_read_json(body), str)
        if not closed:
            return "a tool call is not one <tool_call>, its JSON and </tool_call> at the end of the turn"
        return None if answered else "a tool call without a result"

    def instructions(self) -> str:
        around = [(tool, self._around(tool.name, tool.several_arguments)) for tool in self.tools]
        ways = [(tool, (_object_of(tool) or "…").join(texts)) for tool, texts in around]
        return _instructions(ways, "<tool_response> and </tool_response>")


class ChatFormat(JsonFormat):
    """Calls are written as in `json`; the model's chat template writes the rest: it describes the tools in the system
    prompt and puts each result into a separate turn. For the templates of Qwen, Hermes and the like."""

    def instructions(self) -> str:
        return ""  # the template gives them


def _object_of(tool: ToolSpec) -> str | None:
    """The JSON object of a tool's several arguments as a description shows it: `{"city": "…", "day": …}`; None for one argument."""
    if not tool.several_arguments:
        return None
    properties = (tool.parameters or {}).get("properties", {})
    texts = [
        key for key, kind in properties.items() if isinstance(kind, Mapping) and "string" in (kind.get("type") or ())
    ]
    parts = (f"{json.dumps(key, ensure_ascii=False)}: " + ('"…"' if key in texts else "…") for key in properties)
    return "{" + ", ".join(parts) + "}"


def _instructions(ways: Sequence[tuple[ToolSpec, str]], marks: str) -> str:
    if not ways:
        return ""
    lines = [
        f"{tool.name}{': ' + tool.description.rstrip('.') if tool.description else ''}. To call it, write {way}"
        for tool, way in ways
    ]
    return "\n".join([*lines, f"The result of a call is then shown to you between {marks}."])


def _read_json(body: str) -> dict[str, Any] | str:
    """The object of a call, or an explanation of what is wrong with it."""
    if not body.strip():
        return "Empty call: nothing stands between <tool_call> and </tool_call>."
    try:
        call = json.loads(body.strip(), strict=False)  # strict=False: real newlines inside code strings are accepted
    except (ValueError, RecursionError) as error:
        hint = (
            r" Inside a string write <\/tool_call> for the tag that ends the call."
            if "Unterminated" in str(error)
            else ""
        )
        return f"Malformed call: the text in <tool_call> is not valid JSON ({error}).{hint}"
    return call if isinstance(call, dict) else 'Malformed call: expected {"name": "…", "arguments": {…}}.'
