"""The benchmark sets by name: the source of their questions, and how each is graded.

An entry says how we score a set (`rule`), and how its authors and the paper score it (`convention`). docs/eval.md has the
same table with licences and pitfalls. A set is read from the file that its authors publish, or from the copy in the official
APPO repository. Columns may have any of the names that these files use.
"""

from __future__ import annotations

import base64
import dataclasses
import itertools
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from appo_jax.data.golds import accepted_answers
from appo_jax.data.records import read_records
from appo_jax.errors import ConfigError, DataError
from appo_jax.reward.latex import last_boxed

log = logging.getLogger(__name__)

Rule = Literal["math", "qa", "gaia", "judge"]


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A benchmark set."""

    title: str
    rule: Rule
    """math: equal value. qa: exact match, and token F1. gaia: GAIA's quasi-exact match. judge: a language model decides."""
    headline: Literal["accuracy", "f1"]
    """The figure of the paper's table."""
    convention: str
    """How its authors or the paper score it, if they do it differently."""
    where: str
    """Where to get it."""
    count: int
    """The number of questions in the version that the paper uses; a file of another size gives a warning."""
    levels: tuple[str, ...] = ()
    """The levels of the set; a question of another level is an error. Empty: any level."""


_F1 = "token F1 as HotpotQA's script computes it, best over the aliases (the paper's figure)"
_JUDGE = "a language model as judge (paper: Qwen2.5-72B-Instruct)"

BENCHMARKS: dict[str, Benchmark] = {
    "aime24": Benchmark("AIME 2024", "math", "accuracy", _JUDGE, "HuggingFaceH4/aime_2024", 30),
    "aime25": Benchmark("AIME 2025", "math", "accuracy", _JUDGE, "math-ai/aime25", 30),
    "math500": Benchmark("MATH-500", "math", "accuracy", _JUDGE, "HuggingFaceH4/MATH-500", 500),
    "gsm8k": Benchmark("GSM8K", "math", "accuracy", _JUDGE, "openai/grade-school-math, test.jsonl", 1319),
    "math": Benchmark("MATH", "math", "accuracy", _JUDGE, "hendrycks/competition_math, test split", 5000),
    "hotpotqa": Benchmark("HotpotQA", "qa", "f1", _F1, "hotpotqa.github.io, dev distractor", 200),
    "2wiki": Benchmark("2WikiMultihopQA", "qa", "f1", _F1, "Alab-NII/2wikimultihop, dev", 200),
    "musique": Benchmark("MuSiQue", "qa", "f1", _F1, "StonyBrookNLP/musique, answerable dev", 200),
    "bamboogle": Benchmark("Bamboogle", "qa", "f1", _F1, "ofirpress/self-ask", 125),
    "webwalker": Benchmark("WebWalkerQA", "judge", "accuracy", _JUDGE, "Alibaba-NLP/WebWalker", 680),
    "gaia": Benchmark(
        "GAIA, text only", "gaia", "accuracy", "quasi-exact match (GAIA's leaderboard); the paper: a judge",
        "gaia-benchmark/GAIA, validation, 103 of 165 questions have no file", 103, ("1", "2", "3"),
    ),
    "hle": Benchmark("Humanity's Last Exam", "judge", "accuracy", "its judge prompt (o3-mini)", "cais/hle, text only", 500),
    "xbench": Benchmark("xbench-DeepSearch", "judge", "accuracy", "its judge prompt", "xbench-ai/xbench-evals", 100),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Item:
    """One question of a set."""

    id: str
    question: str
    golds: tuple[str, ...]
    level: str = ""
    type: str = ""


QUESTION = ("question", "problem", "Question", "prompt")
ANSWER = ("answer", "golden_answers", "Final answer", "gold", "target", "answers")  # or a solution
ALIASES = ("answer_aliases", "aliases")
ID = ("id", "_id", "task_id", "unique_id", "question_id")
LEVEL, TYPE = ("level", "Level", "difficulty"), ("type", "subject", "category", "Type")


def benchmark(name: str) -> Benchmark:
    """The set of a name. Raises ConfigError for an unknown name."""
    if name not in BENCHMARKS:
        raise ConfigError(f"--set {name!r}: expected one of {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]


def load_items(name: str, path: Path) -> list[Item]:
    """The questions of a set, in the order of the file. A question without an id gets its position, from 0.

    Raises DataError for a missing file (it says where to get it), a line without a question or an answer, an unknown level,
    or an id that occurs twice.
    """
    found = benchmark(name)
    if not path.is_file():
        raise DataError(
            f"{path}: no such file; {found.title} comes from {found.where} (docs/eval.md), give it with --data"
        )
    seen: dict[str, int] = {}
    positions = itertools.count()

    def parse(number: int, record: Any) -> Item | None:
        position = next(positions)
        if name == "gaia" and isinstance(record, dict) and record.get("file_name"):
            return None  # the set has only the questions without a file
        if name == "xbench" and isinstance(record, dict) and record.get("canary"):
            record = _decrypted(record)
        item = _item(name, found, record, position)
        if item.id in seen:
            raise ValueError(f"id {item.id!r} is given twice (first in record {seen[item.id]})")
        seen[item.id] = number
        return item

    items = read_records(path, parse, None)
    if len(items) != found.count:
        log.warning("%s: it has %d questions, %s as the paper uses it %d", path, len(items), found.title, found.count)
    return items


def _decrypted(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """A record of xbench's own file, whose question and answer are encrypted: XOR with `canary`, then base64."""
    try:
        parts = {name: base64.b64decode(record[name], validate=True) for name in ("prompt", "answer")}
    except (KeyError, TypeError, ValueError):  # text: it was decrypted before
        return record
    key = str(record["canary"]).encode()
    return {**record, **{name: _xor(part, key).decode() for name, part in parts.items()}}


def _xor(text: bytes, key: bytes) -> bytes:
    return bytes(byte ^ own for byte, own in zip(text, itertools.cycle(key), strict=False))


def _item(name: str, found: Benchmark, record: Any, position: int) -> Item:
    """The item of a record. Without an id it gets its position. Raises TypeError or ValueError."""
    if not isinstance(record, dict):
        raise TypeError(f"expected an object, got {type(record).__name__}")
    question = _first(record, QUESTION)
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"no question; expected a text under one of {', '.join(QUESTION)}")
    answer = _first(record, ANSWER)
    if answer is None:
        answer = _boxed(record.get("solution")) if found.rule == "math" else record.get("solution")
    golds = accepted_answers([answer, _first(record, ALIASES)])
    if name == "gsm8k":
        golds = tuple(gold.rpartition("####")[2].strip() for gold in golds)
    if not golds:
        raise ValueError(f"no answer; expected a text, a number or a list under one of {', '.join(ANSWER)}")
    level = str(_first(record, LEVEL) or "")
    if found.levels and level not in found.levels:
        raise ValueError(f"level {level!r} is unknown; {found.title} has {', '.join(found.levels)}")
    id = _first(record, ID)
    return Item(str(position if id is None else id), question, golds, level, str(_first(record, TYPE) or ""))


def _boxed(solution: Any) -> Any:
    """The answer in a solution: its last box if it is text. Raises ValueError if that has none."""
    if not isinstance(solution, str):
        return solution
    if (answer := last_boxed(solution)) is None:
        raise ValueError(f"no answer, and no \\boxed{{…}} in the solution; expected either ({', '.join(ANSWER)})")
    return answer


def _first(record: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((record[name] for name in names if record.get(name) is not None), None)
