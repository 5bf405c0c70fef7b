"""Compares our grading with that of other libraries on 500 predictions per set: how often they agree, and where they differ.

    python benchmarks/agreement.py --data DATA --official APPO --peers PEERS

DATA: a folder with eval/*.jsonl and gsm8k/test.jsonl. APPO: a checkout of github.com/AMAP-ML/APPO. PEERS: a folder in which these
are installed (`pip install --no-deps --target PEERS …`): inspect-evals (GAIA's scorer), lm-eval (GSM8K, MATH), transformers 4
(SQuAD's metrics). The packages are not imported; only the files with the grading functions are run.

The predictions are made from the golds: unchanged, of another question, in another spelling, with words around them, or a part.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import re
import sys
import types
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from appo_jax.benchmark.grading import grade_prediction
from appo_jax.benchmark.predictions import Sample
from appo_jax.benchmark.questions import load_questions
from appo_jax.benchmark.sets import BENCHMARKS, Item
from appo_jax.reward import verify

PAIRS = 500  # predictions per set
Judge = Callable[[str, Item], bool]  # (prediction, question) -> correct; for F1: a number

SPELLINGS: dict[str, dict[str, Callable[[str], str]]] = {
    "math": {
        "as it is": lambda gold: gold,
        "no spaces": lambda gold: gold.replace(" ", ""),
        "dollars around it": lambda gold: f"${gold}$",
        "x = it": lambda gold: f"x = {gold}",
        "a unit after it": lambda gold: f"{gold} apples",
        "tfrac, dfrac": lambda gold: gold.replace("\\frac", "\\dfrac"),
        "a/b": lambda gold: re.sub(r"\\frac\{(\w+)\}\{(\w+)\}", r"\1/\2", gold),
        "a point and zeros after it": lambda gold: f"{gold}.00" if re.fullmatch(r"-?\d+", gold) else gold,
        "commas in thousands": lambda gold: f"{int(gold):,}" if re.fullmatch(r"-?\d+", gold) else gold,
        "negated": lambda gold: f"-{gold}",
        "one more": lambda gold: str(int(gold) + 1) if re.fullmatch(r"-?\d+", gold) else f"{gold}+1",
    },
    "qa": {
        "as it is": lambda gold: gold,
        "upper case": str.upper,
        "the, and a point": lambda gold: f"the {gold}.",
        "a word after it": lambda gold: f"{gold} probably",
        "first half": lambda gold: gold[: max(1, len(gold) // 2)],
        "hyphens for spaces": lambda gold: gold.replace(" ", "-"),
        "a sentence around it": lambda gold: f"The answer is {gold}",
        "quotes around it": lambda gold: f'"{gold}"',
        "no punctuation": lambda gold: re.sub(r"[^\w\s]", "", gold),
        "no accents": lambda gold: gold.encode("ascii", "ignore").decode(),
    },
}


def predictions(items: list[Item], kind: str) -> Iterator[tuple[str, str, Item]]:
    """PAIRS triples (how it was made, prediction, question). Every fifth prediction is the gold of a random question."""
    rng = random.Random(0)
    ways = SPELLINGS["math" if kind == "math" else "qa"]
    for i in range(PAIRS):
        item = items[i % len(items)]
        name = list(ways)[(i // len(items) + i) % len(ways)]
        if i % 5 == 4:
            yield "of another question", rng.choice(items).golds[0], item
        else:
            yield name, ways[name](item.golds[0]), item


def functions_of(path: Path, stubs: Mapping[str, Mapping[str, Any]] = {}, drop: str = "") -> types.ModuleType:
    """A module that is made from one source file. `stubs`: module name -> attributes, in place of the modules that it imports.
    `drop`: lines that contain this text are left out."""
    for name, attributes in stubs.items():
        stub = types.ModuleType(name)
        stub.__dict__.update(attributes)
        sys.modules.setdefault(name, stub)
    source = path.read_text()
    if drop:
        source = "\n".join(line for line in source.splitlines() if drop not in line)
    module = types.ModuleType(path.stem)
    module.__dict__["logging"] = types.SimpleNamespace(get_logger=logging.getLogger)
    exec(compile(source, str(path), "exec"), module.__dict__)
    return module


class Peers:
    """The grading functions of the other libraries."""

    def __init__(self, official: Path, peers: Path):
        source = official / "evaluation" / "src"
        self.equal = functions_of(source / "math_equivalence.py").is_equiv
        self.official = functions_of(source / "metrics.py", drop="from .math_equivalence")
        self.official.is_equiv = self.equal
        decorators = {name: (lambda *a, **k: lambda f: f) for name in ("scorer",)}
        unused = dict.fromkeys(("CORRECT", "INCORRECT", "Score", "Scorer", "Target", "TaskState"))
        scorers = decorators | unused | {"accuracy": lambda: None, "stderr": lambda: None}
        stubs = {"inspect_ai": {}, "inspect_ai.scorer": scorers, "inspect_ai.solver": unused}
        self.gaia = functions_of(peers / "inspect_evals/gaia/scorer.py", stubs)
        self.math = functions_of(peers / "lm_eval/tasks/hendrycks_math/utils.py", {"datasets": {"Dataset": object}})
        self.squad = functions_of(peers / "transformers/data/metrics/squad_metrics.py", drop="from ...")

    def of(self, name: str) -> dict[str, tuple[Judge, str]]:
        """Title -> (judge, field) for the set `name`. `field`: what of our result is compared, "correct" or "f1"."""
        if BENCHMARKS[name].rule == "math":
            found: dict[str, tuple[Judge, str]] = {
                "official math_equal": (
                    lambda text, item: bool(self.official.evaluate_math_prediction(text, item.golds[0])["math_equal"]),
                    "correct",
                ),
                "lm-eval MATH": (lambda text, item: bool(self.math.is_equiv(text, item.golds[0])), "correct"),
            }
            return found | ({"lm-eval GSM8K": (_lm_eval_gsm8k, "correct")} if name == "gsm8k" else {})
        if BENCHMARKS[name].rule == "gaia":
            return {
                "inspect_evals GAIA": (lambda text, item: self.gaia.question_scorer(text, item.golds[0])[0], "correct")
            }
        return {
            "official EM": (
                lambda text, item: bool(self.official.evaluate_qa_prediction(text, list(item.golds))["em"]), "correct"
            ),
            "official F1": (lambda text, item: self.official.evaluate_qa_prediction(text, list(item.golds))["f1"], "f1"),
            "SQuAD EM": (lambda text, item: any(self.squad.compute_exact(g, text) for g in item.golds), "correct"),
            "SQuAD F1": (lambda text, item: max(self.squad.compute_f1(g, text) for g in item.golds), "f1"),
        }  # fmt: skip


def _lm_eval_gsm8k(text: str, item: Item) -> bool:
    """The rule of lm-eval's gsm8k.yaml: the last number of the answer (flexible-extract), compared without ignored patterns."""
    numbers = [a or b for a, b in re.findall(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", text)]

    def plain(value: str) -> str:
        for pattern in (",", r"\$", r"(?s).*#### ", r"\.$"):
            value = re.sub(pattern, "", value)
        return value.lower()

    return plain(numbers[-1] if numbers else "[invalid]") == plain(item.golds[0])


def load(name: str, data: Path, official: Path) -> list[Item] | None:
    """The questions of a set, from DATA or from the official repository. None: neither has them."""
    places = (
        data / name / "test.jsonl",
        data / "eval" / f"{name}.jsonl",
        official / f"evaluation/data/{name}/test.jsonl",
    )
    found = next((path for path in places if path.is_file()), None)
    return list(load_questions(name, found).items) if found else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("data", "official", "peers"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    verify.start()
    peers = Peers(options.official, options.peers)
    print("| set | compared with | agree of 500 | differences: prediction, gold, ours, theirs |\n|---|---|---|---|")
    for name, benchmark in BENCHMARKS.items():
        items = load(name, options.data, options.official)
        if items is None or benchmark.rule == "judge":
            continue
        pairs = list(predictions(items, benchmark.rule))
        boxed = [f"\\boxed{{{text}}}" if text.count("{") == text.count("}") else text for _, text, _ in pairs]
        ours = [
            grade_prediction(item, Sample(text), benchmark.rule)
            for (_, _, item), text in zip(pairs, boxed, strict=True)
        ]
        for title, (judge, field) in peers.of(name).items():
            ways: Counter[tuple[str, float, float]] = Counter()
            example: dict[tuple[str, float, float], tuple[str, str]] = {}
            for (way, text, item), verdict in zip(pairs, ours, strict=True):
                our_value, their_value = float(getattr(verdict, field)), float(judge(text, item))
                if abs(our_value - their_value) > 1e-9:
                    key = (way, round(our_value, 2), round(their_value, 2)) if field == "correct" else (way, 0.0, 0.0)
                    ways[key] += 1
                    example.setdefault(key, (text, item.golds[0]))
            differences = "; ".join(
                f"{way} ({count}): {json.dumps(example[way, a, b], ensure_ascii=False)}"
                + (f", {a:g}, {b:g}" if field == "correct" else "")
                for (way, a, b), count in ways.most_common()
            )
            print(f"| {name} | {title} | {PAIRS - ways.total()} | {differences} |", flush=True)


if __name__ == "__main__":
    main()
