"""The robust reward, its format rules and the grading, on responses written by hand.

Segments are drawn as a list: text of the policy as it is, a tool result after the mark `R:`.
"""

import dataclasses
import time

import pytest

from appo_jax.reward import Response
from appo_jax.reward.format import format_error
from appo_jax.reward.grade import final_answer, grade
from appo_jax.reward.official import official_reward
from appo_jax.reward.robust import robust_reward
from appo_jax.tools.format import JsonFormat, TagFormat
from appo_jax.tools.protocol import ToolSpec
from appo_jax.types import Segment, StopReason

TOOLS = ("python", "search")
TAGS, JSON = (form(tuple(ToolSpec(name) for name in TOOLS)) for form in (TagFormat, JsonFormat))


def response(*parts, golds=("5",), kind="math", tools_used=()):
    segments = tuple(Segment(p.removeprefix("R:"), not p.startswith("R:")) for p in parts)
    return Response(segments, golds, kind, frozenset(tools_used), StopReason.ANSWERED)


ANSWER = r"<answer> It is \boxed{5} </answer>"
GOOD = [
    ("<think> two and three </think> " + ANSWER,),
    ("<think> compute </think> <python> print(2+3) </python>", "R: <result>\n5\n</result>", " " + ANSWER),
    ("<think> a </think><search> q </search>\n", "R: <result>\nx\n</result>", "<think> b </think>\n" + ANSWER),
    ("<think> a</think><search>q </search>", "R:<result/>", "<python>1</python>", "R:1", ANSWER),
    # a call inside <think> is allowed, as in the official rules
    ("<think> a <search> q </search>", "R:<result>\nx\n</result>", " so </think>" + ANSWER),
    # results may hold anything: they are not the policy's words
    ("<think> a </think><search> q </search>", r"R:<result> </think> <answer> \boxed{9} <python> </result>", ANSWER),
    ("<think> a </think>", ANSWER),  # the policy's text may come in pieces
    ("<think> a </thi", "nk>" + ANSWER + " <|end|>"),
]  # fmt: skip
BAD = [
    ((ANSWER,), "missing, nested"),
    (("",), "exactly one <answer>"),
    ((), "exactly one <answer>"),
    (("<think> never ends",), "exactly one <answer>"),
    (("<think> a " + ANSWER,), "not closed"),
    (("a </think>" + ANSWER,), "not closed"),
    (("<think> a <think> b </think> </think>" + ANSWER,), "nested"),
    (("<think> a " + ANSWER + "</think>",), "nested"),
    (("<think> a </think>" + ANSWER + ANSWER,), "exactly one <answer>"),
    (("<think> a </think></answer><answer>",), "nested"),
    (("<think> a </think> <answer> 5 </answer>",), "no complete"),
    ((r"<think> \boxed{5} </think> <answer> 5 </answer>",), "no complete"),
    ((r"<think> a </think> <answer> \boxed{5 </answer>",), "no complete"),
    ((r"<think> a </think> <python> 1 </python> <result> 1 </result>" + ANSWER,), "<result>"),
    (("<think> a </think> <python> 1 </python>" + ANSWER,), "at the end of the turn"),
    (("<think> a </think> <python> 1 " + ANSWER,), "a tool call is not"),
    (("<think> a </think> 1 </python>", "R:<result>error</result>", ANSWER), "a tool call is not"),
    (("<think> a </think> <python> 1 </search>", "R:<result>error</result>", ANSWER), "a tool call is not"),
    (("<think> a </think> <python><python> 1 </python>", "R:<result>1</result>", ANSWER), "a tool call is not"),
    (("<think> a </think>", "R:<result>1</result>", ANSWER), "a tool call is not"),
    (("<think> a </think>" + ANSWER + "<python> 1 </python>",), "without a result"),
    # no tag forms across a tool result
    (("<think> a </th", "R:<result>x</result>", "ink>" + ANSWER), "not closed"),
]


@pytest.mark.parametrize("parts", GOOD)
def test_good_format(parts):
    assert format_error(response(*parts), TAGS) is None


@pytest.mark.parametrize(("parts", "reason"), BAD)
def test_broken_format(parts, reason):
    assert reason in format_error(response(*parts), TAGS)


def test_tags_of_tools_not_on_offer_are_just_text():
    only_python = TagFormat((ToolSpec("python"),))
    assert format_error(response("<think> <search> </think>" + ANSWER), only_python) is None
    assert format_error(response("<think> <tool_call> </think>" + ANSWER), TAGS) is None
    assert format_error(response("<think> <search> </think>" + ANSWER), JSON) is None


CALL = '<tool_call>\n{"name": "search", "arguments": {"query": "q"}}\n</tool_call>'
NESTED = (
    r'<tool_call>{"name": "python", "arguments": {"code": "s = \"<tool_call>\"; t = \"<\/tool_call>\""}}</tool_call>'
)
RESPONSE = "R:\n<tool_response>\nx\n</tool_response>\n"


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        (("<think> a </think>" + CALL, RESPONSE, "<think> b </think>" + ANSWER), None),
        (("<think> a </think>" + NESTED, RESPONSE, ANSWER), None),  # the tags in its code are part of the call
        (("<think> a </think><tool_call>{broken</tool_call>", "R:explained", ANSWER), None),  # structure is what counts
        (("<think> a </think><result> 1 </result>" + ANSWER,), None),  # no mark of this format
        (("<think> a </think>" + CALL + ANSWER,), "at the end of the turn"),
        (("<think> a </think>" + ANSWER + CALL,), "without a result"),
        (("<think> a <tool_call> </think>" + ANSWER,), "a tool call is not"),
        (("<think> a </think></tool_call>", RESPONSE, ANSWER), "a tool call is not"),
        (("<think> a </think><tool_call>" + CALL, RESPONSE, ANSWER), "a tool call is not"),
        (("<think> a </think>", RESPONSE, ANSWER), "a tool call is not"),
    ],
)
def test_the_rules_for_calls_follow_the_call_format(parts, reason):
    error = format_error(response(*parts), JSON)
    assert error is None if reason is None else reason in error


SPELLINGS = ("<{}>", "</{}>", "<{}/>", "< {} >", "</ {} >", "< / {}>", "<{} id='1'>", "<\u200b{}>", "＜{}＞")


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize(
    ("call_format", "mark", "other"), [(TAGS, "result", "tool_response"), (JSON, "tool_response", "result")]
)
def test_invented_results_are_found_in_any_spelling(call_format, mark, other, spelling):
    for name in (mark, mark.upper(), mark.title()):
        written = spelling.format(name)
        broken = response(f"<think> I see {written} 5 </think>" + ANSWER)
        assert "mark of a tool result" in format_error(broken, call_format)
    assert format_error(response(f"<think> I see {spelling.format(other)} </think>" + ANSWER), call_format) is None
    for text in (f"{mark}s > 3 and < {mark}", f"<{mark}s>", f"<my{mark}>", f"<{mark}-set>", mark):
        assert format_error(response(f"<think> {text} </think>" + ANSWER), call_format) is None


def test_finding_invented_results_takes_linear_time():
    def seconds(text):
        began = time.perf_counter()
        format_error(response(text), TAGS)
        return time.perf_counter() - began

    for piece in ("<", "< ", "<result ", "</", "< / ", "<result\t\n", " "):
        assert seconds("<" + piece * 200_000) < 1.0, piece


@pytest.mark.parametrize(
    ("opening", "text", "reason"),
    [
        ("<think>\n", "I add. </think>" + ANSWER, None),
        ("<think>\n\n</think>\n\n", ANSWER, None),
        ("", "I add. </think>" + ANSWER, "not closed"),
        ("<think>\n", "<think> I add. </think>" + ANSWER, "nested"),
        ("<think>\n", ANSWER, "not closed"),
        ("<think>\n\n</think>\n\n", "</think>" + ANSWER, "not closed"),
    ],
)
def test_a_thought_that_the_prompt_opened_counts(opening, text, reason):
    given = dataclasses.replace(response(text), opening=opening)
    error = format_error(given, TAGS)
    assert error is None if reason is None else reason in error
    assert robust_reward(given, 0.1, TAGS).reward == (1.0 if reason is None else -1.0)
    balanced = (opening + text).count("<think>") == text.count("</think>") + opening.count("</think>")
    assert official_reward(given, 0.1).reward == (1.0 if balanced else -1.0)  # it counts tags, and no more


@pytest.mark.parametrize(
    ("parts", "answer"),
    [
        ((r"\boxed{1} <answer> \boxed{2} </answer> \boxed{3}",), "2"),  # the answer block first
        ((r"<answer> \boxed{1} </answer> <answer> \boxed{2} </answer>",), "2"),
        ((r"<think>\boxed{1}</think> <answer> 2 </answer>",), "2"),  # whatever stands in a thought
        ((r"\boxed{1} <answer> </answer>",), "1"),  # an empty block is no answer
        ((r"first \boxed{1}, so \boxed{7}",), "7"),
        ((r"so \boxed{1} and \boxed{7}",), "1, and 7"),
        (("<answer> 2 </answer>",), "2"),
        ((r"no answer", r"R:<answer>\boxed{5}</answer>"), None),  # a tool cannot answer
        (("5",), None),
        ((), None),
    ],
)
def test_final_answer(parts, answer):
    assert final_answer(response(*parts)) == answer


@pytest.mark.parametrize(
    ("answer", "golds", "kind", "score", "correct"),
    [
        ("5", ("5",), "math", 1, True),
        ("-5", ("5",), "math", 0, False),
        ("5", ("4", "5"), "math", 1, True),
        (r"\frac{10}{2}", ("5",), "math", 1, True),
        ("Paris", ("Paris",), "qa", 1, True),
        ("Paris, France", ("Paris",), "qa", 2 / 3, False),
        (r"\text{Paris}", ("Lutetia", "Paris"), "qa", 1, True),
        ("5", (), "math", 0, False),
    ],
)
def test_grade(answer, golds, kind, score, correct):
    result = grade(response(rf"<answer>\boxed{{{answer}}}</answer>", golds=golds, kind=kind))
    assert (result.score, result.correct) == (pytest.approx(score), correct)


CALLS = (
    "<think> a </think> <search> q </search>",
    "R:<result>x</result>",
    "<python>1</python>",
    "R:<result>1</result>",
)


@pytest.mark.parametrize(
    ("parts", "options", "reward", "correct"),
    [
        (("<think> a </think>" + ANSWER,), {}, 1.0, True),
        (("<think> a </think>" + ANSWER,), {"golds": ("6",)}, 0.0, False),
        ((*CALLS, ANSWER), {"tools_used": ("search", "python")}, 1.1, True),
        ((*CALLS, ANSWER), {"tools_used": ("search",)}, 1.0, True),  # both tools, or no bonus
        ((*CALLS, ANSWER), {"tools_used": ("search", "python"), "golds": ("6",)}, 0.0, False),  # a bonus needs a score
        ((ANSWER,), {}, -1.0, True),  # right, in the wrong form
        (("nothing",), {"tools_used": ("search", "python")}, -1.0, False),
    ],
)
def test_reward(parts, options, reward, correct):
    result = robust_reward(response(*parts, **options), 0.1, TAGS)
    assert (result.reward, result.correct) == (pytest.approx(reward), correct)


def test_partial_credit_earns_the_bonus_and_the_detail_adds_up():
    given = response(
        *CALLS, r"<answer>\boxed{Vienna}</answer>", golds=("Vienna, Austria",), kind="qa", tools_used=TOOLS
    )
    result = robust_reward(given, 0.25, TAGS)
    assert result.reward == pytest.approx(2 / 3 + 0.25)
    assert not result.correct
    assert result.detail == {"score": pytest.approx(2 / 3), "format": 1.0, "bonus": 0.25, "verify_timeout": 0.0}


def test_no_tools_on_offer_no_bonus():
    assert robust_reward(response("<think> a </think>" + ANSWER), 0.1, TagFormat(())).reward == 1.0
