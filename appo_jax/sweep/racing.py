"""When a trial may skip its last seeds: only when its interval excludes the best trial.

Single runs of reinforcement learning are noisy, and a trial stopped for one bad seed may have been the best. So a trial
is compared with the best trial on all seeds that both have, from the third seed on. The differences give an interval,
and the trial stops if the upper end of the interval is below zero. The interval is one-sided, by Student's t, at 5 %
divided by the number of comparisons and of trials that could be the best (Bonferroni): if differences are normal, the
truly best trial is stopped in at most 5 % of sweeps. tests/sweep/test_racing.py measures that on simulated trials.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats

LEVEL = 0.05
MIN_SEEDS = 3

Values = Mapping[int, float]  # objective by seed, higher is better


def excluded(trial: Values, others: Sequence[Values], num_seeds: int) -> bool:
    """Whether `trial` can be stopped after the seeds it has. `others`: all other trials that have run seeds;
    `num_seeds`: how many a whole trial has."""
    if not MIN_SEEDS <= len(trial) < num_seeds:
        return False
    rivals = [other for other in others if other.keys() >= trial.keys()]
    if not rivals:
        return False
    best = max(rivals, key=lambda other: sum(other[seed] for seed in trial))
    differences = np.array([value - best[seed] for seed, value in trial.items()])
    looks = num_seeds - MIN_SEEDS
    return upper_bound(differences, LEVEL / (looks * len(rivals))) < 0


def upper_bound(differences: np.ndarray, level: float) -> float:
    """Upper end of the one-sided interval of the mean at confidence 1 − `level` (Student's t)."""
    n = len(differences)
    spread = float(np.std(differences, ddof=1)) / np.sqrt(n)
    return float(differences.mean() + stats.t.ppf(1 - level, n - 1) * spread)
