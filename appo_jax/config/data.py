"""The prompts: where they come from and in which order."""

from __future__ import annotations

import dataclasses
from typing import Literal

from pydantic import PositiveFloat

from appo_jax.config.bounds import Seed


@dataclasses.dataclass(frozen=True)
class ColumnsConfig:
    """Where a record holds what, for the sources `files` and `tfds`. A dot leads into an object: `reward_model.ground_truth`."""

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
    """The system prompt. Records without it have `data.system_prompt`, or the program's own."""
    extra: tuple[str, ...] = ()
    """Columns to keep with the question for reports, such as level and type."""


@dataclasses.dataclass(frozen=True)
class DataPart:
    """One source of a mixture. Its fields mean what those of `DataConfig` mean."""

    source: str
    """As `data.source`."""
    path: str | None = None
    """As `data.path`."""
    held_out: str | None = None
    """As `data.held_out`."""
    kind: Literal["math", "qa"] = "qa"
    """As `data.kind`."""
    columns: ColumnsConfig = ColumnsConfig()
    """As `data.columns`."""
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
    """File of the questions for evaluation. None: the one that the source has beside its training file."""
    kind: Literal["math", "qa"] = "qa"
    """How answers are compared, in files that do not say it."""
    columns: ColumnsConfig = ColumnsConfig()
    """Where records hold what, for the sources files and tfds."""
    mixture: tuple[DataPart, ...] = ()
    """For `source = "mixture"`: the sources and their weights."""
    drop: tuple[Literal["duplicates", "near_duplicates", "overlaps"], ...] = ()
    """Training questions to leave out. duplicates: that stand there before, but for case, spaces and punctuation.
    near_duplicates: that share most of their words in order with an earlier one. overlaps: that are, by either rule, among
    the questions for evaluation. `appo-jax data describe` counts each."""
    evaluation: tuple[str, ...] = ()
    """Files of questions (jsonl, json, parquet, csv) that training must not have seen, beside those for evaluation."""
    seed: Seed = 0
    """Seed of the world's content and of its demonstrations."""
    malformed: Literal["fatal", "skip"] = "fatal"
    """What happens at a line that cannot be read, or a prompt that is too long. fatal: the run ends. skip: it is left out.
    Either way file and line are named."""
    system_prompt: str | None = None
    """Replaces the source's own system prompt. None: the source's. `{tools}` in it becomes the run's tools and how they are
    called."""
