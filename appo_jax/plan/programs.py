"""Every program of a run, as the run compiles it: the very jitted functions, given shapes and shardings instead of arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from appo_jax.algorithms import make_algorithm
from appo_jax.config import Architecture, Config
from appo_jax.learner.optimizer import rl_optimizer
from appo_jax.learner.step import StepSpec, TrainBatch, TrainState, make_train_step
from appo_jax.policy import sharding
from appo_jax.policy.attention import Places
from appo_jax.policy.constraints import row_shards
from appo_jax.policy.parameters import abstract_params
from appo_jax.policy.score import prefill, score
from appo_jax.rollout.decode import AppendBatch, DecodeSpec, StopTables, Until, append_tokens, decode_segment
from appo_jax.rollout.engine import SEGMENT_STEPS
from appo_jax.rollout.shapes import GenerationShapes, Shapes
from appo_jax.rollout.state import Prefixes, empty_prefixes, empty_state

AUTOMATON_STATES = 32  # of the stop strings of two tools, and some more


@dataclasses.dataclass(frozen=True)
class Program:
    """One program, what a training step does with it, and what lies in memory beside it."""

    name: str
    trace: Callable[[], Any]  # -> jax.stages.Traced
    times: int  # runs in one training step, every rollout at its full length
    counted: str  # how `times` is made up
    beside: int  # bytes per chip that the run keeps meanwhile and that are no argument of the program
    fields: str  # config fields that make it smaller
    steps: int = 1  # of the loop of unknown length in it: its work is counted by the step


def programs(config: Config, arch: Architecture, mesh: Mesh) -> Iterator[Program]:
    """The programs of one training step, in their order.

    A rollout is taken to use all of `max_response_tokens`: times and memory are those of the longest step.
    """
    rollout, branching, algorithm = config.rollout, config.branching, make_algorithm(config)
    dtype = jnp.dtype("bfloat16" if config.policy.compute_dtype == "auto" else config.policy.compute_dtype)
    minibatches = config.prompts_per_step // config.prompts_per_minibatch
    rows = config.prompts_per_minibatch * algorithm.initial  # of a mini-batch
    shapes = Shapes(rollout, branching, row_shards(mesh))
    length = shapes.rollout_length
    by_row, whole = sharding.batch_sharding(mesh), NamedSharding(mesh, PartitionSpec())

    def array(shape: tuple[int, ...], dtype: Any, where: NamedSharding = whole) -> Any:  # stands for an array
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    def placed(tree: Any) -> Any:
        """Caches and rows of a generation: first axis over data and fsdp, key/value heads over tensor."""
        caches = sharding.cache_sharding(mesh)

        def one(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            return array(x.shape, x.dtype, caches if x.ndim == 4 else whole)

        return jax.tree.map(one, tree)

    # ---- what lives as long as the run
    optimizer = rl_optimizer(config.optimizer)
    params = abstract_params(arch)
    state = jax.eval_shape(lambda p: TrainState(p, optimizer.init(p)), params)
    state = sharding.annotate(state, sharding.state_shardings(state, arch, mesh), mesh)
    copy = jax.tree_util.tree_map_with_path(  # as sharding.reshard makes it
        lambda path, x: jax.ShapeDtypeStruct(x.shape, x.dtype if path[-1].key.endswith("norm") else dtype), params
    )
    copy = sharding.annotate(copy, sharding.param_shardings(arch, mesh, "generate"), mesh)
    reference = on_chip(state.params) if config.loss.kl_weight > 0 else 0
    resident, moments = on_chip(state) + reference, on_chip(state.opt_state) + reference

    def train() -> Any:
        spec = StepSpec(
            arch, config.loss, rollout.temperature, config.optimizer.micro_batch, dtype, config.optimizer.remat
        )
        floats = array((rows, length), jnp.float32, by_row)
        tokens = array((rows, length), jnp.int32, by_row)
        batch = TrainBatch(tokens, floats, floats, floats, floats if config.loss.kl_weight > 0 else None)
        step: Any = make_train_step(optimizer, spec)  # jitted
        return step.trace(state, batch)

    yield Program(
        "reshard", lambda: sharding.reshard.trace(state.params, mesh, dtype), minibatches + 1,
        f"{minibatches} mini-batches + the step's start", moments, "mesh.tensor",
    )  # fmt: skip

    # ---- initial rollouts
    first = shapes.initial(config.prompts_per_step, algorithm.initial)
    prompts = shapes.prefill_rows(config.prompts_per_step)
    waves = -(-config.prompts_per_step // prompts)
    yield Program(
        "prefill",
        lambda: prefill.trace(copy, array((prompts, rollout.max_prompt_tokens), jnp.int32, by_row), arch=arch, dtype=dtype),
        waves, f"{config.prompts_per_step} prompts, {prompts} at a time", resident,
        "rollout.max_prompt_tokens, rollout.decode_rows",
    )  # fmt: skip

    def generation(of: GenerationShapes) -> tuple[Prefixes, Any]:
        """Prefixes and rows as the engine holds them."""
        prefixes = jax.eval_shape(lambda: empty_prefixes(arch, of.slots, of.prefix_length, dtype))
        rows = jax.eval_shape(lambda: empty_state(arch, of.rows, of.suffix_length, dtype))
        places = Places(array((of.rows, 2), jnp.int32), array((of.slots, of.columns), jnp.int32))
        return Prefixes(placed(prefixes), places), placed(rows)

    def decode(of: GenerationShapes) -> Any:
        prefixes, rows = generation(of)
        spec = DecodeSpec(arch, dtype, rollout.temperature, rollout.top_k, rollout.top_p, (0,))
        states = array((AUTOMATON_STATES, arch.vocab_size), np.uint8), array((AUTOMATON_STATES,), jnp.int32)
        number = array((), jnp.int32)
        return decode_segment.trace(copy, prefixes, rows, StopTables(*states), Until(number, number), spec=spec)

    prompt_caches = on_chip(
        placed(jax.eval_shape(lambda: empty_prefixes(arch, prompts, rollout.max_prompt_tokens, dtype)))
    )
    fills = -(-config.prompts_per_step * algorithm.initial // first.rows)
    yield Program(
        "decode, initial", lambda: decode(first),
        fills * rollout.max_response_tokens, f"{fills} × {first.rows} rows × {rollout.max_response_tokens} tokens",
        resident + prompt_caches, "rollout.decode_rows, rollout.max_response_tokens", SEGMENT_STEPS,
    )  # fmt: skip

    # ---- scores
    max_scored = shapes.max_scored(config.prompts_per_minibatch, algorithm.initial)  # by each branching loop
    most, loops = max_scored[-1], len(max_scored) if algorithm.branches else 0
    parents = shapes.score_rows(most)
    passes = -(-most // parents)
    one_cache = on_chip(placed(jax.eval_shape(lambda: empty_prefixes(arch, parents, length, dtype))))
    scorings = 1 + (config.loss.kl_weight > 0) + loops
    yield Program(
        "score",
        lambda: score.trace(
            state.params, array((parents, length), jnp.int32, by_row), arch=arch, temperature=rollout.temperature, dtype=dtype
        ),
        passes * minibatches * scorings, f"{passes} × {parents} rollouts × {minibatches} mini-batches × {scorings}",
        moments + (passes - 1) * one_cache, "rollout.decode_rows, rollout.max_response_tokens",
    )  # fmt: skip

    # ---- branches
    last, kept = first, prompt_caches
    if algorithm.branches:
        last, kept = shapes.branches(most), passes * one_cache
        drawn = config.prompts_per_minibatch * (rollout.budget - algorithm.initial)
        fills = -(-drawn // last.rows) * minibatches
        yield Program(
            "decode, branches", lambda: decode(last), fills * rollout.max_response_tokens,
            f"{fills} × {last.rows} rows × {rollout.max_response_tokens} tokens", resident + kept,
            "rollout.decode_rows, rollout.max_response_tokens", SEGMENT_STEPS,
        )  # fmt: skip

    appended = last.append_rows

    def append() -> Any:
        prefixes, rows = generation(last)
        chunk = array((appended, rollout.max_result_tokens), jnp.int32)
        some = array((appended,), jnp.int32)
        return append_tokens.trace(copy, prefixes, rows, AppendBatch(some, chunk, some), arch=arch, dtype=dtype)

    calls = config.prompts_per_step * rollout.budget * rollout.max_tool_calls
    yield Program(
        "append", append, -(-calls // appended),
        f"{config.prompts_per_step} prompts × {rollout.budget} rollouts × {rollout.max_tool_calls} calls / {appended}",
        resident + kept, "rollout.max_result_tokens, rollout.decode_rows",
    )  # fmt: skip
    yield Program(
        "train", train, minibatches, f"{minibatches} mini-batches of {rows} rollouts", reference,
        "optimizer.micro_batch, mesh.fsdp, mesh.tensor",
    )  # fmt: skip


def on_chip(tree: Any) -> int:
    """Bytes per chip of a tree of sharded `ShapeDtypeStruct`."""

    def size(x: jax.ShapeDtypeStruct) -> int:
        shape = x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)
        # PRNG keys are two words.
        return int(np.prod(shape)) * (8 if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x.dtype.itemsize)

    return sum(size(x) for x in jax.tree.leaves(tree))
