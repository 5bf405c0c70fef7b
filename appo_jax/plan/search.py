"""Hill climbing for the fastest config that fits a slice, over mesh, `decode_rows`, `micro_batch` and `remat`."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any, get_args

from appo_jax.algorithms import make_algorithm
from appo_jax.config import Config, Remat
from appo_jax.config_io import check, diff_configs, flatten
from appo_jax.errors import ConfigError, PlanError
from appo_jax.plan.report import Plan
from appo_jax.rollout.shapes import Shapes


@dataclasses.dataclass(frozen=True)
class Found:
    """The result of a search."""

    config: Config
    """The best config that was found."""
    plan: Plan
    """Its plan."""
    tried: int
    """Number of configs for which a plan was made."""
    finished: bool
    """Whether no neighbour of `config` is better. False: the time was over before this was known."""
    failed: dict[str, str]
    """Neighbours for which the compiler failed, as options of the command line, and its errors."""

    def changes(self, start: Config) -> str:
        """The changes from `start`, as options of the command line."""
        return _options(start, self.config) or "nothing: the config is the best of those that were tried"

    def report(self, start: Config) -> dict[str, Any]:
        """What is printed of the search, from names to values."""
        report = {"change": self.changes(start), "tried": self.tried, "finished": self.finished}
        return report | {f"not compiled, {options}": error for options, error in self.failed.items()}


def search(
    config: Config, plan_of: Callable[[Config], Plan], seconds: float, on_better: Callable[[Config, Plan], None]
) -> Found:
    """Move from `config` to a better neighbour, again and again, until no neighbour is better or `seconds` are over: no plan is
    begun that would end later if it took as long as the longest before it.

    A config that fits is better than one that does not fit. Of two that fit, the one with the shorter step is better. Of two that
    do not fit, one for which the compiler refused no program is better, because the peak of a refused one is not known; else the
    one with the lower peak of memory. If `plan_of` raises ConfigError for a neighbour, because the
    devices cannot run it, the neighbour is skipped; if it raises PlanError, because the compiler fails, the neighbour is skipped
    and named in the result. For `config` itself the error is raised. `on_better` is called with every better config and its
    plan. The result is never worse than `config`.
    """
    began = time.monotonic()
    best, plan, tried = config, plan_of(config), 1
    longest = time.monotonic() - began
    seen, failed = [config], dict[str, str]()
    while True:
        better = False
        for other in neighbours(best):
            if other in seen:
                continue
            plan_began = time.monotonic()
            if plan_began + longest > began + seconds:
                return Found(best, plan, tried, finished=False, failed=failed)
            seen.append(other)
            try:
                other_plan = plan_of(other)
            except ConfigError:
                continue
            except PlanError as error:
                failed[_options(config, other)] = str(error)
                continue
            finally:
                longest = max(longest, time.monotonic() - plan_began)
            tried += 1
            if _rank(other_plan) < _rank(plan):
                best, plan, better = other, other_plan, True
                on_better(best, plan)
                break  # go on with the neighbours of the better config
        if not better:
            return Found(best, plan, tried, finished=True, failed=failed)


def neighbours(config: Config) -> Iterator[Config]:
    """Valid configs that differ from `config` in one choice. Those that need few compilations come first."""
    for other in _candidates(config):
        try:
            yield check(other)
        except ConfigError:
            continue


def _candidates(config: Config) -> Iterator[Config]:
    replace, optimizer, mesh = dataclasses.replace, config.optimizer, config.mesh
    algorithm = make_algorithm(config)
    max_rows = config.prompts_per_minibatch * algorithm.trained_per_prompt
    # `remat` and `micro_batch` come first, because only the train program depends on them.
    remats = get_args(Remat)
    index = remats.index(optimizer.remat)
    for remat in (*remats[max(0, index - 1) : index], *remats[index + 1 : index + 2]):
        yield replace(config, optimizer=replace(optimizer, remat=remat))
    shapes = Shapes.of(algorithm, mesh.data * mesh.fsdp)
    update = shapes.update(config, algorithm)
    micro_batch = update.rows * update.length // shapes.rollout_length
    for size in (2 * micro_batch, micro_batch // 2):
        if 0 < size <= max_rows:
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


def _options(start: Config, other: Config) -> str:
    """The changes from `start` to `other`, as options of the command line."""
    fields = flatten(other)
    return " ".join(f"--{name.replace('_', '-')} {fields[name]}" for name in diff_configs(start, other))


def _rank(plan: Plan) -> tuple[bool, bool, float]:
    """The order of plans: (does not fit, has a refused program, seconds of a step or bytes of the peak). Smaller is better."""
    refused = plan.step_s is None
    if plan.fits and plan.step_s is not None:
        return False, refused, plan.step_s
    return True, refused, plan.tightest.peak
