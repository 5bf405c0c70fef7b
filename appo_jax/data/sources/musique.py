"""MuSiQue-Ans as distributed (github.com/StonyBrookNLP/musique, CC BY 4.0). Questions without an answer are left out."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from appo_jax.config import ColumnsConfig, DataConfig
from appo_jax.data.golds import accepted_answers
from appo_jax.data.multihop import MultihopReader, load_multihop
from appo_jax.data.source import Dataset
from appo_jax.types import Document, Example

FILES = (["musique_ans_v1.0_train.jsonl", "train.jsonl"], ["musique_ans_v1.0_dev.jsonl", "dev.jsonl"])
COLUMNS = ColumnsConfig("question", "answer", "id", "", "", "", ("answerable",))


def load(config: DataConfig) -> Dataset:
    """`data.path`: the folder of its files, or the training file. Raises DataError with file and line."""
    what = f"a folder with {FILES[0][0]} and {FILES[1][0]} (github.com/StonyBrookNLP/musique)"
    return load_multihop(config, MusiqueReader(config, COLUMNS, "qa"), _paragraphs, FILES, what)


class MusiqueReader(MultihopReader):
    """Accepts `answer_aliases` in addition to the answer, and leaves out questions without an answer."""

    def example(self, record: Any, path: Path, number: int) -> Example | None:
        example = super().example(record, path, number)
        if example is None or not example.extra.get("answerable", True):
            return None
        aliases = accepted_answers(record.get("answer_aliases"))
        return dataclasses.replace(example, golds=tuple(dict.fromkeys((*example.golds, *aliases))))


def _paragraphs(record: Any) -> list[Document]:
    return [Document(entry["title"], entry["paragraph_text"]) for entry in record.get("paragraphs") or ()]
