"""Correlated proxies against simulation of the definitions, enumeration of policies, and a general-purpose solver."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from preflab.algorithms import correlated_proxies_orpo as cp

seeds = st.integers(0, 10**6)


def drawn(seed, S=3, A=2):
    rng = np.random.default_rng(seed)
    P, initial = rng.dirichlet(np.ones(S), size=(S, A)), rng.dirichlet(np.ones(S))
    reference = 0.8 * rng.dirichlet(np.ones(A), size=S) + 0.2 / A
    return P, initial, reference, rng.normal(size=(S, A)), rng


@given(seeds, st.floats(0, 0.95))
def test_occupancies_solve_the_flow_and_give_their_policy_back(seed, gamma):
    P, initial, policy, _, _ = drawn(seed)
    mu = cp.occupancy(P, initial, gamma, policy)
    assert mu.sum() == pytest.approx(1, abs=1e-12)
    assert cp.flow_residual(P, initial, gamma, mu) <= 1e-12
    np.testing.assert_allclose(cp.policy_of(mu), policy, atol=1e-12)
    excess = 0.1 * (1 - gamma) * initial.max()
    assert cp.flow_residual(P, initial, gamma, mu * 1.1) == pytest.approx(excess, abs=1e-12)


def test_a_state_that_is_never_reached_has_the_uniform_policy():
    np.testing.assert_array_equal(
        cp.policy_of(np.array([[1.0, 3.0], [0.0, 0.0]])), [[0.25, 0.75], [0.5, 0.5]]
    )


@given(seeds, st.floats(0, 0.95))
def test_policy_iteration_finds_the_best_of_all_policies(seed, gamma):
    P, initial, _, reward, _ = drawn(seed)
    best = float((cp.occupancy(P, initial, gamma, cp.best_policy(P, initial, gamma, reward)) * reward).sum())
    for actions in itertools.product(range(2), repeat=3):
        mu = cp.occupancy(P, initial, gamma, np.eye(2)[list(actions)])
        assert float((mu * reward).sum()) <= best + 1e-12


@given(seeds, st.floats(0.05, 1))
def test_both_bounds_hold_and_keep_their_order(seed, scale):
    rng = np.random.default_rng(seed)
    base, mu = rng.dirichlet(np.ones(6), size=2) * 0.99 + 0.01 / 6
    proxy = rng.normal(size=6)
    true = scale * proxy + rng.normal(size=6)
    found = cp.Proxy.under(base, true, proxy)
    chi2, gain, proxy_gain = cp.chi_square(mu, base), float((mu - base) @ true), float((mu - base) @ proxy)
    assert gain >= cp.sharp_bound(found, proxy_gain, chi2) - 1e-10
    if found.r > 0:
        assert cp.sharp_bound(found, proxy_gain, chi2) >= cp.gain_bound(found, proxy_gain, chi2) - 1e-10
    weighted = np.cov(np.stack([true, proxy]), aweights=base, ddof=0)
    assert found.r == pytest.approx(weighted[0, 1] / math.sqrt(weighted[0, 0] * weighted[1, 1]), abs=1e-9)
    assert found.sigma_true == pytest.approx(math.sqrt(weighted[0, 0]), abs=1e-12)


def test_a_perfect_proxy_loses_nothing():
    rng = np.random.default_rng(0)
    base, mu = rng.dirichlet(np.ones(6), size=2)
    proxy = rng.normal(size=6)
    found = cp.Proxy.under(base, 3 * proxy + 7, proxy)
    gain, proxy_gain = 3 * float((mu - base) @ proxy), float((mu - base) @ proxy)
    for bound in (cp.gain_bound, cp.sharp_bound):
        assert bound(found, proxy_gain, cp.chi_square(mu, base)) == pytest.approx(gain, abs=1e-6)


def test_chi_square_is_infinite_where_the_support_fails():
    assert cp.chi_square([0.5, 0.5], [1.0, 0.0]) == math.inf
    assert cp.chi_square([1.0, 0.0], [1.0, 0.0]) == 0
    assert cp.chi_square([1.0, 0.0], [0.5, 0.5]) == pytest.approx(1)


@given(seeds)
def test_the_discriminator_minimises_its_loss(seed):
    rng = np.random.default_rng(seed)
    p, q = 0.9 * rng.dirichlet(np.ones(5), size=2) + 0.02
    d = cp.discriminator(p, q)
    for other in rng.normal(size=(10, 5)):
        assert cp.discriminator_loss(d + other, p, q) > cp.discriminator_loss(d, p, q)
    reward = rng.normal(size=5)
    chi2 = cp.chi_square(p, q)
    assert float(p @ (reward - cp.penalised_reward(reward, d, 0.5, "chi2"))) == pytest.approx(0.5 * chi2)
    assert float(p @ (reward - cp.penalised_reward(reward, d, 2.0, "kl"))) == pytest.approx(2 * float(p @ d))
    root = reward - cp.penalised_reward(reward, d, 2.0, "sqrt_chi2", chi2)
    assert float(p @ root) == pytest.approx(2 * math.sqrt(chi2))


@pytest.mark.parametrize("seed", range(12))
def test_the_safe_policy_is_certified_and_no_random_policy_is_better(seed):
    P, initial, reference, proxy, rng = drawn(seed)
    base = cp.occupancy(P, initial, 0.8, reference)
    previous = -math.inf
    for penalty in (2.0, 1.0, 0.5, 0.2, 0.05, 0.0):
        found = cp.lower_bound_policy(P, initial, 0.8, proxy, reference, penalty)
        assert 0 <= found.gap <= 1e-6
        assert cp.flow_residual(P, initial, 0.8, found.mu) <= 1e-12
        np.testing.assert_allclose(cp.occupancy(P, initial, 0.8, found.policy), found.mu, atol=1e-12)
        assert found.value >= previous - 1e-8  # a smaller penalty is never worse
        previous = found.value
        for policy in rng.dirichlet(np.ones(2), size=(50, 3)):
            mu = cp.occupancy(P, initial, 0.8, policy)
            value = float((mu * proxy).sum()) - penalty * math.sqrt(cp.chi_square(mu, base))
            assert value <= found.value + found.gap + 1e-10
    best = cp.occupancy(P, initial, 0.8, cp.best_policy(P, initial, 0.8, proxy))
    assert found.value == pytest.approx(float((best * proxy).sum()), abs=1e-7)


def test_a_large_penalty_stays_at_the_reference():
    P, initial, reference, proxy, _ = drawn(1)
    found = cp.lower_bound_policy(P, initial, 0.8, proxy, reference, 50.0)
    np.testing.assert_array_equal(found.policy, reference)
    assert found.chi2 == 0
    assert found.gap <= 1e-12


def test_bad_input_is_refused():
    P, initial, reference, proxy, _ = drawn(0)
    with pytest.raises(ValueError, match=r"P has shape \(3, 2, 2\); expected \(S, A, S\)"):
        cp.occupancy(P[:, :, :2], initial, 0.5, reference)
    wrong = P.copy()
    wrong[1, 1] *= 0.9
    with pytest.raises(ValueError, match=r"P\[s=1, a=1\] is no law"):
        cp.occupancy(wrong, initial, 0.5, reference)
    for gamma in (1.0, -0.1):
        with pytest.raises(ValueError, match=r"gamma is .*; it must lie in \[0, 1\)"):
            cp.best_policy(P, initial, gamma, proxy)
    with pytest.raises(ValueError, match=r"initial has shape \(2,\); expected \(3,\)"):
        cp.occupancy(P, initial[:2], 0.5, reference)
    with pytest.raises(ValueError, match=r"rewards have shapes \(3,\) and \(2,\); the reference has \(2,\)"):
        cp.Proxy.under([0.5, 0.5], [1.0, 2.0, 3.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="constant under the reference"):
        cp.Proxy.under([0.5, 0.5], [1.0, 1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match=r"r is -0.5; the bound needs a proxy that is positively correlated"):
        cp.gain_bound(cp.Proxy(-0.5, 1, 1), 0.1, 0.1)
    with pytest.raises(ValueError, match="an entry of 0, for which the discriminator is infinite"):
        cp.discriminator([0.0, 1.0], [0.5, 0.5])
    with pytest.raises(ValueError, match="kind is 'tv'; expected kl, chi2 or sqrt_chi2"):
        cp.penalised_reward([0.0], [0.0], 1.0, "tv")
    for chi2 in (None, 0.0):
        with pytest.raises(ValueError, match=r"chi2 is .*; the root's penalty divides"):
            cp.penalised_reward([0.0], [0.0], 1.0, "sqrt_chi2", chi2)
    with pytest.raises(ValueError, match=r"mu_ref\[s=0, a=1\] is 0: chi2 is infinite"):
        cp.lower_bound_policy(P, initial, 0.5, proxy, np.tile([1.0, 0.0], (3, 1)), 1.0)
    with pytest.raises(ValueError, match="penalty is -1"):
        cp.lower_bound_policy(P, initial, 0.5, proxy, reference, -1)
