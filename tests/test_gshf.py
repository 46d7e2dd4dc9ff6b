"""GSHF: the enhancer against brute force, the pessimists against a conic solver, runs against their definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from preflab.algorithms.gshf import (
    GSHF,
    covariance,
    enhancer,
    inverse_root,
    main_policy,
    pessimistic_policy,
    pessimistic_value,
)
from preflab.algorithms.planning.games import kl

seeds = st.integers(0, 10**6)


def drawn(seed, n=4):
    rng = np.random.default_rng(seed)
    d = int(rng.integers(1, 4))
    A = rng.normal(size=(d, d))
    features, sigma = rng.normal(size=(n, d)), A @ A.T + 0.1 * np.eye(d)
    return features, sigma, np.log(0.95 * rng.dirichlet(np.ones(n)) + 0.05 / n), rng


@given(seeds)
def test_the_covariance_is_the_sum_over_comparisons(seed):
    rng = np.random.default_rng(seed)
    features, y = rng.normal(size=(4, 3)), rng.integers(4, size=(9, 2))
    counts = np.zeros((4, 4))
    np.add.at(counts, (y[:, 0], y[:, 1]), 1.0)
    D = features[y[:, 0]] - features[y[:, 1]]
    sigma = covariance(features, counts, 0.3)
    np.testing.assert_allclose(sigma, D.T @ D + 0.3 * np.eye(3), atol=1e-12)
    L = inverse_root(sigma)
    np.testing.assert_allclose(L @ L.T, np.linalg.inv(sigma), atol=1e-10)


@pytest.mark.parametrize("seed", range(12))
def test_the_enhancer_is_the_furthest_on_a_grid(seed):
    features, sigma, log_main, rng = drawn(seed, 3)
    beta, radius = rng.uniform(0.1, 1), rng.uniform(0.02, 0.6)
    main = np.exp(log_main)
    axis = np.linspace(0, 1, 201)
    a, b = (x.reshape(-1) for x in np.meshgrid(axis, axis))
    laws = np.stack([a, b, 1 - a - b], axis=1)[a + b <= 1]
    laws = np.abs(laws)
    with np.errstate(divide="ignore", invalid="ignore"):
        divergence = np.where(laws > 0, laws * (np.log(laws) - log_main), 0.0).sum(1)
    norms = np.linalg.norm((laws - main) @ features @ inverse_root(sigma), axis=1)
    best = norms[beta * divergence <= radius * norms].max()
    found = enhancer(log_main, features, sigma, beta, radius)
    assert found.norm >= best - 1e-12
    assert found.norm <= best + 0.05 * norms.max()
    assert found.slack >= -1e-12
    moved = (found.policy - main) @ features
    assert found.norm == pytest.approx(math.sqrt(moved @ np.linalg.solve(sigma, moved)), rel=1e-9)
    assert found.slack == pytest.approx(radius * found.norm - beta * kl(found.log_policy, log_main), abs=1e-9)


def test_two_responses_by_bisection():
    """phi = 0, 1 and Sigma = 1: beta KL((x, 1 - x), main) = radius |x - x_main|, on the side that reaches further."""
    from scipy.optimize import brentq

    p, beta, radius = 0.3, 0.5, 0.2

    def excess(x):
        return beta * (x * math.log(x / p) + (1 - x) * math.log((1 - x) / (1 - p))) - radius * abs(x - p)

    ends = [brentq(excess, p + 1e-6, 1 - 1e-12), brentq(excess, 1e-12, p - 1e-6)]
    found = enhancer(np.log([p, 1 - p]), [[1.0], [0.0]], [[1.0]], beta, radius)
    assert found.policy[0] == pytest.approx(max(ends, key=lambda x: abs(x - p)), abs=1e-9)
    assert found.slack == pytest.approx(0, abs=1e-12)


def test_where_there_is_nowhere_to_go():
    features, sigma, log_main, _ = drawn(0)
    still = enhancer(log_main, features, sigma, 0.5, 0.0)
    np.testing.assert_array_equal(still.policy, np.exp(log_main))
    equal = enhancer(log_main, np.ones((4, 1)), [[1.0]], 0.5, 1.0)
    np.testing.assert_allclose(equal.policy, np.exp(log_main), atol=1e-12)
    assert equal.norm == pytest.approx(0, abs=1e-12)
    far = enhancer(log_main, features, sigma, 0.01, 100.0)  # everything is allowed: a vertex
    assert far.policy.max() == pytest.approx(1, abs=1e-12)


# ---- pessimism -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_option_two_by_a_conic_solver(seed):
    import cvxpy as cp

    features, sigma, log_ref, rng = drawn(seed, 5)
    theta, nu, radius, beta = rng.normal(size=features.shape[1]), np.exp(log_ref) @ features, 0.7, 0.4
    pi = cp.Variable(5, nonneg=True)
    x = features - nu
    objective = (
        x @ theta @ pi
        - radius * cp.norm((x @ inverse_root(sigma)).T @ pi)
        - beta * cp.sum(cp.rel_entr(pi, np.exp(log_ref)))
    )
    best = cp.Problem(cp.Maximize(objective), [cp.sum(pi) == 1]).solve(solver=cp.CLARABEL)
    found = pessimistic_policy(theta, features, nu, sigma, radius, log_ref, beta)
    assert found.value == pytest.approx(best, abs=1e-7)
    assert found.gap <= 1e-9
    np.testing.assert_allclose(found.policy, pi.value, atol=1e-4)


@given(seeds, st.sampled_from(["pointwise", "expected"]), st.sampled_from([0.0, 0.1, 1.0, 10.0]))
def test_the_pessimists_are_optimal_by_their_own_values(seed, form, radius):
    features, sigma, log_ref, rng = drawn(seed)
    theta, beta = rng.normal(size=features.shape[1]), rng.uniform(0.1, 1)
    rest = (theta, features, features[0], sigma, radius, log_ref, beta)
    found = pessimistic_policy(*rest, form=form)
    assert found.value == pytest.approx(pessimistic_value(found.log_policy, *rest, form=form), abs=1e-9)
    for law in 0.95 * rng.dirichlet(np.ones(4), size=5) + 0.05 / 4:
        other = pessimistic_value(np.log(law), *rest, form=form)
        assert other <= found.value - beta * kl(np.log(law), found.log_policy) + 1e-8
    if radius == 0:
        np.testing.assert_allclose(found.policy, main_policy(theta, features, log_ref, beta)[0], atol=1e-12)


def test_the_vector_nu_takes_out_the_free_constant():
    features, log_ref = np.eye(3), np.log([0.3, 0.3, 0.4])
    sigma = covariance(features, [[0, 50, 0], [0, 0, 50], [0, 0, 0]], 1e-3)
    rest = (features[1], sigma, 1.0, log_ref, 0.1)
    with_nu = pessimistic_policy([0.5, 0.0, -0.5], features, *rest, form="pointwise").policy
    without = pessimistic_policy([0.5, 0.0, -0.5], features, np.zeros(3), *rest[1:], form="pointwise").policy
    assert with_nu[0] > 0.8  # well compared with response 1
    np.testing.assert_allclose(
        without, main_policy([0.5, 0, -0.5], features, log_ref, 0.1)[0], atol=0.05
    )  # all pay alike


# ---- online ----------------------------------------------------------------------------------------------------------

RARE = np.log([math.exp(-10), (1 - math.exp(-10)) / 2, (1 - math.exp(-10)) / 2])


def start(radius=4.0, **options):
    settings = {"radius": radius, "batch": 8, "ball": 2.0, "seed": 3} | options
    return GSHF([0.6, -0.2, -0.4], np.eye(3), RARE, 0.05, **settings)


def test_a_run_in_two_parts_is_the_run():
    whole, parts = start().advance(12), start().advance(5).advance(0).advance(7)
    np.testing.assert_array_equal(whole.wins, parts.wins)
    assert whole.regret == parts.regret
    assert whole.norms == parts.norms
    assert whole.wins.sum() == 96


def test_the_enhancer_looks_where_the_main_policy_does_not():
    looks, passive = start().advance(25), start(0.0).advance(25)
    assert passive.wins[0].sum() + passive.wins[:, 0].sum() == 0
    assert looks.wins[0].sum() + looks.wins[:, 0].sum() > 20
    assert looks.regret[-1] < 0.05 < 0.2 < passive.regret[-1]
    assert passive.norms == [0.0] * 25


def test_given_data_are_used():
    given_wins = np.array([[0, 25, 28], [7, 0, 0], [4, 0, 0.0]])
    run = start(given=given_wins)
    assert run.advance(1).regret[0] < 0.1
    assert run.wins.sum() == 64 + 8


def test_bad_input_is_refused():
    features, sigma, log_ref, _ = drawn(0)
    with pytest.raises(ValueError, match="radius is -1; it must be at least 0"):
        enhancer(log_ref, features, sigma, 0.5, -1)
    with pytest.raises(ValueError, match="sigma is not positive definite"):
        inverse_root(np.zeros((2, 2)))
    with pytest.raises(ValueError, match="form is 'mean'"):
        pessimistic_policy(
            np.zeros(features.shape[1]), features, features[0], sigma, 1.0, log_ref, 0.5, "mean"
        )
    with pytest.raises(ValueError, match=r"features has shape \(3, 3\); expected \(3, 2\)"):
        GSHF([0.0, 1.0], np.eye(3), RARE, 0.05, radius=1.0, batch=1, ball=2.0)
    with pytest.raises(ValueError, match=r"beyond the ball 0\.1"):
        start(ball=0.1)
    with pytest.raises(ValueError, match="batch is 0"):
        start(batch=0)
    with pytest.raises(ValueError, match=r"given has shape \(2, 2\)"):
        start(given=np.zeros((2, 2)))
    with pytest.raises(ValueError, match="ridge is 0"):
        start(ridge=0)


def test_a_dual_that_does_not_close_is_an_error(monkeypatch):
    from preflab.algorithms import gshf

    features, sigma, log_ref, rng = drawn(3)
    monkeypatch.setattr(gshf, "_NEWTON_STEPS", 1)
    with pytest.raises(ArithmeticError, match="duality gap"):
        pessimistic_policy(
            rng.normal(size=features.shape[1]), features, features[0], sigma, 5.0, log_ref, 0.05
        )
