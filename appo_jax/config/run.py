"""The config of a run: its parts, and the fields that belong to no part."""

from __future__ import annotations

import dataclasses
from typing import Annotated

from annotated_types import Interval
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt

from appo_jax.config.bounds import Pause, Seconds, Seed
from appo_jax.config.data import DataConfig
from appo_jax.config.judge import JudgeConfig
from appo_jax.config.learning import OptimizerConfig, SFTConfig
from appo_jax.config.method import AdvantageConfig, BranchingConfig, LossConfig
from appo_jax.config.policy import PolicyConfig
from appo_jax.config.rollout import RolloutConfig
from appo_jax.config.tools import ToolsConfig


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """The reward of a finished rollout."""

    function: str = "robust"
    """robust: exact answers, strict format. judge: a language model decides, strict format. official: as the official code
    judges. Or `package.module:function` of your own."""
    judge: JudgeConfig | None = None
    """For `function = "judge"`, and for sets of `eval.sets` that a judge decides: the language model."""
    terms: tuple[str, ...] = ()
    """Functions `package.module:function` from a Response to a number. Each number is added to the reward, and recorded under the
    function's name among the parts of a rollout's reward."""
    timeout: Seconds = 300.0
    """Seconds for one rollout's reward. A rollout that takes longer has none."""
    tool_bonus: NonNegativeFloat = 0.1
    """Added if the answer earns something and both tools were used. Official code: 0.1."""
    overlong_buffer: NonNegativeInt = 0
    """DAPO's soft punishment: over this many last tokens of `rollout.max_response_tokens` a response's reward falls by
    up to 1. 0: off (the algorithm dapo then uses a fifth of `max_response_tokens`)."""


@dataclasses.dataclass(frozen=True)
class EvalSetConfig:
    """A benchmark set that the policy is measured on while it learns."""

    set: str
    """Its name (docs/eval.md), or `package.module:set` of your own."""
    data: str
    """Its file."""
    limit: NonNegativeInt = 0
    """Number of questions, from the beginning of the set. 0: all."""
    samples: PositiveInt = 1
    """Rollouts of every question."""
    temperature: Annotated[float, Interval(ge=0, le=1e6)] = 0.0
    """Sampling temperature of these rollouts: 0 (greedy), or from 1e-6 to 1e6."""


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Evaluation: greedy rollouts of held-out questions, and benchmark sets."""

    num_prompts: NonNegativeInt = 200
    """Held-out questions. 0: all of them."""
    every: NonNegativeInt = 0
    """Steps between evaluations during training. 0: only before and after."""
    sets: tuple[EvalSetConfig, ...] = ()
    """Benchmark sets that are answered and graded whenever the policy is evaluated during training, and at its end."""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis of the mesh; their product is the number of devices."""

    data: PositiveInt = 1
    """Copies of the parameters; rows are split over them."""
    fsdp: PositiveInt = 1
    """Parts that parameters and optimizer state are split into; rows are split over them too."""
    tensor: PositiveInt = 1
    """Parts that heads, the MLP's inner axis and the vocabulary are split into."""
    slices: PositiveInt = 1
    """Slices connected by the data-centre network; the data axis is a multiple of it."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that defines a run."""

    # How config_io reads and checks a config and its parts.
    __pydantic_config__ = {"extra": "forbid", "strict": True, "allow_inf_nan": False}  # noqa: RUF012

    run_dir: str = "runs/default"
    """Folder for everything that the run writes. If it holds a run of the same config, that run is continued."""
    init_from: str | None = None
    """Run directory whose cold-started policy this run begins with, instead of a cold start."""
    algorithm: str = "appo"
    """A name in the table of appo_jax/algorithms.py. The table says which of the fields below the algorithm sets."""
    seed: Seed = 0
    """Seed of the initial weights, the order of the prompts and the sampling."""
    steps: PositiveInt = 100
    """Training steps: prompts_per_step prompts are rolled out in each."""
    prompts_per_step: PositiveInt = 128
    """Prompts of one step, a multiple of prompts_per_minibatch. Paper: 128."""
    prompts_per_minibatch: PositiveInt = 16
    """P: prompts of one update. Paper: 16."""
    max_resamples: NonNegativeInt = 0
    """Dynamic sampling: up to this many times, prompts whose rewards are all equal are replaced by others. 0: off (the
    algorithm dapo then uses 3). Only for algorithms that do not branch."""
    max_sampled_tokens: NonNegativeInt = 0
    """Stop training once this many tokens have been sampled, for comparisons at an equal budget. 0: no limit."""
    checkpoint_every: PositiveInt = 10
    """Steps between two checkpoints."""
    keep_checkpoints: PositiveInt = 3
    """Newest checkpoints that are kept."""
    keep_best_checkpoints: NonNegativeInt = 0
    """Checkpoints with the highest held-out accuracy that are kept as well. Needs an `eval.every` that is a multiple of
    `checkpoint_every`: a policy must be saved when it is evaluated."""
    keep_rollouts: NonNegativeInt = 0
    """Steps up to the newest checkpoint whose rollout trees are kept on disk; those of later steps are kept, too. 0: all."""
    max_silent_seconds: Seconds = 600.0
    """Seconds without progress after which the run prints the stacks of all threads and ends with exit code 75. systemd on a
    pod, a study and a sweep then start it again. The limit is at least ten times the longest wait of the phase so far, and
    three times as long while a phase may still be compiling."""
    stop_grace_seconds: Pause = 0.0
    """A run that is asked to stop finishes and saves its step. If this many seconds pass after SIGTERM or Ctrl-C, it ends without
    that step; set it where the machine is taken away (spot capacity: about 30 s). SIGHUP, which `launch/stop.sh` sends, has no
    limit. 0: no limit."""
    policy: PolicyConfig = PolicyConfig()
    """The policy that the run starts from."""
    data: DataConfig = DataConfig()
    """The questions."""
    tools: ToolsConfig = ToolsConfig()
    """The tools that rollouts may call."""
    rollout: RolloutConfig = RolloutConfig()
    """How rollouts are sampled."""
    branching: BranchingConfig = BranchingConfig()
    """Where rollouts branch."""
    reward: RewardConfig = RewardConfig()
    """How rollouts are rewarded."""
    advantage: AdvantageConfig = AdvantageConfig()
    """How advantages are computed."""
    loss: LossConfig = LossConfig()
    """The loss."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """The optimizer."""
    sft: SFTConfig = SFTConfig()
    """The cold start."""
    eval: EvalConfig = EvalConfig()
    """How the policy is evaluated."""
    mesh: MeshConfig = MeshConfig()
    """The devices."""
