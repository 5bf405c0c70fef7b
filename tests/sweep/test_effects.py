"""Effects of fields: against scipy's analysis of variance, and on data whose truth is known."""

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
    return Runs(points, which, np.array(values)), trials


def test_one_field_without_seeds_is_the_classic_analysis_of_variance():
    rng = np.random.default_rng(0)
    groups = [rng.normal(mean, 1.0, 6) for mean in (0.0, 0.5, 1.5)]
    runs = Runs([{"x": i} for i, group in enumerate(groups) for _ in group], [0] * 18, np.concatenate(groups))
    [effect] = field_effects(runs, ["x"])
    expected = stats.f_oneway(*groups)
    assert effect.p == pytest.approx(expected.pvalue)
    between = sum(len(g) * (g.mean() - runs.values.mean()) ** 2 for g in groups)
    assert effect.share == pytest.approx(between / np.square(runs.values - runs.values.mean()).sum())


def test_the_field_that_matters_is_first_and_the_one_that_does_not_stays_open():
    rng = np.random.default_rng(1)
    fields = {"useless": (1, 2, 3), "tau": (8.0, 32.0), "gate": ("a", "b")}
    runs, _ = grid(fields, 3, lambda p: 0.03 * (p["tau"] == 32.0) + 0.1 * (p["gate"] == "b"), rng)
    effects = field_effects(runs, list(fields))
    assert [e.name for e in effects[:2]] == ["gate", "tau"]
    assert effects[0].p < 0.001
    assert effects[1].p < 0.001
    assert effects[2].p > 0.05
    assert effects[0].levels == ("a", "b")
    assert effects[0].means[1] - effects[0].means[0] == pytest.approx(0.1, abs=0.01)


def test_noise_is_what_is_left_of_trials_and_seeds():
    rng = np.random.default_rng(2)
    truth = rng.normal(size=40)
    runs, trials = grid({"x": tuple(range(40))}, 10, lambda point: truth[point["x"]], rng, deviation=0.02)
    deviation, freedom = noise(runs, trials)
    assert freedom == 400 - 40 - 10 + 1
    assert deviation == pytest.approx(0.02, rel=0.1)


def test_too_few_runs_say_nothing_instead_of_something_wrong():
    [effect] = field_effects(Runs([{"x": 1}, {"x": 2}], [0, 0], np.array([0.1, 0.2])), ["x"])
    assert np.isnan(effect.p)
    assert np.isnan(noise(Runs([{"x": 1}], [0], np.array([0.1])), [0])[0])


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
