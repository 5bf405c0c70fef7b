"""Text answers: exact match and token F1 over the accepted aliases, as SQuAD and HotpotQA define them.

Differences from their `normalize_answer`, which treats some different answers as equal and loses others: a number keeps
its sign and its decimal point ("5" is not "-5", "25" is not "2.5") and drops its thousands separators; any other sign between
digits separates them ("3:00" is not "300", "10⁵" is "10^5" and not "105"); amounts of two currencies differ; signs of names are
kept ("C++", "F#", the blood group "O-"); an answer that has only articles keeps them ("A" can be right), and the last word is
none ("Vitamin A"); symbols are an answer if there is nothing else; LaTeX text markup is removed; Unicode letters are normalised,
and Latin letters lose their accents; "&" is "and"; and answers are equal if they differ only in spaces, except spaces between two
digits ("J. K." and "J.K.", "well-known" and "well known").
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

from appo_jax.reward.latex import plain
from appo_jax.reward.notation import DASHES
from appo_jax.text.letters import LATIN

_ONE_SPELLING = DASHES | str.maketrans("’‘٬٫", "'',.")
# Small digits and fractions next to a digit, which Unicode's normal form would make one number with it: 10⁵, 1½.
_SMALL = "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻₀₁₂₃₄₅₆₇₈₉₊₋"
_NEXT_TO_SMALL = re.compile(rf"(?<=\d)(?=[{_SMALL}¼½¾⅐-⅞])|(?<=[{_SMALL}])(?=\d)")
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}([,'_])\d{3}(?:\1\d{3})*+(?![\d,])")
_SIGN = re.compile(r"(?<![^\s(\[{$€£¥₹^,;:/*×=])-(?=[$€£¥₹]?\.?\d)")  # a minus before a number, not a hyphen or a range
_POINT = re.compile(r"(?<=\d)\.(?=\d)|(?<!\w)\.(?=\d)")
_GROUPED = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?: \d{3})++(?![\d,])")
_AND = re.compile(r"(?<=\w)\s*&\s*(?=\w)")
_NAME_SIGNS = re.compile(r"(?<=[a-z])[+#♯]+(?!\w)")  # of C++, F#, A+
# The minus of AB-; the hyphen at the end of a longer word (anti-) is punctuation.
_NAME_MINUS = re.compile(r"((?:^|\s)[^\w\s]*[a-z]{1,2})-(?=\W*$)")
_PERCENT = re.compile(r"(?<=\d) ?per ?cent\b")  # "%" is dropped too
_ARTICLES = re.compile(r"\b(?:a|an|the)\b(?=\s+\S)")  # the last word is no article: Vitamin A
_ONLY_ARTICLES = frozenset({"a", "an", "the"})
_CURRENCY = re.compile(r"[$€£¥₹]")
_SPACE_BESIDE_WORDS = re.compile(r"(?<!\d) | (?!\d)")
_CLOSED = frozenset({"yes", "no", "noanswer"})  # no partial credit (HotpotQA)
_LATIN = str.maketrans(LATIN)
# punctuation that belongs to a number is mapped to private-use letters while the other punctuation is deleted
_MINUS, _DOT = "\ue000", "\ue001"
_SIGNS = dict(zip("+#♯", "\ue002\ue003\ue003", strict=True))
_DELETED = "\ue004"  # a sign that is deleted, and between digits leaves a space
_DELETED_BETWEEN_DIGITS = re.compile(rf"(?<=\d){_DELETED}+(?=[{_MINUS}{_DOT}]?\d)")


def normalize(text: str) -> str:
    """Lower-case words and numbers with single spaces, without punctuation and articles (see the module's
    docstring)."""
    given = _letters(_NEXT_TO_SMALL.sub("^", plain(text)))
    text = _AND.sub(" and ", re.sub("[\ue000-\ue004]", "", given.translate(_ONE_SPELLING)))
    text = _THOUSANDS.sub(lambda m: m.group().replace(m[1], ""), _PERCENT.sub("", text))
    text = _GROUPED.sub(lambda m: m.group().replace(" ", ""), text)
    text = _NAME_MINUS.sub(rf"\1{_MINUS}", _POINT.sub(_DOT, _SIGN.sub(_MINUS, text)))
    text = _NAME_SIGNS.sub(lambda m: "".join(_SIGNS[sign] for sign in m.group()), text)
    kept = "".join(_DELETED if unicodedata.category(ch)[0] in "PS" else ch for ch in text)
    kept = _DELETED_BETWEEN_DIGITS.sub(" ", kept).replace(_DELETED, "")
    text = _letters(kept)  # an accent may have lost the colon between it and its letter
    text = text.replace(_MINUS, "-").replace(_DOT, ".").replace(_SIGNS["+"], "+").replace(_SIGNS["#"], "#")
    words = text.split()
    if not words and any(unicodedata.category(ch)[0] == "S" for ch in given):
        words = given.split()  # an answer of symbols only
    return " ".join(words if _ONLY_ARTICLES.issuperset(words) else _ARTICLES.sub(" ", " ".join(words)).split())


def _letters(text: str) -> str:
    """`text` in lower case with one spelling of each letter and digit, without accents of Latin letters and invisible
    characters."""
    kept: list[str] = []
    latin = False
    for ch in unicodedata.normalize("NFKD", unicodedata.normalize("NFKC", text).casefold()):
        if unicodedata.category(ch) in ("Mn", "Cf") and (latin or unicodedata.category(ch) == "Cf"):
            continue
        if "\u02b0" <= ch <= "\u02ff":  # letters that modify: the apostrophe of Hawaiʻi
            kept.append("'")
            continue
        latin = ch.translate(_LATIN).isascii()
        kept.append(str(unicodedata.decimal(ch, ch)))
    return unicodedata.normalize("NFKC", "".join(kept).translate(_LATIN))


def exact_match(answer: str, golds: Sequence[str]) -> bool:
    """Whether the normalised answer equals one of the normalised golds. An empty answer equals nothing."""
    normalized = normalize(answer)
    return bool(normalized) and any(
        _same(normalized, normalize(gold)) and _same_currency(answer, gold) for gold in golds
    )


def _same_currency(answer: str, gold: str) -> bool:
    """Whether two amounts are not of two currencies. A sign may be left out."""
    signs = set(_CURRENCY.findall(answer)), set(_CURRENCY.findall(gold))
    return signs[0] == signs[1] or not all(signs)


def _same(answer: str, gold: str) -> bool:
    return answer == gold or _SPACE_BESIDE_WORDS.sub("", answer) == _SPACE_BESIDE_WORDS.sub("", gold)


def token_f1(answer: str, golds: Sequence[str]) -> float:
    """Highest token F1 of the answer against a gold, in [0, 1]; 1 for an exact match."""
    return max((_f1(normalize(answer), normalize(gold)) for gold in golds), default=0.0)


def _f1(answer: str, gold: str) -> float:
    if answer and _same(answer, gold):
        return 1.0
    if answer != gold and (answer in _CLOSED or gold in _CLOSED):
        return 0.0
    return overlap_f1(answer.split(), gold.split())


def overlap_f1(answer: Sequence[str], gold: Sequence[str]) -> float:
    """F1 of two lists of tokens, in any order, in [0, 1]; 0 if they have no token in common."""
    common = (Counter(answer) & Counter(gold)).total()
    return 2 * common / (len(answer) + len(gold)) if common else 0.0
