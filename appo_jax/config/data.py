"""The prompts: where they come from and in which order."""

from __future__ import annotations

import dataclasses
from typing import Literal

from appo_jax.config.bounds import Seed


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The questions of a run, for training and for evaluation."""

    source: str = "world"
    """A file of data/sources by its name, or `package.module:function` of your own. world: the embedded one (generated).
    gsm8k: a folder with train.jsonl and test.jsonl. appo_rl: the official parquet files (AMAP-ML/APPO)."""
    path: str | None = None
    """Folder of the data (`--data DIR` on the command line). For `world`, where the generated TFDS dataset is kept."""
    seed: Seed = 0
    """Seed of the world's content and of its demonstrations."""
    malformed: Literal["fatal", "skip"] = "fatal"
    """What happens at a line that cannot be read, or a prompt that is too long. fatal: the run ends. skip: it is left out.
    Either way file and line are named."""
    system_prompt: str | None = None
    """Replaces the source's own system prompt. None: the source's. `{tools}` in it becomes the run's tools and how they are
    called."""
