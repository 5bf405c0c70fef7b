"""Where questions come from: one `Dataset` whatever the source."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Protocol

from appo_jax.config import DataConfig
from appo_jax.data import appo_rl, gsm8k, traces
from appo_jax.data.documents import Document
from appo_jax.errors import DataError
from appo_jax.types import Example, Trace

WORLD_FOLDER = Path("artifacts/world")  # relative to the working directory; used when data.path is not given


class MakeTraces(Protocol):
    def __call__(self, search: traces.Call, python: traces.Call, limit: int | None = None) -> list[Trace]:
        """Demonstrations for the cold start, at most `limit`. search, python: the real tools, from the argument of a
        call to the text the policy reads. Raises DataError when the source has none."""


@dataclasses.dataclass(frozen=True)
class Dataset:
    train: tuple[Example, ...]
    held_out: tuple[Example, ...]  # shares no question with train
    documents: tuple[Document, ...] | None  # what the search tool searches, when the source brings it
    make_traces: MakeTraces


def load_dataset(config: DataConfig) -> Dataset:
    """Read (for the world: make, if need be) the data of a run. Raises DataError."""
    if config.source == "world":
        return _world(config)
    assert config.path is not None  # config.rules
    path = Path(config.path)
    if not path.exists():
        raise DataError(f"{path}: no such file or folder; data.path (--data DIR) must lead to the {config.source} data")
    return _gsm8k(path, config) if config.source == "gsm8k" else _appo_rl(path, config)


def _world(config: DataConfig) -> Dataset:
    from appo_jax.data.world import load_world  # TFDS is needed for nothing else

    world = load_world(Path(config.path or WORLD_FOLDER), config.seed)
    system = config.system_prompt or ""
    names = [document.title for document in world.documents]

    def make_traces(search: traces.Call, python: traces.Call, limit: int | None = None) -> list[Trace]:
        return traces.demonstrate(world.train, system, names, search, python, config.seed, limit)

    def examples(questions: tuple) -> tuple[Example, ...]:
        return tuple(question.example(system) for question in questions)

    return Dataset(examples(world.train), examples(world.held_out), world.documents, make_traces)


def _gsm8k(folder: Path, config: DataConfig) -> Dataset:
    train, held_out, rationales = gsm8k.load_gsm8k(folder, config.system_prompt, config.malformed)

    def make_traces(search: traces.Call, python: traces.Call, limit: int | None = None) -> list[Trace]:
        return gsm8k.demonstrate(train, rationales, python, limit)

    return Dataset(tuple(train), tuple(held_out), None, make_traces)


def _appo_rl(path: Path, config: DataConfig) -> Dataset:
    train, held_out = appo_rl.load_appo_rl(path, config.system_prompt, config.malformed)

    def make_traces(search: traces.Call, python: traces.Call, limit: int | None = None) -> list[Trace]:
        raise DataError("data.source = 'appo_rl' has no demonstrations: set sft.steps to 0 and start from a policy")

    return Dataset(tuple(train), tuple(held_out), None, make_traces)
