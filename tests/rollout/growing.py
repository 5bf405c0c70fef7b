"""A tree sampler and a tree grower, combined as in `components.build` and `train`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from appo_jax.config import Architecture, BranchingConfig, RolloutConfig
from appo_jax.policy.parameters import Params, init_params
from appo_jax.rollout import scoring
from appo_jax.rollout.engine import Engine
from appo_jax.rollout.growth import Growth, TreeGrower
from appo_jax.rollout.tree_sampler import TreeSampler
from appo_jax.text.tokenizer import Tokenizer
from appo_jax.tools.executor import ToolExecutor
from appo_jax.types import Example, Rollout, Tree


def make_trees(
    arch: Architecture, tokenizer: Tokenizer, executor: ToolExecutor, rollout: RolloutConfig, branching: BranchingConfig,
    mesh: Mesh | None = None, dtype: Any = jnp.float32,
) -> tuple[TreeSampler, TreeGrower]:  # fmt: skip
    engine = Engine(arch, tokenizer, executor, rollout, seed=0, dtype=dtype, mesh=mesh)
    sampler = TreeSampler(engine, branching)
    return sampler, TreeGrower(sampler, tokenizer, rollout, branching, arch.vocab_size, seed=0)


def random_params(arch: Architecture, seed: int = 1) -> Params:
    """Larger weights than the initialisation's, so that entropies differ from token to token."""
    return jax.tree.map(lambda x: 1.4 * x, init_params(arch, seed))


def log_probs(sampler: TreeSampler, params: Params, rollouts: list[Rollout]) -> list[np.ndarray]:
    """The log-probs of some rollouts, scored together."""
    return scoring.log_probs(sampler, params, [rollouts])[0]


def draw_and_grow(
    sampler: TreeSampler, grower: TreeGrower, params: Params, examples: list[Example], num_initial: int = 3,
    moved: Params | None = None,
) -> tuple[list[Tree], list[list[np.ndarray]], Growth]:  # fmt: skip
    """Initial rollouts and their log-probs under `params`, tree after tree, and the trees grown under `moved`."""
    trees = sampler.initial(params, examples, num_initial, (0, 0))
    old = [log_probs(sampler, params, tree) for tree in trees]
    return trees, old, grower.grow(params if moved is None else moved, trees, old, (1, 0))
