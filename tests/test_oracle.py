"""The oracle itself, on cases small enough to work by hand."""

import math

import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st

approx = pytest.approx
TRUE4 = [True] * 4


def test_entropy_of_known_distributions():
    assert oracle.entropy([3.0] * 8) == approx(math.log(8))
    assert oracle.entropy([0.0, -math.inf]) == approx(0)
    logits = [math.log(1 / 2), math.log(1 / 4), math.log(1 / 4)]
    assert oracle.entropy(logits) == approx(1.5 * math.log(2))
    # temperature 1/2 squares the probabilities: 4/6, 1/6, 1/6
    assert oracle.entropy(logits, 0.5) == approx(4 / 6 * math.log(6 / 4) + 2 / 6 * math.log(6))


def test_log_probs_belong_to_the_token_that_the_previous_position_produced():
    logits = np.log([[0.9, 0.1], [0.3, 0.7], [0.5, 0.5]])
    log_p, h = oracle.log_probs_and_entropies(logits, [0, 1, 0], [False, True, True])
    np.testing.assert_allclose(np.exp(log_p), [1, 0.1, 0.3])
    np.testing.assert_allclose(h[1], -0.9 * math.log(0.9) - 0.1 * math.log(0.1))
    log_p, h = oracle.log_probs_and_entropies(logits, [0, 1, 0], [False, False, True])
    assert (log_p[1], h[1]) == (0, 0)


def test_omega_with_half_life_of_one_token():
    # gamma = 1/2: sums from the back: 8, 4 + 4 = 8, 2 + 4 = 6
    result = oracle.omega([2, 4, 8], [True] * 3, tau=1)
    np.testing.assert_allclose(np.log(result), [6, 8, 8])


def test_omega_counts_distance_over_sampled_tokens_only():
    # the two tool tokens in the middle add nothing and take no distance
    result = oracle.omega([2, 100, 100, 4, 8], [True, False, False, True, True], tau=1)
    np.testing.assert_allclose(np.log(result), [6, 0, 0, 8, 8])


def test_omega_after_tau_tokens_counts_half():
    ratio = np.zeros(33)
    ratio[32] = 1.0
    assert math.log(oracle.omega(ratio, [True] * 33, tau=32)[0]) == approx(0.5)


@pytest.mark.parametrize(
    ("values", "mask", "expected"),
    [
        ([1, 3], [True, True], [-1, 1]),
        ([1, 3, 99], [True, True, False], [-1, 1, 0]),
        ([0, 0, 0, 4], TRUE4, [-1 / math.sqrt(3)] * 3 + [math.sqrt(3)]),  # mean 1, variance 3
        ([0.1, 0.1, 0.1], [True] * 3, [0, 0, 0]),  # no variance
        ([7, 8], [True, False], [0, 0]),  # one member
        ([7, 8], [False, False], [0, 0]),  # none
    ],
)
def test_zscore(values, mask, expected):
    np.testing.assert_allclose(oracle.zscore(values, mask), expected)


def test_branching_score_is_the_product_of_both_z_scores():
    # clip to [1, 1.2]: 1, 1, 1.2, 1.2 -> Z = -1, -1, 1, 1; H = 0, 2, 2, 0 -> Z = -1, 1, 1, -1
    args = ([0, 2, 2, 0], [0.5, 1.0, 1.2, 9.0], TRUE4, 1.0, 1.2)
    bs, z_h, z_o, constant = oracle.branching_score(*args)
    np.testing.assert_allclose(z_h, [-1, 1, 1, -1])
    np.testing.assert_allclose(z_o, [-1, -1, 1, 1])
    np.testing.assert_allclose(bs, [1, -1, 1, -1])
    assert not constant
    np.testing.assert_allclose(oracle.branching_score(*args, score="entropy")[0], z_h)
    np.testing.assert_allclose(oracle.branching_score(*args, score="future")[0], z_o)
    np.testing.assert_allclose(oracle.branching_score(*args, "additive", 2.0, 3.0)[0], [-5, -1, 5, 1])


@pytest.mark.parametrize("omega", [[1.0] * 4, [0.2, 0.5, 0.9, 1.0], [1.2, 2.0, 3.0, 4.0]])  # clipped to one value
def test_constant_omega_leaves_the_entropy_alone(omega):
    bs, z_h, _, constant = oracle.branching_score([0, 2, 2, 0], omega, TRUE4, 1.0, 1.2)
    assert constant
    np.testing.assert_allclose(bs, z_h)


def test_ranking_puts_gated_positions_first_and_breaks_ties_by_index():
    z_h = [-1.0, 1.0, 0.5, 2.0, 1.0]
    z_o = [-4.0, 1.0, 2.0, -1.0, 1.0]
    bs = [4.0, 1.0, 1.0, -2.0, 1.0]
    valid = [True] * 5
    # 0 has the greatest product, of two negative factors; 1, 2 and 4 tie
    assert oracle.ranking(bs, z_h, z_o, valid, constant=False) == [1, 2, 4, 0, 3]
    assert oracle.ranking(bs, z_h, z_o, valid, constant=False, gate="literal") == [0, 1, 2, 4, 3]
    assert oracle.ranking(bs, z_h, z_o, [True, True, False, True, True], constant=False) == [1, 4, 0, 3]
    assert oracle.ranking(z_h, z_h, [0.0] * 5, valid, constant=True) == [3, 1, 4, 2, 0]


def test_spacing_counts_sampled_tokens():
    sampled = [True, True, False, False, True, True]
    assert oracle.top_b([1, 4, 5, 0], sampled, 3) == [1, 4, 5]
    # 1 and 4 are neighbours: two tool tokens lie between them; 5 is two away from 1
    assert oracle.top_b([1, 4, 5, 0], sampled, 3, min_spacing=2) == [1, 5]


@pytest.mark.parametrize(
    ("orders", "budget", "expected"),
    [
        ([[5, 6, 7], [1, 2, 3]], 4, [[5, 6], [1, 2]]),
        ([[5, 6, 7], [1, 2, 3]], 3, [[5, 6], [1]]),  # truncated by M
        ([[5, 6, 7, 8, 9], [1]], 6, [[5, 6, 7, 8, 9], [1]]),  # the second frees its budget
        ([[5, 6, 7, 8, 9], [1], []], 4, [[5, 6, 7], [1], []]),
        ([[], []], 3, [[], []]),
    ],
)
def test_round_robin(orders, budget, expected):
    assert oracle.round_robin(orders, budget) == expected


def test_pooled_takes_the_best_of_the_prompt():
    scores = [[9.0, 8.0, 1.0], [8.0, 2.0, 0.0]]
    assert oracle.pooled(scores, [[0, 1, 2], [0, 1, 2]], 3) == [[0, 1], [0]]
    assert oracle.pooled(scores, [[0, 1, 2], [0, 1, 2]], 2) == [[0, 1], []]  # a tie: the lowest rollout


@pytest.mark.parametrize(
    ("n", "b", "loops", "m", "sizes"),
    [
        (4, 3, 1, 16, [4, 16]),
        (1, 2, 3, 16, [1, 3, 9, 16]),  # 27 cut to M
        (1, 4, 2, 25, [1, 5, 25]),
        (3, 1, 2, 12, [3, 6, 12]),
        (3, 1, 2, 16, [3, 6, 12, 16]),  # M above N(B+1)^L: a third loop
        (1, 2, 1, 16, [1, 3, 9, 16]),
        (4, 3, 3, 16, [4, 16, 16, 16]),  # loops that find the tree full add nothing
    ],
)
def test_tree_sizes(n, b, loops, m, sizes):
    assert oracle.tree_sizes(n, b, loops, m) == sizes


@pytest.mark.parametrize(
    ("init", "branch", "mode", "expected"),
    [
        ([0, 1], [0, 1], "paper", [-1, 1]),
        ([0, 1], [0, 0, 0, 1], "paper", [(-1 - 1 / math.sqrt(3)) / 2, (1 + math.sqrt(3)) / 2]),  # branch: 1/4, std √3/4
        ([0, 1], [1, 1], "paper", [-1, (1 + 0) / 2]),  # branch std 0: left out for reward 0, 0 for reward 1
        ([1, 1], [0, 0], "paper", [0, 0]),  # init contributes 0, branch is left out
        ([1, 1], [1, 1], "paper", [0, 0]),
        ([0.1, 0.1, 0.1], [0.1], "paper", [0, 0, 0]),  # 3 · 0.1 / 3 is not 0.1 in floating point
        ([0, 1], [], "paper", [-1, 1]),  # no branches at all
        ([1], [0, 2], "paper", [0]),  # one initial rollout
        ([3], [0, 2], "paper", [(0 + 2) / 2]),
        ([0, 0], [0, 4], "joint", [-1 / math.sqrt(3)] * 2),
        ([1, 1], [1], "joint", [0, 0]),
        ([0, 1], [5, 9], "init_only", [-1, 1]),
        ([2, 2], [5, 9], "init_only", [0, 0]),
    ],
)
def test_a_base(init, branch, mode, expected):
    np.testing.assert_allclose(oracle.a_base(init, branch, mode), expected, atol=1e-12)


def test_a_base_shared_prefix():
    # branch advantages: -1 (root 0, before token 2), 1 (root 0, before token 1); root 1 has none
    first, second = oracle.a_base_shared_prefix([0, 1], [0, 2], root=[0, 0], fork=[2, 1], lengths_N=[3, 2])
    np.testing.assert_allclose(first, [-1 + (-1 + 1) / 2, -1 - 1, -1])
    np.testing.assert_allclose(second, [1, 1])


def test_advantages_scale_by_the_clipped_future_value():
    result = oracle.advantages(2.0, [0.5, 1.1, 7.0, 1.0], [True, True, True, False], 0.5, 1.0, 1.2)
    np.testing.assert_allclose(result, [2 * 1.5, 2 * 1.55, 2 * 1.6, 0])


@pytest.mark.parametrize(
    ("rho", "advantage", "expected"),
    [(1.5, 1, 1.2), (1.5, -1, -1.5), (0.5, 1, 0.5), (0.5, -1, -0.8), (1.1, 2, 2.2), (1.1, -2, -2.2)],
)
def test_surrogate(rho, advantage, expected):
    assert oracle.surrogate(math.log(rho), advantage, 0.2, 0.2) == approx(expected)


def test_kl_estimators():
    # π_θ = 1/2, π_ref = 1/4: log r = −log 2
    args = (math.log(1 / 2), math.log(1 / 4))
    assert oracle.kl(*args, "k1") == approx(math.log(2))
    assert oracle.kl(*args, "k2") == approx(0.5 * math.log(2) ** 2)
    assert oracle.kl(*args, "k3") == approx(1 / 2 - 1 + math.log(2))


@given(
    st.lists(st.floats(0.05, 1), min_size=3, max_size=3),
    st.lists(st.floats(0.05, 1), min_size=3, max_size=3),
)
def test_k1_and_k3_average_to_the_exact_divergence(p, q):
    p, q = np.array(p) / sum(p), np.array(q) / sum(q)
    exact = float(np.sum(p * np.log(p / q)))
    for estimator in ("k1", "k3"):
        mean = sum(pi * oracle.kl(math.log(pi), math.log(qi), estimator) for pi, qi in zip(p, q, strict=True))
        assert mean == approx(exact, abs=1e-9)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("paper", (2 + 5) / (2 * 16)),  # means 2 and 5, two prompts, M = 16
        ("token_mean", (6 + 5) / 4),
        ("seq_mean", (2 + 5) / 2),
        ("constant", (6 + 5) / (3 * 10)),
    ],
)
def test_aggregate(mode, expected):
    values = [[1, 2, 3, 99], [5, 99], [99]]  # the third rollout is masked out
    masks = [[True, True, True, False], [True, False], [False]]
    assert oracle.aggregate(values, masks, mode, num_prompts=2, budget=16, constant=10) == approx(expected)
    assert oracle.aggregate([[1.0]], [[False]], mode, constant=10) == 0


def test_loss_by_hand():
    # ρ = 1.5 and 1 with A = 1: min(1.5, 1.2) and 1; plus β · k2 with log r = 2 on the first token only
    new, old = [[math.log(0.6), math.log(0.5)]], [[math.log(0.4), math.log(0.5)]]
    masks, adv = [[True, True]], [[1.0, 1.0]]
    assert oracle.loss(new, old, adv, masks, mode="paper", budget=4) == approx(-(1.2 + 1) / 2 / 4)
    ref = [[math.log(0.6) + 2, math.log(0.5)]]
    with_kl = oracle.loss(new, old, adv, masks, mode="token_mean", ref_log_probs=ref, kl_weight=0.1, kl_estimator="k2")
    assert with_kl == approx(-(1.2 + 1) / 2 + 0.1 * 2 / 2)
