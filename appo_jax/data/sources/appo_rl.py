"""The RL prompts of the official APPO code: parquet files with its system prompt.

Columns used: prompt (messages system, user), ability ("math", "qa" or null), reward_model.ground_truth.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from appo_jax.config import ColumnsConfig, DataConfig
from appo_jax.data.examples import Reader, split_files
from appo_jax.data.source import Dataset
from appo_jax.types import Example

TRAIN_FILE, HELD_OUT_FILE = "train_10k.parquet", "valid.parquet"
COLUMNS = ColumnsConfig("prompt", "reward_model.ground_truth", "", "ability", "data_source", "")


def load(config: DataConfig) -> Dataset:
    """`data.path`: the folder, or a training file in it (such as hard_search_1k.parquet).

    Raises DataError with file and row."""
    what = f"the folder with {TRAIN_FILE} and {HELD_OUT_FILE} of the official code (github.com/AMAP-ML/APPO)"
    train, held_out = split_files(config, [TRAIN_FILE], [HELD_OUT_FILE], what)
    reader = OfficialReader(config, COLUMNS, "qa", None)
    return Dataset(reader.read(train, what), reader.read(held_out, what))


class OfficialReader(Reader):
    """Reads records and restores LaTeX commands in them (`repair`)."""

    def example(self, record: Any, path: Path, number: int) -> Example | None:
        example = super().example(record, path, number)
        if example is None:
            return None
        golds = tuple(map(repair, example.golds))
        return dataclasses.replace(
            example, question=repair(example.question), golds=golds, system=repair(example.system)
        )


def repair(text: str) -> str:
    r"""Restore LaTeX commands whose first letters were read as string escapes: a backspace before "oxed" was "\b", and so on."""
    return re.sub(r"[\b\f\v](?=[a-z])", lambda found: {"\b": r"\b", "\f": r"\f", "\v": r"\v"}[found[0]], text)
