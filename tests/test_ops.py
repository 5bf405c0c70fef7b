"""Masked reductions and the discounted suffix sum against plain float64 loops, and their degenerate cases."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st

from appo_jax import ops

T = 12
values = st.lists(st.floats(-8, 8, width=32), min_size=T, max_size=T)
masks = st.lists(st.booleans(), min_size=T, max_size=T)
zscore = jax.jit(ops.masked_zscore)
suffix_sum = jax.jit(ops.discounted_suffix_sum, static_argnums=2)


@given(values, masks)
def test_mean_and_std_are_those_of_the_members(x, mask):
    x, mask = np.array(x, np.float32), np.array(mask)
    members = x[mask].astype(np.float64)
    mean, std = jax.jit(ops.masked_mean)(x, mask), jax.jit(ops.masked_std)(x, mask)
    np.testing.assert_allclose(mean, members.mean() if members.size else 0, atol=1e-5)
    np.testing.assert_allclose(std, members.std() if members.size else 0, atol=1e-5)


@given(st.lists(st.integers(-5, 5), min_size=T, max_size=T), masks)
def test_zscore_is_the_oracles_whatever_stands_outside_the_mask(x, mask):
    x, mask = np.array(x, np.float32) / 4, np.array(mask)
    expected = oracle.zscore(x, mask)
    np.testing.assert_allclose(zscore(x, mask), expected, atol=2e-5)
    outside = np.where(mask, x, np.inf).astype(np.float32)
    np.testing.assert_array_equal(zscore(outside, mask), zscore(x, mask))


@given(st.floats(-1e6, 1e6, width=32), masks)
def test_equal_numbers_have_no_zscore_however_their_mean_rounds(x, mask):
    x = np.full(T, x, np.float32)
    assert (np.asarray(zscore(x, np.array(mask))) == 0).all()
    assert bool(ops.is_constant(jnp.array(x), jnp.array(mask)))


def test_rows_do_not_see_each_other():
    x = jnp.array([[1, 3, 9], [5, 5, 5], [0, 0, 2]], jnp.float32)
    mask = jnp.array([[1, 1, 0], [1, 1, 1], [0, 0, 0]], bool)
    np.testing.assert_allclose(ops.masked_zscore(x, mask), [[-1, 1, 0], [0, 0, 0], [0, 0, 0]])
    np.testing.assert_array_equal(ops.is_constant(x, mask), [False, True, True])


@given(values, masks, st.sampled_from([0.5, 1.0, 8.0, 32.0]))
def test_discounted_suffix_sum_is_the_quadratic_sum(x, mask, tau):
    got = suffix_sum(np.array(x, np.float32), np.array(mask), 2.0 ** (-1.0 / tau))
    expected = np.log(oracle.omega(x, mask, tau))  # log of exp of the term-by-term sum
    np.testing.assert_allclose(np.where(mask, got, 0), expected, atol=1e-4)


def test_discounted_suffix_sum_by_hand():
    # half-life of one token: 2 + (4 + 8/2)/2 = 6; the two unmasked places are not there at all
    x = np.array([[2, 100, 100, 4, 8, 7]], np.float32)
    mask = np.array([[1, 0, 0, 1, 1, 0]], bool)
    np.testing.assert_allclose(suffix_sum(x, mask, 0.5), [[6, 8, 8, 8, 8, 0]])


def test_discounted_suffix_sum_of_a_long_rollout_keeps_its_precision():
    rng = np.random.default_rng(0)
    x, gamma = rng.normal(size=8192).astype(np.float32), 2.0 ** (-1 / 32)
    expected = np.zeros(8193)
    for t in range(8191, -1, -1):
        expected[t] = float(x[t]) + gamma * expected[t + 1]
    np.testing.assert_allclose(suffix_sum(x, np.ones(8192, bool), gamma), expected[:-1], atol=1e-4)


@pytest.mark.parametrize("mask", [[0, 0, 0], [0, 1, 0], [1, 1, 1]])
def test_no_case_makes_a_nan_on_the_way(mask):
    x, mask = jnp.array([3.0, 3.0, 3.0]), jnp.array(mask, bool)
    with jax.debug_nans(True):
        for reduce in (ops.masked_mean, ops.masked_std, ops.masked_zscore, functools.partial(suffix_sum, x, mask)):
            result = reduce(0.5) if isinstance(reduce, functools.partial) else reduce(x, mask)
            assert np.isfinite(result).all()
