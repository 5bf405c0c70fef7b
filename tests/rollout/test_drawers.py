"""The log-probs of rollouts under the policies that drew them, from score passes."""

import numpy as np

from appo_jax.rollout.scoring import of_drawers
from appo_jax.types import Example, Rollout, StopReason

EXAMPLE = Example("q", "?", ("1",), "qa", "")


def rollout(node: int, parent: int | None = None, fork: int | None = None) -> Rollout:
    zeros = np.zeros(4, np.float32)
    return Rollout(
        EXAMPLE, np.arange(4), 1, zeros > -1, zeros, zeros, StopReason.ANSWERED, (), node, parent=parent, fork=fork
    )


def test_a_branch_has_its_parents_numbers_up_to_its_fork() -> None:
    """Two initial rollouts, a branch of the second at token 2, a branch of that branch at token 3."""
    tree = [rollout(0), rollout(1), rollout(2, parent=1, fork=2), rollout(3, parent=2, fork=3)]
    known = [np.full(4, 10.0), np.full(4, 20.0)]
    later = [np.full(4, 30.0), np.full(4, 40.0)]
    found = of_drawers([tree], [known], [later])
    assert [x.tolist() for x in found[0]] == [[10] * 4, [20] * 4, [20, 20, 30, 30], [20, 20, 30, 40]]
    assert len(known) == 2
