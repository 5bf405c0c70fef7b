"""Effects of fields: against scipy's analysis of variance, and on data whose truth is known."""

import dataclasses
import itertools

import numpy as np
import pytest
from scipy import stats

from appo_jax.study.statistics import holm
from appo_jax.sweep.effects import Runs, field_effects, in_order, levels_of, noise


def grid(fields, seeds, truth, rng, deviation=0.01):
    points, which, values, trials = [], [], [], []
    for trial, choice in enumerate(itertools.product(*fields.values())):
        point = dict(zip(fields, choice, strict=True))
        for seed in range(seeds):
            points.append(point)
            which.append(seed)
            trials.append(trial)
            values.append(truth(point) + 0.05 * seed + rng.normal(0, deviation))
    return Runs(points, trials, which, np.array(values))


def test_one_field_without_seeds_is_the_classic_analysis_of_variance():
    rng = np.random.default_rng(0)
    groups = [rng.normal(mean, 1.0, 6) for mean in (0.0, 0.5, 1.5)]
    points = [{"x": i} for i, group in enumerate(groups) for _ in group]
    runs = Runs(points, range(18), [0] * 18, np.concatenate(groups))
    [effect] = field_effects(runs, ["x"]).fields
    expected = stats.f_oneway(*groups)
    assert effect.p == pytest.approx(expected.pvalue)
    between = sum(len(g) * (g.mean() - runs.values.mean()) ** 2 for g in groups)
    assert effect.share == pytest.approx(between / np.square(runs.values - runs.values.mean()).sum())


def test_the_field_that_matters_is_first_and_the_one_that_does_not_stays_open():
    rng = np.random.default_rng(1)
    fields = {"useless": (1, 2, 3), "tau": (8.0, 32.0), "gate": ("a", "b")}
    runs = grid(fields, 3, lambda p: 0.03 * (p["tau"] == 32.0) + 0.1 * (p["gate"] == "b"), rng)
    effects = field_effects(runs, list(fields)).fields
    assert [e.name for e in effects[:2]] == ["gate", "tau"]
    assert effects[0].p < 0.001
    assert effects[1].p < 0.001
    assert effects[2].p > 0.05
    assert effects[0].levels == ("a", "b")
    assert effects[0].means[1] - effects[0].means[0] == pytest.approx(0.1, abs=0.01)


def test_noise_is_what_is_left_of_trials_and_seeds():
    rng = np.random.default_rng(2)
    truth = rng.normal(size=40)
    runs = grid({"x": tuple(range(40))}, 10, lambda point: truth[point["x"]], rng, deviation=0.02)
    deviation, freedom = noise(runs)
    assert freedom == 400 - 40 - 10 + 1
    assert deviation == pytest.approx(0.02, rel=0.1)


def test_equal_differences_count_as_half_a_step_of_noise():
    """Two trials of 64 questions, of which both seeds answer two more in one. Once, p was below 0.001."""
    values = np.array([45, 30, 47, 32]) / 64
    runs = Runs([{"x": x} for x in (1, 1, 2, 2)], [0, 0, 1, 1], [0, 1, 0, 1], values)
    assert noise(runs) == pytest.approx((1 / 64, 1))
    # a step of 1/8 between trials of two seeds: the rest has at least (1/16) / √2
    seeds = [0, 1] * 4
    points = [{"x": x, "y": y} for x in (1, 2) for y in (1, 2) for _ in range(2)]
    both = Runs(points, np.repeat(range(4), 2), seeds, np.repeat([0.5, 0.625, 0.75, 0.875], 2))
    found = field_effects(both, ["x", "y"])
    assert (found.deviation, found.freedom) == pytest.approx((1 / 16 / np.sqrt(2), 1))
    x, y = found.fields
    assert (x.name, y.name) == ("x", "y")
    # sums of squares 4 · (1/8)² and 4 · (1/16)², each over the square of that: F = 32 and 8, with 1 and 1 degrees of freedom
    assert (x.p, y.p) == pytest.approx(holm([stats.f.sf(32, 1, 1), stats.f.sf(8, 1, 1)]))


def test_the_shares_of_the_variance_add_up():
    """Once, both fields explained 100 % here."""
    values = np.array([0.50, 0.53, 0.56, 0.59])
    points = [{"a": a, "b": b} for a in (1, 2) for b in (1, 2)]
    a, b = field_effects(Runs(points, range(4), [0] * 4, values), ["a", "b"]).fields
    # of 4 · (0.03² + 0.015²)
    assert (a.name, a.share, b.name, b.share) == ("a", pytest.approx(0.8), "b", pytest.approx(0.2))


def test_too_few_runs_say_nothing_instead_of_something_wrong():
    effects = field_effects(Runs([{"x": 1}, {"x": 2}], [0, 1], [0, 0], np.array([0.1, 0.2])), ["x"])
    assert np.isnan(effects.fields[0].p)
    assert np.isnan(effects.deviation)
    assert np.isnan(noise(Runs([{"x": 1}], [0], [0], np.array([0.1])))[0])


@pytest.mark.parametrize("value", [0.0, 0.1, 0.3])
def test_where_all_runs_are_equal_no_field_matters(value):
    runs = grid({"x": (1, 2, 3), "y": (1, 2)}, 2, lambda point: 0.0, np.random.default_rng(0))
    runs = dataclasses.replace(runs, values=np.full(12, value))
    effects = field_effects(runs, ["x", "y"])
    assert [(e.share, e.p) for e in effects.fields] == [(0.0, 1.0)] * 2
    assert np.isnan([effects.deviation, noise(runs)[0]]).all()  # it is not known, and not 0


@pytest.mark.parametrize("truth", [lambda p: p["x"], lambda p: (p["x"] - 0.5) ** 2, lambda p: p["x"] * p["z"]])
def test_seeds_of_a_trial_do_not_make_a_useless_field_matter(truth):
    """The thirds of `x` leave a part of its effect in the trial, and each seed repeats that part."""
    rng = np.random.default_rng(4)
    found = 0
    for _ in range(200):
        points = [dict(zip("xyz", rng.random(3), strict=True)) for _ in range(16)]
        runs = Runs(
            [point for point in points for _ in range(5)], np.repeat(np.arange(16), 5), np.tile(np.arange(5), 16),
            np.array([truth(point) + rng.normal(0, 0.02) for point in points for _ in range(5)]),
        )  # fmt: skip
        effects = {e.name: e.p for e in field_effects(runs, ["x", "y", "z"]).fields}
        found += effects["y"] < 0.05
    assert found <= 0.08 * 200


def test_a_trial_that_skipped_seeds_is_compared_as_if_it_had_run_them():
    """`bad` skipped the two seeds that are hard."""
    hard = {3: -0.2, 4: -0.2}
    entries = [(x, seed) for x, seeds in (("good", range(5)), ("bad", range(3))) for seed in seeds]
    values = [{"good": 0.9, "bad": 0.1}[x] + hard.get(seed, 0.0) for x, seed in entries]
    runs = Runs(
        [{"x": x} for x, _ in entries], [x == "good" for x, _ in entries], [s for _, s in entries], np.array(values)
    )
    [effect] = field_effects(runs, ["x"]).fields
    assert effect.levels == ("bad", "good")
    assert effect.means[1] - effect.means[0] == pytest.approx(0.8)
    assert np.mean(effect.means) == pytest.approx(0.5 - 0.08)  # the mean over all five seeds


def test_many_numbers_become_thirds():
    labels = levels_of([float(x) for x in range(9)])
    assert labels == ["0 to 2"] * 3 + ["3 to 5"] * 3 + ["6 to 8"] * 3
    assert levels_of([None, "a", "a"]) == ["None", "a", "a"]


def test_holm_on_a_hand_worked_example():
    assert holm([0.01, 0.04, 0.03, float("nan")]) == pytest.approx([0.03, 0.06, 0.06, float("nan")], nan_ok=True)


@pytest.mark.parametrize(
    ("values", "order"),
    [
        ([2.0, 1.2, 2.0], ["1.2", "2"]),
        ([1e-4, 2e-05, 1.0], ["2e-05", "0.0001", "1"]),
        ([128.0, 8.0, 32.0], ["8", "32", "128"]),
        (["product", "entropy", "product"], ["entropy", "product"]),
        ([float(x) for x in range(12)], ["0 to 3", "4 to 7", "8 to 11"]),
    ],
)
def test_levels_are_shown_from_small_to_large(values, order):
    assert in_order(levels_of(values)) == order
