"""The RL prompts of the official APPO code: parquet files with its system prompt.

Columns used: prompt (messages system, user), ability ("math", "qa" or null), reward_model.ground_truth.
"""

from __future__ import annotations

import itertools
import logging
import re
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from appo_jax.config import DataConfig
from appo_jax.data.records import OnMalformed, need_file, parse_records, text_field
from appo_jax.data.source import Dataset, data_path
from appo_jax.errors import DataError
from appo_jax.types import Example, Kind

logger = logging.getLogger(__name__)

TRAIN_FILE, HELD_OUT_FILE = "train_10k.parquet", "valid.parquet"


def load(config: DataConfig) -> Dataset:
    """`data.path`: the folder, or the training file (such as hard_search_1k.parquet) in it.

    Raises DataError with file and row."""
    path = data_path(config)
    train = path if path.suffix == ".parquet" else path / TRAIN_FILE
    held_out = train.parent / HELD_OUT_FILE
    return Dataset(
        _read(train, config.system_prompt, config.malformed), _read(held_out, config.system_prompt, config.malformed)
    )  # fmt: skip


def _read(path: Path, system: str | None, malformed: OnMalformed) -> list[Example]:
    need_file(path, f"the folder with {TRAIN_FILE} and {HELD_OUT_FILE} of the official code")
    try:
        rows = pyarrow.parquet.read_table(path, columns=["prompt", "ability", "reward_model"]).to_pylist()
    except (pyarrow.ArrowException, OSError, KeyError) as error:
        raise DataError(f"{path}: expected a parquet file with prompt, ability, reward_model: {error}") from error
    count = itertools.count(1)

    def parse(row: dict[str, Any]) -> Example | None:
        number = next(count)
        contents = {message["role"]: message["content"] for message in row["prompt"]}
        question, gold = text_field(contents, "user"), row["reward_model"]["ground_truth"]
        if not isinstance(gold, str):
            raise TypeError(f"field 'reward_model.ground_truth': expected text, got {gold!r}")
        if not gold.strip():  # the official file has one such row, a construction without a value
            logger.warning("%s, row %d: no accepted answer; left out", path, number)
            return None
        kind: Kind = "math" if row["ability"] == "math" else "qa"
        prompt = repair(text_field(contents, "system")) if system is None else system
        return Example(f"{path.stem}-{number}", repair(question), (repair(gold),), kind, prompt)

    return [example for example in parse_records(path, rows, parse, malformed, unit="row") if example is not None]


def repair(text: str) -> str:
    r"""Undo string escapes that were read into LaTeX commands: a backspace before "oxed" was "\b", and so on."""
    return re.sub(r"[\b\f\v](?=[a-z])", lambda found: {"\b": r"\b", "\f": r"\f", "\v": r"\v"}[found[0]], text)
