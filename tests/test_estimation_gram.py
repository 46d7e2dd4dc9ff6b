"""Gram matrices, ridge regression and ellipsoid norms against fresh factorisations."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from preflab.algorithms.estimation import Gram, RidgeRegression, TrackedNorms
from preflab.algorithms.estimation.linear_algebra import cholesky_update

LAMBDA = 0.7


def filled(n=30, d=5, seed=0):
    X = np.random.default_rng(seed).normal(size=(n, d))
    gram = Gram(d, LAMBDA)
    for x in X:
        gram.update(x)
    return gram, X, LAMBDA * np.eye(d) + X.T @ X


def test_everything_against_the_matrix():
    gram, X, A = filled()
    rng = np.random.default_rng(1)
    v, B = rng.normal(size=5), rng.normal(size=(5, 3))
    assert gram.count == 30
    np.testing.assert_allclose(gram.matrix, A, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(gram.solve(v), np.linalg.solve(A, v), rtol=1e-11)
    np.testing.assert_allclose(gram.solve(B), np.linalg.solve(A, B), rtol=1e-11)
    assert gram.norm(v) == pytest.approx(np.sqrt(v @ np.linalg.solve(A, v)), rel=1e-12)
    np.testing.assert_allclose(gram.norm(X), [gram.norm(x) for x in X], rtol=1e-12)
    assert gram.weighted_norm(v) == pytest.approx(np.sqrt(v @ A @ v), rel=1e-12)
    assert gram.log_determinant == pytest.approx(np.linalg.slogdet(A / LAMBDA)[1], rel=1e-12)
    assert Gram(3, 0.2).log_determinant == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize("n", [0, 2, 3, 40])
def test_many_updates_at_once(n):
    gram, _, A = filled()
    more = np.random.default_rng(2).normal(size=(n, 5))
    gram.update_many(more)
    np.testing.assert_allclose(gram.matrix, A + more.T @ more, rtol=1e-12, atol=1e-12)
    assert gram.count == 30 + n
    assert gram.factor.flags.c_contiguous


@pytest.mark.parametrize("d", [20, 100])
def test_accurate_after_a_hundred_thousand_updates(d):
    X = np.random.default_rng(d).normal(size=(100_000, d)) * np.logspace(0, -2, d)
    gram = Gram(d, 1.0)
    for x in X:
        cholesky_update(gram.factor, x)
    A = np.eye(d) + X.T @ X
    fresh = np.linalg.cholesky(A)
    assert np.linalg.norm(gram.matrix - A) <= 1e-11 * np.linalg.norm(A)
    # Row by row, so that the small directions count as much as the large ones.
    assert (np.linalg.norm(gram.factor - fresh, axis=1) <= 1e-10 * np.linalg.norm(fresh, axis=1)).all()
    v = X[0]
    assert gram.norm(v) == pytest.approx(np.sqrt(v @ np.linalg.solve(A, v)), rel=1e-10)
    assert gram.log_determinant == pytest.approx(np.linalg.slogdet(A)[1], rel=1e-12)


def test_a_draw_solves_the_triangular_system():
    gram, _, A = filled()
    mean, z = np.arange(5.0), np.random.default_rng(3).normal(size=5)
    draw = gram.draw(mean, 2.0, normals=z)
    np.testing.assert_allclose(np.linalg.cholesky(A).T @ (draw - mean), 2.0 * z, rtol=1e-10, atol=1e-12)
    again = gram.draw(mean, 2.0, rng=np.random.default_rng(3))
    np.testing.assert_array_equal(draw, again)
    np.testing.assert_array_equal(gram.draw(mean, 0.0, normals=z), mean)
    for both in ({}, {"rng": np.random.default_rng(0), "normals": z}):
        with pytest.raises(ValueError, match="either rng or normals"):
            gram.draw(mean, 1.0, **both)


@given(st.integers(1, 6), st.floats(0.05, 4.0), st.floats(0.01, 0.9), st.integers(0, 2**32 - 1))
@settings(max_examples=50, deadline=None)
def test_elliptical_potential(d, regularisation, c, seed):
    """q log(1 + c) <= log det(Lambda / lambda) <= d log(1 + q L^2 / (d lambda)) when only wide x are taken in."""
    rng = np.random.default_rng(seed)
    gram = Gram(d, regularisation)
    for _ in range(120):
        x = rng.normal(size=d)
        x *= rng.random() / np.linalg.norm(x)  # |x| <= L = 1
        if gram.norm(x) ** 2 > c:
            gram.update(x)
        q = gram.count
        assert q * np.log1p(c) <= gram.log_determinant + 1e-9
        assert gram.log_determinant <= d * np.log1p(q / (d * regularisation)) + 1e-9


def test_saved_and_restored_bit_for_bit():
    gram, X, _ = filled()
    copy = Gram.from_arrays(gram.arrays())
    for g in (gram, copy):
        g.update(X[3])
    np.testing.assert_array_equal(copy.factor, gram.factor)
    assert (copy.count, copy.regularisation) == (gram.count, gram.regularisation) == (31, LAMBDA)
    for factor in (np.ones((2, 3)), -np.eye(2), np.ones(2)):
        with pytest.raises(ValueError, match="Cholesky factor"):
            Gram.from_arrays({**gram.arrays(), "factor": factor})


def test_ridge_regression_on_sufficient_statistics():
    rng = np.random.default_rng(4)
    X, Y = rng.normal(size=(50, 4)), rng.normal(size=(50, 3))
    ridge = RidgeRegression.empty(4, 3, LAMBDA)
    for x, y in zip(X, Y, strict=True):
        ridge.update(x, y)
    # An independent route: least squares on the data extended by sqrt(lambda) I.
    expected = np.linalg.lstsq(np.vstack([X, np.sqrt(LAMBDA) * np.eye(4)]), np.vstack([Y, np.zeros((4, 3))]))[
        0
    ]
    np.testing.assert_allclose(ridge.estimate(), expected, rtol=1e-9)
    v = rng.normal(size=3)
    np.testing.assert_allclose(ridge.estimate(v), expected @ v, rtol=1e-9)
    single = RidgeRegression.empty(4)
    single.update(X[0], 2.0)
    np.testing.assert_allclose(single.gram.solve(2 * X[0])[:, None], single.estimate())


def test_one_hot_features_average_the_next_values():
    """theta[x] = sum_s' N(x, s') V(s') / (N(x) + lambda) for one-hot x."""
    rng = np.random.default_rng(5)
    counts = np.zeros((3, 4))
    ridge = RidgeRegression.empty(3, 4, LAMBDA)
    for _ in range(40):
        i, j = rng.integers(3), rng.integers(4)
        ridge.update_index(np.eye(3)[i], j)
        counts[i, j] += 1
    V = rng.normal(size=4)
    np.testing.assert_allclose(ridge.estimate(V), counts @ V / (counts.sum(axis=1) + LAMBDA), rtol=1e-12)
    with pytest.raises(ValueError, match="target is 4"):
        ridge.update_index(np.eye(3)[0], 4)


def test_tracked_norms_follow_and_measure_their_drift():
    rng = np.random.default_rng(6)
    X = rng.normal(size=(60, 8)) / 3
    tracked = TrackedNorms(Gram(8), X, refresh=4000)
    for t in range(4000):
        tracked.update(X[rng.integers(60)])
        if t == 3998:
            before = tracked.norms
            exact = tracked.gram.norm(X)
    np.testing.assert_allclose(before, exact, rtol=1e-9)
    assert 0 < tracked.drift < 1e-9
    assert tracked.since_refresh == 0
    np.testing.assert_array_equal(tracked.norms, np.sqrt(np.square(tracked.gram.norm(X))))
    tracked.update(X[0])
    assert tracked.since_refresh == 1
    np.testing.assert_allclose(tracked.norms, tracked.gram.norm(X), rtol=1e-9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda g: Gram(0), "dimension is 0"),
        (lambda g: Gram(2, 0.0), "regularisation is 0.0"),
        (lambda g: Gram(2, np.nan), "regularisation is nan"),
        (lambda g: g.update([1.0, 2.0]), r"x has shape \(2,\); a vector of dimension 5"),
        (lambda g: g.update([1, 2, np.nan, 4, 5]), r"x\[2\] is not finite"),
        (lambda g: g.update_many(np.ones((3, 4))), r"X has shape \(3, 4\)"),
        (lambda g: g.norm([[1] * 5, [1, 2, 3, 4, np.inf]]), r"X\[1\] is not finite"),
        (lambda g: g.solve(np.ones(4)), r"b has shape \(4,\)"),
        (lambda g: TrackedNorms(g, np.ones((1, 5)), refresh=0), "refresh is 0"),
    ],
)
def test_bad_input_is_named(call, message):
    gram = filled()[0]
    kept = gram.factor.copy()
    with pytest.raises(ValueError, match=message):
        call(gram)
    np.testing.assert_array_equal(gram.factor, kept)
