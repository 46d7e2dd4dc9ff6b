"""Laws of the posterior draws, ellipsoids with their coverage, and the disagreement rule."""

import numpy as np
import pytest
from preflab.algorithms.estimation import (
    GaussianPosterior,
    Gram,
    confidence_radius,
    disagreement,
    fit_preferences,
)
from preflab.envs.links import LOGISTIC
from scipy.stats import kstest, multivariate_normal

D = 4


@pytest.fixture
def gram():
    gram = Gram(D, 0.5)
    gram.update_many(np.random.default_rng(0).normal(size=(12, D)) * [3, 1, 0.3, 0.1])
    return gram


def test_law_of_the_draws(gram):
    mean, sigma, n = np.arange(4.0), 1.7, 100_000
    posterior = GaussianPosterior.from_gram(mean, gram, sigma)
    draws = posterior.draw(np.random.default_rng(1), n)
    covariance = sigma**2 * np.linalg.inv(gram.matrix)
    deviation = np.sqrt(np.diag(covariance))
    assert (np.abs(draws.mean(axis=0) - mean) < 5 * deviation / np.sqrt(n)).all()
    # The sample covariance has entries of deviation at most sqrt(2 / n) s_i s_j.
    assert (np.abs(np.cov(draws.T) - covariance) < 5 * np.sqrt(2 / n) * np.outer(deviation, deviation)).all()
    X = np.random.default_rng(2).normal(size=(6, D))
    spread = posterior.deviation(X)
    np.testing.assert_allclose(spread, np.sqrt(np.einsum("nd,de,ne->n", X, covariance, X)), rtol=1e-10)
    for x, s in zip(X, spread, strict=True):
        assert kstest(draws @ x, "norm", args=(mean @ x, s)).pvalue > 1e-4


def test_a_transposed_factor_has_another_law(gram):
    """The control of the test above: mean + L^{-1} z instead of mean + L^{-T} z is rejected."""
    z = np.random.default_rng(1).standard_normal((100_000, D))
    wrong = np.linalg.solve(gram.factor, z.T).T
    posterior = GaussianPosterior.from_gram(np.zeros(D), gram)
    x = np.random.default_rng(2).normal(size=(6, D))
    p = [
        kstest(wrong @ row, "norm", args=(0, s)).pvalue
        for row, s in zip(x, posterior.deviation(x), strict=True)
    ]
    assert min(p) < 1e-10


def test_draws_are_functions_of_the_normals(gram):
    posterior = GaussianPosterior.from_gram(np.ones(D), gram, 0.3)
    z = np.random.default_rng(3).standard_normal((2, 5, D))
    stacked = posterior.from_normals(z)
    assert stacked.shape == (2, 5, D)
    np.testing.assert_allclose(stacked[1, 2], gram.draw(np.ones(D), 0.3, normals=z[1, 2]), rtol=1e-12)
    assert posterior.draw(np.random.default_rng(0)).shape == (D,)
    before = posterior.factor.copy()
    gram.update(np.ones(D))
    np.testing.assert_array_equal(posterior.factor, before)


def test_distance_and_credible_ellipsoid(gram):
    posterior = GaussianPosterior.from_gram(np.ones(D), gram, 2.0)
    theta = np.array([1.0, 2, 3, 4])
    e = theta - 1
    assert posterior.distance(theta) == pytest.approx(np.sqrt(e @ gram.matrix @ e), rel=1e-12)
    assert posterior.contains(theta, posterior.distance(theta) + 1e-9)
    assert not posterior.contains(theta, posterior.distance(theta) - 1e-9)
    draws = posterior.draw(np.random.default_rng(4), 20_000)
    radius = posterior.credible_radius(0.8)
    share = np.mean([posterior.contains(draw, radius) for draw in draws])
    assert abs(share - 0.8) < 5 * np.sqrt(0.16 / 20_000)


def test_laplace_is_the_expansion_of_the_log_posterior():
    rng = np.random.default_rng(5)
    X = rng.normal(size=(400, 3))
    wins = rng.random(400) < LOGISTIC.value(X @ [0.5, -1, 0.2])
    fit = fit_preferences(X, wins, ridge=1.0)
    posterior = GaussianPosterior.laplace(fit)

    def log_posterior(theta):
        m = np.where(wins, 1, -1) * (X @ theta)
        return -np.log1p(np.exp(-m)).sum() - 0.5 * theta @ theta

    gaussian = multivariate_normal(posterior.mean, np.linalg.inv(posterior.factor @ posterior.factor.T))
    for direction in np.eye(3):
        near = fit.theta + 0.02 * direction
        drop = log_posterior(near) - log_posterior(fit.theta)
        assert drop == pytest.approx(gaussian.logpdf(near) - gaussian.logpdf(fit.theta), rel=0.02)


def test_confidence_radius_covers_at_every_time_and_a_fifth_of_it_does_not():
    """Pairs chosen from the past; the event is simultaneous over the stream, 1 - delta = 0.9."""
    runs, d, bound, delta = 100, 2, 1.0, 0.1
    covered = small = 0
    for seed in range(runs):
        rng = np.random.default_rng(seed)
        theta = rng.normal(size=d)
        theta *= bound * rng.random() / np.linalg.norm(theta)
        X = rng.normal(size=(150, d))
        X /= np.linalg.norm(X, axis=1, keepdims=True)
        won = rng.random(150) < LOGISTIC.value(X @ theta)
        inside = tight = True
        for q in (5, 20, 60, 150):
            gram = Gram(d, 1.0)
            gram.update_many(X[:q])
            fit = fit_preferences(X[:q], won[:q], radius=bound)
            beta = confidence_radius(
                gram.log_determinant,
                delta=delta,
                kappa=LOGISTIC.kappa(bound),
                regularisation=1.0,
                radius=bound,
            )
            distance = GaussianPosterior.from_gram(fit.theta, gram).distance(theta)
            inside &= distance <= beta
            tight &= distance <= beta / 5
        covered += inside
        small += tight
    assert covered >= (1 - delta) * runs
    assert small < 0.8 * runs


def test_confidence_radius_by_hand():
    beta = confidence_radius(2.0, delta=np.exp(-1), kappa=8.0, regularisation=4.0, radius=3.0)
    assert beta == pytest.approx(8 / 2 * 2 + 2 * 2 * 3)


@pytest.mark.parametrize("seed", range(3))
def test_disagreement_is_the_monte_carlo_mean(gram, seed):
    rng = np.random.default_rng(seed)
    difference, sigma = rng.normal(size=D), 0.9
    posterior = GaussianPosterior.from_gram(rng.normal(size=D), gram, sigma)
    first, second = posterior.draw(rng, 100_000), posterior.draw(rng, 100_000)
    sampled = np.abs((first - second) @ difference).mean()
    assert disagreement(gram.norm(difference), sigma) == pytest.approx(sampled, rel=1e-2)


def test_disagreement_of_equal_trajectories_and_of_rows(gram):
    assert disagreement(gram.norm(np.zeros(D)), 1.0) == 0.0
    X = np.random.default_rng(0).normal(size=(3, D))
    np.testing.assert_allclose(
        disagreement(gram.norm(X), 0.7), [disagreement(gram.norm(x), 0.7) for x in X], rtol=1e-12
    )
    np.testing.assert_allclose(
        disagreement(gram.norm(-X), 1.4), 2 * np.asarray(disagreement(gram.norm(X), 0.7)), rtol=1e-12
    )
    before = disagreement(gram.norm(X[0]), 1.0)
    gram.update(X[0])
    assert disagreement(gram.norm(X[0]), 1.0) < before


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: GaussianPosterior(np.zeros(2), np.eye(3)), r"mean \(2,\) and factor \(3, 3\)"),
        (lambda: GaussianPosterior(np.zeros(2), np.eye(2), -1.0), "scale is -1"),
        (
            lambda: GaussianPosterior(np.zeros(2), np.eye(2)).from_normals(np.zeros(3)),
            "the last axis must be 2",
        ),
        (lambda: GaussianPosterior(np.zeros(2), np.eye(2)).credible_radius(1.0), "level is 1.0"),
        (
            lambda: GaussianPosterior.laplace(fit_preferences([[1.0, 0]], [1], radius=1.0)),
            "fit with ridge > 0",
        ),
        (lambda: confidence_radius(1, delta=0, kappa=1, regularisation=1, radius=1), "delta is 0"),
        (lambda: confidence_radius(1, delta=0.1, kappa=0, regularisation=1, radius=1), "kappa is 0"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
