"""The fastest config that fits a slice: uphill from the given one, over mesh, `decode_rows`, `micro_batch` and `remat`."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import get_args

from appo_jax.algorithms import make_algorithm
from appo_jax.config import Config, Remat
from appo_jax.config_io import check, diff_configs, flatten
from appo_jax.errors import ConfigError
from appo_jax.plan.report import Plan
from appo_jax.rollout.shapes import Shapes


@dataclasses.dataclass(frozen=True)
class Found:
    """The best config of a search."""

    config: Config
    plan: Plan
    tried: int
    """Configs that were planned."""
    finished: bool
    """Whether no neighbour is better; False: the time was over before."""

    def changes(self, start: Config) -> str:
        """What to change in `start`, as options of the command line."""
        fields = flatten(self.config)
        options = [f"--{name.replace('_', '-')} {fields[name]}" for name in diff_configs(start, self.config)]
        return " ".join(options) or "nothing: the config is the best of those that were tried"


def search(
    config: Config, plan_of: Callable[[Config], Plan], seconds: float, on_better: Callable[[Config, Plan], None]
) -> Found:
    """Go from `config` to its best neighbour, as long as there is a better one and time is left.

    A config that fits is better than one that does not, then the shorter step is, then, of those that do not fit, the one that
    lacks less memory. `plan_of` may raise ConfigError for a config that the devices do not take: it is passed over. `on_better`
    hears of every step uphill. The result is never worse than `config`.
    """
    deadline = time.monotonic() + seconds
    best, plan, tried = config, plan_of(config), 1
    seen = [config]
    while True:
        better = False
        for other in neighbours(best):
            if other in seen:
                continue
            if time.monotonic() > deadline:
                return Found(best, plan, tried, finished=False)
            seen.append(other)
            try:
                its = plan_of(other)
            except ConfigError:
                continue
            tried += 1
            if _rank(its) < _rank(plan):
                best, plan, better = other, its, True
                on_better(best, plan)
                break  # the neighbours of the better one come next
        if not better:
            return Found(best, plan, tried, finished=True)


def neighbours(config: Config) -> Iterator[Config]:
    """Valid configs that differ from `config` in one choice, those first that are cheap to compile."""
    for other in _candidates(config):
        try:
            yield check(other)
        except ConfigError:
            continue


def _candidates(config: Config) -> Iterator[Config]:
    replace, optimizer, mesh = dataclasses.replace, config.optimizer, config.mesh
    algorithm = make_algorithm(config)
    rows = config.prompts_per_minibatch * algorithm.trained_per_prompt
    # Less is computed again, or fewer passes gather the weights: only the train program is compiled.
    remats = get_args(Remat)
    at = remats.index(optimizer.remat)
    for remat in (*remats[max(0, at - 1) : at], *remats[at + 1 : at + 2]):
        yield replace(config, optimizer=replace(optimizer, remat=remat))
    micro = Shapes(config.rollout, algorithm.branching, mesh.data * mesh.fsdp).update_rows(config, algorithm)
    for size in (2 * micro, micro // 2):
        if 0 < size <= rows:
            yield replace(config, optimizer=replace(optimizer, micro_batch=size))
    for decode_rows in (2 * config.rollout.decode_rows, config.rollout.decode_rows // 2):
        if decode_rows:
            yield replace(config, rollout=replace(config.rollout, decode_rows=decode_rows))
    for fsdp, tensor in ((2 * mesh.fsdp, mesh.tensor // 2), (mesh.fsdp // 2, 2 * mesh.tensor)):
        if fsdp * tensor == mesh.fsdp * mesh.tensor:
            yield replace(config, mesh=replace(mesh, fsdp=fsdp, tensor=tensor))
    for data, fsdp in ((2 * mesh.data, mesh.fsdp // 2), (mesh.data // 2, 2 * mesh.fsdp)):
        if data * fsdp == mesh.data * mesh.fsdp:
            yield replace(config, mesh=replace(mesh, data=data, fsdp=fsdp))


def _rank(plan: Plan) -> tuple[bool, float]:
    """Smaller is better."""
    if plan.fits and plan.step_s is not None:
        return False, plan.step_s
    return True, plan.tightest.peak
