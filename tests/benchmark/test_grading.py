"""Verdicts, by hand."""

import itertools

import pytest

from appo_jax.benchmark.grading import answer_of, gaia_equal, grade_prediction, votes
from appo_jax.benchmark.official import official_figures
from appo_jax.benchmark.predictions import Sample
from appo_jax.benchmark.sets import Item
from appo_jax.reward.grade import grade
from appo_jax.reward.response import Response
from appo_jax.types import Segment, StopReason


# Worked from the rules of GAIA's leaderboard: numbers lose $, % and commas; lists go element by element; text loses spaces,
# case and punctuation.
@pytest.mark.parametrize(
    ("answer", "gold", "equal"),
    [
        ("$1,000.50", "1000.5", True),
        ("17%", "17", True),
        ("about 17", "17", False),
        ("seventeen", "17", False),
        ("1e3", "1000", True),
        ("St. Petersburg", "st petersburg", True),
        ("Saint Petersburg", "St. Petersburg", False),
        ("a, b,c", "A,B, C", True),
        ("a, b", "a, b, c", False),
        ("b, a", "a, b", False),
        ("3; $4", "3; 4", True),
        ("well-known, x", "wellknown, x", False),  # in lists punctuation counts
        ("well-known", "wellknown", True),
        ("", "x", False),
        ("sea gull", "Seagull", True),
    ],
)
def test_gaias_quasi_exact_match(answer, gold, equal):
    assert gaia_equal(answer, gold) is equal


ROLLOUT = {"calls": [], "tokens": 9, "stop_reason": "length"}


@pytest.mark.parametrize(
    ("prediction", "answer"),
    [
        ("<think>5</think><answer>\\boxed{7}</answer>", "7"),
        ("The answer is \\boxed{7}.", "7"),
        ("<answer>\\boxed{7}</answer> and later \\boxed{8} in prose", "7"),
        ("<answer>Paris</answer>", "Paris"),
        ("Paris", "Paris"),
        ("  ", ""),
        # Texts that were cut off before their answer.
        ("<think>Paris is in France.</think><search>capital of France</search>\n<think>The page says Paris", ""),
        ("So <answer> Paris", ""),
        ("It is \\boxed{Pa", ""),
        ('<tool_call>{"name": "python"}</tool_call>', ""),
        ("</think> Paris", ""),
    ],
)
def test_where_an_answer_is_looked_for(prediction, answer):
    assert answer_of(Sample(prediction)) == answer


def test_a_rollout_without_an_answer_has_none_whatever_its_text():
    assert answer_of(Sample("Paris", ROLLOUT)) == ""
    verdict = grade_prediction(Item("0", "?", ("Paris",)), Sample("I would say Paris", ROLLOUT), "judge")
    assert (verdict.correct, verdict.f1, verdict.reason) == (False, 0.0, "no answer")


def test_each_rule_has_its_verdict():
    def verdict_of(gold, text, rule):
        return grade_prediction(Item("0", "?", (gold,)), Sample(text), rule)

    verdict = verdict_of("Frank Lowy", "<answer>Lowy</answer>", "qa")
    assert (verdict.correct, verdict.f1) == (False, pytest.approx(2 / 3))
    assert verdict_of("Frank Lowy", "<answer>frank lowy.</answer>", "qa").correct is True
    assert verdict_of("0.5", "\\boxed{\\frac12}", "math").correct is True
    assert verdict_of("0.5", "\\boxed{\\frac13}", "math").correct is False
    assert verdict_of("x", "x", "judge").correct is None
    empty = verdict_of("x", " ", "judge")
    assert (empty.correct, empty.reason) == (False, "no answer")


@pytest.mark.parametrize(
    "text", [r"\boxed{3}, \boxed{3}", r"\boxed{3} and \boxed{4}", r"\boxed{3}", "<answer>3, 3</answer>"]
)
def test_a_rollout_is_right_where_training_calls_it_right(text):
    response = Response((Segment(text, True),), ("(3, 3)",), "math", frozenset(), StopReason.ANSWERED)
    assert (
        grade_prediction(Item("0", "?", ("(3, 3)",)), Sample(text, ROLLOUT), "math").correct is grade(response).correct
    )


def test_votes_are_by_value_and_the_most_frequent_comes_first():
    assert votes(["1/2", "3", "0.5", "4", "\\frac{1}{2}"], "math") == [[0, 2, 4], [1], [3]]
    assert votes(["The Who", "who", ""], "qa") == [[0, 1]]
    assert votes(["", ""], "qa") == []


@pytest.mark.parametrize("order", list(itertools.permutations(["16 years", "16", "16 books"])))
def test_a_vote_does_not_depend_on_the_order_of_the_samples(order):
    """ "16 years" and "16 books" are both 16, but not each other."""
    assert sorted(map(len, votes([*order, "17", "17"], "math"))) == [2, 3]


# Computed by the official functions (commit b04e7e9) from these pairs.
@pytest.mark.parametrize(
    ("answer", "gold", "equal", "em", "f1"),
    [
        ("Drifting", "Drifting", 1, 1, 1),
        ("the Drifting.", "Drifting", 0, 0, 0),
        ("Bay Ridge", "Bay Ridge, Brooklyn", 0, 0, 0.4),
        ("The Who", "who", 0, 1, 1),
        ("yes probably", "yes", 0, 0, 2 / 3),
        ("$371$", "371", 0, 0, 0),
        ("77.00", "77", 0, 0, 0),
        (r"\dfrac12", r"\frac{1}{2}", 1, 0, 0),
        ("0.5", "1/2", 1, 0, 0),
        (".5", "0.5", 1, 0, 0),
        (r"x = 5", "5", 1, 0, 0.5),
        (r"5\text{ cm}", "5", 1, 0, 0),
        (r"\text{ a}\text{ b}", r"\text{a}", 0, 0, 0.4),
        (r"\sqrt3", r"\sqrt{3}", 1, 0, 0),
        (r"\left( 3, 4 \right)", "(3,4)", 1, 0, 0),
        (r"50\%", "50", 1, 0, 0),
        (r"90^\circ", "90", 1, 0, 0),
        (r"\frac1", r"\frac1", 1, 1, 1),
        ("01/2", r"\frac{1}{2}", 0, 0, 0),
        ("A", "a", 1, 1, 0),
    ],
)
def test_official_figures_are_those_of_the_official_code(answer, gold, equal, em, f1):
    assert official_figures(answer, (gold, "other"), math=True) == {"equal": equal}
    assert official_figures(answer, (gold, "other"), math=False) == {"em": em, "f1": pytest.approx(f1)}


def test_no_answer_has_no_official_figure_above_0():
    assert official_figures("", ("", "the"), math=True) == {"equal": 0}
    assert official_figures("", ("", "the"), math=False) == {"em": 0, "f1": 0}
