"""Questions over several Wikipedia paragraphs: what HotpotQA, 2WikiMultihopQA and MuSiQue have in common.

The paragraphs that come with the questions, each once, are the corpus of the search tool, unless the config names another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from appo_jax.config import DataConfig
from appo_jax.data.examples import Reader, split_files
from appo_jax.data.records import read_records
from appo_jax.data.source import Dataset
from appo_jax.types import Document, Example


def load_multihop(
    config: DataConfig,
    reader: Reader,
    paragraphs: Callable[[Any], Iterable[Document]],
    files: tuple[Sequence[str], Sequence[str]],
    what: str,
) -> Dataset:
    """Both splits and the paragraphs of all their records. paragraphs: those of one record. Raises DataError."""
    documents: dict[Document, None] = {}

    def read(path: Path) -> list[Example]:
        def example(number: int, record: Any) -> Example | None:
            found = reader.example(record, path, number)
            documents.update(dict.fromkeys(paragraphs(record)))
            return found

        return read_records(path, example, config.malformed, what)

    train, held_out = (read(path) for path in split_files(config, *files, what))
    return Dataset(train, held_out, tuple(documents) or None)


def titled_paragraphs(record: Any) -> list[Document]:
    """HotpotQA's `context`: [title, [sentence, …]] pairs, or objects with title and text or sentences."""
    found = []
    for entry in record.get("context") or ():
        if isinstance(entry, dict):
            title, text = entry["title"], entry["text"] if "text" in entry else entry["sentences"]
        else:
            title, text = entry
        found.append(Document(title, "".join(text) if isinstance(text, list) else text))
    return found
