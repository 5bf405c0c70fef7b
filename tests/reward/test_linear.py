"""Every function that reads text of the policy or of a tool takes time linear in its length, for any text.

Each is timed on a text of a kind that is bad for it, and on one four times as long: linear code needs about four times the
time, quadratic code sixteen times.
"""

import time

import pytest

from appo_jax.reward import Response
from appo_jax.reward.format import format_error
from appo_jax.reward.grade import final_answer
from appo_jax.reward.latex import last_boxed, plain
from appo_jax.reward.math import math_equal
from appo_jax.reward.official import official_reward
from appo_jax.reward.qa import exact_match, token_f1
from appo_jax.tools.format import JsonFormat, TagFormat, shield
from appo_jax.tools.protocol import ToolSpec
from appo_jax.tools.search import format_pages, split_contents, words
from appo_jax.tools.wrap import read_arguments
from appo_jax.types import Document, Segment, StopReason

SHORT, FACTOR, ALLOWED = 10_000, 4, 8  # characters; allowed: twice what linear code needs
AT_ONCE = 0.1  # seconds: a text that needs less is nothing to worry about

# A piece that is repeated, or (beginning, repeated piece, end, piece repeated after the end).
HOSTILE = {
    "open boxes": r"\boxed{",
    "boxes without braces": r"\boxed ",
    "closed boxes": r"\boxed{1}",
    "joined boxes": r"\boxed{1}, ",
    "nested boxes": ("", r"\boxed{", "", "}"),
    "open braces": "{",
    "closing braces": "}",
    "backslashes": "\\",
    "backslashes before a box": ("", "\\", "boxed{5}"),
    "spaces": " ",
    "open text commands": r"\text{",
    "nested text commands": ("", r"\text{", "", "}"),
    "long text command": (r"\text", "t", ""),
    "dollars": "$",
    "digits": "1",
    "thousands": ",234",
    "thousands that end badly": ("1", ",234", ",23"),
    "points": ".",
    "fractions": r"\frac",
    "minus signs": "-",
    "names with a minus": " a-",
    "signs between digits": ("5", ";", "6"),
    "raised digits": "1⁵",
    "apostrophes of thousands": ("1", "'234", "'23"),
    "accents": "\u0301",
    "accented letters": "e\u0301",
    "articles": "a ",
    "letters": "a",
    "words": "Lyon ",
    "open answers": "<answer>",
    "closing answers": "</answer>",
    "answers": "<answer>1</answer>",
    "open thoughts": "<think>",
    "thoughts": "<think> </think>",
    "open calls": "<python>",
    "closing calls": "</python>",
    "calls": "<python>1</python>",
    "unanswered calls": ("", "<python>", "</python><result></result>"),
    "open results": "<result>",
    "results": "<result></result>",
    "open JSON calls": "<tool_call>",
    "JSON calls": '<tool_call>{"name": "python", "arguments": {"code": "1"}}</tool_call>',
    "deep JSON": ("<tool_call>", "[", "</tool_call>"),
    "quotes": ('<tool_call>"', '\\"', "</tool_call>"),
    "half tags": "</",
    "open tags with attributes": "<result x",
    "loose tags": "< / Result a = 1 >",
    "spaces in a tag": ("<", " ", "result>"),
    "tags and spaces": ("</python>", " ", "x"),
}


def text_of(kind, length):
    pattern = HOSTILE[kind]
    start, piece, end, *tail = pattern if isinstance(pattern, tuple) else ("", pattern, "")
    count = length // len(piece)
    return start + piece * count + end + "".join(tail) * count


def response(text, kind="qa"):
    return Response((Segment(text, True),), ("1,234 apples",), kind, frozenset(), StopReason.ANSWERED)


SPECS = (ToolSpec("python", "code"), ToolSpec("search", "query"))
TAGS, JSON = TagFormat(SPECS), JsonFormat(SPECS)
THOUGHT = "<think>{}</think><answer>\\boxed{{5}}</answer>"
READERS = {
    "last_boxed": last_boxed,
    "plain": plain,
    "final_answer": lambda text: final_answer(response(text)),
    "math_equal": lambda text: math_equal(text, "1,234 apples"),
    "exact_match": lambda text: exact_match(text, ["1,234 apples"]),
    "token_f1": lambda text: token_f1(text, ["1,234 apples"]),
    "format_error": lambda text: format_error(response(text), TAGS),
    "format_error of a thought": lambda text: format_error(response(THOUGHT.format(text)), TAGS),
    "format_error of JSON calls": lambda text: format_error(response(THOUGHT.format(text)), JSON),
    "official_reward": lambda text: official_reward(response(text), 0.1),
    "parse of tags": TAGS.parse,
    "parse of tags at the end": lambda text: TAGS.parse(f"{text}</python>"),
    "parse of JSON": JSON.parse,
    "parse of JSON at the end": lambda text: JSON.parse(f"{text}</tool_call>"),
    "shield": shield,
    "read_arguments": lambda text: read_arguments(text, {"properties": {"code": {"type": "string"}}}),
    "words": words,
    "format_pages": lambda text: format_pages([Document("title", text)] * 3),
    "split_contents": split_contents,
}


def seconds(function, text):
    best = float("inf")
    for _ in range(3):
        began = time.process_time()
        function(text)
        best = min(best, time.process_time() - began)
        if best < AT_ONCE:
            break
    return best


@pytest.mark.parametrize("reader", READERS)
def test_four_times_the_text_takes_about_four_times_the_time(reader):
    slow = {}
    for kind in HOSTILE:
        long = seconds(READERS[reader], text_of(kind, FACTOR * SHORT))
        if long > AT_ONCE and long > ALLOWED * (short := seconds(READERS[reader], text_of(kind, SHORT))):
            slow[kind] = (short, long)
    assert not slow
