"""Brings mathematical answers in Unicode, variants of LaTeX and plain text to the same plain LaTeX ("clean
notation")."""

from __future__ import annotations

import re
import unicodedata

_SUPERSCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱ", "0123456789+-()ni", strict=True))
_SUBSCRIPTS = dict(zip("₀₁₂₃₄₅₆₇₈₉₊₋", "0123456789+-", strict=True))
_SYMBOLS = {
    "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "∙": r"\cdot ", "∗": "*", "÷": "/", "∕": "/", "⁄": "/", "±": r"\pm ",
    "∞": r"\infty ", "≤": r"\le ", "⩽": r"\le ", "≥": r"\ge ", "⩾": r"\ge ", "≠": r"\ne ", "≈": r"\approx ",
    "∪": r"\cup ", "∩": r"\cap ", "∅": r"\emptyset ", "∈": r"\in ", "∖": r"\setminus ", "⟨": r"\langle ",
    "〈": r"\langle ", "⟩": r"\rangle ", "〉": r"\rangle ", "°": r"^\circ ", "º": r"^\circ ", "√": r"\sqrt ", "∠": r"\angle ",
    "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "ℚ": r"\mathbb{Q}", "ℕ": r"\mathbb{N}", "ℂ": r"\mathbb{C}", "′": "'",
    "‘": "'", "’": "'", "“": '"', "”": '"', "、": ",", "。": ".", "∛": r"\sqrt[3]", "∜": r"\sqrt[4]", "∶": ":",
    "ʼ": "'", "٬": ",", "٫": ".", "،": ",", "℃": r"^\circ C", "℉": r"^\circ F", "Ω": r"\Omega ", "【": "", "】": "",
}  # fmt: skip
_SMALL_GREEK = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi pi rho sigma tau upsilon phi chi psi omega"
GREEK_NAMES = _SMALL_GREEK.split()
_CAPITAL_GREEK = "Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega"
_GREEK = dict(zip("αβγδεζηθικλμνξπρστυφχψωΓΔΘΛΞΠΣΦΨΩ", f"{_SMALL_GREEK} {_CAPITAL_GREEK}".split(), strict=True))
_GREEK |= {"\u00b5": "mu", "\u2126": "Omega"}  # the micro sign and the ohm sign of keyboards
DASHES = dict.fromkeys(map(ord, "−‐‑‒–—―"), "-")
"""Signs that look like a minus, for `str.translate`."""
_SYNONYMS = {
    "leq": "le", "leqslant": "le", "lt": "<", "geq": "ge", "geqslant": "ge", "gt": ">", "neq": "ne", "varnothing": "emptyset",
    "lbrace": r"\{", "rbrace": r"\}", "lbrack": "[", "rbrack": "]", "imath": "i", "dfrac": "frac", "tfrac": "frac",
    "cfrac": "frac", "tbinom": "binom", "dbinom": "binom", "left": "", "right": "", "displaystyle": "", "textstyle": "",
    "limits": "", "quad": " ", "qquad": " ", "thinspace": " ", "enspace": " ", "dots": "ldots", "degree": r"^\circ",
    "div": "/", "bmod": " mod ", "colon": ":", "therefore": "", "large": "", "Large": "", "LARGE": "", "huge": "", "Huge": "",
    "small": "", "normalsize": "", "bf": "", "it": "", "middle": "", "vert": "|", "lvert": "|", "rvert": "|",
} | dict.fromkeys(("big", "Big", "bigl", "bigr", "Bigl", "Bigr", "bigg", "Bigg", "biggl", "biggr"), "")  # fmt: skip
_COMMAND = re.compile(r"\\\\|\\([a-zA-Z]+)")
_BRACED = r"\s*\{((?:[^{}]|\{[^{}]*\})*)\}"
_TEXT = re.compile(r"\\(?:text[a-z]*|mbox|hbox)" + _BRACED)
_UPRIGHT = re.compile(r"\\(?:mathrm|mathbf|mathit|mathsf|boldsymbol|bm|rm|underline|fbox)" + _BRACED)
_COLOR = re.compile(r"\\(?:text)?color\s*\{[^{}]*\}")
_UNIT_LETTERS = "mgshlLNJWVAKCF"
_ONE_TOKEN = rf"(?:{_BRACED}|\s*(\d|[a-zA-Z]|\\[a-zA-Z]+))"
_FRACTION = re.compile(r"\\(frac|binom)(?![a-zA-Z])" + _ONE_TOKEN + _ONE_TOKEN)
_CHOOSE = re.compile(r"\{([^{}]*)\\choose(?![a-z])([^{}]*)\}|(?:\{\})?[_^]\{?(\d+)\}?\s*C_\{?(\d+)\}?")
# 4/3 π and 4/3π: the number before what is set apart, or before a sign that is no letter, is the whole fraction.
_FACTOR = re.compile(r"(?<![\w.,^/)}\]])(\d+)/(\d+)(?=\s|\\(?:pi|sqrt)(?![a-zA-Z]))")
# Functions in plain text, before their argument.
_FUNCTION = re.compile(
    r"(?<![a-zA-Z\\])(arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|ln|lg|log|exp|sqrt)"
    r"(?=\s*[({_^\\\d]|\s+[a-zA-Z](?![a-zA-Z]))"
)
# Greek letters as sympy has them, in a text without other words. Shorter ones may be products (xi), and psi is a unit.
_GREEK_WORD = re.compile(
    r"(?<![a-zA-Z\\])(alpha|beta|gamma|delta|epsilon|zeta|eta|theta|iota|kappa|lambda|rho|sigma|tau|upsilon|phi|chi|omega)"
    r"(?![a-zA-Z])"
)
_SYMBOLIC = re.compile(rf"(?:{_GREEK_WORD.pattern}|(?<![a-zA-Z])[a-zA-Z](?![a-zA-Z])|\\[a-zA-Z]+|[^a-zA-Z])*")
_CIRCLED = re.compile(r"(?<=[①-⑳])\s*(?=[①-⑳\d])|(?<=\d)\s*(?=[①-⑳])")
_SENTENCE = re.compile(
    r"(?:the )?(?:(?:correct|final|right) )?(?:answer|result|solution) ?(?:is|=|:) ?:? ?|=\s*", re.IGNORECASE
)
_BELOW_20 = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen "
    "nineteen"
)
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
NUMBER_WORDS = f"{_BELOW_20} {_TENS}".split()
_SPELLED = _BELOW_20.split() + [
    f"{ten} {one}".removesuffix(" zero") for ten in _TENS.split() for one in _BELOW_20.split()[:10]
]
"""The numbers from 0 to 99 in words, each at its own place."""
_AND_SPELLED = re.compile(r"(\d{1,2})\s*\(([a-z -]+)\)", re.IGNORECASE)  # 5 (five)
_QUOTES = re.compile(r"\*([^*]+)\*|`+([^`]+)`+|\"([^\"]*)\"")
_MIXED = re.compile(
    r"(?<![\w.,^/\\])(?<![\^_/] )(\d{1,3}(?:[, ]\d{3})+|\d+)"
    r"(?:\s*\\frac\{\s*(\d+)\s*\}\{\s*(\d+)\s*\}|\s+(\d+)\s*/\s*(\d+)(?![\d.]))"
)
_BOLD = re.compile(r"(?<![\w)}\]])\*\*(?=\S)([^*]+)(?<=\S)\*\*(?![\w({\\])")
_TRIGONOMETRIC = re.compile(r"(?<![a-z])(?:sin|cos|tan|cot|sec|csc|cis)(?![a-z])")
_DEGREES = re.compile(
    r"(\d+(?:\.\d+)?|\\frac\{[^{}]*\}\{[^{}]*\}|[a-zA-Z]|\\[a-zA-Z]+)\s*\^\s*\{?\s*\\circ(?![a-z])\s*\}?"
)
# A decimal that is not written to its end: 0.333..., 0.3 repeating, 0.16 (6 repeating).
_POINTS = r" ?(?:\.(?: ?\.){2,}|\\[lc]dots(?![a-zA-Z]))(?! ?[\d.])"
_REPEATS = r"(?:(?:with )?(?:the )?(\d+)s? (?:is |are )?)?(?:repeat(?:ing|ed|s)|recur(?:ring|s))(?![a-zA-Z])"
_UNENDING = re.compile(
    rf"(?<![\d.])(\d*\.\d+|0,\d+)({_POINTS})?(,? ?(?:\( ?{_REPEATS} ?\)|{_REPEATS}))?", re.IGNORECASE
)
# A marked period with an ellipsis or the word as well: 0.(3)...
_CYCLE = r"(\.\d*(?: ?\\(?:overline|bar|dot) ?(?:\{ ?\d+ ?\}|\d)|\(\d+\)))"
_MARKED_TWICE = re.compile(rf"{_CYCLE}(?:{_POINTS})?(?:,? ?(?:\( ?{_REPEATS} ?\)|{_REPEATS}))?", re.IGNORECASE)
# A dot over the first and the last digit of a period.
_FIRST_AND_LAST = re.compile(r"(?<=[\d.])\\dot ?\{?(\d)\}? ?(\d*) ?\\dot ?\{?(\d)\}?")
_ROOT = re.compile(
    r"\\sqrt\s*(\[[^\[\]]*\])?(?:\s*(\d+)|\s*([a-zA-Z])(?![a-zA-Z])|\s*\(([^()]*)\)|\s*(\\frac\{\d+\}\{\d+\}))"
)


def clean(text: str) -> str:
    """`text` in plain LaTeX: no layout, `\\text{…}` unwrapped and set apart by spaces, digits and signs in ASCII.

    White space that separates is kept as one space. `$` stays only as a currency sign."""
    text = _rows(_ascii_signs(text))
    if "matrix" not in text and "array" not in text:  # where \\\\ ends no row, it is a command escaped once too often
        text = re.sub(r"\\\\(?=[a-zA-Z])", r"\\", text)
    text = re.sub(r"\s*\\!\s*|\{\}", "", _COLOR.sub("", text)).replace(r"\text{,}", ",").replace("{,}", ",")
    text = re.sub(r"(?<!\\)\\[,;: ]|~", " ", text)
    text = _COMMAND.sub(_synonym, text)
    text = _dollars(re.sub(r"(?<!\\)\\[()\[\]]", "", text))
    while (unwrapped := _UPRIGHT.sub(_set_apart, _TEXT.sub(r" \1 ", _BOLD.sub(r"\1", text)))) != text:
        text = unwrapped
    text = _repeating(re.sub(r"\\([%$&#_])", r"\1", text))
    text = re.sub(r"\\sqrt\s*\{\s*-\s*1\s*\}", "i", _functions(text))
    text = _ROOT.sub(lambda m: rf"\sqrt{m[1] or ''}{{{m[2] or m[3] or m[4] or m[5]}}}", text)
    text = re.sub(r"\\sqrt\s*\[(\d*[13579])\]\s*\{\s*-", r"-\\sqrt[\1]{", text)
    text = _CHOOSE.sub(lambda m: rf"\binom{{{m[1] or m[3]}}}{{{m[2] or m[4]}}}", text)
    text = _FRACTION.sub(lambda m: rf"\{m[1]}{{{(m[2] or m[3]).strip()}}}{{{(m[4] or m[5]).strip()}}}", text)
    text = re.sub(r"(?<![a-zA-Z\\])(?:infinity|infty)(?![a-zA-Z])", r"\\infty", text)
    text = re.sub(r"(?<![a-zA-Z\\])pi(?![a-zA-Z])", r"\\pi ", text)
    text = _FACTOR.sub(r"\\frac{\1}{\2}", text)
    text = re.sub(r"(?<=[\d}])\s*(?<![a-zA-Z])(?:per ?cent(?:age)?|pct)(?![a-zA-Z])", "%", text)
    text = re.sub(r"(?<=\d), (?=0\d\d(?!\d))", ",", text)  # 80, 000: a list has no part that begins with 0
    text = re.sub(r"(?<![a-zA-Z])([ap])\.\s?m(?![a-zA-Z])\.?", r"\1m", text)
    text = _in_radians(_powers(_mixed_numbers(_quoted(text.strip()))))
    text = re.sub(r"([\[\]])([^\[\]()]+[,;][^\[\]()]+)([\[\]])", _half_open, text)
    return " ".join(text.split()).rstrip(".,; \\").strip()


def _functions(text: str) -> str:
    """Functions in plain text as LaTeX has them: `sin(x)`, `exp(x)`, `abs(x)`, `cbrt(2)`."""
    text = re.sub(
        r"(?<![a-zA-Z\\])Matrix\((\[.*\])\)", r"\1", re.sub(r"(?<![a-zA-Z\\])oo(?![a-zA-Z])", r"\\infty ", text)
    )
    text = re.sub(r"(?<![a-zA-Z\\])a(sin|cos|tan)(?=\()", r"arc\1", text)
    text = _FUNCTION.sub(r"\\\1", re.sub(r"(?<![a-zA-Z])cbrt(?=\s*[({])", r"\\sqrt[3]", text))
    text = re.sub(r"(?<![a-zA-Z])[aA]bs\(((?:[^()]|\([^()]*\))*)\)", r"|\1|", text)
    if _SYMBOLIC.fullmatch(text) and re.search(r"[^a-zA-Z]", text):
        text = _GREEK_WORD.sub(r"\\\1 ", text)
    text = re.sub(r"\\operatorname\*?\s*\{(\w+)\}", r"\\\1 ", text)
    text = re.sub(r"\\lg(?![a-zA-Z])(?!\s*_)", r"\\log_{10} ", text)
    text = re.sub(r"\\log\s*_\s*10(?!\d)", r"\\log_{10} ", text)
    text = re.sub(r"\\log\s*_\s*(?:e(?![a-zA-Z])|\{e\})", r"\\ln ", text)
    return re.sub(r"\\exp\s*(?:\(([^()]*)\)|\{([^{}]*)\})", lambda m: f"e^{{{m[1] or m[2]}}}", text)


def _repeating(text: str) -> str:
    """Repeating decimals such as 0.333... and 0.3 repeating, written out to so many places that they compare as equal to
    their value. The period is the shortest text that ends the decimal twice; the word may name another, and falls back on the
    last digit. A decimal without a period stays as it is from six places on; a shorter one keeps `\\ldots`, so that it is no
    number."""
    text = re.sub(r"(?:\d\u0305)+", lambda m: rf"\overline{{{m[0][::2]}}}", " ".join(text.split()))
    text = _FIRST_AND_LAST.sub(r"\\overline{\1\2\3}", re.sub(r"(\d)\u0307", r"\\dot{\1}", text))
    return _UNENDING.sub(_written_out, _MARKED_TWICE.sub(r"\1", text))


def _written_out(match: re.Match[str]) -> str:
    number, points, word, named = match[1].replace(",", "."), match[2], match[3], match[4] or match[5]
    if not points and not word:
        return match[0]
    decimals = number.partition(".")[2]
    ends = (decimals[-length:] for length in range(1, len(decimals) // 2 + 1))
    cycle = named or next((end for end in ends if decimals.endswith(2 * end)), "")
    if not cycle and word and len(decimals) < 6:
        cycle = decimals[-1]
    if cycle and decimals.endswith(cycle):
        return number + cycle * (12 // len(cycle) + 1)
    return number if len(decimals) >= 6 and not named else rf"{number}\ldots "


def _rows(text: str) -> str:
    """Equations below each other as a list, and the rows of a matrix with one kind of end."""
    text = re.sub(r"\\\\\s*\[\s*[\d.]+\s*(?:pt|em|ex|mm)\s*\]|\\cr(?![a-zA-Z])", r"\\\\", text)
    return re.sub(
        r"\\begin\{(cases|aligned)\}(.*?)\\end\{\1\}",
        lambda m: ", ".join(filter(str.strip, m[2].replace("&", "").split("\\\\"))),
        text,
        flags=re.DOTALL,
    )


def _quoted(text: str) -> str:
    """A text without the marks around the whole of it (*5*, `5`, "5", # 5), without "the answer is" or `=` before it, and
    without its number in words behind it (5 (five))."""
    previous = None
    while text != previous:
        previous = text
        text = re.sub(r"^#+ ", "", text).strip()
        text = text[found.end() :] if (found := _SENTENCE.match(text)) else text
        spelled = _AND_SPELLED.fullmatch(text)
        if spelled and _SPELLED[int(spelled[1])] == spelled[2].lower().replace("-", " "):
            text = spelled[1]
        mark = _QUOTES.fullmatch(text)
        text = (mark[1] or mark[2] or mark[3] or "").strip() if mark else text
    return text


def _half_open(match: re.Match[str]) -> str:
    """`]1, 2]` and `[1; 2[` with parentheses on the open side."""
    opening, inside, closing = match.groups()
    return f"{'(' if opening == ']' else '['}{inside}{')' if closing == '[' else ']'}"


def _mixed_numbers(text: str) -> str:
    """`1 1/4` and `1\\frac{1}{4}` as the sum in parentheses that they are: an integer and a proper fraction."""

    def total(match: re.Match[str]) -> str:
        top, bottom = match[2] or match[4], match[3] or match[5]
        if len(top + bottom) > 100 or not 0 < int(top) < int(bottom):
            return match[0]
        return rf"({re.sub('[, ]', '', match[1])}+\frac{{{top}}}{{{bottom}}})"

    text = re.sub(r"\^\{?(\d+)\}?\s*/\s*_\{?(\d+)\}?", r" \\frac{\1}{\2}", text)  # ¹/₄
    return _MIXED.sub(total, text)


def _powers(text: str) -> str:
    """`**` between operands is a power; an exponent or index that is a fraction stands in braces."""
    text = re.sub(r"\s*\*\*\s*(-?(?:\d+(?:\.\d+)?|\.\d+)|[a-zA-Z])", r"^{\1}", text)
    text = re.sub(r"\s*\*\*\s*", "^", text)
    return re.sub(r"([\^_])\s*(\\frac\{[^{}]*\}\{[^{}]*\})", r"\1{\2}", text)


def _in_radians(text: str) -> str:
    """Degrees after a trigonometric function are a factor of their number, not a unit of the whole."""
    function = _TRIGONOMETRIC.search(text)
    if function is None:
        return text
    text = text[: function.end()] + _DEGREES.sub(r"(\1 \\cdot \\frac{\\pi}{180})", text[function.end() :])
    return re.sub(r"\\?cis\s*(\((?:[^()]|\([^()]*\))*\))", r"e^{i \1}", text)


def _ascii_signs(text: str) -> str:
    """Letters, digits and signs of Unicode in plain spelling; invisible characters are dropped."""
    parts: list[str] = []
    raised = ""  # "^" or "_" while a run of small digits is open
    text = _CIRCLED.sub(", ", text)  # ①③ are two items, and not 13
    text = re.sub(r"(?<=\d)\s*\u00b5(?=[a-zA-Z])", " micro", text)  # of a unit; the letter \u03bc may be a factor
    for ch in text.translate(DASHES):
        mark = "^" if ch in _SUPERSCRIPTS else "_" if ch in _SUBSCRIPTS else ""
        if raised and mark != raised:
            parts.append("}")
        if mark and mark != raised:
            parts.append(mark + "{")
        raised = mark
        if mark:
            parts.append(_SUPERSCRIPTS.get(ch) or _SUBSCRIPTS[ch])
        elif ch in _SYMBOLS:
            parts.append(_SYMBOLS[ch])
        elif ch in _GREEK:
            parts.append(f"\\{_GREEK[ch]} ")
        elif unicodedata.decomposition(ch).startswith("<fraction>"):  # ½; after a digit it is a mixed number
            parts.append(
                r"\frac" + "".join(f"{{{number}}}" for number in unicodedata.normalize("NFKC", ch).split("⁄") if number)
            )
        elif unicodedata.category(ch) != "Cf":
            parts.append(str(unicodedata.decimal(ch, ch)))
    return unicodedata.normalize("NFKC", "".join(parts) + ("}" if raised else "")).translate(DASHES)


def _synonym(match: re.Match[str]) -> str:
    if (name := match[1]) not in _SYNONYMS:  # a line break is not a command
        return match[0]
    plain = _SYNONYMS[name]
    return f"\\{plain} " if plain.isalpha() and plain != "i" else plain


def _dollars(text: str) -> str:
    """Drop the `$` signs that pair up; a single one is a currency sign."""
    signs = re.findall(r"(?<!\\)\$", text)
    return re.sub(r"(?<!\\)\$", "", text) if len(signs) % 2 == 0 else text


def _set_apart(match: re.Match[str]) -> str:
    """The content of `\\mathrm{…}`: words are set off by spaces, and so is the letter of a unit after a number; any other
    single letter is treated like a letter."""
    letter = match[1].strip()
    is_unit = letter and letter in _UNIT_LETTERS and match.string[: match.start()].rstrip()[-1:].isdigit()
    return match[1] if len(letter) == 1 and not is_unit else f" {match[1]} "
