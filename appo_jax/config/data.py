"""The prompts: where they come from, and how they are filtered."""

from __future__ import annotations

import dataclasses
from typing import Literal

from pydantic import PositiveFloat

from appo_jax.config.bounds import Seed
from appo_jax.types import Kind

OnMalformed = Literal["fatal", "skip"]


@dataclasses.dataclass(frozen=True)
class ColumnsConfig:
    """The keys of a record's fields, for the sources `files` and `tfds`. A dot names a field of an object:
    `reward_model.ground_truth`."""

    question: str = "question"
    """The question: text, or a list of chat messages with one of the user's and perhaps one of the system's."""
    golds: str = "answer"
    """The accepted answers: text, a number, a list of them, or an object with a `target`."""
    id: str = "id"
    """A name for the question. Records without it are named by file and line."""
    kind: str = "kind"
    """How answers are compared: math or qa. Records without it have `data.kind`."""
    source: str = "source"
    """The set that a question is from, for reports and weights. Records without it have the name of their file."""
    system: str = "system"
    """The system prompt. Records without it get `data.system_prompt`, or the source's default."""
    extra: tuple[str, ...] = ()
    """Columns to keep with the question for reports, such as level and type."""


@dataclasses.dataclass(frozen=True)
class DataPart:
    """One source of a mixture. Its fields mean what those of `DataConfig` mean."""

    source: str
    """Like `data.source`."""
    path: str | None = None
    """Like `data.path`."""
    held_out: str | None = None
    """Like `data.held_out`."""
    kind: Kind = "qa"
    """Like `data.kind`."""
    columns: ColumnsConfig = ColumnsConfig()
    """Like `data.columns`."""
    weight: PositiveFloat = 1.0
    """Share of the prompts that come from here, relative to the other parts' weights."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The questions of a run, for training and for evaluation."""

    source: str = "world"
    """A file of data/sources by its name, or `package.module:function` of your own. world: the embedded one (generated).
    docs/data.md describes the others. mixture: the sources of `data.mixture`."""
    path: str | None = None
    """Folder or file of the data (`--data DIR` on the command line). For `world`, where the generated TFDS dataset is kept."""
    held_out: str | None = None
    """File of the questions for evaluation. None: the file that the source keeps next to its training file."""
    kind: Kind = "qa"
    """How answers are compared, for files that do not say so."""
    columns: ColumnsConfig = ColumnsConfig()
    """Which keys of a record hold what, for the sources files and tfds."""
    mixture: tuple[DataPart, ...] = ()
    """For `source = "mixture"`: the sources and their weights."""
    drop: tuple[Literal["duplicates", "near_duplicates", "overlaps"], ...] = ()
    """Training questions to leave out. duplicates: equal to an earlier one, apart from case, spaces and punctuation
    outside numbers.
    near_duplicates: most of their words occur in the same order in an earlier one. overlaps: by either rule the same as
    a question for evaluation. `appo-jax data describe` counts each."""
    evaluation: tuple[str, ...] = ()
    """Files of further questions (jsonl, json, parquet, csv) that must not occur in training, besides those for
    evaluation."""
    seed: Seed = 0
    """Seed of the world's content and of its demonstrations."""
    malformed: OnMalformed = "fatal"
    """What to do about a line that cannot be read or a prompt that is too long. fatal: end the run. skip: leave it out.
    In both cases the file and the line are reported."""
    system_prompt: str | None = None
    """Replaces the source's own system prompt. None: the source's. `{tools}` in it becomes the run's tools and how they are
    called."""
