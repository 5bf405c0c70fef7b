"""The built-in sampler: initial rollouts start from prefilled prompts, branches from the caches of the pass that scored
their parents."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from appo_jax import distributed
from appo_jax.config import BranchingConfig
from appo_jax.policy.constraints import row_shards
from appo_jax.policy.packing import pack
from appo_jax.policy.parameters import Params
from appo_jax.policy.score import Rows, score
from appo_jax.policy.sharding import generating
from appo_jax.rollout.engine import Draw, Engine
from appo_jax.rollout.prefixes import Prefix
from appo_jax.rollout.rows import fork_of, fork_of_prompt
from appo_jax.rollout.sampler import Branch, GenerationStats, ScorePass
from appo_jax.rollout.shapes import Shapes
from appo_jax.types import Example, Rollout, Tree


@dataclasses.dataclass(frozen=True)
class ScoredPrefixes:
    """The scored rollouts as prefixes, and the bound on which the shapes of branching from them depend."""

    prefixes: list[Prefix]
    max_rollouts: int


class TreeSampler:
    """A `Sampler` that uses `Engine`. Rollouts that share a prefix share its KV cache; scoring is the prefill of the
    branches."""

    def __init__(self, engine: Engine, branching: BranchingConfig):
        self.engine = engine
        self.shapes = Shapes(engine.config, branching, row_shards(engine.mesh))

    def initial(
        self, params: Params, examples: Sequence[Example], copies: int, draw_id: Sequence[int],
        temperature: float | None = None, max_examples: int | None = None,
    ) -> list[Tree]:  # fmt: skip
        """See `Sampler.initial`. Example i belongs to host i mod the number of hosts."""
        engine, policy = self.engine, generating(params, self.engine.mesh, self.engine.dtype)
        groups = []
        for index, example in enumerate(examples):
            host = index % distributed.num_hosts()
            prompt = np.asarray(engine.tokenizer.render_prompt(example.system, example.question), np.int32)
            groups.append([fork_of_prompt(example, prompt, engine.start(host), node, host) for node in range(copies)])
        max_examples = max_examples or len(examples)
        shapes = self.shapes.initial(max_examples, copies)
        prompts = [group[0].tokens for group in groups]
        source = engine.prefill(policy, prompts, shapes.prefix_length, self.shapes.prefill_rows(max_examples))
        temperature = engine.config.temperature if temperature is None else temperature
        return engine.generate(policy, groups, source, shapes, Draw(draw_id, temperature))

    def score(
        self, params: Params, rollouts: Sequence[Rollout], max_rollouts: int | None = None, to_branch: bool = False
    ) -> ScorePass:
        """See `Sampler.score`. The rollouts are packed into rows, which are scored in passes of one shape."""
        max_rollouts, length = max_rollouts or len(rollouts), self.shapes.rollout_length
        scored = ScorePass(rollouts, [], [], ScoredPrefixes([], max_rollouts) if to_branch else None)
        shape = self.shapes.packed(max_rollouts)
        packing = pack([rollout.tokens for rollout in rollouts], shape.length, shape.rows)
        passes = []
        for first in range(0, len(packing.rows.tokens), shape.rows):
            rows = Rows(*(x[first : first + shape.rows] for x in packing.rows))
            result = score(
                params, rows, arch=self.engine.arch, temperature=self.engine.config.temperature, dtype=self.engine.dtype
            )
            passes.append(
                (np.asarray(result.log_probs), np.asarray(result.entropies), result.cache if to_branch else [])
            )
            del result  # its cache, unless it is kept, before the next pass makes another
        for at, slots in zip(packing.row, packing.slots, strict=True):
            log_probs, entropies, cache = passes[at // shape.rows]
            row = int(at) % shape.rows
            scored.log_probs.append(np.append(np.float32(0), log_probs[row, slots]))  # nothing predicts a first token
            scored.entropies.append(np.append(np.float32(0), entropies[row, slots]))
            if to_branch:
                scored.prefixes.prefixes.append(Prefix(cache, row, np.pad(slots, (0, length - len(slots)))))
        return scored

    def branches(
        self, params: Params, scored: ScorePass, branches: Sequence[Sequence[Branch]], draw_id: Sequence[int]
    ) -> list[list[Rollout]]:
        """See `Sampler.branches`."""
        engine, prefixes = self.engine, scored.prefixes
        assert isinstance(prefixes, ScoredPrefixes), "score the rollouts with to_branch=True first"
        groups = [
            [fork_of(parent, branch, engine.start) for branch in wanted]
            for parent, wanted in zip(scored.rollouts, branches, strict=True)
        ]
        policy = generating(params, engine.mesh, engine.dtype)
        shapes = self.shapes.branches(prefixes.max_rollouts)
        draw = Draw(draw_id, engine.config.temperature)
        return engine.generate(policy, groups, iter(prefixes.prefixes), shapes, draw)

    def take_stats(self) -> GenerationStats:
        return self.engine.take_stats()
