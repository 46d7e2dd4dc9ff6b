"""The compiled kernels against NumPy and SciPy."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from preflab.algorithms.estimation import linear_algebra as la
from scipy.linalg import solve_triangular


def positive_definite(rng, d):
    root = rng.normal(size=(d, d))
    return root @ root.T + 0.1 * np.eye(d)


@given(st.integers(1, 12), st.integers(0, 2**32 - 1), st.floats(-3, 3))
@settings(max_examples=60, deadline=None)
def test_update_is_the_factor_of_the_sum(d, seed, exponent):
    rng = np.random.default_rng(seed)
    A = positive_definite(rng, d)
    x = 10**exponent * rng.normal(size=d)
    x[rng.random(d) < 0.3] = 0.0
    L, kept = np.linalg.cholesky(A), x.copy()
    la.cholesky_update(L, x)
    np.testing.assert_array_equal(x, kept)
    np.testing.assert_array_equal(np.triu(L, 1), 0)
    fresh = np.linalg.cholesky(A + np.outer(x, x))
    np.testing.assert_allclose(L, fresh, rtol=0, atol=1e-11 * np.abs(fresh).max())


@pytest.mark.parametrize("d", [1, 2, 5, 20, 63])
def test_triangular_solves(d):
    rng = np.random.default_rng(d)
    A = positive_definite(rng, d)
    L, b = np.linalg.cholesky(A), rng.normal(size=d)
    kept = b.copy()
    np.testing.assert_allclose(
        la.solve_lower(L, b), solve_triangular(L, b, lower=True), rtol=1e-9, atol=1e-12
    )
    np.testing.assert_allclose(la.solve_upper(L, b), solve_triangular(L.T, b), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(A @ la.solve_factored(L, b), b, atol=1e-9)
    np.testing.assert_array_equal(b, kept)


def test_upper_triangle_is_never_read():
    rng = np.random.default_rng(0)
    L = np.linalg.cholesky(positive_definite(rng, 6))
    dirty, b = L + np.triu(np.full((6, 6), np.nan), 1), rng.normal(size=6)
    np.testing.assert_array_equal(la.solve_lower(dirty, b), la.solve_lower(L, b))
    np.testing.assert_array_equal(la.solve_upper(dirty, b), la.solve_upper(L, b))
    la.cholesky_update(dirty, b)
    la.cholesky_update(L, b)
    np.testing.assert_array_equal(np.tril(dirty), L)


def test_stacked_forms_equal_single_ones():
    rng = np.random.default_rng(1)
    L = np.stack([np.linalg.cholesky(positive_definite(rng, 7)) for _ in range(4)])
    x = rng.normal(size=(4, 7))
    lower, upper = la.solve_lower_many(L, x), la.solve_upper_many(L, x)
    single = L.copy()
    for h in range(4):
        np.testing.assert_array_equal(lower[h], la.solve_lower(L[h], x[h]))
        np.testing.assert_array_equal(upper[h], la.solve_upper(L[h], x[h]))
        la.cholesky_update(single[h], x[h])
    la.cholesky_update_many(L, x)
    np.testing.assert_array_equal(L, single)


def test_downdated_norms_are_those_of_the_sum():
    rng = np.random.default_rng(2)
    A, X, x = positive_definite(rng, 5), rng.normal(size=(30, 5)), rng.normal(size=5)
    X[0] = x  # its norm falls to q / (1 + q)
    squared = np.einsum("nd,nd->n", X, np.linalg.solve(A, X.T).T)
    u = np.linalg.solve(A, x)
    la.downdate_norms(squared, X, u, x @ u)
    expected = np.einsum("nd,nd->n", X, np.linalg.solve(A + np.outer(x, x), X.T).T)
    np.testing.assert_allclose(squared, expected, rtol=1e-10)
    assert squared[0] == pytest.approx((x @ u) / (1 + x @ u))


def test_downdated_norms_stay_nonnegative():
    squared = np.array([0.5])
    la.downdate_norms(squared, np.array([[1.0]]), np.array([10.0]), 10.0)  # more than there is
    assert squared[0] == 0.0
