"""Mathematical equality: the plain-number path by hand and against fractions, the rest through math-verify itself."""

import threading
import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appo_jax.reward import verify
from appo_jax.reward.math import MAX_ANSWER_CHARS, equals_one, math_equal
from appo_jax.reward.notation import clean
from appo_jax.reward.number import read_number
from appo_jax.reward.structure import interval


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5", 5),
        ("-5", -5),
        ("−5", -5),
        ("- 5", -5),
        ("+5", 5),
        ("025", 25),
        ("2.5", Fraction(5, 2)),
        (".5", Fraction(1, 2)),
        ("5.", 5),
        ("1,000", 1000),
        ("1{,}234{,}567", 1234567),
        (r"518,\!400", 518400),
        (r"\$90,000", 90000),
        ("$1.65", Fraction(165, 100)),
        (r"-\$4", -4),
        ("1/3", Fraction(1, 3)),
        ("-17/64", Fraction(-17, 64)),
        (r"\frac{407}{1580}", Fraction(407, 1580)),
        (r"-\dfrac{5}{2}", Fraction(-5, 2)),
        (r"120^\circ", 120),
        (r"51.32^{\circ}", Fraction(5132, 100)),
        (r"864 \mbox{ inches}^2", 864),
        (r"12\text{ cm}", 12),
        (r"$5 \text{ km/h}$", 5),
        (r"6\thinspace", 6),
        (r"\(7\)", 7),
    ],
)
def test_a_plain_number(text, value):
    assert read_number(clean(text)).value == value


@pytest.mark.parametrize(
    "text", ["", "-", ".", "x", "2x", "1, 3", "1,3", "1,0000", "4343_6", "3:1", "5 or 6", r"5 \text{ or } 6",
             "1/0", r"\frac{1}{0}", "(37", r"\sqrt{2}", "5!", "1/2/3", "100!", "--5", r"\frac{1}{2}x"],
)  # fmt: skip
def test_not_a_plain_number(text):
    assert read_number(clean(text)) is None


@given(st.integers(-(10**12), 10**12), st.integers(0, 9))
def test_decimals_and_thousands_separators_keep_the_value(digits, places):
    value = Fraction(digits, 10**places)
    whole, fraction = divmod(abs(digits), 10**places)
    text = ("-" if digits < 0 else "") + f"{whole:,}" + (f".{fraction:0{places}d}" if places else "")
    assert read_number(clean(text)).value == value


@given(st.integers(0, 99), st.text("0123456789", max_size=3), st.text("0123456789", min_size=1, max_size=3))
def test_a_repeating_decimal_has_the_value_of_its_geometric_series(integer, fixed, cycle):
    exact = integer + Fraction(int("0" + fixed), 10 ** len(fixed))
    exact += Fraction(int(cycle), 10 ** len(fixed) * (10 ** len(cycle) - 1))
    for end in ("...", r"\ldots", " repeating"):
        number = read_number(clean(f"{integer}.{fixed}{3 * cycle}{end}"))
        assert abs(number.value - exact) <= Fraction(1, 10**6) * exact


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0.12 repeating", Fraction(11, 90)),  # the last digit
        ("0.12 (12 repeating)", Fraction(4, 33)),
        ("0.1212 repeating", Fraction(4, 33)),  # what stands there twice
        ("0.3...", None),
        ("3.14159...", None),
        ("0.12 (3 repeating)", None),
        ("3.141592...", Fraction("3.141592")),  # six places are a decimal
        ("12...", 12),
    ],
)
def test_which_digits_repeat(text, value):
    number = read_number(clean(text))
    assert number is None if value is None else abs(number.value - value) < 1e-12


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("0.1...0.9", "0.1...0.9"),  # from 0.1 to 0.9
        ("0.1, 0.2, \\dots, 0.9", "0.1, 0.2, \\ldots , 0.9"),
        ("It is 5...", "It is 5"),
        ("1.2.3...", "1.2.3"),
    ],
)
def test_an_ellipsis_that_continues_no_decimal_stays_as_it_is(text, cleaned):
    assert clean(text) == cleaned


def test_repeating_decimals_are_read_in_short_time():
    start = time.monotonic()
    for text in ("0." + "12" * 10_000 + "...", "0.3..." * 5_000, "0.3 (the 3 " * 2_000, "5 > x and " * 2_000):
        clean(text)
        interval(text)
    assert time.monotonic() - start < 3


SAME = [
    ("5", "5"), ("5.0", "5"), ("025", "25"), ("1000", "1,000"), ("4.5", r"\frac{9}{2}"), ("9/2", "4.5"),
    ("10%", r"10\%"), ("10", r"10\%"), ("0.1", r"10\%"), ("10%", "10"), ("$950", r"\$950"), ("950", r"\$950"),
    ("120", r"120^\circ"), ("864", r"864 \mbox{ inches}^2"), ("0.333333", "1/3"),
    ("0.3333333333333333", r"\frac{1}{3}"),
    ("0.30000000000000004", "0.3"), ("12.0000000000000", "12"),
    # as written
    ("(B)", r"\text{(B)}"), ("B", r"\text{(B)}"), ("evelyn", r"\text{Evelyn}"), ("acd", "ACD"), ("Да", "Да"),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\dfrac{\pi}{2})"), ("1}^N", "1}^N"),
    # math-verify
    (r"-6+3\sqrt{3}", r"3\sqrt{3} - 6"), ("x = 25", "25"), ("25", "a = 25"), ("5 apples", "5"), ("1+x^2", "x^2+1"),
    ("3, 1", "1, 3"), ("2, -2", r"\pm 2"), (r"\frac 92", "4.5"), (r"4\pi", r"4 \cdot \pi"), ("2^{10}", "1024"),
    (r"(4,\infty)\cup(-\infty,-4)", r"(-\infty,-4)\cup (4,\infty)"),
]  # fmt: skip
DIFFERENT = [
    ("5", "-5"), ("-5", "5"), ("25", "2.5"), ("15", "5"), ("0.33", "1/3"), ("3.14", "3.1416"), ("1000000.5", "1000001"),
    ("0.0000001", "0.0000002"), ("10%", "20%"), ("100%", r"10\%"), ("100", r"10\%"), ("100000001", "100000000"),
    ("B", "A"), ("a", "b"), ("4343_5", "4343_6"), ("5 or 6", "5"), ("5, 6", "5"), ("5x", "5"), ("3 million", "3"),
    ("5 plus 6", "5"), ("2", r"\pm 2"), ("[-2,-1]", "(-2,-1)"), (r"\sqrt{2}", r"\sqrt{3}"), ("", "5"), (" ", " "),
    ("five", "5"), ("}{", "5"), ("\\", "5"), ("5" * (MAX_ANSWER_CHARS + 1), "5"),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "gold"), SAME)
def test_equal(answer, gold):
    assert math_equal(answer, gold) is True


@pytest.mark.parametrize(("answer", "gold"), DIFFERENT)
def test_not_equal(answer, gold):
    assert math_equal(answer, gold) is False


def test_an_answer_that_never_ends_is_given_up_and_the_next_one_is_answered(monkeypatch):
    verify._worker.close()
    monkeypatch.setattr(verify, "VERIFY_SECONDS", 0.5)
    assert math_equal("x+1", "1+x") is True  # starts the process outside the clock
    start = time.monotonic()
    assert math_equal("9^{9^{9^{9}}}", "x+7") is None
    assert time.monotonic() - start < 5
    assert math_equal("x+2", "2+x") is True
    verify._worker.close()


def test_all_golds_share_one_time_limit(monkeypatch):
    verify._worker.close()
    monkeypatch.setattr(verify, "VERIFY_SECONDS", 0.5)
    assert math_equal("x+1", "1+x") is True
    start = time.monotonic()
    assert equals_one(("9^{9^{9^{8}}}",), [f"x+{i}" for i in range(20)]) is None
    assert time.monotonic() - start < 4
    verify._worker.close()


def test_number_words_in_brackets_are_read_in_short_time():
    start = time.monotonic()
    assert math_equal("5 (" + "eightyseventy-" * 25 + "!)", "5") is False
    assert time.monotonic() - start < 3


def test_works_from_many_threads():
    verdicts = {}

    def check(i):
        verdicts[i] = math_equal(f"x^{i} + 1", f"1 + x^{i % 4}")

    threads = [threading.Thread(target=check, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert verdicts == {i: i < 4 for i in range(8)}


def test_long_texts_with_relations_and_words_are_read_in_short_time():
    start = time.monotonic()
    for text in (
        "= 5 " * 99,
        "5 cups in " * 39,
        "total " * 60 + ": 5",
        "theta + " * 49,
        "\\alpha" * 60 + "x",
        "A, " * 120,
    ):
        math_equal(text, "5")
    assert time.monotonic() - start < 5 * verify.VERIFY_SECONDS
