"""Finds the unit of an answer. Units are compared by name and never converted."""

from __future__ import annotations

import re
from collections import Counter

import Stemmer

from appo_jax.reward import notation

_SPELLINGS = """
meter: m metre; centimeter: cm centimetre; millimeter: mm millimetre; kilometer: km kilometre; decimeter: dm; nanometer: nm
micrometer: um microm micron; angstrom: å; microsecond: micros; microliter: ul microl; millisecond: ms
inch: in; foot: ft feet; yard: yd; mile: mi
gram: g gm; kilogram: kg kilo kgs; milligram: mg; microgram: ug microg; tonne: ton; poundmass: lb lbs; ounce: oz
second: s sec secs; minute: min mins; hour: h hr hrs; day: d; week: wk; month: mo; year: yr yrs
liter: l litre; milliliter: ml millilitre; gallon: gal gals; quart: qt; pint: pt; acre:; hectare: ha
degree: ° deg degs; celsius: c centigrade; fahrenheit: f; kelvin: k; radian: rad rads
newton: n; joule: j; electronvolt: ev; watt: w; volt: v; ampere: a amp; ohm:; hertz: hz; pascal: pa; mole: mol; kilowatt: kw
kilojoule: kj; calorie: cal; byte:; bit:
dollar: $ us$ usd buck; cent: ¢; euro: € eur; yen: ¥ jpy 円; rupee: ₹ rs inr; yuan: 元 cny rmb; won: ₩ krw; ruble: ₽ rub
canadiandollar: c$ ca$ cad; australiandollar: a$ au$ aud; franc: chf; krone: kr kroner krona kronor
pound:; poundsterling: £ gbp quid
person: people persons; man: men; woman: women; child: children
mouse: mice; tooth: teeth; goose: geese
"""
_MANY = {
    "mph": (("mile", 1), ("hour", -1)), "mpg": (("mile", 1), ("gallon", -1)), "cc": (("centimeter", 3),),
} | dict.fromkeys(("kph", "kmh", "kmph"), (("kilometer", 1), ("hour", -1)))  # fmt: skip
_NAMES = {
    spelling: name.strip()
    for entry in re.split(r"[;\n]", _SPELLINGS.strip())
    for name, _, others in [entry.partition(":")]
    for spelling in (name.strip(), *others.split())
}
_TABLE = frozenset(_NAMES.values())
_POWERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}
_FILLERS = ("old", "us", "american", "sterling", "more", "fewer")  # "years old" is years, "US dollars" are dollars
SCALES = {
    "hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "quadrillion": 10**15,
    "quintillion": 10**18, "lakh": 10**5, "crore": 10**7, "dozen": 12, "gross": 144, "score": 20, "tens": 10,
}  # fmt: skip
"""Words after a number that multiply it."""
# Words after a number that change its value or connect it to other text.
_NO_UNIT_WORDS = """
and or plus minus times over divided by mod modulo to if is not than less factorial choose point squared cubed root
half halves third thirds quarter quarters percent percentage pct out below above under beyond fold micro
twice thrice approximately about around mil mill bil tril
sin cos tan cot csc log ln exp sqrt infinity pm mp cdot true false none yes no but when where for the a an i e
abc xyz
"""
# 5 fives are 25; 5 ones are 5, and 5 zeros are counted.
_MANY_OF_A_NUMBER = [re.sub("xs$", "xes", re.sub("y$", "ie", word) + "s") for word in notation.NUMBER_WORDS[2:]]
NO_UNIT = frozenset([*_NO_UNIT_WORDS.split(), *notation.NUMBER_WORDS, *_MANY_OF_A_NUMBER])
# Words that change a value at the end (5 double, 5 theta), and describe what they stand before (5 double rooms).
_ATTRIBUTE_WORDS = (
    "negative positive double triple quadruple wrong incorrect unknown undefined repeating repeated recurring"
)
ATTRIBUTES = frozenset([*_ATTRIBUTE_WORDS.split(), *notation.GREEK_NAMES]) - {"psi"}  # pounds per square inch
# Two-digit numbers, ten-dollar bills: the hyphen joins a number to an attribute.
_NUMBER_IN_ATTRIBUTE = re.compile(
    r"(?<![a-z-])(one|two|three|four|five|six|seven|eight|nine|ten)-([a-z]+)(?= [a-z]{3})"
)
# Scales (millions), parts (thirds, hundredths), numbers (thirteen), and functions that touch their variable (lnx).
_NUMBER_WORD = re.compile(
    rf"(?:{'|'.join(SCALES)}|[a-z]*illion)s?|[a-z]*teen|(?:ln|log|exp|sin|cos|tan)[nxyz]|"
    r"(?:four|fif|six|seven|eigh|nin|ten|eleven|twelf|[a-z]*teen|[a-z]*tie|hundred|thousand|[a-z]*illion)ths?"
)
# A number behind "of", which makes a product (12 sets of 3), and is no part of a name (20% milk, two-liter bottles, H2O).
_COUNT = re.compile(
    r"(?<![a-z\d.])\d[\d.]*+(?! ?%| percent|-[a-z])|"
    rf"(?<![a-z])(?:{'|'.join([*notation.NUMBER_WORDS, *_MANY_OF_A_NUMBER])}|(?:{'|'.join(SCALES)})s?)(?!-?[a-z])"
)
_FRONT = re.compile(
    r"(-?)\s*((?:US|CA?|AU?)?\$|[€£¥₹₩₽]|(?:USD|EUR|GBP|CAD|AUD|CHF|JPY|CNY|INR|KRW|Rs)(?![a-zA-Z])\.?)\s*(?=[-.\d\\(])"
)
# Where, when and for what: at the market, during the week, to download the file. Each word must say nothing about the value.
_CIRCUMSTANCE = re.compile(r"(?:(.*?[a-z°)}]) )?(?:at|on|in|for|over|during|from|to) ([a-z' -]+)", re.IGNORECASE)
_SMALL_WORDS = frozenset(["a", "an", "the", "to", "by", "for", "on", "at", "of", "in", "its", "my", "his", "her"])
_IN_BRACKETS = re.compile(r"(?<=[\w}°$%]) \(([a-z]+(?: [a-z]+)*)\)$", re.IGNORECASE)
_TIMES_OF_DAY = frozenset({"noon", "midnight"})
_START = re.compile(
    r"(?<![a-zA-Z\\])[a-zA-Z]|\^\s*\{?\s*\\circ|\\Omega(?![a-zA-Z])|(?<=\s)\\mu\s*[msL](?![a-zA-Z])|[$€£¥₹₩₽¢%Åå円元]"
)
_OVER = re.compile(r"\\frac\s*\{\s*([a-zA-Z ]+(?:\^\{?\d\}?)?)\s*\}\s*\{\s*([a-zA-Z ]+(?:\^\{?\d\}?)?)\s*\}$")
_WORDS_IN_VALUE = re.compile(rf"(?<![a-zA-Z\\])(?!(?:{'|'.join(SCALES)})s?(?![a-z]))[a-zA-Z]{{2,}}")

Unit = tuple[tuple[str, int], ...]
"""Powers of named units, in the order of the alphabet: km/h is (("hour", -1), ("kilometer", 1))."""


def split_unit(text: str) -> tuple[str, Unit | None] | None:
    """(value, unit) of an answer in clean notation, the unit None where there is none.

    A unit is a currency sign in front, or at the end a name of the table above, or any other words (books, red apples)
    after a space. None where two units contradict each other ($5 euros).
    """
    front = _FRONT.match(text)
    currency = read_unit(front[2]) if front else None
    if front:
        text = front[1] + text[front.end() :]
    text = _with_brackets_read(_OVER.sub(lambda m: f" {m[1]}/{m[2]}", text), money=front is not None)
    value, back = _split_end(text, money=front is not None)
    if back is None:
        return value.strip(), currency
    if currency is None:
        return value, back
    unit = _of_money(currency, back)
    return None if unit is None else (value, unit)


def _of_money(currency: Unit, back: Unit) -> Unit | None:
    """The unit of an amount with a currency sign and with the unit `back` behind it. $18 per day are dollars per day, words that
    are no unit ($18 profit) say nothing. None if `back` names another unit ($5 euros)."""
    named = tuple((name, power) for name, power in back if power > 0 and name in _TABLE)
    if named and not same_unit(named, currency):
        return None
    return tuple(sorted([*currency, *((name, power) for name, power in back if power < 0)]))


def same_unit(a: Unit, b: Unit) -> bool:
    """Whether two units are one. A pound may be that of mass (lb) or that of money (£), which are two."""
    return a == b or any(_with_pound(a, kind) == _with_pound(b, kind) for kind in ("poundmass", "poundsterling"))


def _with_pound(unit: Unit, kind: str) -> Unit:
    return tuple(sorted((kind if name == "pound" else name, power) for name, power in unit))


def _split_end(text: str, money: bool) -> tuple[str, Unit | None]:
    """(value, unit) at the end of a text. `money`: it stands behind a currency sign."""
    for start in _START.finditer(text):
        value, tail = text[: start.start()], text[start.start() :]
        letters = re.match(r"[a-zA-Z]*", tail)[0]  # type: ignore[index]
        # Letters that touch a value are a factor of it (5x), unless they name a unit that is longer than a letter (5cm).
        apart = not value or value[-1].isspace() or not tail[0].isascii() or not tail[0].isalpha()
        if value.rstrip().endswith("/"):  # 18/hour; 1/x is a fraction
            value, tail, apart = value.rstrip()[:-1], f"/{tail}", money
        if not _is_value(value.strip()) or value.rstrip().endswith("\\mu"):  # 2\mu g has no gram
            continue
        if money and apart and _says_nothing(tail):
            return value.strip(), None
        if _says_of_what(tail):
            return value.strip(), read_unit(re.sub(r"^of (?:(?:an?|the) )?", "", tail), any_words=False)
        unit = read_unit(_without_circumstance(tail) or tail, any_words=apart)
        if unit is not None and (apart or len(letters) > 1):
            return value.strip(), unit
    return text, None


def _says_nothing(tail: str) -> bool:
    """Whether the words behind an amount of money only say where, when or for what it is, or that it is added or left."""
    return tail.strip().lower() in ("more", "left over", "leftover") or _without_circumstance(tail) == ""


def _without_circumstance(tail: str) -> str:
    """The words of a unit without those that say where, when or for what: dollars at the market. They stay if one of them may
    change the value or name another (15 minutes to noon, 18 dollars at the market or the shop)."""
    match = _CIRCUMSTANCE.fullmatch(tail)
    words = re.findall("[a-z]+", match[2].lower().replace("'", "")) if match else []
    plain = all(word in _SMALL_WORDS or _is_plain(word) for word in words)
    plain = plain and not {*words} <= _SMALL_WORDS and not re.search("times$", (match and match[1]) or "")
    return (match[1] or "") if match and plain else tail


def _is_plain(word: str) -> bool:
    """Whether a word has no part in a value: no number, and no word as minus or double."""
    changes = NO_UNIT | ATTRIBUTES | _TIMES_OF_DAY
    return len(word) > 1 and word not in changes and not is_number_word(word)


def _with_brackets_read(text: str, money: bool) -> str:
    """`12 cm (remaining)` without its words in brackets; in `12 (remaining)` and `12 (cm)` they name the unit."""
    match = _IN_BRACKETS.search(text)
    if match is None or not all(map(_is_plain, match[1].lower().split())) or read_unit(match[1]) is None:
        return text
    before = text[: match.start()]
    has_unit = money or _split_end(before, money)[1] is not None
    return before if has_unit else f"{before} {match[1]}" if re.search(r"[\d}]$", before) else text


def _says_of_what(tail: str) -> bool:
    """Whether the words say of what a value is a part (5/6 of the cake, 2/3 of an hour). Of a number or a letter is a product."""
    first, *words = tail.lower().replace("'", "").split()
    named = [len(word) > 2 and bool(_names(word, any_words=True)) for word in words]
    small = [word in ("of", "a", "an", "the") for word in words]
    return first == "of" and all(map(max, named, small)) and named[-1:] == [True] and words[-1] not in ATTRIBUTES


def is_number_word(word: str) -> bool:
    return _NUMBER_WORD.fullmatch(word) is not None


def _is_value(text: str) -> bool:
    """Whether the text can have a unit: it has a digit, or is a letter or a LaTeX command, and has no words."""
    if _WORDS_IN_VALUE.search(text):
        return False
    return bool(re.search(r"\d|\\[a-z]+", text)) or re.fullmatch(r"[b-hj-z]", text) is not None


def read_unit(text: str, any_words: bool = True) -> Unit | None:
    """The unit that `text` names, or None. `any_words`: words of the table or any others from three letters on."""
    text = re.sub(r"(?<![a-zA-Z])k(?![a-zA-Z])", "thousand", text)  # kelvin is K
    text = re.sub(r"\\mu\s*(?=[a-zA-Z]$|[a-zA-Z]\W)", "micro", re.sub(r"\\Omega(?![a-zA-Z])\s*", "ohm ", text))
    text, _, of_what = text.lower().replace("^{\\circ}", "°").replace("^\\circ", "°").partition(" of ")
    if _COUNT.search(of_what):
        return None
    text = _NUMBER_IN_ATTRIBUTE.sub(lambda m: m[1] + m[2] if _names(m[2], any_words) else m[0], text)
    text = re.sub(r"\\cdot|\\times|\*|(?<=[a-z])-(?=[a-z])|(?<=°)(?=[a-z])", " ", text)
    text = re.sub(r"(?<![a-z])left[ -]over(?![a-z])", "leftover", text)
    text = re.sub(r"(?<![a-z])in (?=(?!squared|cubed)[a-z]{3})", "", text)  # in total, in profit: no inches
    text = re.sub(r"(?<![a-z])(?:per|(?:an?|every|each)(?= [a-z]{3}))(?![a-z])", "/", re.sub(r"[{}.,']", "", text))
    text = re.sub(r"(?<![a-z])times(?=\s*(?:$|/))", "time", text)  # how often; 5 times x is a product
    powers: Counter[str] = Counter()
    sign, power, last, word = 1, 1, "", ""
    for token in re.findall(r"[^\s/]+|/", re.sub(r"\s*\^\s*", "^", text)):
        word, _, exponent = re.sub(r"(?<=[a-z]m)([23])$", r"^\1", token).partition("^")  # cm3
        if token == "/":
            sign = -1
        elif word in _POWERS:
            power = _POWERS[word]
        elif word in ("squared", "cubed") and last:
            powers[last] *= 2 if word == "squared" else 3
        elif word not in _FILLERS and not (word == "leftover" and last):
            names = _names(word, any_words)
            if not names or not re.fullmatch(r"|-?\d", exponent):
                return None
            for name, direction in names:  # direction: the power of the unit in the name
                powers[name] += sign * direction * power * int(exponent or 1)
            power, last = 1, names[-1][0]
    if "celsius" in powers or "fahrenheit" in powers:
        del powers["degree"]
    return tuple(sorted(powers.items())) if last and word not in ATTRIBUTES else None


def _names(word: str, any_words: bool) -> list[tuple[str, int]]:
    """The units that a word stands for, each with its power; none for a word that is no unit."""
    if word in _MANY:
        return list(_MANY[word])
    for spelling in (word, word.removesuffix("s"), word.removesuffix("es")):
        if spelling in _NAMES:
            return [(_NAMES[spelling], 1)]
    if any_words and word in ("am", "pm"):
        return [(word, 1)]
    if any_words and len(word) > 2 and word.isalpha() and word not in NO_UNIT and not is_number_word(word):
        return [(Stemmer.Stemmer("english").stemWord(word), 1)]
    return []
