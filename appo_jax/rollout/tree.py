"""From initial rollouts to rollout trees: score under the current policy, choose branch points, draw the branches.

A tree is the list of one prompt's rollouts; a rollout's `node` is its index. Nodes 0 … N−1 are the initial rollouts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from appo_jax.branching.score import branching_scores, future_value
from appo_jax.branching.select import select, tree_sizes
from appo_jax.branching.turns import after_tool_calls, fresh, random_turns
from appo_jax.config import BranchingConfig, RolloutConfig
from appo_jax.policy.attention import LayerCache
from appo_jax.policy.parameters import Params
from appo_jax.policy.score import score
from appo_jax.rollout.batch import Batch
from appo_jax.rollout.engine import Engine
from appo_jax.rollout.seating import Fork
from appo_jax.text.tokenizer import Tokenizer
from appo_jax.types import Rollout

Tree = list[Rollout]
TURN_SCORES = ("entropy_change", "random_turn")  # branch where a turn begins (branching/turns.py)


@dataclasses.dataclass
class NodeScores:
    """What the score pass said of one rollout; all `[T]`, the rollout's own length."""

    log_probs: np.ndarray  # under the current policy
    entropies: np.ndarray
    future_value: np.ndarray  # Ω
    score: np.ndarray
    preferred: np.ndarray
    valid: np.ndarray
    constant_future: bool


@dataclasses.dataclass
class Growth:
    """A mini-batch's trees after branching, and what the metrics want to know about it."""

    trees: list[Tree]
    scores: list[list[NodeScores]]  # by prompt, by node, as of the loop that scored it last; initial rollouts first
    missing_branches: int = 0  # rollouts that the trees lack of the budget, because no valid position was left


def blank_tokens(tokenizer: Tokenizer) -> np.ndarray:
    """`[V]` bool: tokens that decode to nothing, whitespace or punctuation alone."""

    def blank(piece: bytes) -> bool:
        return not any(char.isalnum() or char == "�" for char in piece.decode("utf-8", errors="replace"))

    return np.array([blank(piece) for piece in tokenizer.token_bytes()])


def valid_positions(rollout: Rollout, blank: np.ndarray, config: BranchingConfig, eos_id: int) -> np.ndarray:
    """`[T]` bool: tokens before which (with `include_token`: after which) a branch may begin."""
    valid = rollout.sampled.copy()
    if config.skip_blank:
        valid &= ~np.append(blank, True)[
            np.minimum(rollout.tokens, len(blank))
        ]  # ids beyond the tokenizer's are blank too
    if config.include_token:
        # After EOS there is nothing to continue, and the last token may have used up the room.
        valid &= rollout.tokens != eos_id
        valid[-1] = False
    return valid


def already_branched(tree: Tree, include_token: bool) -> list[np.ndarray]:
    """`[T]` bool for each rollout of a tree: a branch with the same head begins there already.

    The head of a branch is its parent's, so a point there is one point, whichever of the two it was chosen on.
    """

    def owner(node: int, cut: int) -> int:
        """The rollout that drew the last of the first `cut` tokens of `node`."""
        rollout = tree[node]
        while rollout.parent is not None and rollout.fork is not None and cut <= rollout.fork:
            rollout = tree[rollout.parent]
        return rollout.node

    forks = {(owner(r.parent, r.fork), r.fork) for r in tree if r.parent is not None and r.fork is not None}
    out = [np.zeros(rollout.length, bool) for rollout in tree]
    for taken, rollout in zip(out, tree, strict=True):
        for node, cut in forks:
            if cut - include_token < rollout.length and owner(rollout.node, cut) == node:
                taken[cut - include_token] = True
    return out


def inherit(rollout: Rollout, by_node: Sequence[np.ndarray], own: np.ndarray) -> np.ndarray:
    """`own [T]`, with the parent's numbers (in `by_node`) at the tokens that a branch has from its parent."""
    if rollout.parent is None or rollout.fork is None:
        return own
    return np.concatenate([by_node[rollout.parent][: rollout.fork], own[rollout.fork :]])


_future_value = jax.jit(future_value, static_argnames="tau")
_branching_scores = jax.jit(branching_scores, static_argnames="config")


class TreeGrower:
    """Grows the trees of a mini-batch under the policy as it is now."""

    def __init__(self, engine: Engine, rollout: RolloutConfig, branching: BranchingConfig):
        self.engine, self.rollout, self.branching = engine, rollout, branching
        self.blank = blank_tokens(engine.tokenizer)
        self.length = rollout.max_prompt_tokens + rollout.max_response_tokens  # T
        # Rollouts that are scored in one pass.
        self.parents = max(1, rollout.decode_rows // branching.num_branch_points)

    def log_probs(self, params: Params, rollouts: Sequence[Rollout]) -> list[np.ndarray]:
        """`[T]` log-probabilities of each rollout's tokens under `params`, by the very program that scores branches.

        The same program on the same policy gives the same numbers, so in the first mini-batch Ω is exactly 1.
        """
        return [log_probs for log_probs, _ in self.score(params, rollouts, len(rollouts))[0]]

    def score(
        self, params: Params, rollouts: Sequence[Rollout], most: int
    ) -> tuple[list[tuple[np.ndarray, np.ndarray]], list[list[LayerCache]]]:
        """Each rollout's `[T]` log-probs and entropies, and the KV caches of the passes of `parents` rollouts they took.

        `most` is what the number of rollouts can never exceed; shapes follow from it.
        """
        ragged, caches = [], []
        for first in range(0, len(rollouts), self.parents):
            some = rollouts[first : first + self.parents]
            batch = Batch.of(some, self.engine.whole(min(self.parents, most)), self.length)
            scored = score(
                params, batch.tokens, arch=self.engine.arch, temperature=self.rollout.temperature,
                dtype=self.engine.dtype,
            )  # fmt: skip
            log_probs, entropies = np.asarray(scored.log_probs), np.asarray(scored.entropies)
            ragged += [(log_probs[i, : r.length], entropies[i, : r.length]) for i, r in enumerate(some)]
            caches.append(scored.cache)
        return ragged, caches

    def future_values(
        self, params: Params, trees: Sequence[Tree], old_log_probs: Sequence[Sequence[np.ndarray]]
    ) -> list[list[np.ndarray]]:
        """Ω `[T]` of every rollout of `trees` under `params`, by tree; `old_log_probs` alike."""
        rollouts = [rollout for tree in trees for rollout in tree]
        scored = self.log_probs(params, rollouts)
        log_probs, old = (np.zeros((len(rollouts), self.length), np.float32) for _ in range(2))
        sampled = np.zeros(old.shape, bool)
        flat = (values for tree in old_log_probs for values in tree)
        for i, (rollout, now, then) in enumerate(zip(rollouts, scored, flat, strict=True)):
            t = rollout.length
            log_probs[i, :t], old[i, :t], sampled[i, :t] = now, then, rollout.sampled
        future = np.asarray(_future_value(log_probs, old, sampled, tau=self.branching.tau))
        ragged = iter([future[i, : r.length] for i, r in enumerate(rollouts)])
        return [[next(ragged) for _ in tree] for tree in trees]

    def grow(
        self, params: Params, trees: Sequence[Tree], old_log_probs: Sequence[Sequence[np.ndarray]], salt: Sequence[int]
    ) -> Growth:
        """Branch `trees` (initial rollouts; their log-probs under π_old alike) until each holds M rollouts.

        L loops, and further ones when M is above N·(B+1)^L. A loop that finds all trees full is left out.
        """
        growth = Growth([list(tree) for tree in trees], [[] for _ in trees])
        b, budget = self.branching, self.rollout.budget
        if b.score in TURN_SCORES:  # a rollout may have more branches than B; the last loop fills the budget
            sizes = [len(trees[0]), *[budget] * b.num_loops]
        else:
            sizes = tree_sizes(len(trees[0]), b.num_branch_points, b.num_loops, budget)
        old = [list(tree) for tree in old_log_probs]
        now: list[list[np.ndarray]] = [
            [] for _ in trees
        ]  # log-probs under the present policy, from a node's first pass
        for loop, size in enumerate(sizes[:-1], start=1):
            if all(len(tree) == budget for tree in growth.trees):
                break
            nodes = [(p, n) for p, tree in enumerate(growth.trees) for n in range(len(tree))]
            rollouts = [growth.trees[p][n] for p, n in nodes]
            most = size * len(trees)
            scored, caches = self.score(params, rollouts, most)
            for (p, n), rollout, (log_probs, _) in zip(nodes, rollouts, scored, strict=True):
                if n == len(now[p]):
                    now[p].append(inherit(rollout, now[p], log_probs))
                if n == len(old[p]):  # its own tokens were drawn by the present policy, the others as the parent's were
                    old[p].append(inherit(rollout, old[p], log_probs))
            scored = [(now[p][n], entropies) for (p, n), (_, entropies) in zip(nodes, scored, strict=True)]
            scores = self._branching_scores(rollouts, [old[p][n] for p, n in nodes], scored, most)
            growth.scores = [[] for _ in trees]
            for (p, _), node_scores in zip(nodes, scores, strict=True):
                growth.scores[p].append(node_scores)
            points = self._choose(growth, loop, salt)
            self._branch(params, growth, nodes, iter(caches), points, most, loop, [*salt, loop])
        growth.missing_branches = sum(budget - len(tree) for tree in growth.trees)
        return growth

    def _branching_scores(
        self, rollouts: Sequence[Rollout], old_log_probs: Sequence[np.ndarray],
        scored: Sequence[tuple[np.ndarray, np.ndarray]], most: int,
    ) -> list[NodeScores]:  # fmt: skip
        log_probs, entropies, old = (np.zeros((most, self.length), np.float32) for _ in range(3))
        sampled, valid = np.zeros((most, self.length), bool), np.zeros((most, self.length), bool)
        for i, rollout in enumerate(rollouts):
            t = rollout.length
            log_probs[i, :t], entropies[i, :t] = scored[i]
            old[i, :t], sampled[i, :t] = old_log_probs[i], rollout.sampled
            valid[i, :t] = valid_positions(rollout, self.blank, self.branching, self.engine.tokenizer.eos_id)
        future = _future_value(log_probs, old, sampled, tau=self.branching.tau)
        result = jax.device_get(_branching_scores(future, entropies, valid, config=self.branching))
        return [
            NodeScores(
                log_probs[i, : r.length], entropies[i, : r.length], result.future_value[i, : r.length],
                result.score[i, : r.length], result.preferred[i, : r.length], valid[i, : r.length],
                bool(result.constant_future[i]),
            )
            for i, r in enumerate(rollouts)
        ]  # fmt: skip

    def _choose(self, growth: Growth, loop: int, salt: Sequence[int]) -> list[list[tuple[int, int]]]:
        """Branch points `(node, position)` of every prompt for this loop."""
        points = []
        for p, (tree, scores) in enumerate(zip(growth.trees, growth.scores, strict=True)):
            budget = self.rollout.budget - len(tree)
            if self.branching.score in TURN_SCORES:
                rng = np.random.default_rng([self.engine.seed, *salt, loop, p])
                points.append(self._choose_turns(tree, scores, budget, loop, rng))
                continue
            taken = already_branched(tree, self.branching.include_token)
            chosen = select(
                [s.score for s in scores], [s.preferred for s in scores],
                [s.valid & ~t for s, t in zip(scores, taken, strict=True)], [r.sampled for r in tree], budget,
                self.branching,
            )  # fmt: skip
            points.append(chosen)
        return points

    def _choose_turns(
        self, tree: Tree, scores: Sequence[NodeScores], budget: int, loop: int, rng: np.random.Generator
    ) -> list[tuple[int, int]]:
        """Branch points of ARPO or Tree-GRPO; after the last loop, new rollouts for what is left of the budget."""
        sampled, b = [r.sampled for r in tree], self.branching
        if b.score == "random_turn":
            points = random_turns(sampled, b.num_branch_points, budget, rng)
        else:  # a rollout's lots are drawn once: those of an earlier loop's rollouts are drawn
            own_from = [(r.fork or 0) if r.loop == loop - 1 else r.length for r in tree]
            entropies = [s.entropies for s in scores]
            points = after_tool_calls(entropies, sampled, own_from, budget, self.engine.arch.vocab_size, rng)
        left = budget - len(points) if loop == b.num_loops else 0
        num_initial = sum(r.is_initial for r in tree)
        return points + fresh(num_initial, tree[0].prompt_length, left)

    def _branch(
        self, params: Params, growth: Growth, nodes: Sequence[tuple[int, int]], caches: Iterator[list[LayerCache]],
        points: Sequence[Sequence[tuple[int, int]]], most: int, loop: int, salt: Sequence[int],
    ) -> None:  # fmt: skip
        """Draw the branches and add them to their trees, in the order of `points`."""
        forks: dict[tuple[int, int], list[Fork]] = {at: [] for at in nodes}
        for p, chosen in enumerate(points):
            for offset, (n, position) in enumerate(chosen):
                cut = position + (self.branching.include_token and self.branching.score not in TURN_SCORES)
                node = len(growth.trees[p]) + offset
                forks[p, n].append(fork_of(growth.trees[p][n], cut, node, loop, self.engine))
        results = self.engine.generate(
            params, caches, [forks[at] for at in nodes], self.branching.num_branch_points, most, salt
        )
        drawn: list[list[Rollout]] = [[] for _ in growth.trees]
        for (p, _), rollouts in zip(nodes, results, strict=True):
            drawn[p] += rollouts
        for tree, rollouts in zip(growth.trees, drawn, strict=True):
            tree += sorted(rollouts, key=lambda rollout: rollout.node)


def fork_of(parent: Rollout, cut: int, node: int, loop: int, engine: Engine) -> Fork:
    """The branch that keeps `parent.tokens[:cut]`, with the calls and the tool states of that moment."""
    calls = tuple(call for call in parent.calls if call.result_end <= cut)
    return Fork(
        example=parent.example, tokens=parent.tokens[:cut], prompt_length=parent.prompt_length,
        sampled=parent.sampled[:cut], log_probs=parent.log_probs[:cut], entropies=parent.entropies[:cut], calls=calls,
        states=calls[-1].states if calls else engine.start(parent.host), node=node, parent=parent.node, loop=loop,
        host=parent.host,
    )  # fmt: skip
