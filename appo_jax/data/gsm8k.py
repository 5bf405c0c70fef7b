"""GSM8K: grade-school word problems, and tool-use demonstrations made of their calculator notes.

Source: openai/grade-school-math. A line is {"question": ..., "answer": rationale with notes `<<48/2=24>>`, "#### 72"}.
"""

from __future__ import annotations

import functools
import itertools
import json
import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from appo_jax.data.records import OnMalformed, need_file, parse_records, text_field
from appo_jax.data.traces import render_result
from appo_jax.types import Example, Segment, Trace

logger = logging.getLogger(__name__)

SYSTEM_PROMPT = (
    "Solve the problem step by step. Put your reasoning between <think> and </think>. For every calculation write "
    "Python code that prints the result between <python> and </python>; the result is then shown to you between "
    "<result> and </result>. When you are done, write <answer> \\boxed{number} </answer>."
)

_NOTE = re.compile(r"<<([^<>]*)=([^<>=]*)>>")


def load_gsm8k(
    folder: Path, system: str | None, malformed: OnMalformed
) -> tuple[list[Example], list[Example], list[str]]:
    """(train, held_out, the rationale of every train example). Raises DataError with file and line."""
    train = _read(folder / "train.jsonl", "train", system, malformed)
    held_out = _read(folder / "test.jsonl", "test", system, malformed)
    return [example for example, _ in train], [example for example, _ in held_out], [text for _, text in train]


def _read(path: Path, split: str, system: str | None, malformed: OnMalformed) -> list[tuple[Example, str]]:
    need_file(path, "the folder with GSM8K's train.jsonl and test.jsonl")
    count = itertools.count(1)

    def parse(line: bytes) -> tuple[Example, str]:
        number = next(count)
        record = json.loads(line)
        question, answer = text_field(record, "question"), text_field(record, "answer")
        rationale, mark, gold = answer.rpartition("####")
        gold = gold.strip().replace(",", "")
        if not mark or not re.fullmatch(r"-?\d+(\.\d+)?", gold):
            raise ValueError(f"field 'answer' must end in '#### number', got {answer[-40:]!r}")
        prompt = SYSTEM_PROMPT if system is None else system
        return Example(f"gsm8k-{split}-{number}", question, (gold,), "math", prompt), rationale.strip()

    with path.open("rb") as lines:
        return parse_records(path, lines, parse, malformed)


def demonstrate(
    examples: Sequence[Example], rationales: Sequence[str], python: Callable[[str], str], limit: int | None
) -> list[Trace]:
    """Traces of the first `limit` usable examples: each note becomes a python call with its real result.

    An example without notes, or with one that python does not confirm, is left out; how many is logged.
    """
    python = functools.cache(python)
    made = (_trace(example, text, python) for example, text in zip(examples, rationales, strict=True))
    traces: list[Trace] = []
    seen = 0
    for trace in made:
        if len(traces) == limit:
            break
        seen += 1
        if trace is not None:
            traces.append(trace)
    if seen > len(traces):
        logger.info("GSM8K: no trace from %d of %d rationales (no note, or a wrong one)", seen - len(traces), seen)
    return traces


def _trace(example: Example, rationale: str, python: Callable[[str], str]) -> Trace | None:
    first, *rest = _NOTE.split(rationale)
    if not rest:
        return None
    segments, written = [], _think(first)
    for expression, value, text in zip(rest[::3], rest[1::3], rest[2::3], strict=True):
        result = python(f"print({expression})")
        if not _agrees(result, value):
            return None
        written += f"<python>\nprint({expression})\n</python>"
        segments += [Segment(written, sampled=True), Segment(render_result(result), sampled=False)]
        written = _think(text)
    written += f"<answer> \\boxed{{{example.golds[0]}}} </answer>"
    return Trace(example, (*segments, Segment(written, sampled=True)))


def _think(text: str) -> str:
    return f"<think>{text.strip()}</think>" if text.strip() else ""


def _agrees(result: str, note: str) -> bool:
    """Whether a python result is the number of a calculator note, which may be rounded to two places."""
    try:
        return abs(float(result) - float(note)) <= 0.01 * max(1.0, abs(float(note)))
    except ValueError:
        return False
