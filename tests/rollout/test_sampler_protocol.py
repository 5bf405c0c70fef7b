"""A foreign sampler: it returns canned rollouts, and a step trains on them. None of our jitted sampling runs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, get_args, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from appo_jax.algorithms import make_algorithm
from appo_jax.branching.rule import ByScore, ByTurns
from appo_jax.branching.rules import RULES
from appo_jax.components import Components
from appo_jax.config import (
    Architecture,
    BranchingConfig,
    Config,
    EvalConfig,
    MeshConfig,
    OptimizerConfig,
    RolloutConfig,
)
from appo_jax.config.method import Score, TurnRule
from appo_jax.evaluate import evaluate
from appo_jax.learner.optimizer import rl_optimizer
from appo_jax.learner.step import StepSpec, TrainState, make_train_step
from appo_jax.policy.parameters import Params
from appo_jax.policy.sharding import make_mesh
from appo_jax.reward import Judge, Response
from appo_jax.rollout.growth import TreeGrower
from appo_jax.rollout.sampler import Branch, GenerationStats, Sampler, ScorePass
from appo_jax.rollout.scoring import scores
from appo_jax.text.tokenizer import SentencePieceTokenizer
from appo_jax.tools.executor import ToolExecutor
from appo_jax.train_step import Trainer, train_step
from appo_jax.types import Example, RewardResult, Rollout, StopReason, Tree

CANNED = ("the fox is lazy", "the dog", "7 dogs jump", "over", "a quick brown fox")
P, N, M = 2, 2, 5


class Echo:
    """Returns a canned text for each rollout, keeps the parent's tokens before a fork, and gives log-probs by position."""

    def __init__(self, tokenizer: SentencePieceTokenizer):
        self.tokenizer, self.said, self.sampled = tokenizer, 0, 0

    def _rollout(self, example: Example, head: list[int], prompt_length: int, **node: Any) -> Rollout:
        line = self.tokenizer.encode(CANNED[self.said % len(CANNED)])
        self.said += 1
        self.sampled += len(line) + 1
        tokens = np.array([*head, *line, self.tokenizer.eos_id], np.int32)
        sampled = np.arange(len(tokens)) >= prompt_length
        return Rollout(
            example, tokens, prompt_length, sampled, np.where(sampled, -1.0, 0.0).astype(np.float32),
            sampled.astype(np.float32), StopReason.ANSWERED, (), **node,
        )  # fmt: skip

    def initial(
        self, params: Params, examples: Sequence[Example], copies: int, draw_id: Sequence[int],
        temperature: float | None = None, max_examples: int | None = None,
    ) -> list[Tree]:  # fmt: skip
        prompts = [self.tokenizer.render_prompt(example.system, example.question) for example in examples]
        return [
            [self._rollout(example, prompt, len(prompt), node=node) for node in range(copies)]
            for example, prompt in zip(examples, prompts, strict=True)
        ]

    def score(
        self, params: Params, rollouts: Sequence[Rollout], max_rollouts: int | None = None, to_branch: bool = False
    ) -> ScorePass:
        assert rollouts, "a sampler need not know what to do with nothing"
        positions = [np.arange(r.length, dtype=np.float32) for r in rollouts]
        log_probs = [np.where(r.sampled, -1 - t / 50, 0) for r, t in zip(rollouts, positions, strict=True)]
        return ScorePass(rollouts, log_probs, [np.cos(t) + 1 for t in positions])

    def branches(
        self, params: Params, scored: ScorePass, branches: Sequence[Sequence[Branch]], draw_id: Sequence[int]
    ) -> list[list[Rollout]]:
        assert any(branches)
        return [
            [
                self._rollout(
                    parent.example, parent.tokens[: b.cut].tolist(), parent.prompt_length, node=b.node, parent=parent.node,
                    fork=b.cut, loop=b.loop,
                )
                for b in wanted
            ]
            for parent, wanted in zip(scored.rollouts, branches, strict=True)
        ]  # fmt: skip

    def take_stats(self) -> GenerationStats:
        stats, self.sampled = GenerationStats(sampled_tokens=self.sampled), 0
        return stats


def longer_is_better(response: Response) -> RewardResult:
    length = sum(len(segment.text) for segment in response.segments)
    return RewardResult(length / 100, length > 10)


@pytest.mark.parametrize("score", ["product", "random_turn"])
def test_a_step_trains_on_canned_rollouts(
    score: Any, arch: Architecture, tokenizer: SentencePieceTokenizer, executor: ToolExecutor, params: Params,
    examples: list[Example],
) -> None:  # fmt: skip
    config = Config(
        prompts_per_step=P, prompts_per_minibatch=1, optimizer=OptimizerConfig(learning_rate=1e-3), eval=EvalConfig(num_prompts=P),
        rollout=RolloutConfig(num_initial=N, budget=M, max_prompt_tokens=12, max_response_tokens=60, max_result_tokens=24),
        branching=BranchingConfig(num_branch_points=2, score=score),
    )  # fmt: skip
    sampler: Sampler = Echo(tokenizer)
    dataset: Any = None
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    judge = Judge("longer_is_better", longer_is_better)
    components = Components(
        config, dataset, examples, examples, tokenizer, executor, arch, jnp.float32, mesh, sampler, judge, ExitStack()
    )
    algorithm, optimizer = make_algorithm(config), rl_optimizer(config.optimizer)
    update = make_train_step(optimizer, StepSpec(arch, algorithm.loss, 1.0, jnp.float32, "none"))
    grower = TreeGrower(sampler, tokenizer, config.rollout, algorithm.branching, arch.vocab_size, seed=0)
    start = jax.tree.map(jnp.copy, params)
    state = TrainState(start, optimizer.init(start))
    trainer = Trainer(components, algorithm, grower, update, None)
    state, record, trees = train_step(trainer, 0, state, examples[:P], iter(()))

    assert [len(tree) for tree in trees] == [M] * P
    for tree in trees:
        for r in tree[N:]:
            assert r.parent is not None
            assert r.tokens[: r.fork].tolist() == tree[r.parent].tokens[: r.fork].tolist()
            said = tokenizer.decode(r.tokens[r.fork : -1].tolist())
            assert said in CANNED
    drawn = sum(int(r.sampled[r.fork or 0 :].sum()) for tree in trees for r in tree)
    assert record["rollout/sampled_tokens"] == drawn
    assert record["advantage/zero_share"] < 1
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), state.params, params)
    assert any(jax.tree.leaves(moved))
    assert evaluate(state.params, components).accuracy == np.mean(
        [len(line) > 10 for line in said_by_evaluation(M * P)]
    )


def test_a_sampler_is_never_asked_for_nothing(
    arch: Architecture, tokenizer: SentencePieceTokenizer, params: Params, examples: list[Example]
) -> None:
    """As for the branches of reinforce_pp, and in a loop that finds no position for a branch."""
    sampler = Echo(tokenizer)
    assert scores(sampler, params, [[], []], 0) == ([[], []], [[], []])
    rollout = RolloutConfig(num_initial=N, budget=M, max_prompt_tokens=12, max_response_tokens=60)
    grower = TreeGrower(sampler, tokenizer, rollout, BranchingConfig(), arch.vocab_size, seed=0)
    (tree,) = sampler.initial(params, examples[:1], N, (0,))
    for r in tree:
        r.sampled[:] = False
    grown = grower.grow(params, [tree], [[r.log_probs for r in tree]], (0,))
    assert (len(grown.trees[0]), grown.missing_branches) == (N, M - N)


def said_by_evaluation(before: int) -> list[str]:
    """The sampler's texts after `before` rollouts, one for each held-out question."""
    return [CANNED[(before + i) % len(CANNED)] for i in range(P)]


def test_every_rule_can_be_configured_and_every_choice_is_a_rule() -> None:
    assert set(get_args(get_type_hints(BranchingConfig)["score"])) == set(RULES)
    # The checks of the config ask the two lists of names, the program asks the rules.
    assert {name for name, rule in RULES.items() if isinstance(rule, ByScore)} == set(get_args(Score))
    assert {name for name, rule in RULES.items() if isinstance(rule, ByTurns)} == set(get_args(TurnRule))
