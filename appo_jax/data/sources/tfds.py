"""Any TFDS dataset that was built as array_record files. It is read without TensorFlow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from appo_jax.config import DataConfig
from appo_jax.data.examples import Reader, data_path
from appo_jax.data.records import parse_each
from appo_jax.data.source import Dataset
from appo_jax.errors import ConfigError, DataError
from appo_jax.types import Example

HELD_OUT_SPLITS = ("test", "validation", "valid", "dev", "held_out")


def load(config: DataConfig) -> Dataset:
    """`data.path`: the folder that holds dataset_info.json (…/name/version).

    The held-out split is the one that `data.held_out` names, or test, validation, valid, dev or held_out. `data.columns` names
    the columns. Raises ConfigError or DataError."""
    folder = data_path(config)
    try:
        builder = tfds.builder_from_directory(str(folder))
        splits = dict(builder.info.splits)
    except Exception as error:  # TFDS may raise anything
        raise DataError(
            f"{folder}: no TFDS dataset ({type(error).__name__}: {error}); expected a folder with dataset_info.json"
        ) from error
    held_out = config.held_out or next((name for name in HELD_OUT_SPLITS if name in splits), "")
    if missing := [name for name in ("train", held_out) if name not in splits]:
        wanted = repr(missing[0]) if missing[0] else f"for evaluation ({', '.join(HELD_OUT_SPLITS)})"
        raise DataError(f"{folder}: no split {wanted}; it has {', '.join(splits)}; name one with data.held_out")
    if held_out == "train":
        raise ConfigError("data.held_out = 'train' is the split for training; name another one")
    reader = Reader(config, config.columns, config.kind)
    return Dataset(_read(builder, "train", reader, folder), _read(builder, held_out, reader, folder))


def _read(builder: Any, split: str, reader: Reader, folder: Path) -> list[Example]:
    expected = builder.info.splits[split].num_examples
    try:
        source = builder.as_data_source(split=split)
        records = [_plain(source[i]) for i in range(len(source))]
    except Exception as error:
        raise DataError(
            f"{folder}, split {split}: cannot be read ({type(error).__name__}: {error}); build it with "
            'file_format="array_record"'
        ) from error
    if len(records) != expected:
        raise DataError(f"{folder}, split {split}: holds {len(records)} of {expected} records; build it again")
    whole = f"{folder}, split {split}"
    rows = ((f"{whole}, record {number}", (number, record)) for number, record in enumerate(records, start=1))
    return parse_each(rows, lambda row: reader.example(row[1], Path(split), row[0]), reader.config.malformed, whole)


def _plain(value: Any) -> Any:
    """TFDS features in JSON's types: bytes become text, arrays become lists."""
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
