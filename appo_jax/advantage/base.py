"""A_base of every rollout of a mini-batch's trees, by the rule in `advantage.base`. On the host, in float64."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from appo_jax.advantage.groups import EQUAL, dual_group, spread, zscores_within
from appo_jax.config import AdvantageConfig, Std
from appo_jax.types import Rollout, Tree, turn_starts

# GiGPO (arXiv 2505.10978): discount of the reward from turn to turn, and weight of the turns' advantage.
TURN_DISCOUNT, TURN_WEIGHT = 0.95, 1.0


def base_advantages(
    trees: Sequence[Tree], penalties: Sequence[Sequence[np.ndarray]] | None, config: AdvantageConfig
) -> list[list[np.ndarray]]:
    """A_base `[T]` of every rollout, by tree; 0 outside its sampled tokens.

    penalties: `[T]` of every rollout, subtracted from the reward (a KL term in the reward). `global` subtracts each at
    its token; the other rules subtract their sum. Branches have an A_base only under the rules that treat them like
    initial rollouts: `joint`, `global`, `tree` and `turn`. Under the others it is 0.
    """
    if config.base == "global":
        return global_returns(trees, penalties, config.std)
    out = []
    for p, tree in enumerate(trees):
        rewards = np.array([r.reward for r in tree], np.float64)
        if penalties is not None:
            rewards = rewards - [penalty.sum() for penalty in penalties[p]]
        out.append([np.where(r.sampled, a, 0.0) for r, a in zip(tree, _of_tree(tree, rewards, config), strict=True)])
    return out


def _of_tree(tree: Tree, rewards: np.ndarray, config: AdvantageConfig) -> Iterable[np.ndarray | float]:
    """A_base of each rollout of one prompt: a number for the whole rollout or `[T]`."""
    first = np.array([r.is_initial for r in tree])
    if config.base == "turn":
        return turn_groups(tree, rewards, config.std)
    if config.base == "tree":
        return tree_groups(rewards, [root_and_shared(tree, r)[0] for r in tree], config.std)
    if config.base == "joint":
        return zscores_within(rewards, config.std)
    if config.base == "every_rollout":
        return dual_group(rewards, rewards[first], rewards[~first], config.std)
    if config.base == "shared_prefix":
        return shared_prefix(tree, rewards, config.std)
    if config.base == "paper":
        initial = dual_group(rewards[first], rewards[first], rewards[~first], config.std)
    else:
        initial = zscores_within(rewards[first], config.std)
    return np.concatenate([initial, np.zeros((~first).sum())])


def root_and_shared(tree: Tree, rollout: Rollout) -> tuple[int, int]:
    """The initial rollout from which `rollout` descends, and the number of first tokens that the two share."""
    shared = rollout.length
    while rollout.parent is not None and rollout.fork is not None:
        shared, rollout = min(shared, rollout.fork), tree[rollout.parent]
    return rollout.node, shared


def shared_prefix(tree: Tree, rewards: np.ndarray, std: Std) -> list[np.ndarray]:
    """Official code: A_init, and on every token shared with branches the mean of those branches' own advantages.

    A_init is the z-score within the initial rollouts, a branch's own advantage the z-score within the branches; a group
    without spread gives 0. A token is shared with the branches (of any loop) that forked after it.
    """
    first = np.array([r.is_initial for r in tree])
    initial, branches = zscores_within(rewards[first], std), zscores_within(rewards[~first], std)
    total, count = ([np.zeros(tree[n].length) for n in range(len(initial))] for _ in range(2))
    for rollout, branch_advantage in zip(tree[len(initial) :], branches, strict=True):
        if np.isnan(rewards[rollout.node]):
            continue
        root, shared = root_and_shared(tree, rollout)
        total[root][:shared] += branch_advantage
        count[root][:shared] += 1
    values = [a + t / np.maximum(c, 1) for a, t, c in zip(initial, total, count, strict=True)]
    # Without a reward of its own a rollout learns nothing, whatever its branches got.
    values = [np.zeros_like(v) if np.isnan(r) else v for v, r in zip(values, rewards[first], strict=True)]
    return [*values, *(np.zeros(r.length) for r in tree[len(initial) :])]


def tree_groups(rewards: np.ndarray, roots: Sequence[int], std: Std) -> np.ndarray:
    """Tree-GRPO (arXiv 2509.21240): z-score among the rollouts of the same root plus z-score among all, `[M]`."""
    of_root = np.array(roots)
    advantages = zscores_within(rewards, std)
    for root in set(roots):
        advantages[of_root == root] += zscores_within(rewards[of_root == root], std)
    return advantages


def turn_groups(tree: Tree, rewards: np.ndarray, std: Std) -> list[np.ndarray]:
    """GiGPO: z-score of the episode plus that of each turn among the turns that began in an equal state, `[T]` each.

    A turn's state is what the policy has just read: the prompt, or a tool's answer with the tool's name. Its return is the
    reward, discounted by the turns still to come.
    """
    episodes = zscores_within(rewards, std)
    groups: dict[tuple[str, str] | None, list[tuple[int, int, float]]] = {}  # state -> (rollout, first token, return)
    for n, rollout in enumerate(tree):
        starts = turn_starts(rollout.sampled)
        read = {call.result_end: (call.name, call.result) for call in rollout.calls}
        for k, start in enumerate(starts.tolist()):
            value = rewards[n] * TURN_DISCOUNT ** (len(starts) - 1 - k)
            groups.setdefault(read.get(start), []).append((n, start, value))
    values = [np.full(rollout.length, episode) for rollout, episode in zip(tree, episodes, strict=True)]
    for members in groups.values():
        of_members = zscores_within(np.array([value for *_, value in members]), std)
        for (n, start, _), zscore in zip(members, of_members, strict=True):
            later = [t for t in turn_starts(tree[n].sampled).tolist() if t > start]
            end = min(later, default=tree[n].length)
            values[n][start:end] += TURN_WEIGHT * zscore
    return values


def global_returns(
    trees: Sequence[Tree], penalties: Sequence[Sequence[np.ndarray]] | None, std: Std
) -> list[list[np.ndarray]]:
    """REINFORCE++ (arXiv 2501.03262): reward minus the penalties from a token on, normalised over the mini-batch's tokens."""
    returns: list[list[np.ndarray]] = []
    for p, tree in enumerate(trees):
        to_go = [np.zeros(r.length) if penalties is None else penalties[p][n] for n, r in enumerate(tree)]
        returns.append([r.reward - np.cumsum(x[::-1])[::-1] for r, x in zip(tree, to_go, strict=True)])
    rollouts = [r for tree in trees for r in tree]
    tokens = np.concatenate([x[r.sampled] for r, x in zip(rollouts, (x for row in returns for x in row), strict=True)])
    tokens = tokens[~np.isnan(tokens)]  # rollouts without a reward
    if not tokens.size or tokens.max() - tokens.min() <= EQUAL:
        return [[np.zeros(r.length) for r in tree] for tree in trees]
    mean, scale = tokens.mean(), spread(tokens, std)
    return [
        [np.where(r.sampled, np.nan_to_num((x - mean) / scale), 0.0) for r, x in zip(tree, row, strict=True)]
        for tree, row in zip(trees, returns, strict=True)
    ]
