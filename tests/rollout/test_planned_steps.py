"""The programs of a step according to `appo-jax plan` against those of a real step: which, with which shapes, how often."""

from __future__ import annotations

import dataclasses
import gc
import itertools
from collections import Counter
from contextlib import ExitStack
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from growing import random_params

from appo_jax.algorithms import ALGORITHMS, Algorithm, make_algorithm
from appo_jax.components import Components
from appo_jax.config import (
    Architecture,
    BranchingConfig,
    Config,
    EvalConfig,
    LossConfig,
    MeshConfig,
    OptimizerConfig,
    PolicyConfig,
    RolloutConfig,
)
from appo_jax.evaluate import evaluate
from appo_jax.plan.programs import Program, programs
from appo_jax.policy import sharding
from appo_jax.policy.parameters import Params
from appo_jax.reward import Judge
from appo_jax.rollout import engine as engine_module
from appo_jax.rollout import prefixes, tree_sampler
from appo_jax.train import begin
from appo_jax.train_step import train_step
from appo_jax.types import Example, RewardResult

# The jitted functions of a run, where the run looks them up, and which of their arguments tell their programs apart.
WATCHED = {
    "reshard": (sharding, "reshard", ()),
    "prefill": (prefixes, "prefill", (1,)),
    "decode": (engine_module, "decode_segment", (1, 2)),
    "append": (engine_module, "append_tokens", (1, 2, 3)),
    "score": (tree_sampler, "score", (1,)),
}
ROLLOUT = RolloutConfig(
    num_initial=3, budget=6, max_prompt_tokens=12, max_response_tokens=24, max_result_tokens=16, max_tool_calls=2,
    decode_rows=8, max_seconds=120,
)  # fmt: skip
KL = LossConfig(kl_weight=0.1)


def shapes(tree: Any) -> tuple:
    """Shapes and dtypes of a tree's arrays, abstract or not."""
    leaves = [getattr(leaf, "_aval", leaf) for leaf in jax.tree.leaves(tree)]
    return tuple((np.shape(x), str(x.dtype)) for x in leaves)


def size(arrays: Any) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(arrays) if isinstance(x, jax.Array))


def other_trees(config: Config) -> Algorithm:
    """An algorithm that sets the fields of the trees."""
    appo = ALGORITHMS["appo"](config)
    branching = dataclasses.replace(appo.branching, num_branch_points=2)
    return dataclasses.replace(appo, rollout=dataclasses.replace(appo.rollout, budget=9), branching=branching)


class Seen:
    """Records the calls of programs by name and shapes, and the bytes that exist beside their arguments; the programs run as
    usual. `others`: bytes that are not the run's."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, others: int) -> None:
        self.calls: Counter = Counter()
        self.resident: dict[tuple, int] = {}
        self.decode_steps, self.others = 0, others
        for name, (module, function, telling) in WATCHED.items():
            monkeypatch.setattr(module, function, self.watch(name, getattr(module, function), telling))

    def watch(self, name: str, function: Any, telling: tuple[int, ...]) -> Any:
        def watched(*args: Any, **kwargs: Any) -> Any:
            key = name, shapes([args[i] for i in telling])
            self.calls[key] += 1
            beside = size(jax.live_arrays()) - self.others - size(args)
            self.resident[key] = max(self.resident.get(key, 0), beside)
            out = function(*args, **kwargs)
            self.decode_steps += int(out[1]) if name == "decode" else 0
            return out

        return watched


@pytest.fixture(scope="module")
def arch(arch: Architecture) -> Architecture:
    """One layer, because compiling takes nearly all of the time of a step."""
    return dataclasses.replace(arch, num_layers=1)


@pytest.fixture(scope="module")
def params(arch: Architecture) -> Params:
    return random_params(arch)


def planned(config: Config, arch: Any, mesh: Any) -> dict[tuple, Program]:
    """The programs of the plan, by name and shapes."""
    found: dict[tuple, Program] = {}
    for program in programs(config, arch, mesh):
        name = program.name.split(",")[0]
        args, _ = program.trace().args_info
        telling = WATCHED[name][2] if name in WATCHED else (1,)
        key = name, shapes([args[i] for i in telling])
        assert key not in found, "two entries for one program"
        found[key] = program
    return found


CASES = {name: Config(algorithm=name) for name in ALGORITHMS} | {
    "appo, kl in the loss": Config(loss=KL),
    "appo, kl in the reward": Config(loss=dataclasses.replace(KL, kl_in="reward")),
    "appo, once a step": Config(
        branching=BranchingConfig(refresh="step"), loss=dataclasses.replace(KL, kl_in="reward")
    ),
    "appo, in bfloat16": Config(policy=PolicyConfig(compute_dtype="bfloat16")),
    "appo, two loops": Config(branching=BranchingConfig(num_loops=2), rollout=RolloutConfig(budget=12)),
    "appo, other trees": Config(algorithm="other trees"),
    "tree_grpo, two loops": Config(algorithm="tree_grpo", branching=BranchingConfig(num_loops=2), loss=KL),
}


EXAMPLES = [Example(f"q{i}", text, ("x",), "qa", "") for i, text in enumerate(("the fox", "dog", "7", "lazy"))]


def components_of(case: Config, arch: Architecture, tokenizer: Any, executor: Any, budget: int = 6) -> Components:
    config = dataclasses.replace(
        case,
        prompts_per_step=4, prompts_per_minibatch=2, optimizer=OptimizerConfig(learning_rate=1e-3),
        rollout=dataclasses.replace(ROLLOUT, budget=budget), eval=EvalConfig(num_prompts=3),
        branching=dataclasses.replace(case.branching, num_branch_points=1),
        policy=dataclasses.replace(case.policy, architecture=arch, tokenizer="x"),
    )  # fmt: skip
    dtype = jnp.dtype("float32" if config.policy.compute_dtype == "auto" else config.policy.compute_dtype)
    config = dataclasses.replace(config, policy=dataclasses.replace(config.policy, compute_dtype=dtype.name))
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    algorithm = make_algorithm(config)
    # The plan is of the built-in sampler, whichever a run has.
    engine = engine_module.Engine(arch, tokenizer, executor, algorithm.rollout, config.seed, dtype, mesh)
    sampler = tree_sampler.TreeSampler(engine, algorithm.branching)
    dataset: Any = None
    return Components(
        config, dataset, (), EXAMPLES, tokenizer, executor, arch, dtype, mesh, sampler,
        Judge("none", lambda response: RewardResult(0.0, False)), ExitStack(),
    )  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_real_step_runs_what_the_plan_says(name: str, arch, tokenizer, executor, params, monkeypatch) -> None:
    case = CASES[name]
    monkeypatch.setitem(ALGORITHMS, "other trees", other_trees)
    budget = max(6, min(12, case.rollout.budget if "loops" in name else 6))
    components = components_of(case, arch, tokenizer, executor, budget)
    config, mesh, dtype = components.config, components.mesh, components.dtype
    algorithm = make_algorithm(config)
    gc.collect()
    others = size(jax.live_arrays())
    trainer, state = begin(components, jax.tree.map(jnp.copy, params))
    updates: Counter = Counter()

    def update(state: Any, batch: Any) -> Any:
        updates["train", shapes(batch)] += int(batch.used)
        return trainer.update(state, batch)

    plan = {key: program for key, program in planned(config, arch, mesh).items() if "evaluation" not in program.name}
    expected = {key: program.times for key, program in plan.items()}
    seen = Seen(monkeypatch, others)
    watched = dataclasses.replace(trainer, update=update)
    train_step(watched, 0, state, EXAMPLES, itertools.repeat(EXAMPLES))
    found = dict(seen.calls + updates)

    # Appends of shorter results have programs of their own, which the plan leaves out.
    longest = {key for key in expected if key[0] == "append"}
    found = {key: times for key, times in found.items() if key[0] != "append" or key in longest}
    assert found.keys() == expected.keys()
    for key in found:
        # As often as tokens and calls come, an append more, when it is compiled; rows for scores as rollouts fill them.
        if key[0] in ("decode", "append", "score"):
            assert 0 < found[key] <= expected[key] + 1
        elif "loops" in name or algorithm.max_resamples or key[0] == "train":
            # A loop that finds the budget used is left out; some prompts have a spread; rows are filled.
            assert 0 < found[key] <= expected[key]
        else:
            assert found[key] == expected[key], key[0]
    # No more lies beside a program than is planned, except small arrays, and on a CPU the transposed weights of decode steps.
    transposed = size(params) * dtype.itemsize // 4
    for key in plan.keys() & seen.resident.keys():
        copy = transposed if key[0] in ("prefill", "decode", "append") else 0
        assert seen.resident[key] <= plan[key].resident + copy + 4096, key[0]
    assert seen.decode_steps <= sum(times for (kind, _), times in expected.items() if kind == "decode")


def test_an_evaluation_runs_what_the_plan_says(arch, tokenizer, executor, params, monkeypatch) -> None:
    """A row and a prefix for each of three questions; a step has four prompts, with three rollouts each."""
    components = components_of(CASES["appo"], arch, tokenizer, executor)
    gc.collect()
    others = size(jax.live_arrays())
    plan = planned(components.config, arch, components.mesh)
    plan = {key: program for key, program in plan.items() if "evaluation" in program.name}
    assert {program.times for program in plan.values()} == {0}
    seen = Seen(monkeypatch, others)
    evaluate(params, components)
    assert {key for key in seen.calls if key[0] != "append"} == {key for key in plan if key[0] != "append"}
    assert {key for key in plan if key[0] == "append"} <= seen.calls.keys()
    transposed = size(params) * components.dtype.itemsize // 4
    for key, program in plan.items():
        assert seen.resident[key] <= program.resident + transposed + 4096, key[0]
