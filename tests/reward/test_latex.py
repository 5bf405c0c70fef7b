import pytest

from appo_jax.reward.latex import last_boxed, plain


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
