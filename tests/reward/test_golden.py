"""Hand-made pairs of a gold and an answer, with the decision of a careful human: tests/golden/grading.jsonl.

`gold` is a text, or a list of aliases. An `answer` with boxes of its own is the whole answer block.
"""

import json
from collections import Counter
from pathlib import Path

import pytest

from appo_jax.reward import Response
from appo_jax.reward.grade import grade
from appo_jax.types import Segment, StopReason

PAIRS = [json.loads(line) for line in (Path(__file__).parent.parent / "golden/grading.jsonl").open(encoding="utf-8")]


def verdict(pair):
    answer = pair["answer"] if "\\boxed" in pair["answer"] else rf"\boxed{{{pair['answer']}}}"
    golds = tuple(pair["gold"]) if isinstance(pair["gold"], list) else (pair["gold"],)
    segments = (Segment(f"<answer> {answer} </answer>", True),)
    return grade(Response(segments, golds, pair["kind"], frozenset(), StopReason.ANSWERED)).correct


@pytest.mark.parametrize("topic", sorted({pair["note"].partition(":")[0] for pair in PAIRS}))
def test_pairs(topic):
    wrong = [pair for pair in PAIRS if pair["note"].partition(":")[0] == topic and verdict(pair) != pair["equal"]]
    assert not wrong


def test_there_are_many_pairs_of_both_verdicts_and_none_twice():
    keys = Counter((pair["kind"], str(pair["gold"]), pair["answer"]) for pair in PAIRS)
    assert max(keys.values()) == 1
    assert min(Counter(pair["equal"] for pair in PAIRS).values()) >= 200
