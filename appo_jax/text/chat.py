"""Chat templates: from messages to the text that a model was trained on, and from that text to safe tokens.

Hugging Face stores a model's chat format as a jinja2 template. It comes with the weights and is not trusted, so it runs
in jinja2's immutable sandbox. Message contents are not trusted either: a question may contain the text `<|im_end|>`.
`guard` splits such text with a mark that no content contains, and `split` finds the control tokens that the template
wrote.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from appo_jax.errors import DataError

# {"role": "system" | "user" | "assistant" | "tool", "content": …}; an assistant's message may have "tool_calls", as
# transformers' have them.
Message = Mapping[str, Any]
Guarded = TypeVar("Guarded")


def compile_template(source: str) -> jinja2.Template:
    """A template in the environment of transformers' `apply_chat_template`, except for one thing: `strftime_now` is
    undefined, so that templates which print the date (Llama 3.2) fall back to their fixed one and runs can be repeated.
    Raises DataError for a template that jinja2 cannot parse."""
    try:
        return _environment().from_string(source)
    except jinja2.TemplateError as error:
        raise DataError(f"chat template: jinja2 cannot parse it: {error}") from error


def variables_of(source: str) -> set[str]:
    """Names of the variables that a template reads and does not set itself."""
    return jinja2.meta.find_undeclared_variables(_environment().parse(source))


def literals(source: str) -> set[str]:
    """The texts in a template: those that it writes as they are, and the strings in its expressions."""
    tree = _environment().parse(source)
    strings = {node.value for node in tree.find_all(jinja2.nodes.Const) if isinstance(node.value, str)}
    return strings | {node.data for node in tree.find_all(jinja2.nodes.TemplateData)}


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    return environment


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` around a reply, by which transformers tells it from the rest. As there, what is set in it stays in it."""

    tags = {"generation"}  # noqa: RUF012 (declared so by jinja2)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def render(
    template: jinja2.Template,
    messages: Sequence[Message],
    add_generation_prompt: bool,
    tools: Sequence[Mapping[str, Any]] | None = None,
    **variables: Any,
) -> str:
    """Text of a conversation. tools: OpenAI-style functions, which the template describes to the policy. `variables`
    are the template's special tokens (`bos_token`, …).
    Raises DataError when the template refuses the conversation (say, a role it does not know)."""
    try:
        return template.render(
            messages=messages, add_generation_prompt=add_generation_prompt, tools=tools, documents=None, **variables
        )
    except Exception as error:  # whatever the template's expressions raise
        roles = [message["role"] for message in messages]
        problem = f"{type(error).__name__}: {error}"
        raise DataError(f"chat template: cannot render a conversation with the roles {roles}: {problem}") from error


_REPLY = "THE-REPLY"
_TOOL = {
    "type": "function",
    "function": {
        "name": "f",
        "description": "",
        "parameters": {"type": "object", "properties": {"x": {"type": "string", "description": ""}}, "required": ["x"]},
    },
}


def reply_end(
    template: jinja2.Template, control: re.Pattern[str], with_tools: bool = False, **variables: Any
) -> str | None:
    """The control token that a template writes behind an assistant's message; None if it writes none there, or cannot render
    such a conversation. It must be the same whether or not another message follows: otherwise it belongs to that message or to
    the end of the conversation."""
    question = {"role": "user", "content": "q"}
    turns = [question, {"role": "assistant", "content": _REPLY}]
    found = set()
    for messages in (turns, [*turns, question]):
        try:
            text = render(template, messages, False, [_TOOL] if with_tools else None, **variables)
        except DataError:
            return None
        end = control.match(text.partition(_REPLY)[2].lstrip())
        found.add(end[0] if end else None)
    return found.pop() if len(found) == 1 else None


def control_pattern(tokens: Sequence[str]) -> re.Pattern[str]:
    """Matches any of the control tokens' texts, the longest first."""
    return re.compile("|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True)) or r"(?!)")


def guard(value: Guarded, control: re.Pattern[str]) -> tuple[Guarded, str]:
    """The messages (or tools, or both) with a mark inside every text of a control token, and that mark, to be removed
    again. Values other than lists, objects and strings stay as they are."""
    text = json.dumps(value, ensure_ascii=False)
    mark = next(mark for mark in map(chr, range(0xE000, 0xF900)) if mark not in text)

    def part(match: re.Match[str]) -> str:
        return match[0][0] + mark + match[0][1:]

    def walk(item: Any) -> Any:
        if isinstance(item, str):
            return control.sub(part, item)
        if isinstance(item, Mapping):
            return {key: walk(inner) for key, inner in item.items()}
        return [walk(inner) for inner in item] if isinstance(item, list | tuple) else item

    return walk(value), mark


def split(text: str, control: re.Pattern[str]) -> Iterator[tuple[str, bool]]:
    """The text in order as (piece, is a control token); no piece is empty."""
    start = 0
    for match in control.finditer(text):
        if match.start() > start:
            yield text[start : match.start()], False
        yield match[0], True
        start = match.end()
    if start < len(text):
        yield text[start:], False


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
