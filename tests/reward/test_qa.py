"""Text answers. Expected values are worked by hand from the definition of token F1: 2·common / (|answer| + |gold|)."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from appo_jax.reward.qa import exact_match, normalize, token_f1


@pytest.mark.parametrize(
    ("text", "normalized"),
    [
        ("The  Young, In Heart!", "young in heart"),
        ("U.S.", "us"),
        ("Austria-Hungary", "austriahungary"),
        ("A", "a"),  # nothing but an article
        ("the A", "the a"),
        ("-5", "-5"),
        ("−5", "-5"),
        ("2.5", "2.5"),
        ("25.", "25"),
        ("3,182", "3182"),
        ("1,234,567.5", "1234567.5"),
        ("1, 234", "1 234"),
        ("1990–1995", "1990 1995"),
        ("2004-05", "2004 05"),
        ("1939‑1945", "1939 1945"),
        ("‑5", "-5"),
        ("2∶1", "2 1"),
        ("10⁻⁵", "10 -5"),
        ("10^{-5}", "10 -5"),
        ("(1,-2)", "1 -2"),
        ("1½", "1 1 2"),
        ("5'11\"", "5 11"),
        ("12'345", "12345"),
        ("blood group O−.", "blood group o-"),
        ("anti-", "anti"),
        ("H₂O", "h2o"),
        ("$-3.50", "-3.50"),
        ("June\xa029, 2007", "june 29 2007"),
        (r"\text{Kenneth Walker III}", "kenneth walker iii"),
        ("“Violetta”", "violetta"),
        ("", ""),
        ("...", ""),
    ],
)
def test_normalize(text, normalized):
    assert normalize(text) == normalized


@pytest.mark.parametrize(
    ("answer", "golds", "f1", "exact"),
    [
        ("Chattahoochee National Forest", ("Chattahoochee National Forest",), 1, True),
        ("the Chattahoochee national forest.", ("Chattahoochee National Forest",), 1, True),
        ("Chattahoochee Forest", ("Chattahoochee National Forest",), 2 * 2 / 5, False),
        ("Vienna", ("Vienna, Austria",), 2 * 1 / 3, False),
        ("NYC", ("New York City", "NYC"), 1, True),
        ("York City", ("New York", "New York City"), 2 * 2 / 5, False),  # the better alias
        ("13 June 2017", ("June 13, 2017",), 1, False),  # the same tokens in another order
        ("new new york", ("new york new",), 1, False),  # a multiset, not a set
        ("new new new", ("new york",), 2 * 1 / 5, False),
        ("yes", ("yes",), 1, True),
        ("yes it is", ("yes",), 0, False),  # no partial credit for yes and no
        ("no", ("no answer was given",), 0, False),
        ("5", ("-5",), 0, False),
        ("25", ("2.5",), 0, False),
        ("A", ("A",), 1, True),
        ("3182", ("3,182",), 1, True),
        ("", ("",), 0, False),
        ("", ("x",), 0, False),
        ("x", (), 0, False),
    ],
)
def test_f1_and_exact_match(answer, golds, f1, exact):
    assert token_f1(answer, golds) == pytest.approx(f1)
    assert exact_match(answer, golds) is exact


WORDS = st.lists(st.sampled_from(["the", "red", "fox", "-5", "2.5", "yes", "a", "U.S."]), max_size=5).map(" ".join)


@given(WORDS, WORDS)
def test_f1_is_symmetric_bounded_and_1_for_exact_matches(x, y):
    assert token_f1(x, [y]) == token_f1(y, [x])
    assert 0 <= token_f1(x, [y]) <= 1
    if exact_match(x, [y]):
        assert token_f1(x, [y]) == 1


@given(st.text())
@example("C:\u0327")  # composes when the colon is gone
def test_normalize_is_idempotent_on_any_text(text):
    once = normalize(text)
    assert normalize(once).split() == once.split() or "\\" in text or "$" in text  # markup is read once
