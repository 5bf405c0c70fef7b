"""Verdicts, by hand."""

import pytest

from appo_jax.benchmark.grading import answer_of, gaia_equal, grade_prediction, votes
from appo_jax.benchmark.sets import Item


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


@pytest.mark.parametrize(
    ("prediction", "answer"),
    [
        ("<think>5</think><answer>\\boxed{7}</answer>", "7"),
        ("The answer is \\boxed{7}.", "7"),
        ("<answer>\\boxed{7}</answer> and later \\boxed{8} in prose", "7"),
        ("<answer>Paris</answer>", "Paris"),
        ("Paris", "Paris"),
        ("  ", ""),
    ],
)
def test_where_an_answer_is_looked_for(prediction, answer):
    assert answer_of(prediction) == answer


def test_each_rule_has_its_verdict():
    qa = Item("0", "?", ("Frank Lowy",))
    verdict = grade_prediction(qa, "<answer>Lowy</answer>", "qa")
    assert (verdict.correct, verdict.f1) == (False, pytest.approx(2 / 3))
    assert grade_prediction(qa, "<answer>frank lowy.</answer>", "qa").correct is True
    assert grade_prediction(Item("0", "?", ("0.5",)), "\\boxed{\\frac12}", "math").correct is True
    assert grade_prediction(Item("0", "?", ("0.5",)), "\\boxed{\\frac13}", "math").correct is False
    assert grade_prediction(Item("0", "?", ("x",)), "x", "judge").correct is None
    empty = grade_prediction(Item("0", "?", ("x",)), " ", "judge")
    assert (empty.correct, empty.reason) == (False, "no answer")


def test_votes_are_by_value_and_the_most_frequent_comes_first():
    assert votes(["1/2", "3", "0.5", "4", "\\frac{1}{2}"], "math") == [[0, 2, 4], [1], [3]]
    assert votes(["The Who", "who", ""], "qa") == [[0, 1], [2]]
