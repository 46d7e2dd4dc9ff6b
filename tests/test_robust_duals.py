"""Regularised worst-case expectations against a convex solver, their own attaining laws, and known values."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from preflab.algorithms import robust_duals as rd
from scipy.optimize import minimize_scalar

DUALS = {
    "tv": (rd.tv, rd.total_variation_distance),
    "kl": (rd.kl, rd.kl_divergence),
    "chi2": (rd.chi_square, rd.chi_square_divergence),
}
seeds, sizes, lambdas = st.integers(0, 10**6), st.integers(1, 8), st.floats(0.01, 10)


def drawn(n, seed):
    """Values with ties; a law with some outcomes of mass 0."""
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.ones(n)) * (rng.random(n) < 0.8)
    p = p / p.sum() if p.sum() > 0 else np.eye(n)[0]
    return np.round(3 * rng.random(n), 1), p, rng


@given(st.sampled_from(list(DUALS)), sizes, seeds, lambdas)
def test_the_worst_law_attains_the_dual_and_no_law_is_below(kind, n, seed, lam):
    dual, distance = DUALS[kind]
    V, p, rng = drawn(n, seed)
    found = dual(V, p, lam)
    assert abs(found.gap) <= 1e-11
    assert found.law.sum() == pytest.approx(1, abs=1e-12)
    assert (found.law >= 0).all()
    assert found.value <= p @ V + 1e-12
    for mu in [p, *rng.dirichlet(np.ones(n), size=10), *rng.dirichlet(20 * p + 1e-3, size=10)]:
        assert mu @ V + lam * distance(mu, p) >= found.value - 1e-11
    assert dual(V, p, 2 * lam).value >= found.value - 1e-12
    assert dual(V + 5, p, lam).value == pytest.approx(found.value + 5, abs=1e-11)


@pytest.mark.parametrize("kind", list(DUALS))
@pytest.mark.parametrize("seed", range(3))
def test_a_convex_solver_agrees(kind, seed):
    cp = pytest.importorskip("cvxpy")
    V, p, _ = drawn(5, seed)
    V, p = V[p > 0], p[p > 0]
    for lam in (0.3, 2.0):
        mu = cp.Variable(len(V), nonneg=True)
        cost = {
            "tv": lambda mu=mu: cp.norm1(mu - p) / 2,
            "kl": lambda mu=mu: cp.sum(cp.rel_entr(mu, p)),
            "chi2": lambda mu=mu: cp.sum_squares((mu - p) / np.sqrt(p)),
        }[kind]()
        problem = cp.Problem(cp.Minimize(V @ mu + lam * cost), [cp.sum(mu) == 1])
        problem.solve(solver="CLARABEL")
        assert DUALS[kind][0](V, p, lam).value == pytest.approx(problem.value, abs=1e-7)


@given(sizes, seeds, lambdas)
def test_the_threshold_of_chi_square_maximises_its_dual(n, seed, lam):
    V, p, _ = drawn(n, seed)
    found = rd.chi_square(V, p, lam).value
    low, high = V[p > 0].min(), V.max()
    grid = [rd.chi_square_dual(V, p, lam, a) for a in np.linspace(low, high + 1, 60)]
    assert max(grid) <= found + 1e-12
    best = minimize_scalar(
        lambda a: -rd.chi_square_dual(V, p, lam, a),
        bounds=(low, high + 1e-9),
        method="bounded",
        options={"xatol": 1e-10},
    )
    assert -best.fun == pytest.approx(found, abs=1e-6)


def test_known_values():
    V, p = [0.0, 1.0, 3.0], [0.001, 0.5, 0.499]
    assert rd.tv(V, p, 0.1).value == pytest.approx(0.0999)  # min(V, lam) with a fail state
    np.testing.assert_allclose(rd.tv(V, p, 2.0).law, [0.5, 0.5, 0.0])
    assert rd.kl(V, p, 0.7).value == pytest.approx(
        -0.7 * math.log(0.001 + 0.5 * math.exp(-1 / 0.7) + 0.499 * math.exp(-3 / 0.7))
    )
    mean, square = 0.5 + 3 * 0.499, 0.5 + 9 * 0.499
    assert rd.chi_square(V, p, 50.0).value == pytest.approx(mean - (square - mean**2) / 200)
    assert rd.chi_square([1.0, 2.0], [0.5, 0.5], 0.1).law == pytest.approx([1.0, 0.0])
    # outcomes without nominal mass: total variation may move there, the others may not
    assert rd.tv([0.0, 1.0], [0.0, 1.0], 0.2).value == pytest.approx(0.2)
    for dual in (rd.kl, rd.chi_square):
        assert dual([0.0, 1.0], [0.0, 1.0], 1e-9).value == pytest.approx(1.0)
    assert rd.chi_square_divergence([0.5, 0.5], [1.0, 0.0]) == math.inf


def test_kl_is_exact_for_tiny_and_huge_lambda():
    V, p = np.array([1.0, 2.0, 5.0]), np.array([0.2, 0.3, 0.5])
    assert rd.kl(V, p, 1e-6).value == pytest.approx(1.0, abs=1e-5)
    assert rd.kl(V, p, 1e12).value == pytest.approx(p @ V, abs=1e-10)


def test_bad_input_is_refused():
    for dual, _ in DUALS.values():
        with pytest.raises(ValueError, match=r"law\[1\] is -0.5; probabilities are at least 0"):
            dual([0.0, 1.0], [1.5, -0.5], 1.0)
        with pytest.raises(ValueError, match=r"values has shape \(3,\); the law has 2 outcomes"):
            dual([0.0, 1.0, 2.0], [0.5, 0.5], 1.0)
        with pytest.raises(ValueError, match=r"values\[1\] is nan; values must be finite"):
            dual([0.0, math.nan], [0.5, 0.5], 1.0)
        for lam in (0.0, -1.0, math.inf):
            with pytest.raises(ValueError, match=r"lam is .*; it must be positive and finite"):
                dual([0.0, 1.0], [0.5, 0.5], lam)
