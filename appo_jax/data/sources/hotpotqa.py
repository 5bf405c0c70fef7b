"""HotpotQA (CC BY-SA 4.0) as distributed (hotpotqa.github.io), as parquet of Hugging Face, or as jsonl of FlashRAG."""

from __future__ import annotations

from appo_jax.config import ColumnsConfig, DataConfig
from appo_jax.data.multihop import MultihopReader, load_multihop, titled_paragraphs
from appo_jax.data.source import Dataset

TRAIN_FILES = ("hotpot_train_v1.1.json", "train.jsonl", "train.json")
HELD_OUT_FILES = ("hotpot_dev_distractor_v1.json", "hotpot_dev_fullwiki_v1.json", "dev.jsonl", "dev.json")
COLUMNS = ColumnsConfig("question", "answer", "_id", "", "", "", ("type", "level"))


def load(config: DataConfig) -> Dataset:
    """`data.path`: the folder of its files, or the training file. Raises DataError with file and record."""
    what = f"a folder with {TRAIN_FILES[0]} and {HELD_OUT_FILES[0]} (hotpotqa.github.io)"
    return load_multihop(
        config, MultihopReader(config, COLUMNS, "qa"), titled_paragraphs, (TRAIN_FILES, HELD_OUT_FILES), what
    )
