"""Converts records of data files to `Example`, which is the schema of all sources."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from appo_jax.config import ColumnsConfig, DataConfig
from appo_jax.data.golds import accepted_answers, plain
from appo_jax.data.records import MissingField, field, read_records
from appo_jax.errors import ConfigError, DataError
from appo_jax.types import Example, Kind

logger = logging.getLogger(__name__)

# The system prompt of questions whose data has none.
SYSTEM_PROMPT = (
    "Answer the question step by step. Put your reasoning between <think> and </think>. Your tools:\n{tools}\n"
    "When you are done, write <answer> \\boxed{answer} </answer>."
)


@dataclasses.dataclass(frozen=True)
class Reader:
    """Converts the records of one set to examples."""

    config: DataConfig
    columns: ColumnsConfig
    kind: Kind
    system: str | None = SYSTEM_PROMPT  # for records without a system prompt; None: such a record is an error

    def read(self, path: Path, what: str = "a file of questions") -> list[Example]:
        """All examples of a file. Raises DataError with file and line. `what`: the expected file, for messages."""
        return read_records(
            path, lambda number, record: self.example(record, path, number), self.config.malformed, what
        )

    def example(self, record: Any, path: Path, number: int) -> Example | None:
        """The example of a record; None, with a warning, if it has no accepted answer. Raises KeyError, TypeError, ValueError."""
        columns = self.columns
        question, system = prompt_of(self._column(record, "question"), columns.question)
        golds = accepted_answers(self._column(record, "golds"))
        if not golds:
            logger.warning("%s, record %d: no accepted answer; left out", path, number)
            return None
        id = optional_field(record, columns.id)
        kind = self._kind(optional_field(record, columns.kind))
        if system is None:
            system = _text(optional_field(record, columns.system), columns.system)
        if self.config.system_prompt is not None:
            system = self.config.system_prompt
        elif system is None:
            system = self.system
        if system is None:
            raise ValueError("it has no system message; give one with data.system_prompt")
        return Example(
            f"{path.stem}-{number}" if id in (None, "") else plain(id),
            question,
            golds,
            kind,
            system,
            _text(optional_field(record, columns.source), columns.source) or path.stem,
            {name: value for name in columns.extra if (value := optional_field(record, name)) is not None},
        )

    def _column(self, record: Any, name: str) -> Any:
        """The value of a column. Raises KeyError or TypeError, with the setting that names the column if there is one."""
        path = getattr(self.columns, name)
        try:
            return field(record, path)
        except MissingField as error:
            if self.columns is self.config.columns:
                error.advice = f"; data.columns.{name} says which field is read"
            raise

    def _kind(self, value: Any) -> Kind:
        if value is None:
            return self.kind
        if value not in ("math", "qa"):
            raise ValueError(f"field {self.columns.kind!r}: expected math or qa, got {value!r}")
        return value


def prompt_of(value: Any, name: str) -> tuple[str, str | None]:
    """(question, system prompt) from the value of a question's field, which is text or chat messages. name: of the field, for
    messages. Raises KeyError, TypeError or ValueError."""
    if not isinstance(value, list):
        return _question(value, name), None
    roles: dict[str, list[Any]] = {}
    for message in value:
        roles.setdefault(field(message, "role"), []).append(field(message, "content"))
    users, systems = roles.pop("user", []), roles.pop("system", [])
    if len(users) != 1 or len(systems) > 1 or roles:
        turns = ", ".join(str(field(message, "role")) for message in value)
        raise ValueError(f"field {name!r}: expected one user message, after at most one system message; got {turns}")
    return _question(users[0], f"{name}.user"), _text(systems[0], f"{name}.system") if systems else None


def _question(value: Any, name: str) -> str:
    text = _text(value, name)
    if text is None or not text.strip():
        raise (TypeError if text is None else ValueError)(
            f"field {name!r}: expected text, got None" if text is None else f"field {name!r} is blank"
        )
    return text


def _text(value: Any, name: str) -> str | None:
    if value is None or isinstance(value, str):
        return value
    raise TypeError(f"field {name!r}: expected text, got {value!r}")


def optional_field(record: Any, path: str) -> Any:
    """The value at a dotted path, or None."""
    try:
        return field(record, path)
    except (KeyError, TypeError):
        return None


def system_prompt(examples: Sequence[Example], kind: Kind) -> str:
    """The system prompt of the first example of a kind, because the parts of a mixture differ; of the first if none has it."""
    of_kind = (example.system for example in examples if example.kind == kind)
    return next(of_kind, examples[0].system if len(examples) else "")


def split_files(config: DataConfig, train: Sequence[str], held_out: Sequence[str], what: str) -> tuple[Path, Path]:
    """The training file and the held-out file.

    The training file is `data.path`, or the first of the names in `train` that exists in that folder. The held-out file is
    `data.held_out`, or the first of the names in `held_out` that exists in the training file's folder. `what`: the data set
    and where to get it, for messages. Raises ConfigError if both are the same file, and ConfigError or DataError that says what
    is missing."""
    path = data_path(config)
    file = path if path.is_file() else _first(path, train, what)
    if config.held_out is not None:
        other = Path(config.held_out)
    else:
        other = _first(file.parent, held_out, f"{what} (or set data.held_out)")
    if other.resolve() == file.resolve():
        raise ConfigError(
            f"{other} is the training file and the held-out file too: accuracy on its questions would be that of training; give "
            "another data.path, or another data.held_out"
        )
    return file, other


def _first(folder: Path, names: Sequence[str], what: str) -> Path:
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is None:
        raise DataError(f"{folder / names[0]}: no such file; data.path must lead to {what}")
    return found


def data_path(config: DataConfig) -> Path:
    """`data.path`, a file or a folder. Raises ConfigError if it is not set, and DataError if it does not exist."""
    if config.path is None:
        raise ConfigError(
            f"data.path: needed for data.source = {config.source!r} (the folder that holds its files; on the command line: "
            "--data DIR)"
        )
    path = Path(config.path)
    if not path.exists():
        raise DataError(f"{path}: no such file or folder; data.path (--data DIR) must lead to the {config.source} data")
    return path
