"""KL-regularised RL as inference, against general-purpose optimisers, quadrature and enumeration."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from preflab.algorithms import kl_bayes as kb
from scipy.integrate import quad
from scipy.optimize import minimize

seeds = st.integers(0, 10**6)


def drawn(n, seed):
    rng = np.random.default_rng(seed)
    prior, policy = rng.dirichlet(np.ones(n), size=2)
    return prior, policy, rng.normal(size=n), rng


@given(st.integers(1, 9), seeds, st.floats(0.05, 5))
def test_the_gap_of_the_bound_is_a_divergence(n, seed, beta):
    prior, policy, r, _ = drawn(n, seed)
    star = kb.posterior(prior, r, beta)
    gap = beta * star.log_evidence - kb.objective(policy, prior, r, beta)
    assert gap == pytest.approx(beta * kb.divergence(policy, star.law), abs=1e-10)
    assert kb.objective(star.law, prior, r, beta) == pytest.approx(beta * star.log_evidence, abs=1e-10)
    np.testing.assert_allclose(star.law, np.exp(star.log_law), rtol=1e-13)


@given(st.integers(2, 7), seeds, st.floats(0.1, 3))
def test_the_order_of_the_evidence_does_not_matter(n, seed, beta):
    prior, _, r, rng = drawn(n, seed)
    other = rng.normal(size=n)
    first, second = (
        kb.posterior(kb.posterior(prior, a, beta).law, b, beta) for a, b in ((r, other), (other, r))
    )
    np.testing.assert_allclose(first.law, second.law, atol=1e-13)
    np.testing.assert_allclose(first.law, kb.posterior(prior, r + other, beta).law, atol=1e-13)


def test_a_general_optimiser_finds_the_posterior():
    prior, _, r, _ = drawn(5, 3)

    def loss(u):
        law = np.exp(u - np.logaddexp.reduce(u))
        return -kb.objective(law / law.sum(), prior, r, 0.4)

    u = minimize(loss, np.zeros(5), method="BFGS", options={"gtol": 1e-9}).x
    np.testing.assert_allclose(np.exp(u - np.logaddexp.reduce(u)), kb.posterior(prior, r, 0.4).law, atol=1e-6)


def test_nothing_overflows_and_no_mass_is_made():
    star = kb.posterior([0.5, 0.5, 0.0], [0.0, 4000.0, 9000.0], 1.0)
    np.testing.assert_array_equal(star.law, [0, 1, 0])
    assert star.log_law[0] == -4000
    assert star.log_evidence == pytest.approx(4000 + math.log(0.5))
    assert kb.objective([0.0, 0.5, 0.5], [0.5, 0.5, 0.0], [0, 0, 0], 1.0) == -math.inf


@given(st.integers(2, 6), seeds, st.floats(0.1, 3))
def test_the_two_gradients_by_finite_differences(n, seed, beta):
    prior, proposal, r, rng = drawn(n, seed)
    prior, proposal = 0.9 * prior + 0.1 / n, 0.9 * proposal + 0.1 / n
    features, theta = rng.normal(size=(n, 2)), rng.normal(size=2)
    star = kb.posterior(prior, r, beta).law
    policy, scores = kb.restricted(prior, features, theta)

    def slope(f):
        return np.array([(f(theta + 1e-5 * e) - f(theta - 1e-5 * e)) / 2e-5 for e in np.eye(2)])

    def law(t):
        return kb.restricted(prior, features, t)[0]

    up = kb.policy_gradient(policy, scores, prior, r, beta, baseline=1.7)
    np.testing.assert_allclose(up, slope(lambda t: kb.objective(law(t), prior, r, beta)), atol=2e-7)
    np.testing.assert_allclose(up, -beta * slope(lambda t: kb.divergence(law(t), star)), atol=2e-7)
    for baseline in (None, policy):
        forward = kb.dpg_gradient(scores, star, proposal, baseline)
        np.testing.assert_allclose(forward, -slope(lambda t: kb.divergence(star, law(t))), atol=2e-7)


def test_gradient_ascent_reaches_the_posterior_with_both():
    """The family is complete, so that both divergences vanish at the same place."""
    prior, _, r, _ = drawn(4, 1)
    star = kb.posterior(prior, r, 0.5).law
    for kind in ("reverse", "forward"):
        theta = np.zeros(4)
        for _ in range(4000):
            policy, scores = kb.restricted(prior, np.eye(4), theta)
            if kind == "reverse":
                theta += kb.policy_gradient(policy, scores, prior, r, 0.5)
            else:
                theta += 0.5 * kb.dpg_gradient(scores, star, policy, policy)
        np.testing.assert_allclose(policy, star, atol=1e-6)


def test_estimates_on_drawn_samples():
    prior, q, r, rng = drawn(6, 2)
    star = kb.posterior(prior, r, 0.7)
    z = math.exp(star.log_evidence)
    samples = rng.choice(6, size=(400, 500), p=q)
    estimates = kb.evidence_estimate(samples, prior, r, 0.7, q)
    assert estimates.shape == (400,)
    assert abs(estimates.mean() - z) <= 5 * estimates.std() / 20
    _, scores = kb.restricted(prior, rng.normal(size=(6, 2)), np.ones(2))
    for evidence in (z, None):
        gradient = kb.dpg_estimate(samples, scores, np.log(prior) + r / 0.7, q, evidence)
        assert gradient.shape == (400, 2)
        assert (
            np.abs(gradient.mean(axis=0) - star.law @ scores) <= 5 * gradient.std(axis=0) / 20 + 0.01
        ).all()


@given(st.integers(1, 6), st.integers(2, 30), seeds)
def test_best_of_n_stays_below_its_limit(n, m, seed):
    rng = np.random.default_rng(seed)
    prior, r = rng.dirichlet(np.ones(m)), rng.integers(0, m, size=m)
    law = kb.best_of_n_policy(prior, r, n)
    assert law.sum() == pytest.approx(1)
    assert kb.divergence(law, prior) <= kb.best_of_n_limit(n) + 1e-12


@pytest.mark.parametrize("n", [2, 4, 16])
def test_the_limit_of_best_of_n_by_quadrature(n):
    """The density ratio at the quantile u is n u^(n-1)."""
    integral = quad(
        lambda u: n * u ** (n - 1) * math.log(n * u ** (n - 1)) if u > 0 else 0.0, 0, 1, epsabs=1e-12
    )[0]
    assert kb.best_of_n_limit(n) == pytest.approx(integral, abs=1e-9)
    assert kb.best_of_n_limit(4) == pytest.approx(0.636, abs=5e-4)


def test_best_of_n_passes_over_responses_that_are_never_drawn():
    np.testing.assert_allclose(kb.best_of_n_policy([0.5, 0.5, 0.0], [0, 1, 2], 2), [0.25, 0.75, 0])


@given(seeds, st.integers(2, 4))
def test_both_projections_are_global(seed, m):
    rng = np.random.default_rng(seed)
    target = rng.dirichlet(np.full(2 * m, 0.5)).reshape(2, m) * 0.99 + 0.005 / m
    reverse, forward = kb.reverse_projection(target), kb.forward_projection(target)
    assert 0 <= reverse.gap <= 1.01e-10
    assert kb.divergence(reverse.law, target) == pytest.approx(reverse.divergence, abs=1e-12)
    assert kb.divergence(target, forward.law) == pytest.approx(forward.divergence, abs=1e-12)
    # any product law is worse; in reverse KL also the best second law for every first law on a grid
    for u in np.linspace(0.001, 0.999, 200):
        second = target[0] ** u * target[1] ** (1 - u)
        law = np.outer([u, 1 - u], second / second.sum())
        assert kb.divergence(law, target) >= reverse.divergence - 1e-12
    for p, q in zip(rng.dirichlet(np.ones(2), size=20), rng.dirichlet(np.ones(m), size=20), strict=True):
        assert kb.divergence(target, np.outer(p, q)) >= forward.divergence
        assert kb.divergence(np.outer(p, q), target) >= reverse.divergence


def test_a_search_that_is_cut_short_says_so():
    target = [[0.5, 0.01], [0.01, 0.48]]
    short = kb.reverse_projection(target, max_pieces=3)
    assert short.gap > 1e-4
    assert short.divergence - short.gap <= kb.reverse_projection(target).divergence
    assert kb.reverse_projection(target, tolerance=0.9).gap <= 0.9


def test_the_adaptive_rule():
    assert kb.adapted_beta(1.0, 6.0, 6.0) == 1.0
    assert kb.adapted_beta(1.0, 6.6, 6.0) == pytest.approx(1.01)
    assert kb.adapted_beta(2.0, 600.0, 6.0) == pytest.approx(2.04)  # clipped
    assert kb.adapted_beta(2.0, 0.0, 6.0, gain=0.5) == pytest.approx(1.8)


def test_bad_input_is_refused():
    p, r = [0.5, 0.5], [0.0, 1.0]
    for beta in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=r"beta is .*; it must be positive and finite"):
            kb.posterior(p, r, beta)
    with pytest.raises(ValueError, match=r"prior has shape \(1, 2\); expected a vector"):
        kb.posterior([p], r, 1)
    with pytest.raises(ValueError, match=r"prior\[0\] is -0.5; probabilities are at least 0"):
        kb.posterior([-0.5, 1.5], r, 1)
    with pytest.raises(ValueError, match=r"prior sums to 1.2; divide it by its sum"):
        kb.posterior([0.5, 0.7], r, 1)
    with pytest.raises(ValueError, match=r"policy has shape \(3,\); expected \(2,\)"):
        kb.objective([0.5, 0.5, 0], p, r, 1)
    with pytest.raises(ValueError, match=r"rewards has shape \(3,\); the prior has 2 responses"):
        kb.posterior(p, [0, 1, 2], 1)
    with pytest.raises(ValueError, match=r"rewards\[1\] is inf; rewards must be finite"):
        kb.posterior(p, [0, math.inf], 1)
    with pytest.raises(ValueError, match=r"features has shape \(2, 1\); expected \(2, 3\), theta \(3,\)"):
        kb.restricted(p, [[1.0], [0.0]], [0, 0, 0])
    with pytest.raises(ValueError, match=r"scores has shape \(3, 1\); expected \(2, d\)"):
        kb.policy_gradient(p, [[0.0]] * 3, p, r, 1)
    with pytest.raises(ValueError, match=r"proposal\[0\] is 0 where 0.5 is needed.*mix in the prior"):
        kb.dpg_gradient([[1.0], [0.0]], p, [0.0, 1.0])
    for n in (0, 1.5):
        with pytest.raises(ValueError, match="it must be a whole number, at least 1"):
            kb.best_of_n_policy(p, r, n)
    with pytest.raises(ValueError, match="kl is -1"):
        kb.adapted_beta(1, -1, 1)
    with pytest.raises(ValueError, match="target is 0"):
        kb.adapted_beta(1, 1, 0)
    with pytest.raises(ValueError, match=r"gain is 5 and clip 0\.2"):
        kb.adapted_beta(1, 1, 1, gain=5)
    with pytest.raises(ValueError, match=r"target has shape \(2,\); expected a matrix"):
        kb.forward_projection(p)
    with pytest.raises(
        ValueError, match=r"target has shape \(2, 1\) and least entry 0; expected \(2, m\), positive"
    ):
        kb.reverse_projection([[0.0], [1.0]])
