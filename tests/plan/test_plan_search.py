"""`appo-jax plan`: lengths of a real run's rollouts, and the search for the fastest config that fits."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from appo_jax.config import MeshConfig, OptimizerConfig, RolloutConfig
from appo_jax.config_io import load_config
from appo_jax.dumps import write_dump
from appo_jax.errors import ConfigError, DataError, PlanError
from appo_jax.plan import report
from appo_jax.plan.lengths import Lengths, RolloutLengths
from appo_jax.plan.search import neighbours, search
from appo_jax.plan.topology import CHIPS, GIB
from appo_jax.types import Example, Outcome, Rollout, StopReason, ToolCall

ROOT = Path(__file__).parents[2]
CONFIG = load_config(ROOT / "configs/qwen2_5_7b_reasoning.py")


# ---------------------------------------------------------------- lengths


@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=9), drawn=st.integers(1, 60), rows=st.integers(1, 20))
def test_rows_are_never_idle_while_a_rollout_waits(lengths, drawn, rows):
    """So the last row ends at most one rollout after the mean row (Graham's bound), and no earlier than it."""
    steps = Lengths(tuple(lengths), 0, 0, 0).decode_steps(drawn, rows)
    least = drawn * min(lengths) / rows
    most = drawn * max(lengths) / rows + max(lengths)
    assert max(least, min(lengths)) <= steps <= most
    assert Lengths(tuple(lengths), 0, 0, 0).decode_steps(drawn, drawn) <= max(lengths)


@pytest.mark.parametrize(("drawn", "rows", "steps"), [(8, 8, 7), (9, 8, 14), (16, 8, 14), (3, 8, 7)])
def test_equal_rollouts_come_in_waves(drawn, rows, steps):
    assert Lengths((7,), 0, 0, 0).decode_steps(drawn, rows) == steps


def test_lengths_are_those_of_the_runs_own_tokens(tmp_path):
    def rollout(node, length, fork, calls, parent=None):
        sampled = np.arange(length) >= 2  # a prompt of two tokens
        sampled[4] = False  # a tool result
        made = tuple(ToolCall("search", "q", "r", Outcome.OK, 0.0, at - 1, at, {}) for at in calls)
        zeros = np.zeros(length, np.float32)
        return Rollout(
            Example("e", "?", ("1",), "qa", ""), np.zeros(length, np.int32), 2, sampled, zeros, zeros,
            StopReason.ANSWERED, made, node, parent=parent, fork=fork,
        )  # fmt: skip

    # Sampled of its own: 5 of 8, and from token 6 on 4 of 10, which has one call of its own and one of its parent.
    write_dump(tmp_path / "rollouts", 1, [[rollout(0, 8, None, [5]), rollout(1, 10, 6, [5, 9], parent=0)]], str)
    config = RolloutConfig(max_response_tokens=100, max_tool_calls=5)
    lengths = RolloutLengths.of_run(tmp_path, config)
    assert lengths == RolloutLengths(Lengths((5,), 1.0, 2.0, 3.0), Lengths((4,), 1.0, 6.0, 2.0))
    short = dataclasses.replace(config, max_response_tokens=3)
    assert RolloutLengths.of_run(tmp_path, short).initial.sampled == (3,)
    with pytest.raises(DataError, match="takes the directory of a run"):
        RolloutLengths.of_run(tmp_path / "nothing", config)


# ---------------------------------------------------------------- search

ZERO = {f.name: 0 for f in dataclasses.fields(report.Need)} | {"collectives": {}, "counted": "", "fields": ""}


def plan_with(seconds: float, gib: float) -> report.Plan:
    chip = CHIPS["v5e"]
    one = report.Need(
        **(ZERO | {"name": "all", "refused": False, "times": 1, "peak": gib * GIB, "flops": seconds * chip.flops})
    )
    return report.Plan("v5e:8x8", 64, chip, (one,))


def landscape(config) -> report.Plan:
    """Wider tensor parallelism is slower; more rows are faster and larger; what is computed again is smaller and slower."""
    o, again = config.optimizer, {"none": 1.0, "matmuls": 1.2, "layers": 1.4}[config.optimizer.remat]
    seconds = 100 * again + 30 * config.mesh.tensor + 2000 / config.rollout.decode_rows + 160 / o.micro_batch
    gib = (
        2 + 40 / config.mesh.tensor / config.mesh.fsdp + config.rollout.decode_rows / 100 + o.micro_batch / again**6 / 8
    )
    return plan_with(seconds, gib)


def test_the_search_climbs_to_the_best_config_that_fits():
    better = []
    found = search(CONFIG, landscape, 60, lambda config, plan: better.append(plan.step_s))
    assert found.finished
    assert found.plan.fits
    assert found.plan.step_s < landscape(CONFIG).step_s
    assert better == sorted(better, reverse=True), "every step is uphill"
    assert all(
        not landscape(other).fits or landscape(other).step_s >= found.plan.step_s for other in neighbours(found.config)
    )
    assert "--mesh.tensor" in found.changes(CONFIG)


def test_from_a_config_that_does_not_fit_the_search_goes_where_it_does():
    large = dataclasses.replace(CONFIG, rollout=dataclasses.replace(CONFIG.rollout, decode_rows=192 * 16))
    assert not landscape(large).fits
    assert search(large, landscape, 60, lambda *_: None).plan.fits


def test_a_plan_that_the_compiler_refused_is_not_better_than_one_that_is_a_little_too_large():
    """The peak of a refused program is a figure of the compiler's message, which may be only a part of what it needs."""

    def refused_at(gib):
        plan = plan_with(1.0, gib)
        return dataclasses.replace(plan, needs=(dataclasses.replace(plan.needs[0], refused=True),))

    too_large, refused = plan_with(1.0, 16.2), refused_at(9.0)  # a v5e has 16 GiB
    assert not too_large.fits
    assert search(CONFIG, lambda c: too_large if c == CONFIG else refused, 60, lambda *_: None).config == CONFIG
    assert search(CONFIG, lambda c: refused if c == CONFIG else too_large, 60, lambda *_: None).plan is too_large
    smaller = refused_at(8.0)
    assert search(CONFIG, lambda c: refused if c == CONFIG else smaller, 60, lambda *_: None).plan is smaller


@pytest.mark.parametrize(("minutes", "tried"), [(25, 4), (6, 1), (0, 1), (float("inf"), 8)])
def test_the_search_ends_in_time_with_the_best_config_so_far(monkeypatch, minutes, tried):
    """The first plan takes 6 minutes, the others 5: no plan is begun that could end after the time is over."""
    now = [1000.0]
    monkeypatch.setattr("appo_jax.plan.search.time", SimpleNamespace(monotonic=lambda: now[0]))

    def slowly(config):
        now[0] += 60 * (6 if config == CONFIG else 5)
        return landscape(config)

    found = search(CONFIG, slowly, 60 * minutes, lambda *_: None)
    assert now[0] - 1000 <= 60 * max(6, minutes)
    assert found.tried == tried or (minutes > 25 and found.tried >= tried)
    assert found.finished == (minutes > 25)
    assert found.plan.step_s <= landscape(CONFIG).step_s


def test_what_the_devices_do_not_take_is_passed_over():
    def only_tensor_four(config):
        if config.mesh.tensor != 4:
            raise ConfigError("mesh")
        return landscape(config)

    assert search(CONFIG, only_tensor_four, 60, lambda *_: None).config.mesh.tensor == 4


def test_what_the_compiler_fails_on_is_passed_over_and_named():
    def fails_on_more_rows(config):
        if config.rollout.decode_rows > CONFIG.rollout.decode_rows:
            raise PlanError("decode: the compiler failed with JaxRuntimeError: INTERNAL")
        return landscape(config)

    found = search(CONFIG, fails_on_more_rows, 60, lambda *_: None)
    assert found.finished
    assert found.plan.step_s < landscape(CONFIG).step_s
    assert found.failed
    doubled = f"--rollout.decode-rows {2 * CONFIG.rollout.decode_rows}"
    assert all(doubled in options and "INTERNAL" in e for options, e in found.failed.items())
    assert any(name.startswith("not compiled, --") for name in found.report(CONFIG))
    with pytest.raises(PlanError):
        search(CONFIG, lambda config: fails_on_more_rows(wider(config)), 60, lambda *_: None)


def wider(config):
    return dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, decode_rows=4096))


def test_neighbours_are_valid_and_keep_the_devices():
    small = dataclasses.replace(
        CONFIG, mesh=MeshConfig(data=2, fsdp=8, tensor=4), optimizer=OptimizerConfig(micro_batch=16, remat="matmuls")
    )
    others = list(neighbours(small))
    assert {(c.mesh.data * c.mesh.fsdp * c.mesh.tensor) for c in others} == {64}
    assert {c.optimizer.remat for c in others} == {"none", "matmuls", "layers"}
    assert {c.optimizer.micro_batch for c in others} == {16, 32}  # 8 rows cannot be split over 16 devices
    assert small not in others
