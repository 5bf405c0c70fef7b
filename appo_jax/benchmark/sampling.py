"""A policy's answers to a set's questions, with the tools and the prompt of a config."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Sequence
from pathlib import Path

from appo_jax.benchmark.predictions import Sample
from appo_jax.benchmark.sets import Item, Scorer
from appo_jax.components import build, initial_params, response_of
from appo_jax.config import Config
from appo_jax.errors import DataError
from appo_jax.export import newest_params
from appo_jax.policy.sharding import param_shardings, place
from appo_jax.types import Example, Kind, Rollout

EVALUATION = 4  # first number of every draw's identity: what the draws are for


class PolicySampler:
    """Draws samples. A context manager: leaving it closes the tools."""

    def __init__(self, config: Config, run: Path | None):
        self._stack = contextlib.ExitStack()
        self.config = config
        self.components = self._stack.enter_context(build(config))
        c = self.components
        if run is None:
            self.params = initial_params(config, c.arch, c.mesh)
        else:
            _, found = newest_params(run)
            self.params = place(found, param_shardings(c.arch, c.mesh, "train"), c.mesh)
        self.system = next(iter(c.held_out)).system if len(c.held_out) else ""

    def __enter__(self) -> PolicySampler:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def draw(
        self, items: Sequence[Item], samples: int, temperature: float, scorer: Scorer, max_items: int
    ) -> list[list[Sample]]:
        """`samples` rollouts of every question. `max_items`: what the number of questions never exceeds.

        Raises DataError for a question that is longer than `rollout.max_prompt_tokens`."""
        kind: Kind = "math" if scorer == "math" else "qa"
        examples = [Example(item.id, item.question, item.golds, kind, self.system) for item in items]
        limit = self.config.rollout.max_prompt_tokens
        for example in examples:
            length = len(self.components.tokenizer.render_prompt(example.system, example.question))
            if length > limit:
                raise DataError(
                    f"question {example.id!r} has {length} tokens: raise rollout.max_prompt_tokens = {limit}"
                )
        # Every part of a set has draws of its own.
        draw_id = (EVALUATION, zlib.crc32(items[0].id.encode()) & 0x7FFFFFFF)
        trees = self.components.sampler.initial(self.params, examples, samples, draw_id, temperature, max_items)
        return [[self._sample(rollout) for rollout in tree] for tree in trees]

    def _sample(self, rollout: Rollout) -> Sample:
        text = response_of(rollout, self.components.tokenizer).sampled_text
        calls = [call.to_json() for call in rollout.calls]
        keep = ("name", "argument", "result", "outcome", "seconds")
        told = {
            "calls": [{name: call[name] for name in keep} for call in calls],
            "tokens": int(rollout.sampled.sum()), "stop_reason": str(rollout.stop_reason),
        }  # fmt: skip
        return Sample(text, told)
