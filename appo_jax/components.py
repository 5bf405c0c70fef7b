"""Builds the objects that every phase of a run uses: data, tokenizer, tools, the policy's architecture and initial weights,
reward, sampler."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from appo_jax import distributed
from appo_jax.algorithms import make_algorithm
from appo_jax.checkpoint_read import require_meta
from appo_jax.config import Architecture, Config
from appo_jax.data.demonstrations import introduce
from appo_jax.data.pipeline import check_prompts
from appo_jax.data.source import Dataset, load_dataset
from appo_jax.errors import CheckpointError, DataError
from appo_jax.policy import weights
from appo_jax.policy.architecture import architecture_of, check_positions, for_tokenizer
from appo_jax.policy.parameters import Params, init_params
from appo_jax.policy.sharding import make_mesh, param_shardings, use_mesh
from appo_jax.reward import Judge, Judgement, make_reward
from appo_jax.reward.overlong import overlong_penalty
from appo_jax.reward.response import Response, prompt_opening
from appo_jax.rollout.engine import Engine
from appo_jax.rollout.sampler import Sampler
from appo_jax.rollout.tree_sampler import TreeSampler
from appo_jax.text.tokenizer import Tokenizer, check_tags, lacks_tokenizer, policy_tokenizer, vocabulary
from appo_jax.text.train_tokenizer import structure
from appo_jax.tools.build import build_executor
from appo_jax.tools.executor import ToolExecutor
from appo_jax.tools.format import offer_tools
from appo_jax.types import Example, Rollout, Segment, stretches

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Components:
    """All objects of a run except parameters and optimizer state."""

    config: Config
    dataset: Dataset
    train: Sequence[Example]
    held_out: Sequence[Example]
    tokenizer: Tokenizer
    executor: ToolExecutor
    arch: Architecture
    dtype: Any
    mesh: Mesh
    sampler: Sampler
    reward: Judge
    resources: contextlib.ExitStack  # the tools, and the mesh in use

    def __enter__(self) -> Components:
        return self

    def __exit__(self, *exc: object) -> None:
        self.resources.close()


def build(config: Config) -> Components:
    """Build all components. Data and tokenizer come first, so that their errors are reported before tools or devices
    are started."""
    dataset = load_dataset(config.data)
    for name, examples in (("training", dataset.train), ("held-out", dataset.held_out)):
        if not examples:
            raise DataError(
                f"data.source = {config.data.source!r} has no {name} question (data.path = {config.data.path!r}, data.held_out = "
                f"{config.data.held_out!r}, data.drop = {list(config.data.drop)}); correct these"
            )
    if lacks_tokenizer(config.policy):
        raise DataError(
            f"{config.policy.tokenizer}: no such tokenizer; train it on the data's questions and demonstrations with "
            "`appo-jax data world --config FILE` (the config and overrides of this run)"
        )
    tokenizer = policy_tokenizer(config.policy)
    arch = for_tokenizer(architecture_of(config.policy), tokenizer.vocab_size, tokenizer.missing_ids)
    check_positions(arch, config)
    with contextlib.ExitStack() as stack:
        executor = stack.enter_context(build_executor(config.tools, dataset.documents))
        tokenizer = offer_tools(executor.call_format, tokenizer)
        check_tags(tokenizer, structure(executor.call_format.pieces))
        if config.policy.path is None:  # random weights: the tokenizer was trained for the run
            _warn_of_long_calls(tokenizer, executor)
        train, held_out = (_prompts(part, tokenizer, executor, config) for part in (dataset.train, dataset.held_out))
        mesh, dtype = make_mesh(config.mesh), compute_dtype(config)
        stack.enter_context(use_mesh(mesh))
        sampler = make_sampler(config, arch, tokenizer, executor, dtype, mesh)
        reward = make_reward(config.reward, executor.call_format, Path(config.run_dir))
        stack.callback(reward.close)
        reward.try_out(train[0])
        return Components(
            config, dataset, train, held_out, tokenizer, executor, arch, dtype, mesh, sampler, reward, stack.pop_all()
        )  # fmt: skip


def make_sampler(
    config: Config, arch: Architecture, tokenizer: Tokenizer, executor: ToolExecutor, dtype: Any, mesh: Mesh
) -> Sampler:
    """The sampler of a run, for the rollouts and branches of its algorithm."""
    algorithm = make_algorithm(config)
    engine = Engine(arch, tokenizer, executor, algorithm.rollout, config.seed, dtype, mesh)
    return TreeSampler(engine, algorithm.branching)


def require_vocabulary(meta: Mapping[str, Any], tokenizer: Tokenizer, folder: Path) -> None:
    """Raises CheckpointError if the policy of a checkpoint in `folder`, with this `meta`, was trained with other token ids."""
    require_meta(meta, ("tokenizer",), folder)
    if meta["tokenizer"] != (now := vocabulary(tokenizer)):
        raise CheckpointError(
            f"{folder}: its policy was trained with another tokenizer ({meta['tokenizer']}) than there is now ({now}), so its ids "
            "would be read as other text; put back the file or folder that policy.tokenizer (or policy.path) named then"
        )


def _warn_of_long_calls(tokenizer: Tokenizer, executor: ToolExecutor) -> None:
    """Warn if the tokenizer was trained for another call format: calls work, but take many tokens."""
    lengths = {piece: len(tokenizer.encode(piece)) for piece in executor.call_format.pieces}
    if lengths and (longest := max(lengths, key=lambda piece: lengths[piece])) and lengths[longest] > 4:
        log.warning(
            "policy.tokenizer writes %r of tools.call_format in %d tokens; train one for this format and these tools with "
            "`appo-jax data world`, and another --policy.tokenizer",
            longest,
            lengths[longest],
        )


def _prompts(
    examples: Sequence[Example], tokenizer: Tokenizer, executor: ToolExecutor, config: Config
) -> tuple[Example, ...]:
    """The examples with the system prompts that the policy will see; those that are too long are dropped or fatal
    (`data.malformed`)."""
    instructions = executor.call_format.instructions()
    introduced = [introduce(example, instructions) for example in examples]
    return check_prompts(introduced, tokenizer, config.rollout.max_prompt_tokens, config.data.malformed)


def compute_dtype(config: Config) -> Any:
    """The dtype of matmuls: as configured, or by platform."""
    if config.policy.compute_dtype != "auto":
        return jnp.dtype(config.policy.compute_dtype)
    return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)


def initial_params(config: Config, arch: Architecture, mesh: Mesh) -> Params:
    """The policy that the run starts from, in the training layout: a folder's weights, or random ones."""
    shardings = param_shardings(arch, mesh, "train") if mesh.size > 1 else None
    if config.policy.path is not None:
        return weights.load(config.policy.path, shardings, dtype=jnp.float32)
    return init_params(arch, config.seed, shardings)


def response_of(rollout: Rollout, tokenizer: Tokenizer) -> Response:
    """A rollout in the form that reward functions get."""
    start = rollout.prompt_length
    segments = tuple(
        Segment(tokenizer.decode(rollout.tokens[a:b].tolist()), bool(rollout.sampled[a]))
        for a, b in stretches(rollout.sampled, start)
    )
    return Response(
        segments, rollout.example.golds, rollout.example.kind, frozenset(call.name for call in rollout.calls),
        rollout.stop_reason, rollout.example.question, prompt_opening(rollout.tokens[:start].tolist(), tokenizer),
    )  # fmt: skip


def give_rewards(rollouts: Sequence[Rollout], components: Components, overlong_buffer: int = 0) -> None:
    """Fill in `reward`, `correct` and `reward_detail` of finished rollouts, including the punishment of overlong ones.
    Each host judges its share of the rollouts and sends the results to the others. A rollout without a finite reward
    keeps NaN and `reward_error`, and groups leave it out.
    """
    limit = components.config.rollout.max_response_tokens
    mine = [i for i, rollout in enumerate(rollouts) if rollout.host == distributed.host()]
    judgements = components.reward.each([response_of(rollouts[i], components.tokenizer) for i in mine])
    of_host = [(i, dataclasses.astuple(judgement)) for i, judgement in zip(mine, judgements, strict=True)]
    of_all = itertools.chain.from_iterable(distributed.exchange(of_host))
    judged = [(rollouts[i], Judgement(*fields)) for i, fields in of_all]
    components.reward.report([(rollout.example.id, judgement) for rollout, judgement in judged])
    for rollout, judgement in judged:
        rollout.reward, rollout.correct = judgement.reward, judgement.correct
        rollout.reward_detail, rollout.reward_error = judgement.detail, judgement.error
        if overlong_buffer:
            penalty = overlong_penalty(rollout.length - rollout.prompt_length, limit, overlong_buffer)
            rollout.reward += penalty
            rollout.reward_detail["overlong"] = penalty
