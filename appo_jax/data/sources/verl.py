"""Parquet files of veRL and Search-R1.

Columns used: prompt (messages) or question; reward_model.ground_truth (text, or an object with `target`) or golden_answers;
ability; data_source; extra_info.index. Search-R1's prompts ask for other tags than this program's. So if a record has
`question`, it is used with this program's system prompt, and `prompt` is ignored.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from appo_jax.config import ColumnsConfig, DataConfig
from appo_jax.data.examples import Reader, split_files
from appo_jax.data.source import Dataset
from appo_jax.types import Example, Kind

COLUMNS = ColumnsConfig(
    "prompt", "reward_model.ground_truth", "id", "", "data_source", "", ("ability", "extra_info.index")
)


def load(config: DataConfig) -> Dataset:
    """`data.path`: the folder with train.parquet and test.parquet, or the training file. Raises DataError with file and row."""
    what = "a folder with train.parquet and test.parquet of veRL or Search-R1 (huggingface.co/datasets/PeterJinGo)"
    train, held_out = split_files(config, ["train.parquet"], ["test.parquet", "valid.parquet", "val.parquet"], what)
    reader = VerlReader(config, COLUMNS, config.kind)
    return Dataset(reader.read(train, what), reader.read(held_out, what))


class VerlReader(Reader):
    """Reads `question` if the record has it, else `prompt`; and `golden_answers` if the record has no `reward_model`."""

    def example(self, record: Any, path: Path, number: int) -> Example | None:
        columns = self.columns
        if isinstance(record, dict) and isinstance(record.get("question"), str):
            columns = dataclasses.replace(columns, question="question")
        if isinstance(record, dict) and "reward_model" not in record:
            columns = dataclasses.replace(columns, golds="golden_answers")
        kind: Kind = "math" if isinstance(record, dict) and record.get("ability") == "math" else self.kind
        return Reader(self.config, columns, kind, self.system).example(record, path, number)
