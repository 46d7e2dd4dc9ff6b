"""Rewards with an incentive against general solvers, a grid and closed forms; rounds online as they are defined."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from preflab.algorithms.incentives import (
    OnlinePreferences,
    best_value,
    comparison_loss,
    fit_rewards,
    policy_of,
    shortfall,
)
from preflab.algorithms.planning.games import kl
from scipy.optimize import minimize
from scipy.special import expit, logsumexp

seeds = st.integers(0, 10**6)


def drawn(seed, n=4):
    """wins, log ref, beta, q: some pairs never compared."""
    rng = np.random.default_rng(seed)
    wins = rng.integers(0, 8, (n, n)) * (rng.random((n, n)) < 0.7)
    np.fill_diagonal(wins, 0)
    return wins.astype(float), np.log(0.9 * rng.dirichlet(np.ones(n)) + 0.1 / n), rng.uniform(0.1, 2), rng


@given(seeds, st.floats(0.05, 3))
def test_values(seed, beta):
    rng = np.random.default_rng(seed)
    r, log_ref = rng.normal(size=5) * 10, np.log(rng.dirichlet(np.ones(5)) + 1e-12)
    pi, log_pi = policy_of(r, log_ref, beta)
    assert best_value(r, log_ref, beta) == pytest.approx(beta * logsumexp(log_ref + r / beta), rel=1e-12)
    np.testing.assert_allclose(np.exp(log_pi), pi, rtol=1e-12)
    other = np.log(0.9 * rng.dirichlet(np.ones(5)) + 0.02)
    log_ref = log_ref - logsumexp(log_ref)
    value = np.exp(other) @ r - beta * kl(other, log_ref)
    assert shortfall(other, r, log_ref, beta) == pytest.approx(best_value(r, log_ref, beta) - value, abs=1e-9)


@given(seeds, st.sampled_from([0.3, 2.0, 20.0]))
def test_the_pessimist_is_the_convex_optimum(seed, strength):
    wins, log_ref, beta, rng = drawn(seed)
    q = rng.dirichlet(np.ones(4))

    def f(r):
        pi, _ = policy_of(r, log_ref, beta)
        value = comparison_loss(wins, r) + strength * (best_value(r, log_ref, beta) - q @ r)
        surprise = wins * expit(r - r[:, None])
        return float(value), surprise.sum(0) - surprise.sum(1) + strength * (pi - q)

    found = fit_rewards(wins, log_ref, beta, incentive=strength, law=q, box=3.0)
    best = minimize(
        f, np.zeros(4), jac=True, method="L-BFGS-B", bounds=[(-1.5, 1.5)] * 4, options={"ftol": 1e-15}
    )
    assert found.value == pytest.approx(f(found.rewards)[0], rel=1e-12)
    assert found.value <= best.fun + 1e-9
    assert found.value == pytest.approx(best.fun, abs=1e-6)
    assert found.residual <= 1e-8
    assert np.abs(found.rewards).max() <= 1.5


@pytest.mark.parametrize("beta", [0.05, 0.3, 1.0])
def test_the_optimist_is_the_global_optimum_on_a_grid(beta):
    axis = np.linspace(-2, 2, 81)
    a, b = (x.reshape(-1) for x in np.meshgrid(axis, axis))
    grid = np.stack([np.zeros_like(a), a, b], axis=1)
    grid = grid[np.ptp(grid, axis=1) <= 2]  # a constant changes nothing: the first reward is 0
    for seed in range(30):
        wins, log_ref, _, rng = drawn(seed, 3)
        q, strength = rng.dirichlet(np.ones(3)), rng.choice([0.1, 1, 10])
        found = fit_rewards(wins, log_ref, beta, incentive=-strength, law=q, box=2.0)
        values = comparison_loss(wins, grid) - strength * (best_value(grid, log_ref, beta) - grid @ q)
        assert found.value <= values.min() + 1e-9


def test_optimism_without_data_promises_the_box_to_the_rarest():
    log_ref = np.log([0.7, 0.2, 0.1])
    r = fit_rewards(np.zeros((3, 3)), log_ref, 0.1, incentive=-1.0, box=2.0).rewards
    np.testing.assert_allclose(r - r[0], [0, 0, 2], atol=1e-8)


def test_without_incentive_what_nothing_connects_stays():
    wins = np.zeros((4, 4))
    wins[0, 1], wins[1, 0] = 30, 10
    start = [0.3, -0.1, 0.7, -0.4]
    r = fit_rewards(wins, np.log(np.full(4, 0.25)), 0.5, box=4.0, start=start).rewards
    np.testing.assert_allclose(r[2:], start[2:], atol=1e-12)
    assert r[0] - r[1] == pytest.approx(math.log(3), abs=1e-9)
    none = fit_rewards(np.zeros((4, 4)), np.log(np.full(4, 0.25)), 0.5, box=4.0, start=start)
    np.testing.assert_array_equal(none.rewards, start)


@given(seeds)
def test_a_constant_of_the_start_changes_nothing_and_batches_are_separate(seed):
    data = [drawn(seed + k) for k in range(3)]
    wins, log_ref = np.array([d[0] for d in data]), np.array([d[1] for d in data])
    strength = np.array([0.5, -0.7, 0.0])
    one = [
        fit_rewards(w, ref, 0.4, incentive=c, box=3.0).value
        for w, ref, c in zip(wins, log_ref, strength, strict=True)
    ]
    together = fit_rewards(wins, log_ref, 0.4, incentive=strength, box=3.0)
    np.testing.assert_allclose(together.value, one, atol=1e-9)
    assert together.rewards.shape == (3, 4)


# ---- rounds online ---------------------------------------------------------------------------------------------------

LOG_REF = np.log([0.1, 0.5, 0.4])
REWARDS = np.array([[1.0, 0.2, 0.0], [0.0, 0.5, 0.1]])


def start(**options):
    return OnlinePreferences(REWARDS, LOG_REF, 0.2, **{"box": 2.0, "seeds": [3, 4]} | options)


def test_a_run_in_two_parts_is_the_run():
    whole, parts = start().advance(30), start().advance(11).advance(0).advance(19)
    for name in ("wins", "fitted", "regret", "second_counts"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(parts, name))
    assert whole.t == 30
    assert whole.regret.shape == (2, 30)
    assert start().regret.shape == (2, 0)


def test_bandits_do_not_see_each_other():
    both = start().advance(40)
    alone = OnlinePreferences(REWARDS[1], LOG_REF, 0.2, box=2.0, seeds=[4]).advance(40)
    np.testing.assert_array_equal(both.wins[1], alone.wins[0])
    np.testing.assert_allclose(both.regret[1], alone.regret[0], atol=1e-9)


def test_a_round_by_hand():
    run = start(batch=500).advance(1)
    regret = [
        float(best_value(r, LOG_REF, 0.2) - np.exp(LOG_REF) @ r) for r in REWARDS
    ]  # the first policy is the reference
    np.testing.assert_allclose(run.regret[:, 0], regret, atol=1e-12)
    assert run.t == run.wins[0].sum() == run.second_counts[1].sum() == 500
    for s in range(2):
        counts = run.wins[s] + run.wins[s].T
        np.fill_diagonal(counts, 2 * np.diag(run.wins[s]))
        expected = 500 * np.outer(np.exp(LOG_REF), np.exp(LOG_REF))
        expected += expected.T
        np.fill_diagonal(expected, np.diag(expected))
        assert np.abs(counts - expected).max() < 5 * math.sqrt(500 / 4)
        share = run.wins[s][0, 1] / counts[0, 1]
        truth = expit(REWARDS[s][0] - REWARDS[s][1])
        assert abs(share - truth) < 5 * math.sqrt(0.25 / counts[0, 1])


def test_iterative_dpo_learns_what_is_covered():
    run = OnlinePreferences(REWARDS, LOG_REF, 1.0, box=2.0, seeds=[3, 4], batch=100).advance(100)
    assert (run.regret[:, -10:].mean(1) < 0.1 * run.regret[:, 0]).all()


def test_bad_input_is_refused():
    flat = np.log(np.full(3, 1 / 3))
    with pytest.raises(ValueError, match=r"wins has shape \(2, 3\)"):
        fit_rewards(np.zeros((2, 3)), flat, 1.0, box=1.0)
    with pytest.raises(ValueError, match=r"wins\[0, 2\] is -1.0; a number of wins is at least 0"):
        fit_rewards([[0, 0, -1], [0, 0, 0], [0, 0, 0]], flat, 1.0, box=1.0)
    with pytest.raises(ValueError, match="incentive is inf"):
        fit_rewards(np.zeros((3, 3)), flat, 1.0, incentive=math.inf, box=1.0)
    with pytest.raises(ValueError, match="box is 0; it must be positive"):
        fit_rewards(np.zeros((3, 3)), flat, 1.0, box=0)
    with pytest.raises(ValueError, match="beta is -1"):
        fit_rewards(np.zeros((3, 3)), flat, -1, box=1.0)
    with pytest.raises(
        ValueError, match=r"rewards of bandit 0 differ by 1; box is 0.5, take it at least that"
    ):
        start(box=0.5)
    with pytest.raises(ValueError, match="there are 1 seeds for 2 bandits"):
        start(seeds=[1])
    with pytest.raises(ValueError, match="batch is 0"):
        start(batch=0)
    with pytest.raises(ValueError, match="not the logarithm of a law"):
        OnlinePreferences(REWARDS, np.zeros(3), 0.2, box=2.0, seeds=[1, 2])


def test_a_residual_that_stays_is_an_error(monkeypatch):
    from preflab.algorithms import incentives

    monkeypatch.setattr(incentives, "_STEPS", 1)
    wins, log_ref, beta, _ = drawn(0)
    with pytest.raises(ArithmeticError, match="the residual is"):
        fit_rewards(wins, log_ref, beta, incentive=5.0, box=3.0)
