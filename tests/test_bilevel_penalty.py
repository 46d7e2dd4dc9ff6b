"""The penalty method against finite differences, general-purpose optimisers and the definitions of its functions."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from preflab.algorithms import bilevel_penalty as bp
from preflab.algorithms.kl_bayes import divergence
from scipy.optimize import minimize

seeds = st.integers(0, 10**6)


def drawn(seed, upper="preferences", n=5, d=2):
    rng = np.random.default_rng(seed)
    phi, mu = rng.normal(size=(n, d)), 0.8 * rng.dirichlet(np.ones(n)) + 0.2 / n
    r = rng.normal(size=n)
    P = 1 / (1 + np.exp(r[None, :] - r[:, None]))
    chosen = (
        bp.PreferenceRisk(phi, P, 0.1)
        if upper == "preferences"
        else bp.Quadratic(rng.dirichlet(np.ones(n)), 0.1)
    )
    return bp.Problem(phi, mu, float(rng.uniform(0.5, 1.5)), chosen), rng


uppers = st.sampled_from(["preferences", "quadratic"])


@given(seeds, uppers)
def test_the_upper_objectives_have_their_derivatives(seed, upper):
    problem, rng = drawn(seed, upper)
    f, x, y = problem.upper, rng.normal(size=2), rng.dirichlet(np.ones(5))
    h = 1e-6
    by_x = [(f.value(x + h * e, y) - f.value(x - h * e, y)) / (2 * h) for e in np.eye(2)]
    by_y = [(f.value(x, y + h * e) - f.value(x, y - h * e)) / (2 * h) for e in np.eye(5)]
    np.testing.assert_allclose(f.grad_x(x, y), by_x, atol=1e-7)
    np.testing.assert_allclose(f.grad_y(x, y), by_y, atol=1e-7)
    turn = f.grad_y(x, y) - f.grad_y(x, np.zeros(5))
    np.testing.assert_allclose(f.hessian_y(x) @ y, turn, atol=1e-12)


def test_the_risk_is_an_expectation_over_pairs_of_rollouts():
    problem, rng = drawn(0)
    f, x, y = problem.upper, rng.normal(size=2), rng.dirichlet(np.ones(5))
    r, total = problem.features @ x, 0.1 * float(x @ x) / 2
    for i in range(5):
        for j in range(5):
            s = 1 / (1 + math.exp(r[j] - r[i]))
            total -= y[i] * y[j] * (f.P[i, j] * math.log(s) + f.P[j, i] * math.log(1 - s))
    assert f.value(x, y) == pytest.approx(total, abs=1e-12)


@given(seeds)
def test_the_lower_level_and_its_gap(seed):
    problem, rng = drawn(seed)
    x, y = rng.normal(size=2), rng.dirichlet(np.ones(5))
    star, lowest = problem.plain(x)
    assert problem.lower(x, star) == pytest.approx(lowest, abs=1e-12)
    assert problem.lower(x, y) - lowest == pytest.approx(problem.beta * divergence(y, star), abs=1e-11)


@given(seeds, uppers, st.floats(0.005, 0.08))
def test_the_penalised_policy_minimises(seed, upper, sigma):
    """Against a general-purpose optimiser over logits, and against finite differences of its own value."""
    problem, rng = drawn(seed, upper)
    x = 0.5 * rng.normal(size=2)
    found = bp.penalised(problem, x, sigma)
    lowest = problem.plain(x)[1]
    assert found.residual <= 1e-11

    def loss(u):
        y = np.exp(u - np.logaddexp.reduce(u))
        return problem.upper.value(x, y) + (problem.lower(x, y) - lowest) / sigma

    best = minimize(loss, np.log(problem.reference), method="BFGS", options={"gtol": 1e-8})
    assert found.value <= best.fun + 1e-10
    assert found.value == pytest.approx(best.fun, abs=1e-5)
    assert found.value <= bp.value(problem, x) + 1e-12
    h = 1e-5
    slope = [
        (bp.penalised(problem, x + h * e, sigma).value - bp.penalised(problem, x - h * e, sigma).value)
        / (2 * h)
        for e in np.eye(2)
    ]
    np.testing.assert_allclose(found.gradient, slope, atol=1e-6)


@given(seeds, uppers)
def test_the_implicit_gradient(seed, upper):
    problem, rng = drawn(seed, upper)
    x, h = rng.normal(size=2), 1e-6
    slope = [(bp.value(problem, x + h * e) - bp.value(problem, x - h * e)) / (2 * h) for e in np.eye(2)]
    np.testing.assert_allclose(bp.gradient(problem, x), slope, atol=1e-7)


@pytest.mark.parametrize("upper", ["preferences", "quadratic"])
@pytest.mark.parametrize("size", [None, 0.3])
def test_the_double_loop_ends_at_a_stationary_point_near_the_exact_one(upper, size):
    problem, _ = drawn(3, upper)
    found = bp.run(problem, np.zeros(2), 0.01, steps=5000, step=0.3, inner=8, inner_step_size=size)
    assert found.stationarity <= 1e-7
    assert found.steps < 5000
    exact = minimize(lambda x: bp.value(problem, x), found.x, method="BFGS", options={"gtol": 1e-9}).x
    np.testing.assert_allclose(found.x, exact, atol=0.02)
    np.testing.assert_allclose(found.z, problem.plain(found.x)[0], atol=1e-6)


def test_what_underflowed_comes_back():
    problem, _ = drawn(3)
    y = bp.inner_step(problem, np.zeros(2), np.array([1.0, 0, 0, 0, 0]), 0.9 / problem.beta)
    assert (y > 0).all()


def test_a_run_that_is_cut_short_says_so():
    problem, _ = drawn(3)
    found = bp.run(problem, np.zeros(2), 0.01, steps=2, step=0.1)
    assert found.steps == 2
    assert found.stationarity > 1e-4


def test_two_stages_minimise_the_risk_on_the_reference_s_rollouts():
    problem, _ = drawn(4)
    x = bp.two_stage(problem, np.zeros(2), steps=5000, step=0.5)
    np.testing.assert_allclose(problem.upper.grad_x(x, problem.reference), 0, atol=1e-8)
    assert np.abs(bp.gradient(problem, x)).max() > 1e-3
    assert not np.array_equal(x, bp.two_stage(problem, np.zeros(2), steps=1, step=0.5))


def test_the_largest_sigma_keeps_the_problem_convex():
    problem, rng = drawn(1)
    x = rng.normal(size=2)
    sigma = bp.largest_sigma(problem, x)
    along = np.eye(5) - 0.2
    H = along @ (problem.beta * np.eye(5) + sigma * problem.upper.hessian_y(x)) @ along
    assert np.linalg.eigvalsh(H)[0] == pytest.approx(0, abs=1e-9)
    assert bp.largest_sigma(drawn(1, "quadratic")[0], x) == math.inf


def test_newtons_method_gives_up_in_words(monkeypatch):
    problem, _ = drawn(1)
    with pytest.raises(ArithmeticError, match=r"residual is .* after 100 steps; sigma is 0\.01"):
        bp.penalised(problem, [0.3, 0.2], 0.01, tolerance=0.0)


def test_bad_input_is_refused():
    problem, _ = drawn(0)
    phi, mu, f = problem.features, problem.reference, problem.upper
    with pytest.raises(ValueError, match=r"beta is 0; it must be positive"):
        bp.Problem(phi, mu, 0, f)
    with pytest.raises(ValueError, match=r"reference\[1\] is 0; a response without mass never returns"):
        bp.Problem(phi[:2], np.array([1.0, 0.0]), 1, f)
    with pytest.raises(ValueError, match=r"features has shape \(4, 2\); expected \(5, d\)"):
        bp.Problem(phi[:4], mu, 1, f)
    for sigma in (0.0, -1.0):
        with pytest.raises(ValueError, match=r"sigma is .*; it must be positive"):
            bp.penalised(problem, [0, 0], sigma)
    with pytest.raises(ValueError, match=r"sigma is 50.0; below .* the penalised problem has one solution"):
        bp.run(problem, [1, 0], 50.0, steps=1, step=1)
    with pytest.raises(ValueError, match=r"inner_step_size is 9.0; it must be at most 1/beta = "):
        bp.run(problem, [0, 0], 0.01, steps=1, step=1, inner_step_size=9)
    with pytest.raises(ValueError, match="inner is 0 and steps is 1"):
        bp.run(problem, [0, 0], 0.01, steps=1, step=1, inner=0)
