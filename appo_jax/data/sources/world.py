"""The embedded world: made from `data.seed` and kept under `data.path`. It has its own documents and demonstrations."""

from __future__ import annotations

from pathlib import Path

from appo_jax.config import DataConfig
from appo_jax.data import traces
from appo_jax.data.source import Dataset
from appo_jax.data.world import Question, load_world
from appo_jax.types import Example

MAKES_FILES = True
WORLD_FOLDER = Path("artifacts/world")  # relative to the working directory; used when data.path is not given


def load(config: DataConfig) -> Dataset:
    """Raises DataError."""
    world = load_world(Path(config.path or WORLD_FOLDER), config.seed)
    system = config.system_prompt or ""

    def examples(questions: tuple[Question, ...]) -> tuple[Example, ...]:
        return tuple(question.example(system) for question in questions)

    script = traces.WorldScript(world, system, config.seed)
    return Dataset(
        examples(world.train), examples(world.held_out), world.documents, script.demonstration, len(script)
    )  # fmt: skip
