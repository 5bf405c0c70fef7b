"""Independent truth for the method: one rollout or one prompt at a time, float64, plain loops.

Written from a statement of the method alone (its paragraphs are cited as §), never from the code under test. Nothing is
vectorised on purpose. Arrays are over the tokens T of one rollout: index t speaks of token t. `sampled` marks tokens
that the policy chose, `valid` those of them where a branch may start.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

# ---------------------------------------------------------------- §2.2a: the quantities of the score


def log_softmax(logits: Sequence[float], temperature: float = 1.0) -> list[float]:
    scaled = [float(x) / temperature for x in logits]
    top = max(scaled)
    log_sum = top + math.log(math.fsum(math.exp(x - top) for x in scaled))
    return [x - log_sum for x in scaled]


def entropy(logits: Sequence[float], temperature: float = 1.0) -> float:
    """H = −Σ_v p log p of the full distribution at the sampling temperature, in nats."""
    log_p = log_softmax(logits, temperature)
    return -math.fsum(math.exp(lp) * lp for lp in log_p if lp > -math.inf)


def log_probs_and_entropies(logits_TV, tokens_T, sampled_T, temperature=1.0) -> tuple[np.ndarray, np.ndarray]:
    """Per token t, from the logits at t−1, "the position that produced token i"; 0 where not sampled."""
    log_p_T, h_T = np.zeros(len(tokens_T)), np.zeros(len(tokens_T))
    for t in range(1, len(tokens_T)):
        if sampled_T[t]:
            log_p_T[t] = log_softmax(logits_TV[t - 1], temperature)[tokens_T[t]]
            h_T[t] = entropy(logits_TV[t - 1], temperature)
    return log_p_T, h_T


def log_ratio(new_log_probs_T, old_log_probs_T, sampled_T) -> np.ndarray:
    """log ρ_i = log π_θ − log π_old; 0 where not sampled."""
    return np.array(
        [float(n) - float(o) if s else 0.0 for n, o, s in zip(new_log_probs_T, old_log_probs_T, sampled_T, strict=True)]
    )


def omega(
    log_ratio_T, sampled_T, tau: float, max_ratio: float = math.inf, max_log_ratio: float = math.inf
) -> np.ndarray:
    """Ω_i = exp(Σ_{j≥i} γ^{j−i} log ρ_j), γ = 2^(−1/τ), "over sampled tokens only"; 1 where not sampled.

    §4 row 3: "distance counts sampled tokens". The quadratic definition, term by term. §4 row 11, official code:
    "log-ratios clamped to ±20"; "tokens with log-ratio above log 3 leave the Ω sum", and their place in it stays.
    """
    gamma = 2.0 ** (-1.0 / tau)
    positions = [t for t, s in enumerate(sampled_T) if s]
    terms = [clip(log_ratio_T[t], -max_log_ratio, max_log_ratio) for t in positions]
    terms = [0.0 if x > math.log(max_ratio) else x for x in terms] if max_ratio < math.inf else terms
    result = np.ones(len(sampled_T))
    for i, t in enumerate(positions):
        result[t] = math.exp(math.fsum(gamma ** (j - i) * terms[j] for j in range(i, len(positions))))
    return result


def clip(x: float, low: float, high: float) -> float:
    return min(max(float(x), low), high)


def zscore(values_T, mask_T) -> np.ndarray:
    """Over the masked members, population standard deviation; zeros when they are all equal, or none; 0 outside."""
    result = np.zeros(len(values_T))
    members = [t for t, m in enumerate(mask_T) if m]
    xs = [float(values_T[t]) for t in members]
    if not xs or max(xs) == min(xs):
        return result
    mean = math.fsum(xs) / len(xs)
    std = math.sqrt(math.fsum((x - mean) ** 2 for x in xs) / len(xs))
    for t, x in zip(members, xs, strict=True):
        result[t] = (x - mean) / std
    return result


def is_constant(values_T, mask_T) -> bool:
    xs = [float(v) for v, m in zip(values_T, mask_T, strict=True) if m]
    return not xs or max(xs) == min(xs)


def branching_score(
    entropies_T, omega_T, valid_T, clip_low, clip_high, score="product", entropy_weight=1.0, future_weight=1.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray, bool]:
    """(BS, Z(H), Z(clip Ω), constant-Ω path taken), each 0 where not valid.

    BS_i = Z(clip(Ω_i)) · Z(H_i), Z over the rollout's valid tokens. §3 row 1: clip Ω constant → BS = Z(H).
    §6: entropy = Z(H); future = Z(clip Ω); additive = w_H·Z(H) + w_Ω·Z(clip Ω).
    """
    clipped_T = np.array([clip(o, clip_low, clip_high) for o in omega_T])
    z_h, z_o = zscore(entropies_T, valid_T), zscore(clipped_T, valid_T)
    constant = is_constant(clipped_T, valid_T)
    bs = np.zeros(len(z_h))
    for t in range(len(bs)):
        if score == "product":
            bs[t] = z_h[t] if constant else z_o[t] * z_h[t]
        elif score == "entropy":
            bs[t] = z_h[t]
        elif score == "future":
            bs[t] = z_o[t]
        elif score == "additive":
            bs[t] = entropy_weight * z_h[t] + future_weight * z_o[t]
        else:
            raise ValueError(score)
    return bs, z_h, z_o, constant


# ---------------------------------------------------------------- §2.2b and §3: where to branch


def ranking(bs_T, z_h_T, z_o_T, valid_T, constant: bool, gate: str = "both_positive") -> list[int]:
    """Valid positions from best to worst; of equal scores the lowest index first.

    §3 row 2, both_positive: positions with Z(H) > 0 and Z(Ω) > 0 come first, by BS; the others follow by BS. On the
    constant-Ω path Ω says nothing, so Z(H) > 0 alone decides. literal: by BS.
    """
    first, rest = [], []
    for t, v in enumerate(valid_T):
        if v:
            passes = z_h_T[t] > 0 and (constant or z_o_T[t] > 0)
            (first if gate == "both_positive" and passes else rest).append(t)
    return sorted(first, key=lambda t: (-bs_T[t], t)) + sorted(rest, key=lambda t: (-bs_T[t], t))


def spaced(order: Sequence[int], sampled_T, min_spacing: int) -> list[int]:
    """The order without positions nearer than `min_spacing` sampled tokens to one that comes before them in it."""
    rank = np.cumsum([bool(s) for s in sampled_T])  # distances are counted in sampled tokens
    chosen: list[int] = []
    for t in order:
        if all(abs(int(rank[t]) - int(rank[c])) >= min_spacing for c in chosen):
            chosen.append(t)
    return chosen


def top_b(order: Sequence[int], sampled_T, num_branch_points: int, min_spacing: int = 1) -> list[int]:
    """§2.2b: the top-B positions of one rollout; fewer when there are fewer (§3 row 4)."""
    return spaced(order, sampled_T, min_spacing)[:num_branch_points]


def round_robin(orders: Sequence[Sequence[int]], budget: int) -> list[list[int]]:
    """Positions per rollout of one prompt, best first: rounds over the rollouts, each giving its next best.

    §2 "trees are served uniformly; the budget M truncates"; §3 row 4 "the freed budget goes to the prompt's other
    rollouts". `orders` are already spaced; `budget` is min(M − rollouts so far, B · rollouts).
    """
    taken: list[list[int]] = [[] for _ in orders]
    while budget > 0 and any(len(t) < len(o) for t, o in zip(taken, orders, strict=True)):
        for t, order in zip(taken, orders, strict=True):
            if budget > 0 and len(t) < len(order):
                t.append(order[len(t)])
                budget -= 1
    return taken


def pooled(scores_NT: Sequence[Sequence[float]], orders: Sequence[Sequence[int]], budget: int) -> list[list[int]]:
    """§4 row 6, the official code's top-(M−N) of the prompt by BS; ties: lowest rollout, then lowest position."""
    pool = sorted((-scores_NT[n][t], n, t) for n, order in enumerate(orders) for t in order)
    taken: list[list[int]] = [[] for _ in orders]
    for _, n, t in pool[:budget]:
        taken[n].append(t)
    return taken


def proportional(
    scores_NT: Sequence[Sequence[float]], orders: Sequence[Sequence[int]], num_branch_points: int, budget: int,
    gate_NT: Sequence[Sequence[bool]],
) -> dict[tuple[int, int], int]:  # fmt: skip
    """Theorem 1's allocation: branches of each (rollout, position), in proportion to the positive part of the score.

    The candidates are each rollout's top B; those outside the gate get nothing if one inside it has a positive score. Largest
    remainder, handed out one by one; ties: lowest rollout, lowest position.
    """
    weight = {(n, t): max(0.0, float(scores_NT[n][t])) for n, o in enumerate(orders) for t in o[:num_branch_points]}
    if any(w > 0 and gate_NT[n][t] for (n, t), w in weight.items()):
        weight = {(n, t): w if gate_NT[n][t] else 0.0 for (n, t), w in weight.items()}
    total = math.fsum(weight.values())
    if total == 0:
        taken = round_robin(orders, min(budget, num_branch_points * len(orders)))
        return {(n, t): 1 for n, ts in enumerate(taken) for t in ts}
    budget = min(budget, num_branch_points * len(orders))
    share = {point: budget * w / total for point, w in weight.items()}
    counts = {point: math.floor(x) for point, x in share.items()}
    remainders = sorted(share, key=lambda point: (counts[point] - share[point], point))
    for point in remainders[: budget - sum(counts.values())]:
        counts[point] += 1
    return {point: count for point, count in counts.items() if count}


def turns(sampled_T) -> list[list[int]]:
    """The indices of each stretch of sampled tokens."""
    result: list[list[int]] = []
    for t, s in enumerate(sampled_T):
        if s and (t == 0 or not sampled_T[t - 1]):
            result.append([])
        if s:
            result[-1].append(t)
    return result


def arpo_probabilities(entropies_T, sampled_T, vocab_size: int, p=0.5, w=0.2, window=20) -> dict[int, float]:
    """§6 ARPO: P = clip(p + w·ΔH, 0, 1) for each turn after a tool call, by its first token."""
    segments = turns(sampled_T)
    h = [
        math.fsum(float(entropies_T[t]) for t in s[:window]) / len(s[:window]) / math.log(vocab_size) for s in segments
    ]
    return {s[0]: clip(p + w * (x - h[0]), 0.0, 1.0) for s, x in zip(segments[1:], h[1:], strict=True)}


def tree_sizes(num_initial: int, num_branch_points: int, num_loops: int, budget: int) -> list[int]:
    """§2 "Multi-loop trees": rollouts of a prompt after 0, 1, … loops when every rollout has room.

    "Each further loop … branches again, until M rollouts exist"; "an M above N(B+1)^L is filled by further loops".
    """
    sizes, loop = [num_initial], 0
    while loop < num_loops or sizes[-1] < budget:
        branches = sum(num_branch_points for _ in range(sizes[-1]))  # B of every rollout of the tree
        sizes.append(min(budget, sizes[-1] + branches))
        loop += 1
    return sizes


def inherited(parent_T, own_T, fork: int) -> list[float]:
    """§3 "Branches scored in loops > 1": a branch's number at each token: its parent's before the fork, then its own.

    For log π_old the own part is log π_θ ("a branch's own tokens were drawn by the present π_θ: ratio 1").
    """
    return [parent_T[t] if t < fork else own_T[t] for t in range(len(own_T))]


# ---------------------------------------------------------------- §2.2d and §4 row 9: A_base


def group_term(reward: float, group: Sequence[float], ddof: int = 0) -> float | None:
    """(R − mean(G)) / std(G). A group of equal rewards: 0 if R is that reward, else None (left out).

    Population std; §4 row 11, official code: "group std with ddof = 1" (its GRPO adds 1e-6 to it).
    """
    rewards = [float(r) for r in group]
    if not rewards:
        return None
    if max(rewards) == min(rewards):
        return 0.0 if float(reward) == rewards[0] else None
    mean = math.fsum(rewards) / len(rewards)
    std = math.sqrt(math.fsum((r - mean) ** 2 for r in rewards) / (len(rewards) - ddof))
    return (float(reward) - mean) / (std + 1e-6 * ddof)


def a_base(init_rewards_N, branch_rewards, mode: str = "paper", ddof: int = 0) -> np.ndarray:
    """[N] A_base of one prompt's initial rollouts. A group left out is not counted in the average (§3 row 3).

    paper: eq. 6, average over the init and the branch group. joint: one group of all. init_only: the init group.
    """
    init, branch = list(init_rewards_N), list(branch_rewards)
    groups = {"paper": [init, branch], "joint": [init + branch], "init_only": [init]}[mode]
    result = []
    for reward in init:
        terms = [term for group in groups if (term := group_term(reward, group, ddof)) is not None]
        result.append(math.fsum(terms) / len(terms) if terms else 0.0)
    return np.array(result)


def a_base_shared_prefix(
    init_rewards_N, branch_rewards, root: Sequence[int], fork: Sequence[int], lengths_N
) -> list[np.ndarray]:
    """Per initial rollout [T]: §4 row 9, "A_init plus the mean of the branches' own advantages on the shared prefix".

    Branch k grew from initial rollout root[k] and shares its tokens before fork[k]; its own advantage is its term in
    the branch group. A token that no branch shares has A_init alone.
    """
    result = []
    for n, length in enumerate(lengths_N):
        a_init = group_term(init_rewards_N[n], init_rewards_N) or 0.0
        a_T = np.full(length, a_init)
        for t in range(length):
            sharing = [
                group_term(r, branch_rewards) for k, r in enumerate(branch_rewards) if root[k] == n and t < fork[k]
            ]
            if sharing:
                a_T[t] += math.fsum(s or 0.0 for s in sharing) / len(sharing)
        result.append(a_T)
    return result


def a_tree(rewards: Sequence[float], roots: Sequence[int]) -> list[float]:
    """§6 Tree-GRPO: intra-tree plus inter-tree z-score; 0 for a group without spread."""
    result = []
    for reward, root in zip(rewards, roots, strict=True):
        own = [r for r, other in zip(rewards, roots, strict=True) if other == root]
        result.append((group_term(reward, own) or 0.0) + (group_term(reward, rewards) or 0.0))
    return result


def a_turns(
    rewards: Sequence[float], states: Sequence[Sequence[object]], discount=0.95, weight=1.0
) -> list[list[float]]:
    """§6 GiGPO: for each turn of each rollout the episode's z-score plus that of the turn's return among equal states."""
    value = [[r * discount ** (len(s) - 1 - k) for k in range(len(s))] for r, s in zip(rewards, states, strict=True)]
    result = []
    for n, own in enumerate(states):
        row = []
        for k, state in enumerate(own):
            group = [value[m][j] for m, other in enumerate(states) for j, s in enumerate(other) if s == state]
            row.append((group_term(rewards[n], rewards) or 0.0) + weight * (group_term(value[n][k], group) or 0.0))
        result.append(row)
    return result


def a_global(rewards: Sequence[float], penalties, masks) -> list[list[float]]:
    """§6 REINFORCE++: reward less the penalties from the token on, z-scored over all masked tokens of the mini-batch."""
    returns = [
        [r - math.fsum(float(x) for x in p[t:]) for t in range(len(p))] for r, p in zip(rewards, penalties, strict=True)
    ]
    tokens = [x for row, mask in zip(returns, masks, strict=True) for x, m in zip(row, mask, strict=True) if m]
    return [
        [(group_term(x, tokens) or 0.0) if m else 0.0 for x, m in zip(row, mask, strict=True)]
        for row, mask in zip(returns, masks, strict=True)
    ]


def overlong(length: int, limit: int, buffer: int) -> float:
    """§6 DAPO's overlong shaping, case by case."""
    if length <= limit - buffer:
        return 0.0
    if length <= limit:
        return ((limit - buffer) - length) / buffer
    return -1.0


# ---------------------------------------------------------------- §2.2e and f: scaling and loss


def advantages(a_base_n: float, omega_T, sampled_T, future_weight=0.5, clip_low=1.0, clip_high=1.2) -> np.ndarray:
    """Eq. 7: A_i = A_base · (1 + b · clip(Ω_i)); 0 where not sampled."""
    return np.array(
        [
            a_base_n * (1.0 + future_weight * clip(o, clip_low, clip_high)) if s else 0.0
            for o, s in zip(omega_T, sampled_T, strict=True)
        ]
    )


def surrogate(
    log_ratio_i: float, advantage_i: float, clip_low: float, clip_high: float, dual_clip: float = 0.0
) -> float:
    """min(ρ A, clip(ρ, 1−ε, 1+ε) A) of one token; with a dual clip at least c·A where A < 0."""
    rho = math.exp(log_ratio_i)
    value = min(rho * advantage_i, clip(rho, 1.0 - clip_low, 1.0 + clip_high) * advantage_i)
    return max(value, dual_clip * advantage_i) if dual_clip and advantage_i < 0 else value


def surrogate_slope(kind: str, log_ratio_i: float, advantage_i: float, clip_low: float, clip_high: float) -> float:
    """d surrogate / d log π of one token, in closed form.

    clip: ρA, or 0 where the clip decides. §6 gppo: there (1 ± ε)A instead. gppo_high (AEPO's official code): only
    at the upper end. §6 cispo: sg(clip(ρ))·A everywhere.
    """
    rho, a = math.exp(log_ratio_i), advantage_i
    bounded = clip(rho, 1.0 - clip_low, 1.0 + clip_high)
    if kind == "cispo":
        return bounded * a
    decides = (a > 0 and rho > 1.0 + clip_high) or (a < 0 and rho < 1.0 - clip_low)
    if not decides:
        return rho * a
    return bounded * a if kind == "gppo" or (kind == "gppo_high" and a > 0) else 0.0


def kl(log_prob: float, ref_log_prob: float, estimator: str, max_k3: float = math.inf) -> float:
    """Estimators of KL(π_θ‖π_ref) from a token drawn from π_θ, with r = π_ref/π_θ.

    k1 = −log r, k2 = (log r)²/2, k3 = r − 1 − log r. §4 row 11, official code: k3 clamped "at 10".
    """
    log_r = float(ref_log_prob) - float(log_prob)
    if estimator == "k3":
        return min(math.exp(min(log_r, 700.0)) - 1.0 - log_r, max_k3)
    return {"k1": -log_r, "k2": 0.5 * log_r**2}[estimator]


def aggregate(
    values: Sequence[Sequence[float]], masks: Sequence[Sequence[bool]], mode: str, num_prompts=1, budget=1, constant=1
):
    """One number from per-token values of a mini-batch of initial rollouts.

    paper: eq. 8, 1/M Σ_n 1/|H_n| Σ_i, averaged over the prompts; |H_n| counts the rollout's masked tokens, M is the
    budget, branches included. token_mean: over all masked tokens. seq_mean: the mean over rollouts of their mean.
    constant: Σ / (rollouts · constant). A rollout without masked tokens adds 0 and is not a rollout of seq_mean;
    nothing masked at all gives 0.
    """
    sums = [math.fsum(float(v) for v, m in zip(vs, ms, strict=True) if m) for vs, ms in zip(values, masks, strict=True)]
    counts = [sum(bool(m) for m in ms) for ms in masks]
    means = [s / c for s, c in zip(sums, counts, strict=True) if c]
    if not means:
        return 0.0
    if mode == "paper":
        return math.fsum(means) / (num_prompts * budget)
    if mode == "token_mean":
        return math.fsum(sums) / sum(counts)
    if mode == "seq_mean":
        return math.fsum(means) / len(means)
    if mode == "constant":
        return math.fsum(sums) / (len(sums) * constant)
    raise ValueError(mode)


def loss(
    new_log_probs,
    old_log_probs,
    advantages_,
    masks,
    *,
    clip_low=0.2,
    clip_high=0.2,
    mode="paper",
    num_prompts=1,
    budget=1,
    constant=1,
    ref_log_probs=None,
    kl_weight=0.0,
    kl_estimator="k3",
    kl_in="outside",
    max_k3=math.inf,
    dual_clip=0.0,
    max_dual_clipped=-1,
    max_log_ratio=math.inf,
    entropies=None,
    entropy_weight=0.0,
    kind="clip",
) -> float:
    """Eq. 8 with its sign turned, to be minimised; lists over trained rollouts of lists over tokens.

    §4 row 11a: β·KL "outside the sums over n and i" is β times the mean over rollouts of their token means; "inside", it
    is averaged as the surrogate is. §4 row 11, official code: "sequences with more than one dual-clipped token leave the
    token mean's numerator and denominator and keep their KL", and "log-ratios clamped to ±20".
    §6 gppo: the value of eq. 8. §6 cispo: "stop-gradient clipped importance weight times log-prob", times A.
    """
    shape = {"mode": mode, "num_prompts": num_prompts, "budget": budget, "constant": constant}
    surrogates, kept = [], []
    for new, old, adv, mask in zip(new_log_probs, old_log_probs, advantages_, masks, strict=True):
        ratios = [clip(float(a) - float(b), -max_log_ratio, max_log_ratio) for a, b in zip(new, old, strict=True)]
        dual = [
            bool(m) and a < 0 and x > math.log(dual_clip or math.inf) for x, a, m in zip(ratios, adv, mask, strict=True)
        ]
        leaves = max_dual_clipped >= 0 and sum(dual) > max_dual_clipped
        kept.append([bool(m) and not leaves for m in mask])
        if kind == "cispo":
            rho = [clip(math.exp(x), 1.0 - clip_low, 1.0 + clip_high) for x in ratios]
            surrogates.append(
                [r * float(a) * float(n) if m else 0.0 for r, a, n, m in zip(rho, adv, new, mask, strict=True)]
            )
        else:
            pairs = zip(ratios, adv, mask, strict=True)
            surrogates.append(
                [surrogate(x, float(a), clip_low, clip_high, dual_clip) if m else 0.0 for x, a, m in pairs]
            )
    total = -aggregate(surrogates, kept, **shape)
    if kl_weight:
        values = [
            [kl(a, b, kl_estimator, max_k3) if m else 0.0 for a, b, m in zip(new, ref, mask, strict=True)]
            for new, ref, mask in zip(new_log_probs, ref_log_probs, masks, strict=True)
        ]
        if kl_in == "outside":
            means = [
                math.fsum(row) / sum(map(bool, mask)) for row, mask in zip(values, masks, strict=True) if any(mask)
            ]
            total += kl_weight * math.fsum(means) / max(1, len(means))
        else:
            total += kl_weight * aggregate(values, masks, **shape)
    if entropy_weight:
        total -= entropy_weight * aggregate(entropies, masks, **shape)
    return total
