"""Call formats: texts that are read as calls, texts that are explained, and results that cannot close their own block."""

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appo_jax.errors import ConfigError
from appo_jax.tools.arguments import is_data
from appo_jax.tools.format import Call, JsonFormat, TagFormat, make_format, render_result
from appo_jax.tools.protocol import ToolResult, ToolSpec
from appo_jax.tools.wrap import FunctionTool
from appo_jax.types import Outcome

WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "day": {"type": "integer"}},
    "required": ["city"],
}
SAVE = {"properties": {"text": {"type": "string"}}, "required": ["text"]}
TOOLS = (
    ToolSpec("python", "code"),
    ToolSpec("search", "query"),
    ToolSpec("weather", parameters=WEATHER),
    ToolSpec("save", parameters=SAVE),
    ToolSpec("now", parameters={"type": "object", "properties": {}}),
    ToolSpec("list_files", parameters={"type": "object", "properties": {"path": {"type": "string"}}}),
    ToolSpec("inches_to_cm"),
)
TAGS, JSON = TagFormat(TOOLS), JsonFormat(TOOLS)


def test_an_unknown_format_is_refused():
    with pytest.raises(ConfigError, match=r"tools\.call_format = 'xml'"):
        make_format("xml")


@pytest.mark.parametrize(
    ("text", "call"),
    [
        ("<python>1+1</python>", Call("python", "1+1")),
        ("<think>hm</think> <search> who? </search>", Call("search", " who? ")),
        ("<search>a</search>\n", Call("search", "a")),
        # A closed thought's talk of tags does not open a call.
        ("<think>then <python> helps</think><python>y</python>", Call("python", "y")),
        ("<search>a</search><search>b</search>", Call("search", "b")),
        ("<python>if a < b > c: print('<b>')</python>", Call("python", "if a < b > c: print('<b>')")),
        # a tool whose schema requires no argument
        ("<list_files></list_files>", Call("list_files", "{}")),
        ("<list_files> \n</list_files>", Call("list_files", "{}")),
        ("<list_files>/data</list_files>", Call("list_files", "/data")),
        ("<now></now>", Call("now", "{}")),
    ],
)
def test_tags(text, call):
    assert TAGS.parse(text) == call


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x</python>", "has no <python> before it"),
        ("<think><python></think>x</python>", "has no <python> before it"),
        ("<search>a</python>", "has no <python> before it. Write"),
        ('<python>print("</think>")</python>', "before it since </think>, which an argument in tags cannot hold"),
        ('<python>print("</search>")</python>', "before it since </search>, which an argument in tags cannot hold"),
        # Two tags are open: the call may begin at either, and running the wrong one would be something else.
        ("I use <python> now: <python>x</python>", "<python> and <python> stand before </python>"),
        ("<python>s = '<python>'; print(1)</python>", "Write one tag"),
        ("<python>print('<search>rm</search>", "<python> and <search> stand before </search>"),
        ("<search>how does <python>print(1)</python>", "Write one tag"),
        ("<python>print('</search>", "has no <search> before it"),
        ("<python></python>", "Empty call"),
        ("<python> \n </python>", "Empty call"),
        ("<save></save>", "Empty call"),
        ("<python>1", "must end in"),
        ("", "must end in"),
    ],
)
def test_tags_explain_what_is_malformed(text, words):
    assert words in TAGS.parse(text)


@pytest.mark.parametrize(
    ("body", "call"),
    [
        ('{"name": "python", "arguments": {"code": "1+1"}}', Call("python", "1+1")),
        ('{"name": "search", "arguments": "who?"}', Call("search", "who?")),
        ('\n{"name": "python", "arguments": {"code": "a\nb"}}\n', Call("python", "a\nb")),
        ('{"name": "f", "arguments": {"a": 1, "b": "x"}}', Call("f", '{"a": 1, "b": "x"}')),
        ('{"name": "f", "arguments": {"a": [1]}}', Call("f", '{"a": [1]}')),
        # a number for a tool without a schema, which reads text
        ('{"name": "inches_to_cm", "arguments": {"input": 3}}', Call("inches_to_cm", "3")),
        ('{"name": "inches_to_cm", "arguments": {"inches": -2.5}}', Call("inches_to_cm", "-2.5")),
        ('{"name": "inches_to_cm", "arguments": 3}', Call("inches_to_cm", "3")),
        ('{"name": "search", "arguments": {"query": 1984}}', Call("search", "1984")),
        ('{"name": "inches_to_cm", "arguments": {"input": true}}', Call("inches_to_cm", '{"input": true}')),
        ('{"name": "save", "arguments": {"text": 3}}', Call("save", '{"text": 3}')),  # its schema says what is wrong
        # arguments encoded once more than they should be: as a string, as OpenAI's interface has them; inside themselves
        (r'{"name": "python", "arguments": "{\"code\": \"1+1\"}"}', Call("python", "1+1")),
        (r'{"name": "python", "arguments": {"code": "{\"code\": \"1+1\"}"}}', Call("python", "1+1")),
        (r'{"name": "python", "arguments": "{\"code\": \"{\\\"code\\\": \\\"1+1\\\"}\"}"}', Call("python", "1+1")),
        ('{"name": "python", "arguments": {"code": {"code": "1+1"}}}', Call("python", "1+1")),
        (r'{"name": "search", "arguments": "{\"query\": \"who?\"}"}', Call("search", "who?")),
        (
            r'{"name": "weather", "arguments": "{\"city\": \"Bern\", \"day\": 1}"}',
            Call("weather", '{"city": "Bern", "day": 1}'),
        ),
        (r'{"name": "python", "arguments": "\"{\\\"code\\\": \\\"1+1\\\"}\""}', Call("python", "1+1")),
        (r'{"name": "python", "arguments": "\"1+1\""}', Call("python", "1+1")),
        (
            r'{"name": "python", "arguments": {"code": "{\"name\": \"python\", \"arguments\": {\"code\": \"1+1\"}}"}}',
            Call("python", "1+1"),
        ),
        # a dictionary as Python writes it
        ("""{"name": "python", "arguments": "{'code': 'print(1)'}"}""", Call("python", "print(1)")),
        ("""{"name": "search", "arguments": {"query": "{'query': 'who?'}"}}""", Call("search", "who?")),
        # what only looks like it is left alone
        (r'{"name": "python", "arguments": {"code": "{\"a\": 1}"}}', Call("python", '{"a": 1}')),
        (
            r'{"name": "python", "arguments": {"code": "{\"capital\": \"Paris\"}"}}',
            Call("python", '{"capital": "Paris"}'),
        ),
        ("""{"name": "python", "arguments": {"code": "{'x': 'import os'}"}}""", Call("python", "{'x': 'import os'}")),
        (r'{"name": "search", "arguments": {"q": "{\"a\": \"b\"}"}}', Call("search", '{"a": "b"}')),
        # a tool with a schema reads an object as its arguments, so a text that is one stays in its argument
        (r'{"name": "save", "arguments": {"text": "{\"a\": \"b\"}"}}', Call("save", r'{"text": "{\"a\": \"b\"}"}')),
        ('{"name": "save", "arguments": {"text": "plain"}}', Call("save", "plain")),
        ('{"name": "now", "arguments": {}}', Call("now", "{}")),  # it has no arguments
        ('{"name": "list_files", "arguments": {}}', Call("list_files", "{}")),  # its schema requires none
        ('{"name": "list_files", "arguments": ""}', Call("list_files", "{}")),
        ('{"name": "list_files", "arguments": {"path": ""}}', Call("list_files", '{"path": ""}')),
        ('{"name": "list_files", "arguments": {"path": "/data"}}', Call("list_files", "/data")),
        (r'{"name": "search", "arguments": {"query": "\"New York\""}}', Call("search", '"New York"')),
        # the doubled braces of a template
        (r'{"name": "search", "arguments": "{{\"query\": \"x\"}}"}', Call("search", '{{"query": "x"}}')),
        (r'{"name": "python", "arguments": {"code": "{[1, 2]: 3}"}}', Call("python", "{[1, 2]: 3}")),
        ('{"name": "python", "arguments": "{{}}"}', Call("python", "{{}}")),
        ('{"name": "search", "arguments": {"q": "who?"}}', Call("search", "who?")),  # one text: no doubt what is meant
        ('{"name": "weather", "arguments": {"city": "Bern"}}', Call("weather", '{"city": "Bern"}')),
        # the call's own tags inside its code
        ('{"name": "python", "arguments": {"code": "# <tool_call>"}}', Call("python", "# <tool_call>")),
        (r'{"name": "python", "arguments": {"code": "# <\/tool_call>"}}', Call("python", "# </tool_call>")),
        (
            r'{"name": "python", "arguments": {"code": "# <tool_call>{\"name\"}"}}',
            Call("python", '# <tool_call>{"name"}'),
        ),
        (
            '{"name": "python", "arguments": {"code": "# ' + "<tool_call>" * 99 + '"}}',
            Call("python", "# " + "<tool_call>" * 99),
        ),
    ],
)
def test_json(body, call):
    assert JSON.parse(f"some text <tool_call>{body}</tool_call>") == call


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("<tool_call></tool_call>", "Empty call"),
        ("{}</tool_call>", "has no <tool_call>"),
        ("<tool_call>{nope}</tool_call>", "not valid JSON"),
        ("<tool_call>[1]</tool_call>", "expected"),
        ('<tool_call>{"name": "f"}</tool_call>', "expected"),
        ('<tool_call>{"name": 3, "arguments": {}}</tool_call>', "expected"),
        ('<tool_call>{"name": "f", "arguments": {}}</tool_call>', "no argument"),
        ('<tool_call>{"name": "save", "arguments": {}}</tool_call>', "no argument"),
        ('<tool_call>{"name": "f", "arguments": [1]}</tool_call>', "must be an object or a string"),
        ('<tool_call>{"name": "weather", "arguments": 3}</tool_call>', "must be an object or a string"),
        (
            '<tool_call>{"name": "python", "arguments": {"code": "1", "timeout": 5}}</tool_call>',
            'takes one argument, "code"',
        ),
        (
            r'<tool_call>{"name": "python", "arguments": "{\"a\": 1, \"b\": 2}"}</tool_call>',
            'takes one argument, "code"',
        ),
        (
            r'<tool_call>{"name": "python", "arguments": {"code": "{\"code\": \"1\", \"timeout\": 5}"}}</tool_call>',
            "one argument",
        ),
        (
            r'<tool_call>{"name": "search", "arguments": {"query": "{\"query\": \"x\", \"top_k\": 3}"}}</tool_call>',
            "top_k",
        ),
        (r'<tool_call>{"name": "python", "arguments": "[\"print(1)\"]"}</tool_call>', "must be an object or a string"),
        # the code itself, or arguments with another name
        (
            """<tool_call>{"name": "python", "arguments": "{'x': 'import os'}"}</tool_call>""",
            'python takes one argument, "code"; it was given x',
        ),
        (r'<tool_call>{"name": "search", "arguments": "{\"q\": \"who?\"}"}</tool_call>', 'takes one argument, "query"'),
        (
            '<tool_call>{"name": "python", "arguments": {"code": ["1", "2"]}}</tool_call>',
            '"code" of python must be a string',
        ),
        (
            '<tool_call>{"name": "python", "arguments": {"code": {"a": "1"}}}</tool_call>',
            '"code" of python must be a string',
        ),
        (
            '<tool_call>{"name": "search", "arguments": {"query": null}}</tool_call>',
            '"query" of search must be a string',
        ),
        ('<tool_call>{"name": "python", "arguments": {"code": "s = \'</tool_call>', r"write <\/tool_call>"),
        ("<tool_call>" + "[" * 100_000 + "</tool_call>", "not valid JSON"),
    ],
)
def test_json_explains_what_is_malformed(text, words):
    assert words in JSON.parse(text)


@pytest.mark.parametrize(
    ("code", "data"),
    [
        ('{"code": "print(1)"}', True), ("{'code': 'print(1)'}", True), ('["x = 1", "b"]', True), ('"print(1)"', True),
        ("'print(1)'", True), ("print(1)", False), ("[1, 2]", False), ("{1: 2}", False), ("5", False), ("'a' * 3", False),
        ("'doc'\nprint(1)", False), ("[" * 100_000, False), ("", False), ("{x}", False),
        ("{{1}}", False), ("{[1]: 2}", False), ("{{'a': 1}}", False),
        ("'a'", False), ("'two words'", False), ('["a", "b"]', False), ("{'a': 'b'}", False), ("'5'", False), ("''", False),
        ("'# a comment'", False), ("'" + "(" * 100_000 + "'", False),
    ],
)  # fmt: skip
def test_code_that_is_only_data(code, data):
    assert is_data(code) == data


ARGUMENTS = st.lists(
    st.sampled_from(
        ["</think>", "<python>", "</python>", "<search>", "</tool_call>", "<tool_call>", '"', "\\", "/", "x"]
    )
    | st.text(max_size=3)
).map("".join)


@given(ARGUMENTS.filter(str.strip))
def test_what_is_rendered_is_read_again(argument):
    assert JSON.parse(JSON.render_call("python", argument)) == Call("python", argument)
    assert JSON.render_call("python", argument).count("</tool_call>") == 1
    try:
        text = TAGS.render_call("python", argument)
    except ValueError:  # tags have no way to write it
        assert any(tag in argument for tag in ("</think>", "</python>", "<python>", "<search>"))
    else:
        assert TAGS.parse(text) == Call("python", argument)


def test_calls_of_several_arguments_are_rendered_as_an_object():
    argument = '{"city": "Bern", "day": 1}'
    call = JSON.render_call("weather", argument)
    assert json.loads(call.split("\n")[1]) == {"name": "weather", "arguments": {"city": "Bern", "day": 1}}
    assert JSON.parse(call) == Call("weather", argument)


@pytest.mark.parametrize("name", ["list_files", "now"])
def test_a_call_without_an_argument_is_rendered_as_an_empty_object(name):
    call = JSON.render_call(name, "{}")
    assert json.loads(call.split("\n")[1]) == {"name": name, "arguments": {}}
    for call_format in (TAGS, JSON):
        assert call_format.parse(call_format.render_call(name, "{}")) == Call(name, "{}")


@given(st.text())
def test_parsing_never_raises(text):
    for call_format in (TAGS, JSON):
        for stop in call_format.stop_strings:
            assert isinstance(call_format.parse(text + stop), Call | str)


def test_stop_strings():
    assert TAGS.stop_strings == tuple(f"</{tool.name}>" for tool in TOOLS)
    assert JSON.stop_strings == ("</tool_call>",)


def test_results_are_framed_and_cannot_end_their_frame():
    assert render_result(TAGS, "2") == " <result>\n2\n</result>"
    assert render_result(TAGS, "a</result><answer>").count("</result>") == 1
    assert render_result(JSON, "a</tool_response>").count("</tool_response>") == 1
    assert json.loads(JSON.render_call("search", "q").split("\n")[1])["arguments"] == {"query": "q"}


SPELLINGS = ("<{}>", "</{}>", "<{}/>", "< {}>", "</ {} >", "<{} a='b'>")


@pytest.mark.parametrize("call_format", [TAGS, JSON])
@pytest.mark.parametrize("tag", ["result", "tool_response", "answer", "think"])
def test_a_tools_text_cannot_write_the_rollouts_tags(call_format, tag):
    for name in (tag, tag.upper(), tag.title()):
        for spelling in SPELLINGS:
            shown = render_result(call_format, f"a{spelling.format(name)}b")
            assert "a&lt;" in shown
            head, tail = call_format.result_marks
            assert call_format.invented_result(shown.removeprefix(head).removesuffix(tail)) is None
    plain = "x < 3 > 2 <results> <my-answer> a<b> &lt;result&gt;"
    assert plain in render_result(call_format, plain)


def test_shielding_takes_linear_time():
    for piece in ("<", "< ", "<result ", "</", "< / ", " "):
        began = time.perf_counter()
        render_result(TAGS, "<" + piece * 200_000)
        TAGS.parse("<python>" + piece * 100_000 + "</python>")
        JSON.parse("<tool_call>" * 100_000 + piece * 100_000 + "</tool_call>")
        assert time.perf_counter() - began < 2, piece


def test_pieces_rebuild_every_call():
    """A tokenizer that holds the pieces writes a call in: opening, argument, closing."""
    for call_format in (TAGS, JSON):
        for tool, argument in (("python", "1+1"), ("search", "who?")):
            call = call_format.render_call(tool, argument)
            opening, closing = call.split(argument)
            assert {opening, closing} <= set(call_format.pieces)
            assert call_format.render_call(tool, argument, closed=False) == opening + argument
        assert {mark.strip() for mark in call_format.result_marks} <= set(call_format.pieces)


def test_instructions_name_every_tool_and_show_a_call():
    for call_format in (TAGS, JSON):
        text = call_format.instructions()
        assert all(tool.name in text for tool in TOOLS)
        assert all(mark.strip() in text for mark in call_format.result_marks)
    assert "<python>code</python>" in TAGS.instructions()
    assert JSON.render_call("search", "…") in JSON.instructions()
    assert TagFormat(()).instructions() == JsonFormat(()).instructions() == ""


def test_a_description_names_every_argument_of_a_tool():
    """A call that fills it in reaches the tool. The descriptions of tools with one argument are as they always were."""
    assert TAGS.instructions().split("\n")[:-1] == [
        "python. To call it, write <python>code</python>",
        "search. To call it, write <search>query</search>",
        'weather. To call it, write <weather>{"city": "…", "day": …}</weather>',
        "save. To call it, write <save>text</save>",
        "now. To call it, write <now>{}</now>",
        "list_files. To call it, write <list_files>path</list_files>",
        "inches_to_cm. To call it, write <inches_to_cm>input</inches_to_cm>",
    ]
    ways = JSON.instructions().split(". To call it, write ")[1:]
    shown = [way.partition("\n</tool_call>")[0].removeprefix("<tool_call>\n") for way in ways]
    assert shown == [
        '{"name": "python", "arguments": {"code": "…"}}',
        '{"name": "search", "arguments": {"query": "…"}}',
        '{"name": "weather", "arguments": {"city": "…", "day": …}}',
        '{"name": "save", "arguments": {"text": "…"}}',
        '{"name": "now", "arguments": {}}',
        '{"name": "list_files", "arguments": {"path": "…"}}',
        '{"name": "inches_to_cm", "arguments": {"input": "…"}}',
    ]
    functions = {
        "weather": FunctionTool(lambda city, day=0: f"{city} {day}", name="weather", parameters=WEATHER),
        "now": FunctionTool(lambda: "noon", name="now", parameters={"properties": {}}),
    }
    for name, result in (("weather", "Bern 3"), ("now", "noon")):
        for call_format in (TAGS, JSON):
            [way] = [
                text
                for text in call_format.instructions().split(". To call it, write ")
                if f"<{name}>" in text or f'"{name}"' in text
            ]
            filled = way.replace('"…"', '"Bern"').replace("…", "3")
            end = max(filled.rfind(stop) + len(stop) for stop in call_format.stop_strings if stop in filled)
            call = call_format.parse(filled[:end])
            assert functions[name].call(None, call.argument)[0] == ToolResult(result, Outcome.OK)


@pytest.mark.parametrize("kind", [{"type": ["string", "null"]}, {"type": None}, {}, True])
def test_a_schema_of_any_kind_is_described(kind):
    text = TagFormat((ToolSpec("f", parameters={"properties": {"a": kind, "ü": {"type": "array"}}}),)).instructions()
    assert ('<f>{"a": "…", "ü": …}</f>' if "string" in str(kind) else '<f>{"a": …, "ü": …}</f>') in text


@pytest.mark.parametrize("text", ["x</tool_call>", "<tool_call>{nope}</tool_call>", "<tool_call></tool_call>"])
def test_explanations_reach_the_policy_as_they_are(text):
    explanation = JSON.parse(text)
    assert "<tool_call>" in explanation
    assert explanation in render_result(JSON, explanation)
