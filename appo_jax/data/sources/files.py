"""Plain files of questions: jsonl, json, parquet, csv or tsv, with the columns that `data.columns` names."""

from __future__ import annotations

from appo_jax.config import DataConfig
from appo_jax.data.examples import Reader, split_files
from appo_jax.data.records import UNITS
from appo_jax.data.source import Dataset

HELD_OUT_NAMES = ("test", "valid", "validation", "dev", "held_out")


def load(config: DataConfig) -> Dataset:
    """`data.path`: the training file, or a folder with train.jsonl (or .json, .parquet, .csv, .tsv).

    The held-out file is `data.held_out`, or test, valid, validation, dev or held_out in the same folder. Raises DataError with
    file and line."""
    held_out_names = [name + suffix for name in HELD_OUT_NAMES for suffix in UNITS]
    what = "a file of questions, or a folder with train and test (.jsonl, .json, .parquet, .csv or .tsv)"
    train, held_out = split_files(config, [f"train{suffix}" for suffix in UNITS], held_out_names, what)
    reader = Reader(config, config.columns, config.kind)
    return Dataset(reader.read(train, what), reader.read(held_out, what))
