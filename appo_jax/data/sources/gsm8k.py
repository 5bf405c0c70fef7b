"""GSM8K: grade-school word problems, and tool-use demonstrations made from their calculator notes.

Source: openai/grade-school-math. A line is {"question": ..., "answer": rationale with notes `<<48/2=24>>`, "#### 72"}.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from appo_jax.config import DataConfig
from appo_jax.data.demonstrations import CannotDemonstrate, ToolKit
from appo_jax.data.examples import split_files
from appo_jax.data.records import read_records, text_field
from appo_jax.data.source import Dataset
from appo_jax.types import Example, Segment, Trace

WHAT = "the folder with GSM8K's train.jsonl and test.jsonl (github.com/openai/grade-school-math)"
SYSTEM_PROMPT = (
    "Solve the problem step by step. Put your reasoning between <think> and </think>. For every calculation write "
    "Python code that prints the result. Your tools:\n{tools}\nWhen you are done, write "
    "<answer> \\boxed{number} </answer>."
)

_NOTE = re.compile(r"<<([^<>]*)=([^<>=]*)>>")


def load(config: DataConfig) -> Dataset:
    """train.jsonl and test.jsonl in the folder `data.path`. Raises DataError with file and line."""
    files = split_files(config, ["train.jsonl"], ["test.jsonl"], WHAT)
    train, held_out = (_read(path, split, config) for path, split in zip(files, ("train", "test"), strict=True))

    def demonstration(index: int, kit: ToolKit) -> Trace:
        return demonstrate(*train[index], kit)

    return Dataset(
        [example for example, _ in train], [example for example, _ in held_out], None, demonstration, len(train)
    )  # fmt: skip


def _read(path: Path, split: str, config: DataConfig) -> list[tuple[Example, str]]:
    prompt = SYSTEM_PROMPT if config.system_prompt is None else config.system_prompt

    def parse(number: int, record: Any) -> tuple[Example, str]:
        question, answer = text_field(record, "question"), text_field(record, "answer")
        rationale, mark, gold = answer.rpartition("####")
        gold = gold.strip().replace(",", "")
        if not mark or not re.fullmatch(r"-?\d+(\.\d+)?", gold):
            raise ValueError(f"field 'answer' must end in '#### number', got {answer[-40:]!r}")
        return Example(f"gsm8k-{split}-{number}", question, (gold,), "math", prompt, "gsm8k"), rationale.strip()

    return read_records(path, parse, config.malformed, WHAT)


def demonstrate(example: Example, rationale: str, kit: ToolKit) -> Trace:
    """A trace made from a rationale: each calculator note becomes a call with its real result.

    Raises CannotDemonstrate if the rationale has no note, if a result differs from its note, or if the last result is not the
    answer."""
    first, *rest = _NOTE.split(rationale)
    if not rest:
        raise CannotDemonstrate("the rationale has no calculator note")
    tool = kit.tool_for("run_python")
    segments, written, result = [], _think(first), ""
    for expression, value, text in zip(rest[::3], rest[1::3], rest[2::3], strict=True):
        result = kit.run(tool, f"print({expression})")
        if not _agrees(result, value):
            raise CannotDemonstrate("a calculator note of the rationale is wrong")
        written += kit.write_call(tool, f"\nprint({expression})\n")
        segments += [Segment(written, sampled=True), Segment(kit.write_result(result), sampled=False)]
        written = _think(text)
    if not _agrees(result, example.golds[0]):
        raise CannotDemonstrate("the last calculator note is not the answer")
    written += f"<answer> \\boxed{{{example.golds[0]}}} </answer>"
    return Trace(example, (*segments, Segment(written, sampled=True)))


def _think(text: str) -> str:
    return f"<think>{text.strip()}</think>" if text.strip() else ""


def _agrees(result: str, number: str) -> bool:
    """Whether a Python result equals a number of the rationale, which may be rounded to two places and have thousands' commas."""
    try:
        return abs(float(result) - float(number.replace(",", ""))) <= 0.0051
    except ValueError:
        return False
