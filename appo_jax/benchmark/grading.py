"""Gives predictions their verdicts, by the rule of each set."""

from __future__ import annotations

import dataclasses
import re
import string
from collections.abc import Mapping, Sequence

from appo_jax.benchmark.official import official_figures
from appo_jax.benchmark.predictions import Sample
from appo_jax.benchmark.sets import Item, Rule
from appo_jax.reward import qa
from appo_jax.reward.grade import final_answer
from appo_jax.reward.math import equals_one, math_equal
from appo_jax.reward.response import Response
from appo_jax.types import Segment, StopReason

# What a text with a place for its answer holds. Without an answer in that place it has none.
_MARKS = re.compile(r"</?(?:think|answer|search|python|result|tool_call|tool_response)>|\\boxed\b")


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The verdicts on one prediction."""

    correct: bool | None  # by the set's rule; None: no verdict
    f1: float  # token F1 against the best alias, for every rule
    answer: str  # the final answer that was found in the prediction; "": none
    reason: str  # how the verdict was reached
    official: Mapping[str, float]  # as the official evaluation computes them: see `official_figures`
    judged: bool | None = None  # by a language model; None: it gave no verdict, or was not asked
    judge_reason: str = ""  # its words, or what went wrong; "": it was not asked


def answer_of(sample: Sample, repeats: bool = False) -> str:
    """The final answer of a prediction: that of its last <answer> block or \\boxed{}; "" if there is none.

    The whole text of a prediction that was made elsewhere is its answer if it holds no such mark, and no thoughts or calls.
    `repeats`: see `final_answer`."""
    response = Response((Segment(sample.text, sampled=True),), (), "qa", frozenset(), StopReason.ANSWERED)
    found = final_answer(response, repeats)
    if found is None and not sample.rollout and not _MARKS.search(sample.text):
        found = sample.text
    return (found or "").strip()


def grade_prediction(item: Item, sample: Sample, rule: Rule) -> Verdict:
    """The verdict by any rule except the judge. For the judge, `correct` is None and the reason is "judge"."""
    answer = answer_of(sample)
    official = official_figures(answer, item.golds, math=rule == "math")
    if not answer:
        return Verdict(False, 0.0, "", "no answer", official)
    f1 = qa.token_f1(answer, item.golds)
    if rule == "judge":
        return Verdict(None, f1, answer, "judge", official)
    if rule == "qa":
        return Verdict(qa.exact_match(answer, item.golds), f1, answer, "exact match", official)
    if rule == "gaia":
        right = any(gaia_equal(answer, gold) for gold in item.golds)
        return Verdict(right, f1, answer, "quasi-exact match", official)
    equal = equals_one(
        tuple(dict.fromkeys((answer, answer_of(sample, repeats=True)))), item.golds
    )  # as `reward.grade` does
    reason = "math-verify ran out of time" if equal is None else "equal value"
    return Verdict(bool(equal), f1, answer, reason, official)


def same_answer(a: str, b: str, rule: Rule) -> bool:
    """Whether two answers count as the same in a vote: one is right if the other is the gold."""
    if rule == "math":
        return bool(math_equal(a, b) or math_equal(b, a))
    return gaia_equal(a, b) or gaia_equal(b, a) if rule == "gaia" else qa.exact_match(a, [b])


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
    """The indices of samples grouped by their answer; the most frequent answer comes first. Blank answers do not vote.

    Answers that are the same as a third one are in one group, whatever the order of the samples."""
    groups: list[list[str]] = []  # of different texts
    for answer in dict.fromkeys(answer for answer in answers if answer):
        joined = [group for group in groups if any(same_answer(answer, other, rule) for other in group)]
        groups = [group for group in groups if group not in joined]
        groups.append([text for group in joined for text in group] + [answer])
    members = [[i for i, answer in enumerate(answers) if answer in group] for group in groups]
    return sorted(sorted(members), key=len, reverse=True)
