"""Parquet files of veRL and Search-R1.

Columns used: prompt (messages), question or extra_info.question; reward_model.ground_truth (text, or an object with `target`) or
golden_answers; ability; data_source; extra_info.index. Search-R1's and veRL's prompts ask for other tags than this program's. So
if a record has the question alone, it is used with this program's system prompt, and `prompt` is ignored.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from pathlib import Path
from typing import Any

from appo_jax.config import ColumnsConfig, DataConfig
from appo_jax.data.examples import Reader, optional_field, split_files
from appo_jax.data.source import Dataset
from appo_jax.types import Example, Kind

logger = logging.getLogger(__name__)

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
    """Reads the question alone if the record has it, else `prompt`; and `golden_answers` if `reward_model` holds no answer."""

    def example(self, record: Any, path: Path, number: int) -> Example | None:
        columns = self.columns
        questions = ("question", "extra_info.question")
        alone = next((name for name in questions if isinstance(optional_field(record, name), str)), columns.question)
        columns = dataclasses.replace(columns, question=alone)
        if optional_field(record, columns.golds) is None and optional_field(record, "golden_answers") is not None:
            columns = dataclasses.replace(columns, golds="golden_answers")
        ability = str(optional_field(record, "ability") or "").lower()
        if ability not in ABILITIES:
            _say_once(ability, self.kind)
        kind: Kind = "math" if ability == "math" else self.kind
        return Reader(self.config, columns, kind, self.system).example(record, path, number)


ABILITIES = ("", "math", "qa", "fact-reasoning")  # those of veRL's and Search-R1's files


@functools.cache
def _say_once(ability: str, kind: Kind) -> None:
    logger.warning("ability %r is unknown: its questions are graded as data.kind = %s", ability, kind)
