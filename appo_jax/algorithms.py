"""Algorithms by name; only this module knows what a name means. All algorithms share the loop, the budget and the
logging. An algorithm is a choice of rollouts (how many are drawn at once, how the rest are branched, which are trained
on), of an advantage and of a loss. Every choice is also a config field: a name sets the fields that define the
algorithm, and the config sets the rest; a config that gives one of the first another value is refused. Config checks,
the loop and `appo-jax plan` ask `make_algorithm`; to add an algorithm that is made of existing choices, add its
function to `ALGORITHMS`.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from appo_jax.config import AdvantageConfig, BranchingConfig, Config, LossConfig, RolloutConfig
from appo_jax.errors import did_you_mean

T = TypeVar("T")

# Values that a name sets where the config leaves the field at 0 (off).
KL_WEIGHT = 1e-3  # reinforce_pp
ENTROPY_WEIGHT = 0.2  # aepo: its official code
OVERLONG_SHARE = 0.2  # dapo: of rollout.max_response_tokens
MAX_RESAMPLES = 3  # dapo


@dataclasses.dataclass(frozen=True)
class Algorithm:
    """What a step does: the config's choices, with those that the algorithm's name sets."""

    initial: int
    """Rollouts per prompt that are drawn at once from π_old."""
    branches: bool
    """Whether the rest of the budget is branched."""
    train_branches: bool
    """Whether branches are trained on; otherwise they only change the advantages."""
    rollout: RolloutConfig
    """How many rollouts a prompt has, and how they are sampled."""
    branching: BranchingConfig
    """Where and when branches are drawn."""
    advantage: AdvantageConfig
    """How a token's advantage is computed."""
    loss: LossConfig
    """The loss that an update minimises."""
    overlong_buffer: int
    """Number of last tokens of `rollout.max_response_tokens` over which a response's reward falls; 0: none."""
    max_resamples: int
    """How often prompts whose rewards are all equal may be replaced; 0: never."""

    @property
    def budget(self) -> int:
        """M: rollouts per prompt, branches included."""
        return self.rollout.budget

    @property
    def trained_per_prompt(self) -> int:
        """The number of a prompt's rollouts that are trained on."""
        return self.budget if self.train_branches else self.initial

    @property
    def branches_at_start(self) -> bool:
        """Whether all branches are drawn by π_old."""
        return self.branches and self.branching.refresh == "step"

    @property
    def branches_later(self) -> bool:
        """Whether each mini-batch's branches are drawn by the policy of that time (not by π_old)."""
        return self.branches and not self.branches_at_start

    @property
    def trains_later_branches(self) -> bool:
        """Whether branches that the current policy (not π_old) has drawn are trained on."""
        return self.branches_later and self.train_branches

    @property
    def keeps_reference(self) -> bool:
        """Whether a copy of the first policy is kept, for a KL term."""
        return self.loss.kl_weight > 0

    @property
    def uses_future(self) -> bool:
        """Whether the advantage depends on the future value Ω at all."""
        return self.advantage.scaling == "plain" or self.advantage.future_weight != 0

    @property
    def needs_present(self) -> bool:
        """Whether the trained tokens must be scored under π_θ before the update: for Ω, for the number of dual-clipped tokens,
        for the entropies that scale advantages, or because branches that π_θ has drawn are trained on."""
        return (
            self.uses_future or self.drops_dual_clipped or self.advantage.entropy_weight > 0
            or self.trains_later_branches
        )  # fmt: skip

    @property
    def scores_present(self) -> bool:
        """Whether that needs an extra score pass: over all of them, or over branches that π_θ has drawn if it scored the others
        for branching."""
        return self.needs_present and (not self.branches_later or self.train_branches)

    @property
    def scores_reference(self) -> bool:
        """Whether the loss has a KL term, and so needs log π_ref of the trained tokens."""
        return self.keeps_reference and self.loss.kl_in != "reward"

    @property
    def adds_kl(self) -> bool:
        """Whether the KL term is added to the loss with weights of its own."""
        return self.scores_reference and self.loss.kl_in == "outside"

    @property
    def drops_dual_clipped(self) -> bool:
        """Whether the number of a rollout's dual-clipped tokens decides which of them count in the surrogate."""
        return self.loss.max_dual_clipped >= 0

    @property
    def needs_old_of_branches(self) -> bool:
        """Whether the loss, or a KL term in the reward, uses log π_old of branches that π_old drew."""
        return self.train_branches or (self.keeps_reference and self.loss.kl_in == "reward")

    def trained(self, tree: Sequence[T]) -> Sequence[T]:
        """The elements of `tree` (rollouts, or one value for each rollout) that belong to rollouts that are trained on."""
        return tree[: self.trained_per_prompt]


def make_algorithm(config: Config) -> Algorithm:
    """The algorithm that `config.algorithm` names. Raises KeyError for an unknown name (`broken` reports it)."""
    return ALGORITHMS[config.algorithm](config)


def _appo(config: Config) -> Algorithm:
    """APPO (arXiv 2606.12384): branches by Branching Score inform the advantages; initial rollouts are trained on."""
    return Algorithm(
        initial=config.rollout.num_initial, branches=True, train_branches=False,
        rollout=config.rollout, branching=config.branching, advantage=config.advantage, loss=config.loss,
        overlong_buffer=config.reward.overlong_buffer, max_resamples=config.max_resamples,
    )  # fmt: skip


def _grpo(config: Config) -> Algorithm:
    """GRPO (arXiv 2402.03300): all M rollouts are initial ones; the advantage is the z-score among them."""
    # There is no future-aware scaling: 1 + b·clip(Ω) is 1.
    advantage = dataclasses.replace(config.advantage, base="init_only", scaling="offset", future_weight=0.0)
    return dataclasses.replace(_appo(config), initial=config.rollout.budget, branches=False, advantage=advantage)


def _reinforce_pp(config: Config) -> Algorithm:
    """REINFORCE++ (arXiv 2501.03262): advantages normalised over the mini-batch, KL per token in the reward."""
    weight = config.loss.kl_weight or KL_WEIGHT
    return _varied(
        _grpo(config),
        advantage={"base": "global"},
        loss={"kl_in": "reward", "kl_estimator": "k1", "kl_weight": weight, "aggregation": "token_mean"},
    )


def _dapo(config: Config) -> Algorithm:
    """DAPO (arXiv 2503.14476): clip-higher, token mean, dynamic sampling, overlong shaping."""
    algorithm = _varied(_grpo(config), loss={"clip_low": 0.2, "clip_high": 0.28, "aggregation": "token_mean"})
    return dataclasses.replace(
        algorithm,
        overlong_buffer=algorithm.overlong_buffer or round(OVERLONG_SHARE * config.rollout.max_response_tokens),
        max_resamples=algorithm.max_resamples or MAX_RESAMPLES,
    )


def _gppo(config: Config) -> Algorithm:
    """GPPO (arXiv 2508.07629): clipped tokens keep a bounded gradient."""
    return _varied(_grpo(config), loss={"surrogate": "gppo", "dual_clip": 0.0, "max_dual_clipped": -1})


def _cispo(config: Config) -> Algorithm:
    """CISPO (arXiv 2506.13585): no lower bound of the weight, as in its paper; the upper one is `loss.clip_high`."""
    changes = {"surrogate": "cispo", "clip_low": 1.0, "dual_clip": 0.0, "max_dual_clipped": -1}
    return _varied(_grpo(config), loss=changes | {"aggregation": "token_mean"})


def _gigpo(config: Config) -> Algorithm:
    """GiGPO (arXiv 2505.10978): the group's advantage plus that of turns in equal states."""
    return _varied(_grpo(config), advantage={"base": "turn"})


def _arpo(config: Config) -> Algorithm:
    """ARPO (arXiv 2507.19849): branches after tool calls where the entropy rose; one group of all M, all trained on."""
    return _tree(config, score="entropy_change", base="joint")


def _aepo(config: Config) -> Algorithm:
    """AEPO (arXiv 2510.14545): ARPO with fewer branches in a row, a gradient for tokens clipped at the upper end, and
    advantages that grow with the entropy."""
    algorithm = _tree(config, score="entropy_balanced", base="joint")
    weight = config.advantage.entropy_weight or ENTROPY_WEIGHT
    loss = {"surrogate": "gppo_high", "dual_clip": 0.0, "max_dual_clipped": -1}
    return _varied(algorithm, advantage={"entropy_weight": weight}, loss=loss)


def _appo_all(config: Config) -> Algorithm:
    """APPO that trains on its branches too (ours): eq. 6 and 7 of every rollout."""
    return _varied(dataclasses.replace(_appo(config), train_branches=True), advantage={"base": "every_rollout"})


def _tree_grpo(config: Config) -> Algorithm:
    """Tree-GRPO (arXiv 2509.21240): branches at random turns; advantages within and between trees, all trained on."""
    return _tree(config, score="random_turn", base="tree")


def _fipo(config: Config) -> Algorithm:
    """FIPO (arXiv 2603.19835): GRPO, its advantage times the clipped future value."""
    return _varied(_grpo(config), advantage={"scaling": "plain"})


def _tree(config: Config, score: str, base: str) -> Algorithm:
    """A baseline that branches by turns and trains on every rollout. All rollouts are drawn at the start of the
    step."""
    algorithm = dataclasses.replace(
        _grpo(config), initial=config.rollout.num_initial, branches=True, train_branches=True
    )
    branching = {"score": score, "refresh": "step", "allocation": "per_rollout"}
    return _varied(algorithm, branching=branching, advantage={"base": base})


def _varied(algorithm: Algorithm, **changes: Mapping[str, Any]) -> Algorithm:
    """`algorithm` with fields of its parts changed: `_varied(grpo, loss={"clip_high": 0.28})`."""
    parts = {part: dataclasses.replace(getattr(algorithm, part), **fields) for part, fields in changes.items()}
    return dataclasses.replace(algorithm, **parts)


ALGORITHMS: dict[str, Callable[[Config], Algorithm]] = {
    "appo": _appo,
    "appo_all": _appo_all,
    "grpo": _grpo,
    "reinforce_pp": _reinforce_pp,
    "dapo": _dapo,
    "gppo": _gppo,
    "cispo": _cispo,
    "gigpo": _gigpo,
    "arpo": _arpo,
    "aepo": _aepo,
    "tree_grpo": _tree_grpo,
    "fipo": _fipo,
}


def resolved(config: Config) -> Config:
    """`config` with the values that the algorithm's name sets: what a run computes with."""
    if config.algorithm not in ALGORITHMS:
        return config  # `broken` reports it
    algorithm = make_algorithm(config)
    return dataclasses.replace(
        config, rollout=algorithm.rollout, branching=algorithm.branching, advantage=algorithm.advantage, loss=algorithm.loss,
        reward=dataclasses.replace(config.reward, overlong_buffer=algorithm.overlong_buffer),
        max_resamples=algorithm.max_resamples,
    )  # fmt: skip


def overwritten(config: Config) -> dict[str, Any]:
    """Dotted name -> the value that the algorithm's name sets, for the fields to which the config gives another one."""
    names = ["reward.overlong_buffer", "max_resamples"]
    for part in ("rollout", "branching", "advantage", "loss"):
        names += [f"{part}.{field.name}" for field in dataclasses.fields(getattr(config, part))]
    given, used = (operator.attrgetter(*names)(which) for which in (config, resolved(config)))
    return {name: sets for name, value, sets in zip(names, given, used, strict=True) if value != sets}


def broken(config: Config) -> Iterator[str]:
    """Rules between the config and its algorithm that are broken: a sentence for each, with the fields to change."""
    if config.algorithm not in ALGORITHMS:
        yield (
            f"algorithm = {config.algorithm!r}: no algorithm has this name; {did_you_mean(config.algorithm, ALGORITHMS)}"
        )
        return
    for name, sets in overwritten(config).items():
        given, default = (operator.attrgetter(name)(where) for where in (config, Config()))
        if given != default:  # a default was not asked for
            yield (
                f"{name} = {given!r}: algorithm = {config.algorithm!r} sets it to {sets!r}; leave it out (if a file gives it: "
                f"--{name.replace('_', '-')} {sets})"
            )
    algorithm = make_algorithm(config)
    if algorithm.branches and algorithm.budget <= algorithm.initial:
        full = algorithm.initial * (config.branching.num_branch_points + 1) ** config.branching.num_loops
        yield (
            f"rollout.budget = {algorithm.budget} leaves no room for branches in addition to rollout.num_initial = "
            f"{algorithm.initial}: raise it (N·(B+1)^L = {full})"
        )
    if algorithm.branches and algorithm.max_resamples:
        yield (
            f"max_resamples = {algorithm.max_resamples}: algorithm = {config.algorithm!r} branches, and prompts would be replaced "
            "by the rewards of their initial rollouts alone, although their branches may differ; set it to 0"
        )
    sizes, base = _group_sizes(algorithm), algorithm.advantage.base
    if base in sizes and sizes[base] < 2:
        field = "rollout.num_initial" if base == "init_only" and algorithm.branches else "rollout.budget"
        yield (
            f"{field} = {operator.attrgetter(field)(config)}: with advantage.base = {base!r} no group of a prompt has two "
            "rollouts, so every advantage would be 0 and nothing would be learnt; raise it"
        )


def _group_sizes(algorithm: Algorithm) -> dict[str, int]:
    """For each `advantage.base` with groups within a prompt, the rollouts of its largest group."""
    dual = max(algorithm.initial, algorithm.budget - algorithm.initial)
    return (
        {"init_only": algorithm.initial}
        | dict.fromkeys(("paper", "every_rollout", "shared_prefix"), dual)
        | (dict.fromkeys(("joint", "tree", "turn"), algorithm.budget))
    )
