"""Which fields have no effect, against the scores and the advantages themselves."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from appo_jax.advantage.procedural import procedural_advantage
from appo_jax.algorithms import ALGORITHMS, make_algorithm
from appo_jax.branching.rules import RULES
from appo_jax.branching.score import branching_scores
from appo_jax.config import BranchingConfig
from appo_jax.config_io import flatten, load_config, with_fields
from appo_jax.sweep.unused import unused

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.py"
OTHER = {
    "branching.clip_low": 0.5, "branching.clip_high": 1.7, "branching.gate": "literal", "branching.entropy_weight": 0.3,
    "branching.future_weight": 0.2, "advantage.clip_low": 0.5, "advantage.clip_high": 1.7, "advantage.future_weight": 0.2,
}  # fmt: skip


@pytest.fixture(scope="module")
def base():
    return load_config(QUICKSTART)


def values(seed):
    """Ω and entropies of eight rollouts."""
    rng = np.random.default_rng(seed)
    return jnp.exp(jnp.asarray(rng.normal(0, 0.5, (8, 16)), jnp.float32)), jnp.asarray(rng.random((8, 16)), jnp.float32)


@pytest.mark.parametrize("score", RULES)
def test_a_score_uses_the_fields_that_change_it(base, score):
    """A rule that is added passes as it is if it uses all of these fields."""
    future, entropies = values(0)

    def ranks(config, omega=future):
        found = branching_scores(omega, entropies, jnp.ones((8, 16), bool), config.branching)
        return np.lexsort((found.score, found.preferred))

    config = with_fields(base, {"branching.score": score})
    changes = {name for name in OTHER if (ranks(with_fields(config, {name: OTHER[name]})) != ranks(config)).any()}
    assert changes == {name for name in OTHER if name.startswith("branching.")} - unused(config)
    if (ranks(config, values(1)[0]) == ranks(config)).all():  # it does not use Ω, of which tau is the half-life
        assert "branching.tau" in unused(with_fields(config, {"advantage.future_weight": 0.0}))
    else:
        assert "branching.tau" not in unused(with_fields(config, {"advantage.future_weight": 0.0}))


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("fields", [{}, {"advantage.future_weight": 0.0}, {"advantage.scaling": "plain"}], ids=str)
def test_an_advantage_uses_the_fields_that_change_it(base, name, fields):
    config = with_fields(base, {"algorithm": name} | fields)
    future, entropies = values(2)

    def advantage(part, omega=future):
        return np.asarray(procedural_advantage(entropies - 0.5, omega, part))

    part = make_algorithm(config).advantage
    changes = set()
    for field in ("clip_low", "clip_high", "future_weight"):
        other = dataclasses.replace(part, **{field: OTHER[f"advantage.{field}"]})
        if (advantage(other) != advantage(part)).any():
            changes.add(f"advantage.{field}")
    assert changes == {f for f in OTHER if f.startswith("advantage.")} - unused(config)
    if (advantage(part) != advantage(part, values(3)[0])).any():
        assert not {"branching.tau", "advantage.max_ratio"} & unused(config)


def test_what_does_not_branch_has_no_branching(base):
    """FIPO's advantage has a future value, though, and so its half-life."""
    names = {f"branching.{field.name}" for field in dataclasses.fields(BranchingConfig)}
    for name in ALGORITHMS:
        config = with_fields(base, {"algorithm": name})
        if not make_algorithm(config).branches:
            assert names - unused(config) == ({"branching.tau"} if name == "fipo" else set())
        assert unused(config) <= flatten(config).keys()


def test_branches_of_the_old_policy_have_no_future_value(base):
    config = with_fields(base, {"branching.refresh": "step", "advantage.future_weight": 0.0})
    assert {"branching.tau", "branching.clip_low", "branching.clip_high", "branching.gate"} <= unused(config)


def test_without_a_kl_term_its_fields_have_no_effect(base):
    names = {"loss.kl_estimator", "loss.kl_in", "loss.max_k3"}
    assert names <= unused(base)
    assert not names & unused(with_fields(base, {"loss.kl_weight": 0.1}))
