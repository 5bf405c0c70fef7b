"""Mathematical answers: equal as plain numbers, as written, or by math-verify.

Plain numbers are compared exactly, as fractions, without a computer algebra system: most golds are of this kind.
Everything else goes to math-verify in a process of its own (math_worker.py), because an answer such as
`9^{9^{9^9}}` never returns, and because math-verify's own time limit needs the main thread.
"""

from __future__ import annotations

import atexit
import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
import threading
from fractions import Fraction

from appo_jax.errors import AppoError
from appo_jax.reward.latex import plain

MAX_ANSWER_CHARS = 400
"""Longer answers are wrong; no gold comes near."""
VERIFY_SECONDS = 3.0
"""Wall time of one comparison by math-verify; one that needs more counts as unequal."""

_NUMBER = re.compile(
    r"""(?P<sign>[-+−]?)\s*(?:[$€£]\s*)?
    (?: \\[dt]?frac\s*\{\s*(?P<num>\d+)\s*\}\s*\{\s*(?P<den>\d+)\s*\}
      | (?P<over>\d+)\s*/\s*(?P<under>\d+)
      | (?P<whole>\d{1,3}(?:,\d{3})+|\d*)(?:\.(?P<decimals>\d*))? )
    \s*(?P<percent>%)?(?:\s*\^?\s*\{?(?:\\circ|°)\}?)?\.?""",
    re.VERBOSE,
)
_UNIT = re.compile(r"\\(?:text|mbox|mathrm)\s*\{\s*(?!\s*(?:and|or)\b)[a-zA-Z./ ]+\}(?:\s*\^\s*(?:\d|\{\d\}))?\s*$")
_BASE = re.compile(r"_\s*\{?(\d+)\}?$")


@dataclasses.dataclass(frozen=True)
class Number:
    """A number as written: `decimals` digits after the point, perhaps with a percent sign (not yet divided by 100)."""

    value: Fraction
    decimals: int
    percent: bool


def parse_number(text: str) -> Number | None:
    """Read a plain number: sign, currency, thousands separators, decimals, a/b, \\frac{a}{b}, percent, degrees, unit.

    None for anything else, which is then not a plain number ("2x", "1, 3", "4343_6").
    """
    text = plain(_UNIT.sub("", text.strip().strip("$")))
    match = _NUMBER.fullmatch(text)
    if match is None:
        return None
    part = match.groupdict()
    top, bottom = part["num"] or part["over"], part["den"] or part["under"]
    decimals = part["decimals"] or ""
    if top:
        if int(bottom) == 0:
            return None
        value = Fraction(int(top), int(bottom))
    elif part["whole"] or decimals:
        digits = (part["whole"] or "").replace(",", "") + decimals
        value = Fraction(int(digits), 10 ** len(decimals))
    else:
        return None
    return Number(-value if part["sign"] in ("-", "−") else value, len(decimals), part["percent"] is not None)


def numbers_equal(answer: Number, gold: Number) -> bool:
    """Exact equality, with two allowances.

    A decimal written to at least six places may be off by 1e-6 of the smaller of 1 and the gold (1/3 = 0.333333).
    A percent sign on one side only is read either way: 10% is 10 and 0.1.
    """
    readings = [answer.value]
    if answer.percent != gold.percent:
        readings.append(answer.value / 100 if answer.percent else answer.value * 100)
    tolerance = Fraction(1, 10**6) * min(Fraction(1), abs(gold.value))
    if max(answer.decimals, gold.decimals) < 6:
        tolerance = Fraction(0)
    return any(abs(value - gold.value) <= tolerance for value in readings)


def _as_written(text: str) -> str:
    """Spelling differences that never matter, removed."""
    text = re.sub(r"\\(?:left|right)(?![a-zA-Z])|\s+|\.$", "", plain(text))
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    text = re.sub(r"^\(([A-Z])\)$", r"\1", text)  # a choice: (B) is B
    return text.casefold() if re.fullmatch(r"[^\W\d_]{2,}", text) else text


def math_equal(answer: str, gold: str) -> bool | None:
    """Whether two answers are the same value. None: math-verify ran out of time or memory (count it as wrong).

    Raises AppoError when math-verify cannot be started.
    """
    answer, gold = answer.strip(), gold.strip()
    if not answer or len(answer) > MAX_ANSWER_CHARS:
        return False
    if _as_written(answer) == _as_written(gold):
        return True
    answer_number, gold_number = parse_number(answer), parse_number(gold)
    if answer_number and gold_number:
        return numbers_equal(answer_number, gold_number)
    answer_base, gold_base = _BASE.search(answer), _BASE.search(gold)
    if answer_base and gold_base and answer_base.group(1) != gold_base.group(1):
        return False  # math-verify drops the base of 43_5
    return _verify(answer, gold)


class _Worker:
    """One process that runs math_worker.py; it kills itself when a comparison takes too long, and is started anew."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        atexit.register(self.close)

    def compare(self, answer: str, gold: str) -> bool | None:
        with self._lock:
            process = self._process or self._start()
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                process.stdin.write(json.dumps([answer, gold]) + "\n")
                process.stdin.flush()
                reply = process.stdout.readline()
            except BrokenPipeError:
                reply = ""
            if not reply:  # it died of its time limit or its memory limit
                self._stop()
                return None
            verdict: bool = json.loads(reply)
            return verdict

    def _start(self) -> subprocess.Popen[str]:
        self._process = process = subprocess.Popen(
            [sys.executable, "-m", "appo_jax.reward.math_worker", str(VERIFY_SECONDS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
            start_new_session=True,  # Ctrl-C is for the trainer
        )
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            self._stop()
            raise AppoError(
                f"math-verify could not be started by {sys.executable} (its message is above); mathematical golds need "
                "it: reinstall appo_jax with its dependencies"
            )
        return process

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def close(self) -> None:
        with self._lock:
            self._stop()


_worker = _Worker()


@functools.lru_cache(maxsize=8192)
def _verify(answer: str, gold: str) -> bool | None:
    """math-verify's verdict; rollouts of one prompt repeat answers, hence the cache."""
    return _worker.compare(answer, gold)
