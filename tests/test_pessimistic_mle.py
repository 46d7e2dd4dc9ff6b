"""The pessimistic MLE against other solvers, and against the minimum over plausible rewards."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from preflab.algorithms.estimation import fit_preferences
from preflab.algorithms.pessimistic_mle import box_mle, design, pessimistic, set_norm
from scipy.optimize import minimize

seeds = st.integers(0, 10**6)


def drawn(seed, q=12, d=3):
    rng = np.random.default_rng(seed)
    D, counts = rng.normal(size=(q, d)), rng.integers(1, 6, size=q)
    return D, rng.integers(0, counts + 1), counts, rng


@given(seeds, st.floats(0.1, 3))
def test_the_box_holds_the_estimate_and_it_is_optimal(seed, box):
    D, wins, counts, _ = drawn(seed)
    fit = box_mle(D, wins, counts, box)
    assert np.abs(fit.theta).max() <= box
    assert fit.residual <= 1e-6

    def loss(theta):
        m = D @ theta
        return float(wins @ np.logaddexp(0, -m) + (counts - wins) @ np.logaddexp(0, m))

    found = minimize(loss, np.zeros(3), method="SLSQP", bounds=[(-box, box)] * 3, options={"ftol": 1e-13})
    assert loss(fit.theta) <= found.fun + 1e-6
    assert loss(fit.theta) == pytest.approx(found.fun, abs=1e-5)


def test_a_box_that_does_not_bind_changes_nothing():
    D, _, _, _ = drawn(5)
    wins = np.full(12, 3.0) + (D @ [0.5, -0.3, 0.2] > 0)
    free = fit_preferences(D, wins, counts=np.full(12, 7.0)).theta
    np.testing.assert_allclose(box_mle(D, wins, np.full(12, 7.0), 20.0).theta, free, atol=1e-6)


@given(seeds, st.floats(0, 2))
def test_the_penalty_is_a_minimum_over_plausible_rewards(seed, radius):
    D, _, counts, rng = drawn(seed)
    theta, v, X = rng.normal(size=3), rng.normal(size=3), rng.normal(size=(6, 3))
    sigma = design(D, counts, ridge=0.1)
    found = pessimistic(theta, X, v, sigma, radius)
    inverse = np.linalg.inv(sigma)
    for x, lower in zip(X - v, found.lower, strict=True):
        worst = theta - radius * inverse @ x / np.sqrt(x @ inverse @ x)
        assert set_norm(worst - theta, sigma) == pytest.approx(radius, abs=1e-9)
        assert lower == pytest.approx(worst @ x, abs=1e-9)
        for direction in rng.normal(size=(20, 3)):
            inside = theta + radius * direction / set_norm(direction, sigma)
            assert lower <= inside @ x + 1e-9
    assert found.index == np.argmax(found.lower)
    if radius == 0:
        assert found.index == np.argmax(X @ theta)


def test_a_large_radius_stays_where_it_is_sure():
    """f to infinity: the candidate of least norm around v."""
    D, _, _, rng = drawn(1)
    X, sigma = rng.normal(size=(6, 3)), design(D)
    found = pessimistic(rng.normal(size=3), X, np.zeros(3), sigma, 1e9)
    assert found.index == np.argmin([x @ np.linalg.inv(sigma) @ x for x in X])


def test_the_design_is_a_mean():
    D, _, counts, _ = drawn(2)
    repeated = np.repeat(D, counts, axis=0)
    np.testing.assert_allclose(
        design(D, counts, 0.3),
        np.cov(repeated.T, bias=True)
        + 0.3 * np.eye(3)
        + np.outer(repeated.mean(axis=0), repeated.mean(axis=0)),
        atol=1e-12,
    )
    np.testing.assert_allclose(design(D), D.T @ D / 12, atol=1e-12)


def test_bad_input_is_refused():
    D = [[1.0, -1.0]]
    with pytest.raises(ValueError, match="nothing was compared"):
        box_mle([[0.0, 0.0]], [1.0])
    with pytest.raises(ValueError, match="box is 0; it must be positive"):
        box_mle(D, [1.0], box=0)
    with pytest.raises(ValueError, match="0 comparisons and ridge 0; at least one"):
        design(D, [0.0], 0)
    with pytest.raises(ValueError, match="1 comparisons and ridge -1"):
        design(D, ridge=-1)
    with pytest.raises(ValueError, match=r"candidates has shape \(2,\); expected \(k, 2\)"):
        pessimistic([0.0, 1.0], [1.0, 2.0], [0.0, 0.0], np.eye(2), 1.0)
    with pytest.raises(ValueError, match="radius is -1; it must be at least 0"):
        pessimistic([0.0, 1.0], np.eye(2), [0.0, 0.0], np.eye(2), -1)
    with pytest.raises(ValueError, match="sigma is singular: comparisons leave a direction free"):
        pessimistic([0.0, 1.0], np.eye(2), [0.0, 0.0], design(D), 1.0)
