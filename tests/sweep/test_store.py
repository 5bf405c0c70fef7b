"""The storage of a sweep: its queue of points, after a stop at any moment."""

import optuna
import pytest
from optuna.trial import TrialState
from test_claims import make_sweep

from appo_jax.sweep.store import Store

SPACE = {"branching.tau": (8.0, 32.0, 128.0), "branching.clip_high": (1.1, 1.2, 1.5)}


def small(out, **others):
    return make_sweep(out, **({"space": SPACE} | others))


def queued(store):
    return [tuple(trial.system_attrs["fixed_params"].values()) for trial in store.trials()]


@pytest.mark.parametrize("fails_at", [1, 4, 9])
def test_a_start_that_stops_while_it_queues_points_loses_none(tmp_path, monkeypatch, fails_at):
    """Once, the next start queued nothing, so that a grid of 9 had 3 trials."""
    calls, enqueue = [], optuna.Study.enqueue_trial

    def fail(study, *args, **others):
        calls.append(1)
        if len(calls) == fails_at:
            raise OSError(5, "Input/output error")
        enqueue(study, *args, **others)

    with monkeypatch.context() as patched:
        patched.setattr(optuna.Study, "enqueue_trial", fail)
        with pytest.raises(OSError, match="Input/output"):
            Store(small(tmp_path / "a"))
    assert queued(Store(small(tmp_path / "a"))) == queued(Store(small(tmp_path / "b")))
    assert len(Store(small(tmp_path / "a")).trials()) == 9


def test_a_random_sweep_gets_the_further_points_of_more_trials(tmp_path):
    """Also after a trial that was tried again, which is no point of its own."""
    space = {"branching.tau": optuna.distributions.FloatDistribution(1.0, 100.0)}
    store = Store(small(tmp_path / "a", search="random", trials=3, space=space))
    store.study.tell(store.claim_trial(), state=TrialState.FAIL)
    assert store.retry_failed() == 1
    more = small(tmp_path / "a", search="random", trials=6, space=space)
    assert len(Store(more).trials()) == 7
    points = [t.system_attrs["fixed_params"] for t in Store(more).trials() if "retry_of" not in t.user_attrs]
    assert points == more.queued_points()
