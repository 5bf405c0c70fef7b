"""HotpotQA as distributed (hotpotqa.github.io, CC BY-SA 4.0), or as jsonl with `answers` and paragraphs of title and text."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from appo_jax.config import ColumnsConfig, DataConfig
from appo_jax.data.examples import Reader
from appo_jax.data.multihop import load_multihop, titled_paragraphs
from appo_jax.data.source import Dataset
from appo_jax.types import Example

TRAIN_FILES = ("hotpot_train_v1.1.json", "train.jsonl", "train.json")
HELD_OUT_FILES = ("hotpot_dev_distractor_v1.json", "hotpot_dev_fullwiki_v1.json", "dev.jsonl", "dev.json")
COLUMNS = ColumnsConfig("question", "answer", "_id", "", "", "", ("type", "level"))


def load(config: DataConfig) -> Dataset:
    """`data.path`: the folder of its files, or the training file. Raises DataError with file and record."""
    what = f"a folder with {TRAIN_FILES[0]} and {HELD_OUT_FILES[0]} (hotpotqa.github.io)"
    reader = HotpotReader(config, COLUMNS, "qa")
    return load_multihop(config, reader, titled_paragraphs, (TRAIN_FILES, HELD_OUT_FILES), what)


class HotpotReader(Reader):
    """Also reads the jsonl form, whose fields are `id` and `answers`."""

    def example(self, record: Any, path: Path, number: int) -> Example | None:
        columns = self.columns
        if isinstance(record, dict) and "answer" not in record:
            columns = dataclasses.replace(columns, golds="answers", id="id")
        return Reader(self.config, columns, self.kind, self.system).example(record, path, number)
