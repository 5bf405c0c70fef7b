"""A user's data source with a part of the embedded world: its arithmetic without documents."""

import dataclasses

from appo_jax.config import DataConfig
from appo_jax.data.source import Dataset
from appo_jax.data.traces import WorldScript
from appo_jax.data.world import generate


def load(config: DataConfig) -> Dataset:
    world = generate(config.seed)
    train, held_out = ([q for q in part if not q.solution.paths] for part in (world.train, world.held_out))
    script = WorldScript(dataclasses.replace(world, train=tuple(train)), "", config.seed)
    examples = ([question.example("") for question in part] for part in (train, held_out))
    return Dataset(*examples, None, script.demonstration, len(script))
