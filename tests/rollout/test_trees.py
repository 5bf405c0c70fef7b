"""The shape of rollout trees for any (N, B, L, M); no point is branched twice; the trees of the turn-based baselines."""

from __future__ import annotations

import dataclasses
import gc
from collections import Counter
from typing import Any

import jax
import numpy as np
import oracle
import pytest
from growing import draw_and_grow, make_trees

from appo_jax.branching.tree import TreeView, already_branched
from appo_jax.config import Architecture, BranchingConfig, RolloutConfig
from appo_jax.policy.parameters import Params
from appo_jax.rollout import shapes, tree_sampler
from appo_jax.rollout.engine import Engine
from appo_jax.rollout.scoring import log_probs
from appo_jax.text.tokenizer import SentencePieceTokenizer
from appo_jax.tools.executor import ToolExecutor
from appo_jax.types import Example, Tree


@pytest.fixture
def draw(
    arch: Architecture, tokenizer: SentencePieceTokenizer, executor: ToolExecutor, params: Params,
    examples: list[Example], rollout_config: RolloutConfig,
):  # fmt: skip
    """A function that grows the trees of the examples, with N initial rollouts and a budget of M."""

    def draw(num_initial: int, budget: int, branching: BranchingConfig) -> list[Tree]:
        config = dataclasses.replace(rollout_config, num_initial=num_initial, budget=budget)
        sampler, grower = make_trees(arch, tokenizer, executor, config, branching)
        _, _, growth = draw_and_grow(sampler, grower, params, examples, num_initial)
        assert growth.missing_branches == 0
        return growth.trees

    return draw


@pytest.mark.parametrize(
    ("n", "b", "loops", "m"),
    [
        (1, 2, 3, 16), (1, 4, 2, 25), (3, 1, 2, 12), (2, 7, 1, 16),
        # budgets above N·(B+1)^L
        (3, 1, 2, 16), (2, 1, 1, 16), (1, 2, 1, 16), (4, 3, 1, 20),
    ],
)  # fmt: skip
def test_trees_have_the_declared_shape_and_keep_the_budget(draw, n: int, b: int, loops: int, m: int) -> None:
    for tree in draw(n, m, BranchingConfig(num_branch_points=b, num_loops=loops)):
        assert [r.node for r in tree] == list(range(m))
        per_loop = Counter(r.loop for r in tree)
        sizes = oracle.tree_sizes(n, b, loops, m)
        loops = len(sizes) - 1
        assert [per_loop[loop] for loop in range(loops + 1)] == [sizes[0], *np.diff(sizes)]
        for rollout in tree[n:]:
            parent = tree[rollout.parent]
            assert parent.loop < rollout.loop
            assert parent.sampled[rollout.fork]
            assert rollout.tokens[: rollout.fork].tolist() == parent.tokens[: rollout.fork].tolist()
        for loop in range(1, loops + 1):  # served uniformly: a rollout more or less, unless one runs out of positions
            children = Counter(r.parent for r in tree if r.loop == loop)
            served = [r for r in tree if r.loop < loop]
            counts = [children[r.node] for r in served if r.sampled[r.fork or 0 :].sum() > 4 * b]
            assert max(counts) - min(counts) <= 1
            if len(counts) == len(served):
                assert max(counts) <= b
        if loops == 1:
            assert len({(r.parent, r.fork) for r in tree[n:]}) == m - n


def heads(tree: Tree) -> list[list[tuple]]:
    """For every rollout and token: the tokens before it, each identified by the rollout that drew it; nobody drew the prompt."""
    names: list[list[tuple[int, int]]] = []
    for r in tree:
        head = [] if r.parent is None else names[r.parent][: r.fork]
        names.append(head + [(r.node if t >= r.prompt_length else -1, t) for t in range(len(head), r.length)])
    return [[tuple(own[:t]) for t in range(len(own) + 1)] for own in names]


def view(tree: Tree) -> TreeView:
    """What `already_branched` reads of a tree."""
    parents, forks, sampled = ([getattr(r, name) for r in tree] for name in ("parent", "fork", "sampled"))
    return TreeView(tree[0].prompt_length, parents, forks, [], sampled, [], [], [], [])


def test_all_roots_begin_with_the_same_prompt() -> None:
    """Two roots with a prompt of two tokens: the first was branched at token 2, before anything of its own, and at token 4."""
    sampled = [np.arange(6) >= 2] * 4
    tree = TreeView(2, [None, None, 0, 0], [None, None, 2, 4], [], sampled, [], [], [], [])
    found = already_branched(tree, include_token=False)
    assert [np.flatnonzero(taken).tolist() for taken in found] == [[2, 4], [2], [2], [2, 4]]


def test_branch_points_of_all_loops_keep_their_distance(draw) -> None:
    spacing = 5
    branching = BranchingConfig(num_branch_points=2, num_loops=2, min_spacing=spacing)
    for tree in draw(1, 9, branching):
        before = heads(tree)
        branches = [r for r in tree if r.parent is not None]
        for r in branches:
            parent, at = tree[r.parent], r.fork
            for other in branches:
                shared = before[other.parent][other.fork] == before[parent.node][: other.fork + 1][-1]
                if other.loop < r.loop and shared:
                    between = parent.sampled[min(at, other.fork) : max(at, other.fork)].sum()
                    assert between >= spacing


@pytest.mark.parametrize("include_token", [False, True])
def test_a_later_loop_knows_every_point_that_has_a_branch(draw, include_token: bool) -> None:
    branching = BranchingConfig(num_branch_points=2, num_loops=3, include_token=include_token)
    for tree in [*draw(1, 16, branching), *draw(3, 27, branching)]:
        before = heads(tree)
        branched = {before[r.parent][r.fork] for r in tree if r.parent is not None}
        found = already_branched(view(tree), include_token)
        for rollout, taken in zip(tree, found, strict=True):
            expected = [before[rollout.node][t + include_token] in branched for t in range(rollout.length)]
            assert taken.tolist() == expected
        # no rollout was branched at a point that an earlier loop had branched
        branches = [r for r in tree if r.parent is not None]
        for r in branches:
            earlier = [other for other in branches if other.loop < r.loop]
            assert before[r.parent][r.fork] not in {before[other.parent][other.fork] for other in earlier}


def test_caches_are_gone_before_the_next_score_passes(
    arch: Architecture, tokenizer: SentencePieceTokenizer, executor: ToolExecutor, params: Params,
    examples: list[Example], rollout_config: RolloutConfig, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Those of a loop when the next loop begins to score, and those of a pass from which no branches are drawn when it ends."""
    config = dataclasses.replace(rollout_config, num_initial=1, budget=4)
    sampler, grower = make_trees(arch, tokenizer, executor, config, BranchingConfig(num_branch_points=1, num_loops=2))
    monkeypatch.setattr(shapes, "AT_ONCE", 1)  # a row a pass
    real, alive = tree_sampler.score, []

    def watched(*args: Any, **kwargs: Any) -> Any:
        alive.append(sum(x.ndim == 4 for x in jax.live_arrays()) // (2 * arch.num_layers))  # keys and values
        return real(*args, **kwargs)

    monkeypatch.setattr(tree_sampler, "score", watched)
    trees = sampler.initial(params, examples, 1, (0, 0))
    gc.collect()
    old = log_probs(sampler, params, trees)
    assert len(alive) > 1
    assert not any(alive)
    alive.clear()
    growth = grower.grow(params, trees, old, (1, 0))
    assert [len(tree) for tree in growth.trees] == [4] * len(examples)
    second = alive.index(0, 1)  # the first pass of the second loop
    assert alive == [*range(second), *range(len(alive) - second)]


def test_every_branch_point_is_the_oracles(
    engine: Engine, params: Params, examples: list[Example], rollout_config: RolloutConfig
) -> None:
    """From π_old's log-probs and the moved policy's to the points of two loops, branches scored again in the second."""
    config = dataclasses.replace(rollout_config, num_initial=2, budget=9)
    branching = BranchingConfig(num_branch_points=2, num_loops=2, tau=4.0)
    sampler, grower = make_trees(engine.arch, engine.tokenizer, engine.executor, config, branching)
    moved = jax.tree.map(lambda x: 1.02 * x, params)
    _, old, growth = draw_and_grow(sampler, grower, params, examples, 2, moved)
    gated = inherited = 0
    for tree, drawn_by, scores in zip(growth.trees, old, growth.scores, strict=True):
        names, before = heads(tree), list(drawn_by)
        for r in tree[2 : len(scores)]:  # a branch has its parent's numbers before the fork, its own after it
            before.append(oracle.inherited(before[r.parent], scores[r.node].log_probs, r.fork))
        for loop in (1, 2):
            nodes = [r for r in tree if r.loop < loop]
            branched = {names[r.parent][r.fork] for r in nodes if r.parent is not None}
            orders = []
            for r in nodes:
                s = scores[r.node]
                omega = oracle.omega(oracle.log_ratio(s.log_probs, before[r.node], r.sampled), r.sampled, 4.0)
                np.testing.assert_allclose(s.future_value, omega, rtol=1e-3)
                bs, z_h, z_o, constant = oracle.branching_score(s.entropies, omega, s.valid, 1.0, 1.2)
                assert constant == s.constant_future
                if not r.is_initial:  # its own tokens have ratio 1, the inherited ones the parent's
                    assert (s.future_value[r.fork :] == 1).all()
                    inherited += bool((s.future_value[: r.fork] != 1).any())
                np.testing.assert_allclose(s.score, bs, atol=1e-3)
                order = oracle.ranking(bs, z_h, z_o, s.valid, constant)
                gated += order != oracle.ranking(bs, z_h, z_o, s.valid, constant, "literal")
                orders.append([t for t in order if names[r.node][t] not in branched])
            size = sum(r.loop <= loop for r in tree)
            chosen = oracle.round_robin(orders, min(9 - len(nodes), 2 * len(nodes)))
            assert size == len(nodes) + sum(map(len, chosen))
            drawn = [(r.parent, r.fork) for r in tree if r.loop == loop]
            assert sorted(drawn) == sorted((n, t) for n, ts in enumerate(chosen) for t in ts)
    assert gated > 0, "the case must contain a position that the gate moves"
    assert inherited > 0, "the case must contain a branch that inherits tokens of the policy before it moved"


def test_the_future_value_of_a_branch_of_a_branch_is_inherited_through_both(
    engine: Engine, params: Params, examples: list[Example], rollout_config: RolloutConfig
) -> None:
    """Over three loops, Ω at the tokens two generations share is one discounted sum over the same ratios."""
    config = dataclasses.replace(rollout_config, num_initial=1, budget=8)
    branching = BranchingConfig(num_branch_points=1, num_loops=4, tau=1e9)  # γ = 1
    sampler, grower = make_trees(engine.arch, engine.tokenizer, engine.executor, config, branching)
    initial = sampler.initial(params, examples, 1, (0, 0))
    old = log_probs(sampler, params, initial)  # as train_step does
    unmoved = grower.grow(params, initial, old, (1, 0))
    assert all(s.constant_future and (s.future_value == 1).all() for scores in unmoved.scores for s in scores)
    growth = grower.grow(jax.tree.map(lambda x: 1.02 * x, params), initial, old, (1, 0))
    grandchildren = 0
    for tree, known, scores in zip(growth.trees, old, growth.scores, strict=True):
        for r in tree[1 : len(scores)]:
            line = [r]
            while line[-1].parent is not None:
                line.append(tree[line[-1].parent])
            by_root = min(node.fork for node in line[:-1])  # tokens that π_old drew
            first = tree[0].prompt_length
            expected = np.exp(
                float((scores[0].log_probs - known[0])[first:by_root][tree[0].sampled[first:by_root]].sum())
            )
            if by_root > first:
                assert scores[r.node].future_value[first] == pytest.approx(expected, rel=1e-3)
                grandchildren += len(line) > 2
    assert grandchildren > 0


def test_where_no_position_is_left_branches_are_missed_and_counted(
    engine: Engine, params: Params, examples: list[Example], rollout_config: RolloutConfig
) -> None:
    config = dataclasses.replace(rollout_config, max_response_tokens=2)
    branching = BranchingConfig(num_branch_points=3)
    sampler, grower = make_trees(engine.arch, engine.tokenizer, engine.executor, config, branching)
    with jax.debug_nans(True):
        _, _, growth = draw_and_grow(sampler, grower, params, examples)
    places = [sum(int(s.valid.sum()) for s in scores) for scores in growth.scores]
    assert min(places) < 6, "the case must lack positions"
    assert [len(tree) for tree in growth.trees] == [3 + min(6, n) for n in places]
    assert growth.missing_branches == sum(6 - min(6, n) for n in places)


@pytest.mark.parametrize("score", ["entropy_change", "random_turn"])
def test_turn_based_branches_begin_turns_and_fill_the_budget(draw, score: str) -> None:
    trees = draw(8, 20, BranchingConfig(num_branch_points=2, score=score))
    turned = 0
    for tree in trees:
        assert len(tree) == 20
        for rollout in tree[8:]:
            parent = tree[rollout.parent]
            assert parent.sampled[rollout.fork]
            assert not parent.sampled[rollout.fork - 1]
            turned += rollout.fork > parent.prompt_length
    assert turned > 0, "the case must contain branches after tool calls"


def test_proportional_allocation_keeps_the_budget(draw) -> None:
    for tree in draw(3, 9, BranchingConfig(num_branch_points=2, allocation="proportional")):
        assert len(tree) == 9
        assert len({tuple(r.tokens.tolist()) for r in tree}) == 9, "branches of one point are drawn independently"
