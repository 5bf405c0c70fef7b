"""A mixture of several sources. The weights in `data.mixture` give each source's share of the prompts."""

from __future__ import annotations

import bisect
import dataclasses
import itertools

from appo_jax.config import DataConfig, DataPart
from appo_jax.data.demonstrations import ToolKit
from appo_jax.data.source import Dataset, load_dataset
from appo_jax.errors import ConfigError
from appo_jax.types import Example, Trace


def load(config: DataConfig) -> Dataset:
    """The questions of all parts, one part after another. A question's id begins with its part's name.

    Raises ConfigError or DataError."""
    if not config.mixture:
        raise ConfigError(
            "data.mixture: empty; give at least one DataPart(source, path, weight) with data.source = 'mixture'"
        )
    names = [_name(part, i, config.mixture) for i, part in enumerate(config.mixture)]
    loaded = [load_dataset(_config_of(part, config)) for part in config.mixture]
    ends = list(itertools.accumulate(part.num_demonstrations for part in loaded))

    def demonstration(index: int, kit: ToolKit) -> Trace:
        number = bisect.bisect_right(ends, index)
        make = loaded[number].demonstration
        assert make is not None  # an index leads only to a part that has demonstrations
        return make(index - (ends[number - 1] if number else 0), kit)

    documents = tuple(dict.fromkeys(document for part in loaded for document in part.documents or ()))
    return Dataset(
        [_named(example, name) for part, name in zip(loaded, names, strict=True) for example in part.train],
        [_named(example, name) for part, name in zip(loaded, names, strict=True) for example in part.held_out],
        documents or None,
        demonstration if ends[-1] else None,
        ends[-1],
        {name: part.weight for name, part in zip(names, config.mixture, strict=True)},
    )


def _config_of(part: DataPart, config: DataConfig) -> DataConfig:
    if part.source == "mixture":
        raise ConfigError("data.mixture: a part cannot be a mixture; list its parts instead")
    fields = {field.name: getattr(part, field.name) for field in dataclasses.fields(part) if field.name != "weight"}
    return dataclasses.replace(config, **fields, mixture=(), drop=(), evaluation=())


def _name(part: DataPart, index: int, parts: tuple[DataPart, ...]) -> str:
    """The part's source, with a number if an earlier part has the same source."""
    earlier = sum(other.source == part.source for other in parts[:index])
    return part.source if not earlier else f"{part.source}-{earlier + 1}"


def _named(example: Example, name: str) -> Example:
    return dataclasses.replace(example, id=f"{name}/{example.id}", source=name)
