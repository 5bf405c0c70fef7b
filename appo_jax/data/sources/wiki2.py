"""2WikiMultihopQA as distributed (github.com/Alab-NII/2wikimultihop, Apache-2.0).

The aliases of answers are in id_aliases.json, one object per line. They are accepted if that file is in the questions' folder.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from appo_jax.config import ColumnsConfig, DataConfig
from appo_jax.data.examples import data_path
from appo_jax.data.multihop import MultihopReader, load_multihop, titled_paragraphs
from appo_jax.data.records import text_field
from appo_jax.data.source import Dataset
from appo_jax.errors import DataError
from appo_jax.types import Example

FILES = (["train.json", "train.jsonl"], ["dev.json", "dev.jsonl"])
COLUMNS = ColumnsConfig("question", "answer", "_id", "", "", "", ("type", "answer_id"))


def load(config: DataConfig) -> Dataset:
    """`data.path`: the folder with train.json and dev.json, or the training file. Raises DataError with file and record."""
    what = "a folder with train.json and dev.json of 2WikiMultihopQA (github.com/Alab-NII/2wikimultihop)"
    path = data_path(config)
    aliases = read_aliases((path if path.is_dir() else path.parent) / "id_aliases.json")
    reader = AliasReader(config, COLUMNS, "qa", aliases=aliases)
    return load_multihop(config, reader, titled_paragraphs, FILES, what)


@dataclasses.dataclass(frozen=True)
class AliasReader(MultihopReader):
    """Accepts the aliases of the answer's Wikidata item."""

    aliases: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    def example(self, record: Any, path: Path, number: int) -> Example | None:
        example = super().example(record, path, number)
        if example is None:
            return None
        more = self.aliases.get(str(example.extra.get("answer_id")), ())
        return dataclasses.replace(example, golds=tuple(dict.fromkeys((*example.golds, *more))))


def read_aliases(path: Path) -> dict[str, tuple[str, ...]]:
    """Wikidata item -> other names of it, from id_aliases.json; {} if there is no such file. Raises DataError."""
    if not path.is_file():
        return {}
    found = {}
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            found[text_field(record, "Q_id")] = (*(record.get("aliases") or ()), *(record.get("demonyms") or ()))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{path}, line {number}: {error}; correct it, or remove the file to go without aliases"
            ) from error
    return found
