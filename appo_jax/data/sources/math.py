"""MATH (Hendrycks et al., MIT licence): train/ and test/ with one json file per problem, as distributed, or files of records.

A record has `problem` (or `question`), and `answer` or a `solution` whose last \\boxed{} is the answer.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from appo_jax.config import ColumnsConfig, DataConfig
from appo_jax.data.examples import Reader, data_path, split_files
from appo_jax.data.records import parse_each
from appo_jax.data.source import Dataset
from appo_jax.errors import DataError
from appo_jax.reward.latex import boxed_gold
from appo_jax.types import Example

COLUMNS = ColumnsConfig("problem", "answer", "unique_id", "", "", "", ("level", "type", "subject"))
WHAT = "the folder of MATH with train/ and test/ (github.com/hendrycks/math), or with train.jsonl and test.jsonl"


def load(config: DataConfig) -> Dataset:
    """Raises DataError with file and record."""
    path = data_path(config)
    reader = MathReader(config, COLUMNS, "math")
    if (path / "train").is_dir() and (path / "test").is_dir():
        return Dataset(_problems(path / "train", reader), _problems(path / "test", reader))
    train, held_out = split_files(config, ["train.jsonl", "train.parquet"], ["test.jsonl", "test.parquet"], WHAT)
    return Dataset(reader.read(train, WHAT), reader.read(held_out, WHAT))


class MathReader(Reader):
    """Takes the answer from the last \\boxed{} of the solution if the record has no `answer`."""

    def example(self, record: Any, path: Path, number: int) -> Example | None:
        if not isinstance(record, dict):
            raise TypeError(f"expected an object, got {type(record).__name__}")
        if record.get("problem") is None and record.get("question") is not None:
            record = record | {"problem": record["question"]}
        if record.get("answer") is None and isinstance(record.get("solution"), str):
            record = record | {"answer": boxed_gold(record["solution"])}
        return super().example(record, path, number)


def _problems(folder: Path, reader: MathReader) -> list[Example]:
    files = sorted(folder.glob("*/*.json"))
    if not files:
        raise DataError(f"{folder}: holds no <subject>/<number>.json; data.path must lead to {WHAT}")

    def parse(file: Path) -> Example | None:
        record = json.loads(file.read_bytes())
        if not isinstance(record, dict):
            raise TypeError(f"expected an object, got {type(record).__name__}")
        return reader.example(record | {"unique_id": f"{file.parent.name}/{file.stem}"}, file, 1)

    return parse_each(((str(file), file) for file in files), parse, reader.config.malformed, str(folder))
