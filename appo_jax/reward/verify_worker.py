"""The process in which math-verify runs: a line of JSON [answer, gold, seconds] in, a line true or false out.

SIGALRM keeps its default action, which ends the process even inside a long computation of C code.
Usage: python -m appo_jax.reward.verify_worker
"""

import json
import logging
import re
import resource
import signal
import sys
from typing import Any

import sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy
from latex2sympy2_extended.math_normalization import NormalizationConfig, normalize_latex
from math_verify import verify
from math_verify.grader import should_treat_as_complex

# What multiplies the bracket after it: latex2sympy reads (2)(3) as a sum.
FACTOR = re.compile(r"((?<![\d.^_])\d[\d.]*|\)|\\(?:frac|binom)\{[^{}]*\}\{[^{}]*\}|\\sqrt\{[^{}]*\})\s*\(")
MEMORY_BYTES = 2 << 30
DIGITS = 120  # to which numbers are computed; those that agree to 100 of them are equal
# Without its removal of units, which strikes out variables too, and without its search for numbers in what it cannot read.
# Numbers side by side are no sum, and P is not p.
CONVERSION = ConversionConfig(interpret_as_mixed_fractions=False, lowercase_symbols=False)
NORMALIZATION = NormalizationConfig(basic_latex=True, malformed_operators=True, boxed="none")


def main() -> None:
    logging.disable()  # math-verify warns that its own time limits are off
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    read("1")  # builds its tables
    print("ready", flush=True)
    for line in sys.stdin:
        answer, gold, seconds = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            equal = same_value(answer, gold)
        except Exception:  # expressions that it cannot read are not equal
            equal = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(equal), flush=True)


def same_value(answer: str, gold: str) -> bool:
    """Whether two LaTeX expressions have one value. Raises what the parser and sympy raise."""
    a, g = read(answer), read(gold)
    if is_number(a) and is_number(g):
        places = max((len(digits) for digits in re.findall(r"\d*\.(\d+)", f"{answer} {gold}")), default=0)
        return same_number(a, g, tolerant=places >= 6)
    return bool(verify(g, a, numeric_precision=DIGITS, allow_set_relation_comp=True, timeout_seconds=None))


def read(text: str) -> Any:
    """A LaTeX expression in sympy, its decimals as exact fractions and its `i` as the imaginary unit."""
    # Variables, which it would read as the imaginary unit and Euler's number.
    text = re.sub(r"(?<![a-zA-Z\\{\d])E(?![a-zA-Z_]|[-+]?\d)|(?<![a-zA-Z\\{])I(?![a-zA-Z_])", r"\\mathcal{\g<0>}", text)
    text = FACTOR.sub(r"\1 \\cdot (", text)
    text = normalize_latex(text, NORMALIZATION)
    expression = latex2sympy(
        text, is_real=not should_treat_as_complex(text), normalization_config=None, conversion_config=CONVERSION
    )
    if not isinstance(expression, sympy.Basic):
        return expression
    exact = {number: sympy.Rational(str(number)) for number in expression.atoms(sympy.Float)}
    imaginary = {symbol: sympy.I for symbol in expression.free_symbols if symbol.name == "i"}
    return replaced(expression, exact | imaginary)


def replaced(expression: Any, values: dict[Any, Any]) -> Any:
    """`expression` with other numbers and letters. An equation stays one: sympy would make 13/2 = 6.5 the value true."""
    if isinstance(expression, sympy.core.relational.Relational | sympy.And):
        return expression.func(*(replaced(part, values) for part in expression.args), evaluate=False)
    return expression.xreplace(values)


def is_number(expression: Any) -> bool:
    return isinstance(expression, sympy.Expr) and not expression.free_symbols


def same_number(answer: sympy.Expr, gold: sympy.Expr, tolerant: bool) -> bool:
    """Exact equality of two numbers; `tolerant`: up to 1e-6 of the smaller of 1 and the gold, for long decimals.

    math-verify rounds to six places after the point, which makes 1e-8 and 2e-8 the same."""
    answer, gold = answer.doit(), gold.doit()
    if answer == gold:
        return True
    a, g = answer.evalf(DIGITS), gold.evalf(DIGITS)
    difference = abs(a - g)
    if difference.has(sympy.oo, sympy.zoo, sympy.nan):
        return False
    if tolerant and difference <= sympy.Float("1e-6") * min(sympy.Integer(1), abs(g)):
        return True
    if answer.is_Rational and gold.is_Rational:
        return False
    if 0 in (answer, gold):
        return bool((answer - gold).equals(0))
    return bool(difference <= sympy.Float(f"1e-{DIGITS - 20}", DIGITS) * max(abs(a), abs(g)))


if __name__ == "__main__":
    main()
