"""The rule that stops trials: against the textbook's interval, and on simulated sweeps."""

import numpy as np
import pytest
from scipy import stats

from appo_jax.sweep.racing import LEVEL, excluded, upper_bound


def values(numbers):
    return dict(enumerate(numbers))


def test_the_bound_is_the_one_sided_t_interval_of_scipy():
    differences = np.array([-0.03, -0.01, -0.02, -0.05])
    interval = stats.ttest_1samp(differences, 0.0, alternative="less").confidence_interval(1 - 0.02)
    assert np.isclose(upper_bound(differences, 0.02), interval.high)


def test_a_trial_is_stopped_only_by_seeds_it_shares_and_never_before_the_third():
    best, bad = values([0.8, 0.81, 0.79, 0.8, 0.82]), [0.20, 0.21, 0.19]
    assert excluded(values(bad), [best], num_seeds=5)
    assert not excluded(values(bad[:2]), [best], num_seeds=5)
    assert not excluded(values(bad), [values([0.8])], num_seeds=5)  # the rival has not run these seeds
    assert not excluded(values(bad), [], num_seeds=5)
    assert not excluded(values([*bad, 0.2, 0.2]), [best], num_seeds=5)  # nothing left to leave out


def test_noise_that_the_seeds_share_does_not_hide_a_difference():
    seeds = np.array([0.0, 0.3, -0.2, 0.1])
    noise = np.array([0.002, -0.001, 0.001, 0.0])
    assert excluded(values(seeds - 0.1 + noise), [values(seeds)], num_seeds=5)


def simulate(rng, means, num_seeds, questions=0):
    """Run trials one after the other under the rule. Returns which were stopped, and the runs that were made.

    `questions`: the objective is an accuracy on so many questions."""
    shared = rng.normal(0, 0.05, num_seeds)
    table = means[:, None] + shared + rng.normal(0, 0.02, (len(means), num_seeds))
    if questions:
        table = np.round(table * questions) / questions
    done, stopped, runs = [], np.zeros(len(means), bool), 0
    for trial, row in enumerate(table):
        mine = {}
        for seed, value in enumerate(row):
            mine[seed], runs = value, runs + 1
            if excluded(mine, done, num_seeds):
                stopped[trial] = True
                break
        done.append(mine)
    return stopped, runs


def test_the_best_trial_is_stopped_in_at_most_five_percent_of_simulated_sweeps():
    """20 equal trials but one, which is better by half of the noise between runs: the hardest case for the rule."""
    rng = np.random.default_rng(0)
    lost = 0
    for _ in range(400):
        means = np.full(20, 0.5)
        best = rng.integers(20)
        means[best] += 0.01
        lost += simulate(rng, means, 5)[0][best]
    assert lost / 400 <= LEVEL


@pytest.mark.parametrize("questions", [10, 20, 50])
def test_accuracies_on_few_questions_are_not_exact_because_they_are_equal(questions):
    rng = np.random.default_rng(2)
    lost = sum(simulate(rng, np.full(20, 0.5), 5, questions)[0][-1] for _ in range(300))
    assert lost / 300 <= LEVEL


def test_hopeless_trials_cost_fewer_runs():
    rng = np.random.default_rng(1)
    means = np.array([0.5] + [0.1] * 19)
    stopped, runs = simulate(rng, means, 6)
    assert stopped[1:].all()
    assert not stopped[0]
    assert runs < 6 + 19 * 5
