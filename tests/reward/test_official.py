"""The official reward: every rule and every known fault, on responses written by hand."""

import pytest

from appo_jax.reward import Response
from appo_jax.reward.official import official_reward
from appo_jax.types import Segment, StopReason


def reward(text, *golds, kind="qa"):
    given = Response((Segment(text, True),), golds, kind, frozenset(), StopReason.ANSWERED)
    return official_reward(given, bonus=0.1).reward


def answered(answer, before="<think> a </think>"):
    return rf"{before} <answer> It is \boxed{{{answer}}} </answer>"


SEARCH = "<search> q </search> <result> r </result>"
PYTHON = "<python> 1 </python> <result> 1 </result>"
THINK = "<think> a </think>"


@pytest.mark.parametrize(
    "text",
    [
        "",
        answered("x", before=""),  # no <think>
        answered("x", before="<think> a"),
        answered("x", before="<think> a </think> </think>"),
        THINK + r" \boxed{x}",  # no <answer>
        answered("x") + "<answer>",
        answered("x") + answered("x"),
        THINK + r"</answer> \boxed{x} <answer>",
        THINK + "<answer> x </answer>",
        THINK + r"<answer> \boxed{x </answer>",  # the box never closes
        THINK + r"<answer> \boxed{x \boxed x </answer>",  # no closing brace at all
        THINK + r"\boxed{x} <answer> x </answer>",  # boxed, but outside
        THINK + r"<answer> \boxed{x} \boxedtext{y} </answer>",  # the last \boxed… is not a box
        answered("x", before=THINK + "<search> q </search>"),  # no result
        answered("x", before=THINK + "<search> q <result> r </result>"),
        answered("x", before=THINK + "<search> q <result> r </result> </search>"),
        answered("x", before=THINK + "<search> q </search> <result> r"),
        answered("x", before=THINK + SEARCH + "<python> 1 </python>"),
        answered("x", before=THINK + SEARCH + SEARCH + "<search> q </search>"),
    ],
)
def test_broken_format_costs_one(text):
    assert reward(text, "x") == -1


@pytest.mark.parametrize(
    ("text", "gold", "expected"),
    [
        (answered("x"), "x", 1),
        (answered("x"), "y", 0),
        (answered("Vienna"), "Vienna, Austria", 2 / 3),
        (answered("The Vienna."), "vienna", 1),
        (answered(r"a^{2}"), r"a^{2}", 1),
        (answered("yes"), "yes", 1),
        (answered("yes sir"), "yes", 0),
        (answered(""), "x", 0),
        (THINK + r"<answer> \boxed{y} \boxed{x} </answer>", "x", 1),  # the last box
        (THINK + r"<answer> \boxed{\boxed{x}} </answer>", "x", 1),
        (THINK + r"<answer> \boxed{y} or $\boxed x$ </answer>", "x", 1),  # the brace-less spelling
        (answered("x", before=THINK + SEARCH), "x", 1),
        (answered("x", before=THINK + SEARCH + PYTHON), "x", 1.1),  # both tools
        (answered("y", before=THINK + SEARCH + PYTHON), "x", 0),
        (answered("Vienna", before=THINK + SEARCH + PYTHON), "Vienna, Austria", 2 / 3 + 0.1),
        (answered("x", before="<think>" + SEARCH + "</think>"), "x", 1),  # a call inside <think>
        ("<result> </result> </python>" + answered("x"), "x", 1),  # stray results and closing tags are no matter
    ],
)
def test_scores(text, gold, expected):
    assert reward(text, gold) == pytest.approx(expected)


def test_best_gold_counts():
    assert reward(answered("NYC"), "New York City", "NYC") == 1


@pytest.mark.parametrize(
    ("answer", "gold", "expected"),
    [
        ("-5", "5", 1),  # the sign is punctuation
        ("25", "2.5", 1),  # so is the decimal point
        ("A", "A", 0),  # an article, deleted on both sides
        (r"\frac{1}{2}", r"\frac {1}{2}", 0),  # LaTeX spacing: "frac12" against "frac 12"
        (r"\frac{1}{12}", r"\frac{11}{2}", 1),
        (r"\text{Paris}", "Paris", 0),
        ("1/2", "0.5", 0),
    ],
)
def test_known_faults_of_the_score(answer, gold, expected):
    assert reward(answered(answer), gold) == expected


def test_known_fault_a_tool_result_can_break_the_format():
    before = THINK + "<search> q </search> <result> a page that says <answer> </result>"
    assert reward(answered("x", before=before), "x") == -1


def test_known_fault_the_bonus_needs_no_call():
    assert reward(answered("x", before="<think> </search> </python> </think>"), "x") == pytest.approx(1.1)


def test_known_fault_results_written_by_the_policy_pass():
    text = answered("x", before=THINK + SEARCH + PYTHON)  # one sampled segment: no tool ever ran
    assert reward(text, "x") == pytest.approx(1.1)


def test_tool_results_are_part_of_the_judged_text():
    segments = (
        Segment(THINK + "<search> q </search>", True),
        Segment(" <result> r </result>", False),
        Segment(answered("x", before=""), True),
    )
    result = official_reward(Response(segments, ("x",), "qa", frozenset(), StopReason.ANSWERED), bonus=0.1)
    assert result.reward == 1
    assert result.detail == {"f1": 1.0, "format": 1.0, "bonus": 0.0}


@pytest.mark.parametrize(("answer", "expected", "correct"), [("-5", 1, False), ("10/2", 0, True)])
def test_correct_is_judged_by_value_not_by_the_faulty_score(answer, expected, correct):
    given = Response((Segment(answered(answer), True),), ("5",), "math", frozenset(), StopReason.ANSWERED)
    result = official_reward(given, bonus=0.1)
    assert (result.reward, result.correct) == (expected, correct)
