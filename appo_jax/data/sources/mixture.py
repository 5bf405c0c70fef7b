"""A mixture of several sources. The weights in `data.mixture` give each source's share of the prompts."""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Sequence
from typing import TypeVar

from appo_jax.config import DataConfig, DataPart
from appo_jax.data.demonstrations import ToolKit
from appo_jax.data.source import Dataset, load_dataset
from appo_jax.errors import ConfigError
from appo_jax.types import Example, Trace

Item = TypeVar("Item")


def load(config: DataConfig) -> Dataset:
    """The questions and demonstrations of all parts, interleaved: among the first ones, each part has the share of its weight. A
    question's id begins with its part's name.

    Raises ConfigError or DataError."""
    if not config.mixture:
        raise ConfigError(
            "data.mixture: empty; give at least one DataPart(source, path, weight) with data.source = 'mixture'"
        )
    names = [_name(part, i, config.mixture) for i, part in enumerate(config.mixture)]
    weights = [part.weight for part in config.mixture]
    parts = [load_dataset(_config_of(part, config)) for part in config.mixture]
    demonstrations = _interleaved(
        [[(part.demonstration, i) for i in range(part.num_demonstrations)] for part in parts], weights
    )

    def demonstration(index: int, kit: ToolKit) -> Trace:
        make, own_index = demonstrations[index]
        assert make is not None  # a part without this function has no demonstrations
        return make(own_index, kit)

    documents = tuple(dict.fromkeys(document for part in parts for document in part.documents or ()))
    return Dataset(
        _interleaved([_named(part.train, name) for part, name in zip(parts, names, strict=True)], weights),
        _interleaved([_named(part.held_out, name) for part, name in zip(parts, names, strict=True)], weights),
        documents or None,
        demonstration if demonstrations else None,
        len(demonstrations),
        dict(zip(names, weights, strict=True)),
    )


def _interleaved(parts: Sequence[Sequence[Item]], weights: Sequence[float]) -> list[Item]:
    """The items of all parts. Item i of a part stands at (i + 1) / weight; once a part ends, the others follow."""
    placed = (
        [((i + 1) / weight, number, item) for i, item in enumerate(part)]
        for number, (part, weight) in enumerate(zip(parts, weights, strict=True))
    )
    return [item for _, _, item in heapq.merge(*placed, key=lambda place: place[:2])]


def _config_of(part: DataPart, config: DataConfig) -> DataConfig:
    if part.source == "mixture":
        raise ConfigError("data.mixture: a part cannot be a mixture; list its parts instead")
    fields = {field.name: getattr(part, field.name) for field in dataclasses.fields(part) if field.name != "weight"}
    return dataclasses.replace(config, **fields, mixture=(), drop=(), evaluation=())


def _name(part: DataPart, index: int, parts: tuple[DataPart, ...]) -> str:
    """The part's source, with a number if an earlier part has the same source."""
    earlier = sum(other.source == part.source for other in parts[:index])
    return part.source if not earlier else f"{part.source}-{earlier + 1}"


def _named(examples: Sequence[Example], name: str) -> list[Example]:
    return [dataclasses.replace(example, id=f"{name}/{example.id}", source=name) for example in examples]
