"""The benchmark sets by name: the source of their questions, and the rule that decides whether an answer is right.

An entry says how we grade a set (`rule`), and how its authors and the paper grade it (`convention`, `headline`). docs/data.md has
the licences and pitfalls of the sets. A set of one's own is a `Benchmark` that `package.module:set` names.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from appo_jax.data.question_files import HIDDEN, decrypted
from appo_jax.data.sources import wiki2
from appo_jax.errors import ConfigError
from appo_jax.reward.language_judge import EXACT
from appo_jax.tools.user_code import imported

Rule = Literal["math", "qa", "gaia", "judge"]
Headline = Literal["accuracy", "f1", "judge"]
Record = Mapping[str, Any]  # of a set's file, with the names of its fields in lower case


def _unchanged(record: Record, path: Path) -> Record:
    return record


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A benchmark set."""

    title: str
    rule: Rule
    """math: equal value. qa: exact match, and token F1. gaia: GAIA's quasi-exact match. judge: a language model decides."""
    headline: Headline = "accuracy"
    """The figure that is published: accuracy by `rule`, token F1 as the official evaluation computes it, or accuracy by a language
    model as judge. The report marks it, and `eval --compare` compares it."""
    convention: str = "its authors' rule"
    """How its authors or the paper grade it."""
    where: str = "its authors"
    """Where to get it."""
    count: int = 0
    """The number of questions in the version that the paper uses; a file of another size gives a warning. 0: any."""
    levels: tuple[str, ...] = ()
    """The levels of the set; a question of another level is left out. Empty: any level."""
    prepare: Callable[[Record, Path], Record] = _unchanged
    """A record of the file at the path, in the form that `questions.load_questions` reads, with its id. Raises ValueError for a
    record that is no question of the set: it is left out, and counted under this reason."""
    number_rule: str = EXACT
    """What a language model as judge is told about answers that are numbers."""


def benchmark(name: str) -> Benchmark:
    """The set of a name, or the `Benchmark` that `package.module:set` names. Raises ConfigError for anything else."""
    if name in BENCHMARKS:
        return BENCHMARKS[name]
    expected = f"{', '.join(BENCHMARKS)} or `package.module:set`, a Benchmark of your own"
    found = imported("set", name, expected)
    if not isinstance(found, Benchmark):
        raise ConfigError(f"set = {name!r} is a {type(found).__name__}; expected {expected}")
    for field, choices in (("rule", get_args(Rule)), ("headline", get_args(Headline))):
        if (value := getattr(found, field)) not in choices:
            raise ConfigError(f"set = {name!r}: {field} = {value!r}; expected one of {', '.join(choices)}")
    return found


@dataclasses.dataclass(frozen=True)
class Item:
    """One question of a set."""

    id: str
    question: str
    golds: tuple[str, ...]
    level: str = ""
    type: str = ""
    language: str = ""


def _gsm8k(record: Record, path: Path) -> Record:
    """The answer is what follows #### in the solution."""
    answer = record.get("answer")
    return {**record, "answer": answer.rpartition("####")[2]} if isinstance(answer, str) else record


def _wiki2(record: Record, path: Path) -> Record:
    """The aliases of an answer are in id_aliases.json, as for the authors' script, if that file is in the same folder."""
    aliases = _aliases((path if path.is_dir() else path.parent) / "id_aliases.json").get(str(record.get("answer_id")))
    return {**record, "aliases": list(aliases)} if aliases else record


_aliases = functools.cache(wiki2.read_aliases)


def _musique(record: Record, path: Path) -> Record:
    if record.get("answerable") in (False, "False", "false"):
        raise ValueError("its paragraphs do not hold the answer (answerable = false)")
    return record


def _gaia(record: Record, path: Path) -> Record:
    if record.get("file_name"):
        raise ValueError("it asks about a file")
    if record.get("final answer") == HIDDEN:
        raise ValueError("no answer: those of the test split are not public; give the validation split")
    return record


def _hle(record: Record, path: Path) -> Record:
    if record.get("image"):
        raise ValueError("it asks about an image")
    return record


def _xbench(record: Record, path: Path) -> Record:
    return decrypted(record)


_F1 = "token F1 as HotpotQA's script computes it, best over the aliases"
# The judge's prompts of Humanity's Last Exam and of xbench-DeepSearch allow it.
_ROUNDED = "A number may differ in form, and in value by a small margin of error."
_JUDGE = "a language model as judge (paper: Qwen2.5-72B-Instruct)"

BENCHMARKS: dict[str, Benchmark] = {
    "aime24": Benchmark("AIME 2024", "math", "judge", _JUDGE, "HuggingFaceH4/aime_2024", 30),
    "aime25": Benchmark("AIME 2025", "math", "judge", _JUDGE, "math-ai/aime25", 30),
    "math500": Benchmark("MATH-500", "math", "judge", _JUDGE, "HuggingFaceH4/MATH-500", 500),
    "gsm8k": Benchmark(
        "GSM8K", "math", "judge", _JUDGE, "github.com/openai/grade-school-math, test.jsonl", 1319, prepare=_gsm8k
    ),
    "math": Benchmark(
        "MATH", "math", "judge", _JUDGE, "github.com/hendrycks/math, test/ (or EleutherAI/hendrycks_math)", 5000
    ),
    "hotpotqa": Benchmark("HotpotQA", "qa", "f1", _F1, "hotpotqa.github.io, dev distractor", 200),
    "2wiki": Benchmark(
        "2WikiMultihopQA", "qa", "f1", _F1, "github.com/Alab-NII/2wikimultihop, dev.json", 200, prepare=_wiki2
    ),
    "musique": Benchmark(
        "MuSiQue", "qa", "f1", _F1, "github.com/StonyBrookNLP/musique, dev", 200, prepare=_musique
    ),
    "bamboogle": Benchmark("Bamboogle", "qa", "f1", _F1, "github.com/ofirpress/self-ask", 125),
    "webwalker": Benchmark("WebWalkerQA", "judge", "judge", _JUDGE, "github.com/Alibaba-NLP/WebWalker", 680),
    "gaia": Benchmark(
        "GAIA, text only", "gaia", "judge", "quasi-exact match (GAIA's leaderboard); the paper: a judge",
        "github.com/AMAP-ML/APPO, evaluation/data/gaia (gaia-benchmark/GAIA, validation, has 127 questions without a file)",
        103, ("1", "2", "3"), _gaia,
    ),
    "hle": Benchmark(
        "Humanity's Last Exam, text only", "judge", "judge", "a judge (o3-mini) with a prompt of the set's own", "cais/hle", 500,
        prepare=_hle, number_rule=_ROUNDED,
    ),
    "xbench": Benchmark(
        "xbench-DeepSearch", "judge", "judge", "a judge with a prompt of the set's own", "xbench-ai/xbench-evals", 100,
        prepare=_xbench, number_rule=_ROUNDED,
    ),
}  # fmt: skip
