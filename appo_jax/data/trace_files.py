"""Reads published files of traces for the cold start: ShareGPT, LLaMA-Factory's formats, chat messages.

A record is a conversation about one question. The calls stand in the policy's text, as tags or as JSON, or under `tool_calls` or
`function_call` as in OpenAI's interface. The results stand in the same text between the tags of either format, or in separate
turns, with or without such tags. In all cases, the trace is written in the run's call format.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from appo_jax.data.demonstrations import TOOLS_PLACE, CannotDemonstrate, LeftOut, introduce
from appo_jax.data.examples import SYSTEM_PROMPT
from appo_jax.data.golds import accepted_answers
from appo_jax.data.records import read_records
from appo_jax.data.repetitions import find_overlaps
from appo_jax.errors import DataError
from appo_jax.tools.arguments import Problem, decode, read_argument
from appo_jax.tools.format import Call, CallFormat, JsonFormat, TagFormat, render_result
from appo_jax.types import Example, Segment, Trace

WHAT = "a file of traces (docs/traces.md)"
# From roles of ShareGPT, LLaMA-Factory and OpenAI's older interface to roles of chat messages.
_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system", "developer": "system",
    "observation": "tool", "tool": "tool", "function": "tool", "function_response": "tool", "function_call": "call",
}  # fmt: skip
# From a tool's skill to the name that published traces give such a tool: ReTool for code, Search-R1 for search.
_NAMES = {"run_python": "code", "look_up": "search"}
# The marks of R1-Searcher and Search-o1 around queries and results, which are read as the tags of Search-R1.
_MARKS = re.compile(r"<\|(begin|end)_(?:of_|search_)(query|documents|result)\|>")
# The tags of both formats, of ReTool, of Search-R1 and of others.
_RESULT = re.compile(
    r"[ \t]*\n?[ \t]*<(result|tool_response|interpreter|information|observation)>\n?(.*?)\n?</\1>\n?", re.DOTALL
)
_ONLY_A_RESULT = re.compile(rf"\s*{_RESULT.pattern}\s*", re.DOTALL)
_CLOSING = re.compile(r"</([\w.-]+)>\s*\Z")
# What stands before a result without tags: of ToRA, of a block of code, of ReAct; and marks of other tools, as WebThinker has.
_PRINTED = re.compile(
    r"^```output\b|^[ \t]*```[ \t]*\n[\s*#]*Output(?=\**:)|^Observation(?=(?: \d+)?:)|<\|begin_\w+_result\|>",
    re.MULTILINE,
)


def read_traces(
    files: Sequence[Path], call_format: CallFormat, system_prompt: str | None, left_out: LeftOut
) -> list[Trace]:
    """The traces of the files in the run's call format, each once. system_prompt: if not None, it replaces theirs.

    Records that cannot be used are counted in `left_out` by reason. Raises DataError for a file that cannot be read, and if no
    record can be used."""
    traces: dict[tuple[str, tuple[Segment, ...]], Trace] = {}
    writer = _Writer(call_format, system_prompt)
    for file in files:
        for number, record in read_records(file, lambda number, record: (number, record), None, WHAT):
            if isinstance(record, dict) and [key for key in record if record[key] is not None] == ["collected"]:
                continue  # the first line of `sft --collect`
            name = f"{file.stem}-{number}"
            try:
                trace = writer.trace(record, name)
            except (CannotDemonstrate, KeyError, TypeError, ValueError) as error:
                left_out.add(f"it has no field {error}" if isinstance(error, KeyError) else str(error), name)
                continue
            key = (trace.example.question, trace.segments)
            if key in traces:
                left_out.add("it repeats an earlier trace", name)
            traces.setdefault(key, trace)
    if not traces:
        raise DataError(f"sft.traces: {', '.join(map(str, files))}: no trace in them can be used ({left_out})")
    return list(traces.values())


def without_overlaps(traces: Sequence[Trace], evaluation: Sequence[Example], left_out: LeftOut) -> list[Trace]:
    """The traces whose question neither equals nor resembles a question for evaluation. The others are counted in `left_out`.

    Raises DataError if no trace is left."""
    overlaps = {index for index, _ in find_overlaps([trace.example for trace in traces], evaluation)}
    for index in sorted(overlaps):
        left_out.add("its question is in the evaluation (data.drop: overlaps)", traces[index].example.id)
    if len(overlaps) == len(traces):
        raise DataError(
            f"sft.traces: the questions of all {len(traces)} traces are in the evaluation; give other traces"
        )
    return [trace for index, trace in enumerate(traces) if index not in overlaps]


class _Writer:
    """Writes the conversations of records as traces in the run's call format."""

    def __init__(self, call_format: CallFormat, system_prompt: str | None):
        self.format, self.system_prompt = call_format, system_prompt
        self.known = {tool.name: tool for tool in call_format.tools}
        for tool in call_format.tools:
            for skill in _NAMES.keys() & tool.skills:
                self.known.setdefault(_NAMES[skill], tool)
        named = tuple(dataclasses.replace(tool, name=name) for name, tool in self.known.items())
        self.tags, self.json = TagFormat(named), JsonFormat(named)

    def trace(self, record: Any, name: str) -> Trace:
        """The trace of a record. Raises CannotDemonstrate, KeyError, TypeError or ValueError."""
        system, question, turns = _conversation(record)
        if not question.strip():
            raise CannotDemonstrate("the question is blank")
        if self.system_prompt is not None:
            system = self.system_prompt
        elif system is not None and record.get("tools") and TOOLS_PLACE not in system and self.format.instructions():
            system = (
                f"{system}\n{TOOLS_PLACE}" if system else TOOLS_PLACE
            )  # LLaMA-Factory describes the tools of a record after its system prompt
        example = Example(
            str(record.get("id") or name), question, accepted_answers(record.get("answer")),
            "math" if record.get("kind") == "math" else "qa", SYSTEM_PROMPT if system is None else system,
            str(record.get("source") or ""),
        )  # fmt: skip
        return Trace(introduce(example, self.format.instructions()), tuple(self.segments(turns)))

    def segments(self, turns: Sequence[Mapping[str, Any]]) -> Iterator[Segment]:
        """The policy's texts and the tool results, in order. Every call must have a result, and the last text is the policy's."""
        written, call = "", None
        for said, requested, result in _steps(turns):
            if result is not None:
                if call is None:
                    written, call = self.last_call(written)
                yield Segment(self.with_call(self.without_call(written), call), sampled=True)
                yield Segment(render_result(self.format, result), sampled=False)
                written, call = "", None
                continue
            if call is not None:
                raise CannotDemonstrate("a call has no result")
            written += said
            call = None if requested is None else self.read(requested)
        if call is not None:
            raise CannotDemonstrate("a call has no result")
        if not written.strip():
            raise CannotDemonstrate("the policy writes nothing at its end")
        closing = _CLOSING.search(self.without_call(written))
        if closing is not None and closing[1] not in ("think", "answer"):
            raise CannotDemonstrate(
                f"it ends in </{closing[1][:40]}>, as if it called a tool that the run does not have"
            )
        yield Segment(written, sampled=True)

    def without_call(self, text: str) -> str:
        """`text`. Raises CannotDemonstrate if a call ends in it, because sampling would pause there for a result, and if it holds
        what a tool printed."""
        if printed := _PRINTED.search(text):
            raise CannotDemonstrate(
                f"a result stands in the policy's text, after {printed[0].split()[-1].lstrip('*#')}"
            )
        if any(stop in text for stop in (*self.tags.stop_strings, *self.json.stop_strings)):
            raise CannotDemonstrate("a call has no result")
        return text

    def last_call(self, text: str) -> tuple[str, Call]:
        """The call at the end of a text, and the text before it."""
        notation = self.json if text.rstrip().endswith(tuple(self.json.stop_strings)) else self.tags
        found = notation.parse(text)
        if isinstance(found, Call):
            if found.name not in self.known:
                raise CannotDemonstrate(f"it calls {found.name[:40]!r}, which is no tool of the run")
            openings = [mark.start() for mark in re.finditer(f"<(?:tool_call|{re.escape(found.name)})>", text)]
            start = next(at for at in reversed(openings) if notation.parse(text[at:]) == found)
            return text[:start], Call(self.known[found.name].name, found.argument)
        closing = _CLOSING.search(text)
        if closing is None:
            raise CannotDemonstrate("a result follows no call")
        if closing[1] not in (*self.known, "tool_call"):
            raise CannotDemonstrate(f"it calls {closing[1][:40]!r}, which is no tool of the run")
        raise CannotDemonstrate("a call is malformed")

    def read(self, call: Mapping[str, Any]) -> Call:
        """A call from a call in OpenAI's notation."""
        name = str(call["name"])
        if name not in self.known:
            raise CannotDemonstrate(f"it calls {name[:40]!r}, which is no tool of the run")
        arguments = call["arguments"]
        if isinstance(arguments, dict):  # in parquet, every call has the arguments of all tools, null where it has none
            arguments = {key: value for key, value in arguments.items() if value is not None}
        argument = read_argument(self.known[name], arguments)
        if isinstance(argument, Problem):
            raise CannotDemonstrate(f"a call's {argument}")
        return Call(self.known[name].name, argument)

    def with_call(self, text: str, call: Call) -> str:
        """A turn of the policy in the run's call format: `text` and the call at its end."""
        try:
            turn = text + self.format.render_call(call.name, call.argument)
        except ValueError as error:
            raise CannotDemonstrate("a call cannot be written in the run's call format") from error
        if self.format.parse(turn) != call:
            raise CannotDemonstrate("the text before a call makes it malformed in the run's call format")
        return turn


def _conversation(record: Any) -> tuple[str | None, str, list[dict[str, Any]]]:
    """(system prompt, question, the messages after the question) of a record."""
    if not isinstance(record, dict):
        raise TypeError(f"expected an object, got {type(record).__name__}")
    if record.get("left_out") is not None:  # `appo-jax sft --collect` writes this for a question without a usable trace
        raise CannotDemonstrate(str(record["left_out"]))
    system = record.get("system")
    if record.get("instruction") is not None:  # LLaMA-Factory's other format
        if record.get("history"):
            raise ValueError(f"expected one question, at the beginning; it has {len(record['history']) + 1}")
        question = "\n".join(text for text in (record["instruction"], record.get("input")) if text)
        return system, question, [{"role": "assistant", "content": record["output"]}]
    listed = record["conversations"] if record.get("messages") is None else record["messages"]
    messages = [_message(entry) for entry in listed or ()]
    for message in messages[2:]:
        if message["role"] == "user" and _ONLY_A_RESULT.fullmatch(message["content"]):
            message["role"] = "tool"
    if messages and messages[0]["role"] == "system":
        system = messages.pop(0)["content"]
    roles = [message["role"] for message in messages]
    if roles.count("user") != 1 or roles[0] != "user":
        raise ValueError(f"expected one question, at the beginning; it has {roles.count('user')}")
    if "system" in roles:
        raise ValueError("a system message stands in its middle")
    return system, messages[0]["content"], messages[1:]


def _message(entry: Any) -> dict[str, Any]:
    """A message in the form with `role` and `content`, from either form."""
    if not isinstance(entry, dict):
        raise TypeError(f"a message must be an object, not {type(entry).__name__}")
    role = _ROLES.get(entry["from"] if entry.get("role") is None else entry["role"])
    if role is None:
        raise ValueError(
            f"the role {entry.get('role') or entry.get('from')!r} is unknown; expected {', '.join(_ROLES)}"
        )
    content = entry.get("value") if entry.get("content") is None else entry["content"]
    if role in ("assistant", "call") and entry.get("weight") == 0:
        raise CannotDemonstrate("a message of the policy has weight 0, so it is not to be trained on")
    if role == "call":
        calls = decode(content) if isinstance(content, str) else content
        calls = calls if isinstance(calls, list) else [calls]
        return {"role": "assistant", "content": "", "tool_calls": [{"function": call} for call in calls]}
    thought = _text(next(filter(None, map(entry.get, ("reasoning_content", "reasoning", "thinking"))), None))
    text = _text(content)
    text = f"<think>{thought}</think>{text}" if thought else text
    calls = entry.get("tool_calls") or [{"function": call} for call in [entry.get("function_call")] if call]
    return {"role": role, "content": text, "tool_calls": calls}


def _text(content: Any) -> str:
    """The text of a message's content, which may be a list of parts. Raises TypeError for a part that is not text."""
    parts = content if isinstance(content, list) else [content]
    parts = [part["text"] if isinstance(part, dict) and part.get("type") == "text" else part for part in parts]
    wrong = next((part for part in parts if part is not None and not isinstance(part, str)), None)
    if wrong is not None:
        raise TypeError(f"a message's content must be text, not {type(wrong).__name__}")
    return "".join(part or "" for part in parts)


def _as_tag(mark: re.Match[str]) -> str:
    return f"<{'/' if mark[1] == 'end' else ''}{'search' if mark[2] == 'query' else 'information'}>"


def _steps(
    turns: Sequence[Mapping[str, Any]],
) -> Iterator[tuple[str, Mapping[str, Any] | None, str | None]]:
    """(text, call, result) in order. Each has either a text of the policy, or a call under `tool_calls`, or a result."""
    for turn in turns:
        content = _MARKS.sub(_as_tag, turn["content"])
        if turn["role"] == "tool":
            wrapped = _ONLY_A_RESULT.fullmatch(content)
            yield "", None, wrapped[2] if wrapped else turn["content"]
            continue
        before, *rest = _RESULT.split(content)
        yield before, None, None
        for result, text in zip(rest[1::3], rest[2::3], strict=True):
            yield "", None, result
            yield text, None, None
        if len(turn.get("tool_calls") or ()) > 1:
            raise ValueError("several calls in one turn")
        for call in turn.get("tool_calls") or ():
            yield "", call["function"], None
