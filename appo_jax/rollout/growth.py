"""From initial rollouts to rollout trees: score under the current policy, choose where to branch, draw the branches."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from appo_jax.branching import tree as view
from appo_jax.branching.rules import RULES
from appo_jax.branching.score import branching_scores
from appo_jax.config import BranchingConfig, RolloutConfig
from appo_jax.policy.parameters import Params
from appo_jax.rollout.sampler import Branch, Sampler, ScorePass
from appo_jax.rollout.scoring import by_future, inherit, padded
from appo_jax.rollout.shapes import Shapes
from appo_jax.text.tokenizer import Tokenizer
from appo_jax.types import Rollout, Tree


@dataclasses.dataclass
class NodeScores:
    """The results of the score pass for one rollout; all `[T]`, T being its length."""

    log_probs: np.ndarray  # under the current policy
    entropies: np.ndarray
    future_value: np.ndarray  # Ω
    score: np.ndarray
    preferred: np.ndarray
    valid: np.ndarray
    constant_future: bool


@dataclasses.dataclass
class Growth:
    """A mini-batch's trees after branching, and numbers for the metrics."""

    trees: list[Tree]
    scores: list[
        list[NodeScores]
    ]  # by prompt and node, from the loop that scored the rollout last; initial rollouts first
    missing_branches: int = 0  # rollouts missing from the budget because no valid position was left


def blank_tokens(tokenizer: Tokenizer) -> np.ndarray:
    """`[V]` bool: tokens that decode to an empty string or only to whitespace and punctuation."""

    def blank(piece: bytes) -> bool:
        return not any(char.isalnum() or char == "�" for char in piece.decode("utf-8", errors="replace"))

    return np.array([blank(piece) for piece in tokenizer.token_bytes()])


def valid_positions(rollout: Rollout, blank: np.ndarray, config: BranchingConfig, eos_ids: Sequence[int]) -> np.ndarray:
    """`[T]` bool: tokens before which (with `include_token`: after which) a branch may begin."""
    valid = rollout.sampled.copy()
    if config.skip_blank:
        beyond = len(blank)  # ids from the tokenizer's vocabulary on are blank too
        valid &= ~np.append(blank, True)[np.minimum(rollout.tokens, beyond)]
    if config.include_token:
        # Nothing can follow EOS, and after the last token the rollout may be at its limit.
        valid &= ~np.isin(rollout.tokens, eos_ids)
        valid[-1] = False
    return valid


def view_of(tree: Tree, scores: Sequence[NodeScores]) -> view.TreeView:
    """A tree as the rules of branching see it."""
    return view.TreeView(
        prompt_length=tree[0].prompt_length,
        parents=[r.parent for r in tree],
        forks=[r.fork for r in tree],
        loops=[r.loop for r in tree],
        sampled=[r.sampled for r in tree],
        entropies=[s.entropies for s in scores],
        scores=[s.score for s in scores],
        preferred=[s.preferred for s in scores],
        valid=[s.valid for s in scores],
    )


def _add(rollout: Rollout, by_node: list[np.ndarray], scored: np.ndarray) -> None:
    """Add a rollout's log-probs to those of its tree, unless they are known. At inherited tokens they are the parent's."""
    if rollout.node == len(by_node):
        by_node.append(inherit(rollout, by_node, scored))


_branching_scores = jax.jit(branching_scores, static_argnames="config")


def score_positions(
    scored: ScorePass, now: Sequence[np.ndarray], then: Sequence[np.ndarray], valid: Sequence[np.ndarray],
    config: BranchingConfig, shape: tuple[int, int],
) -> list[NodeScores]:  # fmt: skip
    """The scores of every rollout's positions by the rule `config.score`, in the order of `scored.rollouts`.

    `now` and `then`: log-probs `[T]` of each rollout under the current policy and under those that drew its tokens. `valid`:
    `[T]` bool, positions where a branch may begin. `shape`: (R, T) of the padded arrays that are computed.
    """
    rollouts = scored.rollouts
    sampled, ends = padded([r.sampled for r in rollouts], *shape), [r.length for r in rollouts]
    future = by_future(padded(now, *shape), padded(then, *shape), sampled, tau=config.tau)
    entropies = padded(scored.entropies, *shape)
    result = jax.device_get(_branching_scores(future, entropies, padded(valid, *shape), config=config))
    return [
        NodeScores(
            now[i], scored.entropies[i], result.future_value[i, :end], result.score[i, :end],
            result.preferred[i, :end], valid[i], bool(result.constant_future[i]),
        )
        for i, end in enumerate(ends)
    ]  # fmt: skip


class TreeGrower:
    """Grows the trees of a mini-batch under the current policy, with any sampler. `vocab_size`: V of the policy.
    `seed`: for the rules that draw at random.
    """

    def __init__(
        self, sampler: Sampler, tokenizer: Tokenizer, rollout: RolloutConfig, branching: BranchingConfig, vocab_size: int,
        seed: int,
    ):  # fmt: skip
        self.sampler, self.branching, self.budget = sampler, branching, rollout.budget
        self.vocab_size, self.seed = vocab_size, seed
        self.eos_ids, self.blank = tokenizer.eos_ids, blank_tokens(tokenizer)
        self.rule, self.shapes = RULES[branching.score], Shapes(rollout, branching)

    def grow(
        self,
        params: Params,
        trees: Sequence[Tree],
        old_log_probs: Sequence[Sequence[np.ndarray]],
        draw_id: Sequence[int],
    ) -> Growth:
        """Branch `trees` until each holds M rollouts.

        `trees`: initial rollouts; `old_log_probs`: theirs under π_old, by tree. `draw_id`: see `Sampler.initial`. There are L
        loops, and further ones if M is above N·(B+1)^L. Loops end when all trees are full.
        """
        growth = Growth([list(tree) for tree in trees], [[] for _ in trees])
        old = [list(known) for known in old_log_probs]
        new: list[list[np.ndarray]] = [
            [] for _ in trees
        ]  # under the current policy, from the first pass over a rollout
        for loop, max_scored in enumerate(self.shapes.max_scored(len(trees), len(trees[0])), start=1):
            if all(len(tree) == self.budget for tree in growth.trees):
                break
            rollouts = [rollout for tree in growth.trees for rollout in tree]
            scored = self.sampler.score(params, rollouts, max_scored, to_branch=True)
            values = iter(scored.log_probs)
            for p, tree in enumerate(growth.trees):
                for rollout in tree:
                    _add(rollout, new[p], log_probs := next(values))
                    _add(rollout, old[p], log_probs)  # the current policy drew the tokens after the fork
            growth.scores = self._scores(growth.trees, old, new, scored, max_scored)
            cuts = [self._choose(growth, p, loop, draw_id) for p in range(len(trees))]
            self._branch(params, growth, scored, cuts, loop, [*draw_id, loop])
            del scored  # its caches, before the next loop's passes make theirs
        growth.missing_branches = sum(self.budget - len(tree) for tree in growth.trees)
        return growth

    def _scores(
        self, trees: Sequence[Tree], old: Sequence[Sequence[np.ndarray]], new: Sequence[Sequence[np.ndarray]],
        scored: ScorePass, max_scored: int,
    ) -> list[list[NodeScores]]:  # fmt: skip
        """The Branching Scores, by tree. `old` and `new`: log-probs by tree and node."""

        valid = [valid_positions(r, self.blank, self.branching, self.eos_ids) for r in scored.rollouts]
        then, now = ([values for tree in by_tree for values in tree] for by_tree in (old, new))
        shape = max_scored, self.shapes.rollout_length
        by_node = iter(score_positions(scored, now, then, valid, self.branching, shape))
        return [[next(by_node) for _ in tree] for tree in trees]

    def _choose(self, growth: Growth, prompt: int, loop: int, draw_id: Sequence[int]) -> list[view.Cut]:
        """The cuts of one prompt in this loop."""
        tree = growth.trees[prompt]
        budget = self.budget - len(tree)
        rng = np.random.default_rng([self.seed, *draw_id, loop, prompt])
        request = view.Loop(loop, budget, self.vocab_size, rng)
        return self.rule.choose(view_of(tree, growth.scores[prompt]), request, self.branching)

    def _branch(
        self, params: Params, growth: Growth, scored: ScorePass, cuts: Sequence[Sequence[view.Cut]], loop: int,
        draw_id: Sequence[int],
    ) -> None:  # fmt: skip
        """Draw the branches and add them to their trees, in the order of `cuts`."""
        if not any(cuts):
            return
        wanted: list[list[Branch]] = []  # by scored rollout
        for tree, chosen in zip(growth.trees, cuts, strict=True):
            of_node: list[list[Branch]] = [[] for _ in tree]
            for node, cut in enumerate(chosen, start=len(tree)):
                of_node[cut.node].append(Branch(cut.length, node, loop))
            wanted += of_node
        drawn = iter(self.sampler.branches(params, scored, wanted, draw_id))
        for tree in growth.trees:
            branches = [rollout for _ in range(len(tree)) for rollout in next(drawn)]
            tree += sorted(branches, key=lambda rollout: rollout.node)
