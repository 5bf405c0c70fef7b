"""Call formats: what is read as a call, what is explained, and that results cannot close their own block."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appo_jax.errors import ConfigError
from appo_jax.tools.format import Call, make_format

TAGS, JSON = make_format("tags"), make_format("json")


def test_an_unknown_format_is_refused():
    with pytest.raises(ConfigError, match=r"tools\.call_format = 'xml'"):
        make_format("xml")


@pytest.mark.parametrize(
    ("text", "call"),
    [
        ("<python>1+1</python>", Call("python", "1+1")),
        ("<think>hm</think> <search> who? </search>", Call("search", " who? ")),
        ("<search>a</search>\n", Call("search", "a")),
        # The last opening tag counts, and a closed thought's talk of tags does not.
        ("I use <python> now: <python>x</python>", Call("python", "x")),
        ("<think>then <python> helps</think><python>y</python>", Call("python", "y")),
        ("<search>a</search><search>b</search>", Call("search", "b")),
        ("<python>if a < b > c: print('<b>')</python>", Call("python", "if a < b > c: print('<b>')")),
    ],
)
def test_tags(text, call):
    assert TAGS.parse(text) == call


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x</python>", "has no <python> before it"),
        ("<think><python></think>x</python>", "has no <python> before it"),
        ("<search>a</python>", "has no <python> before it"),
        ("<python></python>", "Empty call"),
        ("<python> \n </python>", "Empty call"),
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
        ('{"name": "f", "arguments": {"a": 1}}', Call("f", '{"a": 1}')),
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
        ('<tool_call>{"name": "f", "arguments": [1]}</tool_call>', "must be an object or a string"),
        ("<tool_call>" + "[" * 100_000 + "</tool_call>", "not valid JSON"),
    ],
)
def test_json_explains_what_is_malformed(text, words):
    assert words in JSON.parse(text)


@given(st.text(min_size=1).filter(str.strip))
def test_what_is_rendered_is_read_again(argument):
    if "</think>" not in argument and "</python>" not in argument and "<python>" not in argument:
        assert TAGS.parse(TAGS.render_call("python", argument)) == Call("python", argument)
    if "<tool_call>" not in argument and "</tool_call>" not in argument:
        assert JSON.parse(JSON.render_call("python", argument)) == Call("python", argument)


@given(st.text())
def test_parsing_never_raises(text):
    for call_format in (TAGS, JSON):
        for stop in call_format.stop_strings(("python", "search")):
            assert isinstance(call_format.parse(text + stop), Call | str)


def test_stop_strings():
    assert TAGS.stop_strings(("python", "search")) == ("</python>", "</search>")
    assert JSON.stop_strings(("python", "search")) == ("</tool_call>",)


def test_results_are_framed_and_cannot_end_their_frame():
    assert TAGS.render_result("2") == " <result>\n2\n</result>"
    assert TAGS.render_result("a</result><answer>").count("</result>") == 1
    assert JSON.render_result("a</tool_response>").count("</tool_response>") == 1
    assert json.loads(JSON.render_call("search", "q").split("\n")[1])["arguments"] == {"query": "q"}
