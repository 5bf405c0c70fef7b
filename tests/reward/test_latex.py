import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appo_jax.reward.latex import boxed_answer, boxed_gold, last_boxed, plain


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"so \boxed{5}", "5"),
        (r"\boxed{1} then \boxed{2}.", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed {5}", "5"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),  # one escaped brace, unbalanced on purpose
        (r"\boxed{1} and \boxed{2", "1"),  # the last one never closes
        (r"\boxed{}", ""),
        (r"\boxed{a" + "\n" + "b}", "a\nb"),
        (r"\boxed{5", None),
        (r"\boxed 5", None),
        ("5", None),
        ("", None),
    ],
)
def test_last_boxed(text, content):
    assert last_boxed(text) == content


@pytest.mark.parametrize(
    ("text", "answer", "repeated"),
    [
        (r"\boxed{a} and \boxed{b}", "a, and b", "a, and b"),
        (r"\boxed{a}, \boxed{b} or \boxed{c}", "a, b, or c", "a, b, or c"),
        (r"\boxed{a} as well as $\boxed{b}$", "a, and b", "a, and b"),
        (r"\boxed{a}, \boxed{b} and \boxed{a}", "a, b", "a, b, and a"),
        (r"\boxed{a} and so \boxed{b}", "b", "b"),
    ],
)
def test_joined_boxes_keep_the_word_between_them(text, answer, repeated):
    assert boxed_answer(text) == answer
    assert boxed_answer(text, repeats=True) == repeated


@pytest.mark.parametrize(
    ("solution", "gold"),
    [
        (r"so \boxed{5}", "5"),
        (r"Thus $x = \boxed 2$.", "2"),
        (r"Thus $\boxed 25$. It is not 5.", "25"),
        (r"$\boxed\frac{\sqrt{3}}{2}$", r"\frac{\sqrt{3}}{2}"),
        ("\\[\\boxed 2.\\]", "2"),
        ("\\begin{align*}x&=\\boxed 2\\end{align*}", "2"),
        (r"$\fbox{4}$", "4"),
        (r"$\boxed{1}$ and $\fbox{4}$", "1"),
        (r"$\boxed 1$, then $\boxed{4}$", "4"),
        (r"\boxed{\boxed 2}", "2"),
        (r"\boxedfoo 5", None),
        ("5", None),
    ],
)
def test_the_gold_of_a_solution(solution, gold):
    assert boxed_gold(solution) == gold


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"\text{Paris}", "Paris"),
        (r"\textbf{\text{Paris}}", "Paris"),
        (r"\mathrm{kg}", "kg"),
        (r"AT\&T", "AT&T"),
        (r"\$1.65", "$1.65"),
        (r"$\frac{1}{2}$", r"\frac{1}{2}"),
        (r"\(5\)", "5"),
        (r"518,\!400", "518,400"),
        ("1{,}000", "1,000"),
        (r"New~York", "New York"),
        (r"6\thinspace", "6"),
        (r"a\quad b", "a  b"),
    ],
)
def test_plain(text, expected):
    assert plain(text) == expected


def innermost_last_box(text):
    """The definition written out: from the last `\\boxed{` backwards, the first whose braces are closed. Quadratic time."""
    for match in reversed(list(re.finditer(r"\\boxed\s*\{", text))):
        depth, i = 1, match.end()
        while i < len(text):
            if text[i] == "\\":
                i += 2
                continue
            depth += {"{": 1, "}": -1}.get(text[i], 0)
            if depth == 0:
                return text[match.end() : i]
            i += 1
    return None


PIECES = ["\\boxed{", "\\boxed {", "\\boxed", "{", "}", "\\{", "\\}", "\\", "\\\\", "5", " ", "\n"]


@given(st.lists(st.sampled_from(PIECES), max_size=14).map("".join))
def test_last_boxed_is_what_its_definition_says(text):
    assert last_boxed(text) == innermost_last_box(text)
