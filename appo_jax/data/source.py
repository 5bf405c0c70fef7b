"""Data sources. A data source is a function from the config to a `Dataset`.

A built-in source is a file in `data/sources/` with a function `load(config: DataConfig) -> Dataset`; the file's name is the
source's name. If `load` makes the files under `data.path` when they are missing, the file says `MAKES_FILES = True`. Your own
source is a function of the same signature, given as `package.module:function`.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from appo_jax.config import DataConfig
from appo_jax.data import sources
from appo_jax.data.demonstrations import CannotDemonstrate, ToolKit
from appo_jax.data.question_files import decrypted, lower_case, published_records, question_of
from appo_jax.data.records import parse_each
from appo_jax.data.repetitions import drop_repetitions
from appo_jax.errors import AppoError, ConfigError, DataError
from appo_jax.tools.user_code import imported
from appo_jax.types import Document, Example, Kind, Trace


@dataclasses.dataclass(frozen=True)
class Dataset:
    """What a source returns. In a system prompt, `{tools}` is replaced by instructions for the run's tools."""

    train: Sequence[Example]
    held_out: Sequence[Example]  # shares no question with train
    documents: Sequence[Document] | None = None  # the search tool's corpus, if the source brings one
    # Makes demonstration i of num_demonstrations for the cold start, with the run's tools and their real results.
    # Raises CannotDemonstrate if the tools do not suffice.
    demonstration: Callable[[int, ToolKit], Trace] | None = None
    num_demonstrations: int = 0
    # From `Example.source` to the share of prompts that come from it. Empty: every question once an epoch.
    weights: Mapping[str, float] = dataclasses.field(default_factory=dict)
    # The decisions in a text of the policy, `[start, end)` each, if the source knows them (for `appo-jax influence`).
    decisions: Callable[[str], list[tuple[int, int]]] | None = None


def source_names() -> list[str]:
    """The sources that come with the program."""
    return sorted(module.name for module in pkgutil.iter_modules(sources.__path__))


def makes_files(name: str) -> bool:
    """Whether a source that comes with the program makes the files under its `data.path`, if they are missing."""
    return name in source_names() and getattr(
        importlib.import_module(f"{sources.__name__}.{name}"), "MAKES_FILES", False
    )


def load_dataset(config: DataConfig) -> Dataset:
    """The data of a run, without the repetitions that `data.drop` names. An embedded world is made if it does not exist.

    Raises ConfigError for an unknown source, and DataError for data that cannot be read."""
    load = _find(config.source)
    try:
        dataset = load(config)
    except (AppoError, OSError):
        raise
    except (Exception, SystemExit) as error:
        raise DataError(f"data.source = {config.source!r} raised {type(error).__name__}: {error}") from error
    if not isinstance(dataset, Dataset):
        raise ConfigError(
            f"data.source = {config.source!r} returned a {type(dataset).__name__}; expected an appo_jax.data.source.Dataset"
        )
    for part in ("train", "held_out"):
        if problem := _problem(getattr(dataset, part)):
            raise DataError(f"data.source = {config.source!r}: {part} {problem}")
    if not config.drop:
        return dataset
    return _only(dataset, drop_repetitions(dataset.train, for_evaluation(dataset, config), config.drop))


def _problem(examples: Any) -> str | None:
    """What is wrong with a part of a user's dataset; None if it is a sequence of examples with fields of the right types."""
    if not isinstance(examples, Sequence):
        return f"is a {type(examples).__name__}; expected a list of appo_jax.types.Example"
    for example in examples:
        if not isinstance(example, Example):
            return f"holds a {type(example).__name__}; expected appo_jax.types.Example"
        for name in ("id", "question", "system"):
            if not isinstance(value := getattr(example, name), str):
                return f"holds the example {example.id!r} with {name} = {value!r}; expected a text"
        golds = example.golds
        if not isinstance(golds, tuple | list) or not golds or not all(isinstance(gold, str) for gold in golds):
            return (
                f'holds the example {example.id!r} with golds = {golds!r}; expected a tuple of texts, such as ("42",)'
            )
        if example.kind not in get_args(Kind):
            expected = " or ".join(map(repr, get_args(Kind)))
            return f"holds the example {example.id!r} with kind = {example.kind!r}; expected {expected}"
    return None


def _only(dataset: Dataset, train: Sequence[Example]) -> Dataset:
    """The dataset with a part of its training questions, which alone are demonstrated."""
    make = dataset.demonstration
    if make is None:
        return dataclasses.replace(dataset, train=train)
    ids = {example.id for example in dataset.train} - {example.id for example in train}
    questions = {example.question for example in dataset.train} - {example.question for example in train}

    def demonstration(index: int, kit: ToolKit) -> Trace:
        trace = make(index, kit)
        if trace.example.id in ids or trace.example.question in questions:
            raise CannotDemonstrate("data.drop leaves its question out")
        return trace

    return dataclasses.replace(dataset, train=train, demonstration=demonstration)


def for_evaluation(dataset: Dataset, config: DataConfig) -> list[Example]:
    """The questions that training must not see: held-out ones, and those of the files in `data.evaluation`. Raises DataError."""
    return [*dataset.held_out, *_read_evaluation(config)]


def _read_evaluation(config: DataConfig) -> list[Example]:
    found: list[Example] = []
    for file in map(Path, config.evaluation):
        places = ((f"{file}, {place}", (place, record)) for place, record in published_records(file))
        # `data.malformed` is about training data; `appo-jax eval` leaves records without a question out, too.
        found += parse_each(places, functools.partial(_evaluated, file.stem), "skip", str(file))
    return found


def _evaluated(name: str, row: tuple[str, Any]) -> Example:
    """A question of an evaluation file, which is only compared with others."""
    place, record = row
    return Example(f"{name}, {place}", question_of(decrypted(lower_case(record))), (), "qa", "", name)


def _find(name: str) -> Callable[[DataConfig], Dataset]:
    expected = f"{', '.join(source_names())} or `package.module:function`"
    if ":" in name:
        load = imported("data.source", name, expected)
    elif name in source_names():
        load = getattr(importlib.import_module(f"{sources.__name__}.{name}"), "load", None)
        if load is None:
            raise ConfigError(
                f"data.source = {name!r}: data/sources/{name}.py defines no `load`; expected `load(config: DataConfig) -> Dataset`"
            )
    else:
        raise ConfigError(f"data.source = {name!r}: expected {expected}")
    if not callable(load):
        raise ConfigError(f"data.source = {name!r} is a {type(load).__name__}, not a function; expected {expected}")
    return load
