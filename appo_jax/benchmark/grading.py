"""Gives predictions their verdicts, by the rule of each set."""

from __future__ import annotations

import dataclasses
import re
import string
from collections.abc import Sequence

from appo_jax.benchmark.sets import Item, Rule
from appo_jax.reward import qa
from appo_jax.reward.grade import final_answer
from appo_jax.reward.math import math_equal
from appo_jax.reward.response import Response
from appo_jax.types import Segment, StopReason


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The verdict on one prediction."""

    correct: bool | None  # None: no verdict
    f1: float  # token F1 against the best alias, for every rule
    answer: str  # the final answer that was found in the prediction
    reason: str  # how the verdict was reached


def answer_of(prediction: str) -> str:
    """The final answer of a prediction: that of its last <answer> block or \\boxed{}, else the whole text."""
    response = Response((Segment(prediction, sampled=True),), (), "qa", frozenset(), StopReason.ANSWERED)
    found = final_answer(response)
    return prediction.strip() if found is None else found.strip()


def grade_prediction(item: Item, prediction: str, rule: Rule) -> Verdict:
    """The verdict by any rule except the judge. For the judge, `correct` is None and the reason is "judge"."""
    answer = answer_of(prediction)
    f1 = qa.token_f1(answer, item.golds) if answer else 0.0
    if not answer:
        return Verdict(False, 0.0, "", "no answer")
    if rule == "judge":
        return Verdict(None, f1, answer, "judge")
    if rule == "qa":
        return Verdict(qa.exact_match(answer, item.golds), f1, answer, "exact match")
    if rule == "gaia":
        right = any(gaia_equal(answer, gold) for gold in item.golds)
        return Verdict(right, f1, answer, "quasi-exact match")
    verdicts = [math_equal(answer, gold) for gold in item.golds]
    if not any(verdicts) and None in verdicts:
        return Verdict(False, f1, answer, "math-verify ran out of time")
    return Verdict(any(verdicts), f1, answer, "equal value")


def same_answer(a: str, b: str, rule: Rule) -> bool:
    """Whether two answers count as the same in a vote."""
    if rule == "math":
        return bool(math_equal(a, b))
    return gaia_equal(a, b) if rule == "gaia" else qa.exact_match(a, [b])


def gaia_equal(answer: str, gold: str) -> bool:
    """GAIA's quasi-exact match, as its leaderboard computes it.

    The gold is a number: equal after $, % and thousands separators are removed. It is a list (it holds , or ;): equal length,
    and equal elements at each place, where texts are compared in lower case without spaces. It is a text: compared in lower
    case without spaces and punctuation.
    """
    if _is_number(gold):
        return _gaia_number(answer) == float(gold)
    if re.search("[,;]", gold):
        golds, answers = (re.split("[,;]", text) for text in (gold, answer))
        if len(golds) != len(answers):
            return False
        return all(
            _gaia_number(a) == float(g)
            if _is_number(g)
            else _gaia_text(a, keep_punctuation=True) == _gaia_text(g, True)
            for a, g in zip(answers, golds, strict=True)
        )
    return _gaia_text(answer) == _gaia_text(gold)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _gaia_number(text: str) -> float:
    for sign in "$%,":
        text = text.replace(sign, "")
    return float(text) if _is_number(text) else float("inf")


def _gaia_text(text: str, keep_punctuation: bool = False) -> str:
    text = re.sub(r"\s", "", text).lower()
    return text if keep_punctuation else text.translate(str.maketrans("", "", string.punctuation))


def votes(answers: Sequence[str], rule: Rule) -> list[list[int]]:
    """The indices of samples grouped by their answer; the most frequent answer comes first."""
    groups: list[list[int]] = []
    for i, answer in enumerate(answers):
        for group in groups:
            if answer == answers[group[0]] or (answer and same_answer(answer, answers[group[0]], rule)):
                group.append(i)
                break
        else:
            groups.append([i])
    return sorted(groups, key=len, reverse=True)
