"""AEPO (arXiv 2510.14545): ARPO's branches, less likely the more of them follow each other.

The probability of a branch is P = clip(p + w · ΔH, 0, 1) · (1 − PENALTY · l). l is the number of turns just before this one, in
the same rollout, at which branches begin. PENALTY is the official code's.
"""

from __future__ import annotations

import functools

from appo_jax.branching.rule import ByTurns
from appo_jax.branching.rules.entropy_change import turns

PENALTY = 0.05

RULE = ByTurns(functools.partial(turns, penalty=PENALTY))
