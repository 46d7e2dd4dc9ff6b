"""The Bayesian posterior by quadrature: closed forms, other quadratures, draws; and as a learner's belief."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from preflab.llm_bridge.active import ActiveLearner, Pool, PoolAnnotator, experiment
from preflab.llm_bridge.active.quadrature import GridPosterior
from scipy.integrate import quad
from scipy.special import expit, log_expit


def answered(n, d, seed=0, size=3.0):
    rng = np.random.default_rng(seed)
    D, theta = rng.standard_normal((n, d)) / 2, size * rng.standard_normal(d)
    return D, (rng.random(n) < expit(D @ theta)).astype(float)


def test_before_any_answer_it_is_the_prior():
    belief, D = GridPosterior(2, 0.25), np.array([[1.0, 0.0], [0.3, -2.0], [0.0, 0.0]])
    np.testing.assert_allclose(belief.theta, 0, atol=1e-9)
    np.testing.assert_allclose(belief.covariance, 4 * np.eye(2), atol=1e-8)
    # E |N(0, 2 tau^2 |D|^2)| = 2 tau |D| / sqrt(pi)
    exact = 2 / np.sqrt(np.pi) * 2 * np.linalg.norm(D, axis=1)
    np.testing.assert_allclose(belief.ahead().gaps(D), exact, rtol=1e-3)
    assert belief.edge < 1e-10


@pytest.mark.parametrize("n", [3, 25])
def test_one_dimension_is_adaptive_quadrature(n):
    D, wins = answered(n, 1)
    belief = GridPosterior(1, 0.3, points=801)
    belief.add(D[: n // 2], wins[: n // 2])
    belief.add(D[n // 2 :], wins[n // 2 :])
    signed = D[:, 0] * (2 * wins - 1)
    density = lambda t: np.exp(log_expit(signed * t).sum() - 0.15 * t**2)  # noqa: E731
    whole = lambda f, a=-15.0, b=25.0: quad(f, a, b, epsabs=1e-13, limit=400)[0]  # noqa: E731
    Z = whole(density)
    mean = whole(lambda t: t * density(t)) / Z
    assert belief.theta[0] == pytest.approx(mean, abs=1e-7)
    variance = whole(lambda t: (t - mean) ** 2 * density(t)) / Z
    assert belief.covariance[0, 0] == pytest.approx(variance, rel=1e-6)
    grid = np.linspace(-15, 25, 4001)
    p = np.array([density(t) for t in grid])
    p /= p.sum()
    disagreement = p @ np.abs(grid[:, None] - grid) @ p  # the double sum, not the distribution function
    assert belief.ahead().gaps(np.array([[1.0]]))[0] == pytest.approx(disagreement, rel=1e-4)


def test_two_dimensions_are_another_grid_and_draws_follow():
    D, wins = answered(40, 2)
    belief = GridPosterior(2, 0.5)
    belief.add(D, wins)
    axis = np.linspace(-9, 15, 601)
    theta = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    log_p = log_expit(theta @ (D * (2 * wins - 1)[:, None]).T).sum(1) - 0.25 * (theta**2).sum(1)
    p = np.exp(log_p - log_p.max())
    p /= p.sum()
    mean = p @ theta
    covariance = (theta - mean).T @ ((theta - mean) * p[:, None])
    np.testing.assert_allclose(belief.theta, mean, atol=1e-5)
    np.testing.assert_allclose(belief.covariance, covariance, rtol=1e-4, atol=1e-6)
    rng = np.random.default_rng(1)
    draws = np.array([belief.draw(rng) for _ in range(8000)])
    assert (np.abs(draws.mean(0) - mean) < 4 * np.sqrt(np.diag(covariance) / 8000)).all()
    gap = np.abs((draws[::2] - draws[1::2]) @ D[0])
    assert abs(belief.ahead().gaps(D[:1])[0] - gap.mean()) < 4 * gap.std() / np.sqrt(4000)
    # the mode of a skewed posterior is not its mean: a belief that answers by the mode is another one
    assert np.abs(belief.mode - mean).max() > 0.05


def test_a_grid_that_is_too_narrow_says_so():
    D, wins = answered(10, 2)
    wide, narrow = GridPosterior(2, 0.5), GridPosterior(2, 0.5, width=1.5)
    for belief in (wide, narrow):
        belief.add(D, wins)
    assert wide.edge < 1e-6 < 1e-3 < narrow.edge
    fine = GridPosterior(2, 0.5, points=241)
    fine.add(D, wins)
    np.testing.assert_allclose(wide.covariance, fine.covariance, rtol=1e-6)
    assert np.abs(narrow.covariance / fine.covariance - 1).max() > 0.1
    for arguments, message in (((3, 1.0), "a grid serves 1 or 2"), ((2, 0.0), "precision is 0")):
        with pytest.raises(ValueError, match=message):
            GridPosterior(*arguments)


# ---- as a belief ---------------------------------------------------------------------------------------------------


def plane(prompts=4, candidates=12, seed=0):
    rng, n = np.random.default_rng(seed), prompts * candidates
    phi = rng.standard_normal((n, 2))
    phi /= np.linalg.norm(phi, axis=1).max()
    theta = 8 * np.array([0.6, -0.8])
    uniform = np.full(n, 1 / candidates)
    return Pool(np.repeat(np.arange(prompts), candidates), phi, uniform, phi @ theta, theta=theta)


def test_a_run_on_the_exact_posterior_learns_and_is_not_saved(tmp_path):
    pool = plane()
    given = replace(experiment.prior_settings(pool, spread=2.0), batch=6, buy=2)
    lost = []
    for seed in range(3):
        belief = GridPosterior(2, given.ridge, points=61)
        run = ActiveLearner(pool, PoolAnnotator(pool, seed), given, seed, belief=belief).advance(25)
        assert run.labels == len(belief.wins) == len(belief.arrays()["differences"]) > 0
        assert np.isnan(run.records["log_det"]).all()
        lost.append(pool.optimal_value - pool.value(run.answer))
    assert np.mean(lost) < 0.15 * (pool.optimal_value - pool.value(pool.reference))
    with pytest.raises(ValueError, match="this run's belief was given to it"):
        run.save(tmp_path / "run.npz")


def test_the_rules_are_measured_against_the_posterior():
    pool = plane()
    rows = experiment.against_the_posterior(pool, range(3), [8, 32])
    at = {(row.rule, row.labels): row for row in rows}
    assert set(at) == {(r, n) for r in ("gram", "laplace", "10 heads", "100 heads") for n in (8, 32)}
    for n in (8, 32):
        assert at["laplace", n].ranks.min() > 0.95
        assert np.abs(at["laplace", n].ratio - 1).max() < 0.25
        # Phi' <= 1/4: with sigma_r = 2 the Gram matrix is never less sure than Laplace's Hessian
        assert (at["gram", n].ratio <= at["laplace", n].ratio + 1e-9).all()
        assert at["10 heads", n].ranks.mean() < at["100 heads", n].ranks.mean() + 0.05
        assert at["gram", n].edge < 1e-4
    table = experiment.likeness_table(rows)
    assert table.startswith("| labels | 8 | 32 |")
    assert f"| laplace | {at['laplace', 8].ratio.mean():.2f}, " in table


def test_the_plane_of_the_shipped_lattice_is_linear_in_two_features():
    pool = experiment.plane_pool()
    assert pool.dimension == 2
    assert pool.max_norm == pytest.approx(1)
    gap = pool.reward - pool.phi @ pool.theta
    assert max(np.ptp(gap[pool.rows(x)]) for x in range(pool.prompts)) < 1e-10
    found = experiment.on_the_plane(1, 2, budget=8)
    assert list(found.curves) == ["exact", "disagreement", "variance", "ensemble", "uniform", "shuffled"]
    assert all(curve["labels"][0, -1] == 8 for curve in found.curves.values())
