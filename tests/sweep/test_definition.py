"""What a sweep may be, and which points it has."""

import dataclasses
import itertools
from pathlib import Path

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from appo_jax.config import LoRAConfig
from appo_jax.config_io import load_config, save_config, with_fields
from appo_jax.errors import CheckpointError, ConfigError
from appo_jax.run_dir import open_run
from appo_jax.sweep.definition import Sweep, check_sweep, load_sweep

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(scope="module")
def base():
    return with_fields(load_config(CONFIGS / "quickstart.py"), {"eval.every": 2})


def sweep(base, space, **others):
    return Sweep(**({"out": "x", "base": base, "space": space, "seeds": (0, 1), "max_sampled_tokens": 100} | others))


@pytest.mark.parametrize("file", sorted((CONFIGS / "sweeps").glob("*.py")), ids=lambda file: file.stem)
def test_the_sweeps_of_configs_hold_together(file):
    found = load_sweep(file)
    for point in found.queued_points():
        found.point_config(point)


def test_adapters_can_vary(base):
    """The cold start trains all parameters, and is measured before there are adapters."""
    adapted = with_fields(base, {"policy.lora": LoRAConfig()})
    space = {"policy.lora.rank": (4, 8), "policy.lora.alpha": (8.0, 16.0), "policy.lora.base_dtype": ("float32",)}
    check_sweep(sweep(adapted, space))
    assert len(sweep(adapted, space).queued_points()) == 4


def test_a_grid_has_every_possible_point_once(base):
    s = sweep(base, {"branching.num_branch_points": (3, 4), "rollout.num_initial": (4, 16)})
    points = s.queued_points()
    # 16 initial rollouts leave no branch in a budget of 16
    assert points == [{"branching.num_branch_points": b, "rollout.num_initial": 4} for b in (3, 4)]


def test_random_points_are_possible_and_the_same_each_time(base):
    space = {
        "branching.tau": FloatDistribution(4.0, 256.0, log=True), "branching.num_branch_points": IntDistribution(3, 6),
        "rollout.num_initial": (4, 8, 16), "advantage.future_weight": FloatDistribution(0.0, 1.0, step=0.25),
    }  # fmt: skip
    s = sweep(base, space, search="random", trials=30)
    points = s.queued_points()
    assert points == s.queued_points()
    assert len(points) == 30
    assert all(p["rollout.num_initial"] < 16 and 4 <= p["branching.tau"] <= 256 for p in points)
    assert {p["advantage.future_weight"] for p in points} <= {0.0, 0.25, 0.5, 0.75, 1.0}
    assert {p["branching.num_branch_points"] for p in points} == {3, 4, 5, 6}
    assert sum(p["branching.tau"] < 32 for p in points) == pytest.approx(15, abs=8)  # uniform in the logarithm


def test_random_points_are_all_different(base):
    """Once, 20 points of 27 were 14 with 6 copies, whose runs were made again."""
    space = {
        "branching.tau": (8.0, 32.0, 128.0), "branching.clip_high": (1.1, 1.2, 1.5), "advantage.future_weight": (0.0, 0.5, 1.0),
    }  # fmt: skip
    points = [tuple(p.values()) for p in sweep(base, space, search="random", trials=20).queued_points()]
    assert len(set(points)) == 20
    every = [tuple(p.values()) for p in sweep(base, space, search="random", trials=27).queued_points()]
    assert every[:20] == points
    assert set(every) == set(itertools.product(*space.values()))


def test_random_points_do_not_depend_on_the_order_of_the_fields(base):
    """Once, other points were drawn, and the sweep got them in addition."""
    space = {"optimizer.learning_rate": FloatDistribution(1e-5, 1e-3), "branching.tau": FloatDistribution(4.0, 256.0)}
    points = sweep(base, space, search="random", trials=4).queued_points()
    turned = sweep(base, dict(reversed(space.items())), search="random", trials=4).queued_points()
    assert turned == points
    assert list(turned[0]) == ["branching.tau", "optimizer.learning_rate"]


SAME_RUNS = {
    "grpo does not branch": (
        {"algorithm": ("appo", "grpo"), "branching.tau": (8.0, 32.0, 128.0)},
        [("appo", 8.0), ("appo", 32.0), ("appo", 128.0), ("grpo", 8.0)],
    ),
    "b = 0 has no clip": (
        {"advantage.future_weight": (0.0, 0.5), "advantage.clip_high": (1.1, 1.2, 1.5)},
        [(0.0, 1.1), (0.5, 1.1), (0.5, 1.2), (0.5, 1.5)],
    ),
    "the entropy has no clip": (
        {"branching.score": ("product", "entropy"), "branching.clip_high": (1.1, 1.2)},
        [("product", 1.1), ("product", 1.2), ("entropy", 1.1)],
    ),
    "the first value may break a rule": (
        {"branching.clip_low": (1.3, 1.0), "branching.clip_high": (1.2, 1.5), "branching.score": ("entropy", "product")},
        [(1.3, 1.5, "entropy"), (1.3, 1.5, "product"), (1.0, 1.2, "product"), (1.0, 1.5, "product")],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("space", "points"), SAME_RUNS.values(), ids=SAME_RUNS)
def test_the_same_runs_are_one_trial(base, space, points):
    """Once, each combination was a trial, and the analysis of variance took the copies for observations."""
    grid = [tuple(p.values()) for p in sweep(base, space).queued_points()]
    assert sorted(grid) == sorted(points)
    s = sweep(base, space, search="random", trials=len(points))
    drawn = s.queued_points()
    assert {s.form(p) for p in drawn} == {s.form(dict(zip(space, point, strict=True))) for point in points}
    with pytest.raises(ConfigError, match=f"only {len(points)} different points"):
        sweep(base, space, search="random", trials=len(points) + 1).queued_points()


@pytest.mark.parametrize(
    ("space", "others", "message"),
    [
        ({"branching.tao": (1.0,)}, {}, "'branching.tao' is not a field"),
        ({"branching.tau": ("much",)}, {}, r"branching\.tau = 'much'"),
        ({"sft.steps": (1, 2)}, {}, r"'sft\.steps' cannot vary"),
        ({"seed": (1, 2)}, {}, "'seed' cannot vary"),
        ({"eval.every": (1, 2)}, {}, r"'eval\.every' cannot vary"),
        ({"reward.function": ("robust", "official")}, {}, r"'reward\.function' cannot vary"),
        ({"algorithm": ("dapo",), "loss.clip_high": (0.2, 0.4)}, {}, "every point of the grid breaks a rule"),
        ({}, {}, "at least one field"),
        ({"branching.tau": (8.0,)}, {"seeds": (0, 0)}, "twice"),
        ({"branching.tau": (8.0,)}, {"max_sampled_tokens": 0}, "max_sampled_tokens = 0"),
        ({"branching.tau": (8.0,)}, {"max_sampled_tokens": 2e6}, "max_sampled_tokens = 2000000.0"),
        ({"branching.tau": (8.0,)}, {"seeds": 3}, "seeds = 3: expected a tuple"),
        ({"branching.tau": (8.0,)}, {"search": "random", "trials": "3"}, "trials = '3'"),
        ({"branching.tau": (8.0,)}, {"cold_starts": "runs/x"}, "cold_starts = 'runs/x': expected a tuple"),
        (["branching.tau"], {}, "expected values by field"),
        ({"branching.tau": 16.0}, {}, "16.0 given; expected a tuple"),
        ({"branching.tau": ()}, {}, "expected a tuple of values"),
        ({"branching.tau": (16.0, 16.0)}, {}, "has a value twice"),
        ({"branching.tau": (16, 16.0)}, {}, "has a value twice"),
        (
            {"reward.terms": ((), ("mm:f",))},
            {},
            r"'reward\.terms': \(\) given; expected numbers, texts.* arms of a study",
        ),
        ({"branching.tau": CategoricalDistribution((1.0, -1.0))}, {}, r"branching\.tau = -1\.0"),
        ({"branching.tau": [16.0, "32"]}, {}, "'32'"),
        ({"branching.tau": [16.0, -1.0]}, {}, r"branching\.tau = -1\.0"),
        ({"branching.tau": (8.0,)}, {"search": "tpe"}, "trials = 0"),
        ({"branching.tau": FloatDistribution(1.0, 2.0)}, {}, "a grid needs a tuple"),
        (
            {"branching.tau": (8.0, 32.0), "loss.kl_in": ("inside", "outside")},
            {},
            r"loss\.kl_in: without effect at every point of the grid",
        ),
        ({"branching.tau": (8.0,)}, {"objective": "finall"}, "objective = 'finall': expected 'on_the_way', 'final' or"),
        ({"branching.tau": (8.0,)}, {"objective": ""}, "objective = '': expected 'on_the_way', 'final' or"),
        ({"branching.tau": (8.0,)}, {"objective": None}, "objective = None: expected"),
        ({"branching.tau": (8.0,)}, {"maximize": "no"}, "maximize = 'no': expected True or False"),
        ({"branching.tau": (8.0,)}, {"prune": 1}, "prune = 1: expected True or False"),
        ({"rollout.num_initial": (16,)}, {}, "every point of the grid breaks a rule"),
        ({"rollout.num_initial": (16,)}, {"search": "random", "trials": 2}, "trials = 2: only 0 different points"),
        ({"branching.tau": (8.0, 16.0)}, {"search": "random", "trials": 3}, "trials = 3: only 2 different points"),
        ({"rollout.num_initial": (4, 8, 16)}, {"search": "tpe", "trials": 3}, "trials = 3: only 2 different points"),
    ],
)
def test_what_cannot_be_a_sweep_is_named(base, space, others, message):
    with pytest.raises(ConfigError, match=message):
        check_sweep(sweep(base, space, **others))


@pytest.mark.parametrize("values", [(0.2, 0.28, 0.4), (0.28, 0.2), FloatDistribution(0.2, 0.4)])
def test_a_field_that_the_algorithm_sets_cannot_vary(base, values):
    """Not even to the field's default, which a config need not ask for: both trials would be the same."""
    dapo = dataclasses.replace(base, algorithm="dapo")
    with pytest.raises(
        ConfigError, match=r"loss\.clip_high = 0\.\d is not used, because algorithm = 'dapo' sets it to 0\.28"
    ):
        check_sweep(sweep(dapo, {"loss.clip_high": values}, search="random", trials=2))
    both = sweep(base, {"algorithm": ("appo", "dapo"), "loss.clip_high": (0.2, 0.28)})
    assert [tuple(p.values()) for p in both.queued_points()] == [("appo", 0.2), ("appo", 0.28), ("dapo", 0.28)]


def test_a_run_of_a_trial_differs_from_the_base_in_its_point_alone(base):
    s = sweep(base, {"branching.tau": (8.0, 32.0), "optimizer.learning_rate": (1e-4,)})
    config = s.config(7, {"branching.tau": 8.0, "optimizer.learning_rate": 1e-4}, seed=1)
    assert config.branching.tau == 8.0
    assert config.init_from == s.cold_start(1).run_dir
    assert (config.seed, config.max_sampled_tokens, Path(config.run_dir).name) == (1, 100, "0007-1")
    back = dataclasses.replace(
        config, seed=base.seed, run_dir=base.run_dir, init_from=None, steps=base.steps, max_sampled_tokens=0,
        branching=base.branching, optimizer=base.optimizer,
    )  # fmt: skip
    assert back == base


def test_the_seeds_begin_with_the_given_cold_starts_in_turn(base):
    s = sweep(base, {"branching.tau": (8.0,)}, cold_starts=("runs/a", "runs/b"))
    check_sweep(s)
    assert [s.config(0, {"branching.tau": 8.0}, seed).init_from for seed in (0, 1, 2)] == ["runs/a", "runs/b", "runs/a"]
    assert [s.cold_start(seed).seed for seed in (0, 1, 2)] == [0, 1, 0]


def test_a_cold_start_that_is_not_clear_is_named(base):
    space = {"branching.tau": (8.0,)}
    with pytest.raises(ConfigError, match=r"write cold_starts=\('runs/other',\)"):
        check_sweep(sweep(dataclasses.replace(base, init_from="runs/other"), space))
    with pytest.raises(ConfigError, match="the last parts of two paths are equal"):
        check_sweep(sweep(base, space, cold_starts=("runs/a/cold", "runs/b/cold")))
    for name in ("trial-3", "0002-1", "world"):
        with pytest.raises(ConfigError, match=f"'{name}' is the name of a run here.*rename the folder"):
            check_sweep(sweep(base, space, cold_starts=(f"elsewhere/{name}",)))


def test_a_cold_start_of_another_kind_is_named_before_any_worker_begins(base, tmp_path):
    save_config(dataclasses.replace(base, sft=dataclasses.replace(base.sft, steps=7)), tmp_path / "config.json")
    with pytest.raises(ConfigError, match=r"differs in sft.steps; give another folder"):
        check_sweep(sweep(base, {"branching.tau": (8.0,)}, cold_starts=(str(tmp_path),)))


def test_an_average_on_the_way_needs_evaluations_there(base):
    """Once, it was the mean of the accuracies before and after the run, also in the example of the page."""
    ends = with_fields(base, {"eval.every": 0})
    with pytest.raises(ConfigError, match=r"eval\.every = 0: the objective is 'on_the_way'.*or objective='final'"):
        check_sweep(sweep(ends, {"branching.tau": (8.0,)}))
    check_sweep(sweep(ends, {"branching.tau": (8.0,)}, objective="final"))
    check_sweep(sweep(ends, {"branching.tau": (8.0,)}, objective="reward/initial", maximize=False))


def test_an_unknown_search_is_named(base):
    with pytest.raises(ConfigError, match="search = 'bayes': expected grid, random, tpe"):
        check_sweep(sweep(base, {"branching.tau": (8.0,)}, search="bayes", trials=3))


def test_a_file_without_a_sweep_is_named(tmp_path):
    (tmp_path / "s.py").write_text("sweep = 3")
    with pytest.raises(ConfigError, match="module-level `sweep = Sweep"):
        load_sweep(tmp_path / "s.py")
    with pytest.raises(ConfigError, match="no such file"):
        load_sweep(tmp_path / "t.py")


def test_a_run_in_progress_goes_on_when_its_sweep_was_moved(base, tmp_path, monkeypatch):
    """Once, it was refused, because init_from, a path in the sweep's folder, was another one."""
    monkeypatch.chdir(tmp_path)
    space = {"branching.tau": (8.0, 32.0)}
    old = sweep(base, space, out=str(tmp_path / "old"))
    with open_run(old.config(0, {"branching.tau": 8.0}, 0)) as run:
        run.metrics.write_text('{"step": 1}\n')
        (run.checkpoints / "rl").mkdir()
    (tmp_path / "old").rename(tmp_path / "new")
    new = sweep(base, space, out="new")
    config = new.config(0, {"branching.tau": 8.0}, 0)
    with open_run(config) as run:
        assert run.continued
        run.keep(config)
    assert load_config(tmp_path / "new/runs/0000-0") == config
    others = sweep(base, space, out="new", cold_starts=("cold-0", "cold-1")).config(0, {"branching.tau": 8.0}, 0)
    for wrong, field in ((others, "init_from"), (new.config(0, {"branching.tau": 32.0}, 0), r"branching\.tau")):
        with pytest.raises(CheckpointError, match=rf"holds a run of another config:\n  {field}: "):
            open_run(wrong)


def test_a_tilde_in_the_folders_of_a_sweep_is_the_users_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    imports = "from appo_jax.config_io import *\nfrom appo_jax.sweep.definition import Sweep\n"
    config = f"with_fields(load_config({str(CONFIGS / 'quickstart.py')!r}), {{'eval.every': 1, 'policy.tokenizer': '~/t.model'}})"
    fields = "space={'branching.tau': (8.0, 32.0)}, seeds=(0,), max_sampled_tokens=9, cold_starts=('~/cold',)"
    (tmp_path / "s.py").write_text(f"{imports}sweep = Sweep('~/out', {config}, {fields})")
    found = load_sweep(tmp_path / "s.py").config(0, {"branching.tau": 8.0}, 0)
    assert found.run_dir == f"{tmp_path}/out/runs/0000-0"
    assert (found.init_from, found.policy.tokenizer) == (f"{tmp_path}/cold", f"{tmp_path}/t.model")
