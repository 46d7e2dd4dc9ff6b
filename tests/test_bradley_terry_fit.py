"""The best Bradley-Terry reward of a game: against the general estimator, by its stationarity, and in the limit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from preflab.algorithms.estimation import SeparableDataError, fit_preferences
from preflab.algorithms.estimation.bradley_terry import fit_bradley_terry
from preflab.envs import PreferenceGame, bradley_terry_game, cyclic_game, random_game, three_type_game
from scipy.special import expit, xlogy

seeds, sizes = st.integers(0, 10**6), st.integers(2, 7)


def general(game, joint):
    """The same reward from the estimator for feature differences, with a one-hot feature a response."""
    n = len(game)
    i, j = np.triu_indices(n, 1)
    w = (joint + joint.T)[i, j]
    D = np.eye(n)[i[w > 0]] - np.eye(n)[j[w > 0]]
    w, P = w[w > 0], game.P[i, j][(joint + joint.T)[i, j] > 0]
    return fit_preferences(D, w * P, counts=w, tolerance=1e-13).theta


def divergence(game, w, r):
    """Sum of w KL(P, sigma) over pairs, a comparison."""
    P, fitted = game.P, expit(r[:, None] - r)
    i, j = np.triu_indices(len(P), 1)
    both = sum(xlogy(p, p) - xlogy(p, q) for p, q in ((P[i, j], fitted[i, j]), (P[j, i], fitted[j, i])))
    return float(w[i, j] @ both / w[i, j].sum())


@given(sizes, seeds)
def test_against_the_general_estimator(n, seed):
    rng = np.random.default_rng(seed)
    game, law = random_game(n, rng), 0.9 * rng.dirichlet(np.ones(n)) + 0.1 / n
    joint = rng.dirichlet(np.ones(n * n)).reshape(n, n)
    for given_law, full in ((law, np.outer(law, law)), (joint, joint)):
        fit = fit_bradley_terry(game, given_law)
        assert np.ptp(fit.reward - general(game, full)) <= 1e-7
        assert fit.certificate <= 1e-11
        assert fit.finite
        w = full + full.T
        assert fit.misfit == pytest.approx(divergence(game, w, fit.reward), abs=1e-13)
        for step in rng.normal(0, 0.1, (5, n)):
            assert divergence(game, w, fit.reward + step) >= fit.misfit - 1e-15
        assert fit.best == np.argmax(fit.reward)


@given(sizes, seeds)
def test_a_reward_is_found_and_nothing_is_left(n, seed):
    rng = np.random.default_rng(seed)
    reward = rng.normal(0, 2, n)
    fit = fit_bradley_terry(bradley_terry_game(reward))
    assert np.ptp(fit.reward - reward) <= 1e-8
    assert fit.reward.mean() == pytest.approx(0, abs=1e-12)
    assert fit.misfit <= 1e-12


def test_references_of_1e_17_do_no_harm():
    mu = np.array([1e-17, 0.5, 1e-9, 0.5 - 1e-9 - 1e-17])
    game = random_game(4, 0, reference=mu)
    fit = fit_bradley_terry(game)
    rates = expit(fit.reward[:, None] - fit.reward) @ mu
    np.testing.assert_allclose(rates, game.wins(mu), atol=1e-11)


def test_the_supremum_of_certain_preferences():
    """Two groups, {0, 1, 2} in a circle and {3, 4} at 3 : 1, the first preferred with certainty: the limit of ever
    larger gaps, here of 30."""
    P = np.full((5, 5), 0.5)
    for i, j, p in ((0, 1, 1.0), (1, 2, 1.0), (2, 0, 1.0), (4, 3, 0.75)):
        P[i, j], P[j, i] = p, 1 - p
    P[:3, 3:], P[3:, :3] = 1.0, 0.0
    game = PreferenceGame(P)
    fit = fit_bradley_terry(game)
    assert fit.group.tolist() == [0, 0, 0, 1, 1]
    assert not fit.finite
    assert fit.best == 0
    np.testing.assert_allclose(fit.reward, [0, 0, 0, -np.log(3) / 2, np.log(3) / 2], atol=1e-9)
    assert fit.misfit == pytest.approx(3 * np.log(2) / 10)  # a circle costs 3 log 2, of ten pairs
    apart = fit.reward - 30 * fit.group
    assert divergence(game, np.ones((5, 5)), apart) == pytest.approx(fit.misfit, abs=1e-12)
    # a response that beats all others is a group by itself
    order = PreferenceGame([[0.5, 1, 1], [0, 0.5, 0.5], [0, 0.5, 0.5]])
    fit = fit_bradley_terry(order)
    assert (fit.group.tolist(), fit.best, fit.misfit) == ([0, 1, 1], 0, 0)
    with pytest.raises(SeparableDataError, match="no maximum: response 0 is in a group that never loses"):
        fit_bradley_terry(order, [[0, 0.5, 0], [0, 0, 0.5], [0, 0, 0]])


def test_the_law_decides_who_is_best():
    """0 beats 1 beats 2 beats 0: the best is the response that beats the one which the data hold most often."""
    game = cyclic_game((0.9, 0.8, 0.7))
    for m in range(3):
        law = np.full(3, 0.05)
        law[m] = 0.9
        assert fit_bradley_terry(game, law).best == (m - 1) % 3
    # three types of people and uniform comparisons: the maximiser jumps at e = 0
    assert [fit_bradley_terry(three_type_game(e)).best for e in (-1e-6, 1e-6)] == [0, 1]


def test_bad_input_is_refused():
    game = random_game(4, 0, names=list("abcd"))
    with pytest.raises(ValueError, match=r"no comparison joins \{'d'\} to the other 3 responses"):
        fit_bradley_terry(game, [0.4, 0.3, 0.3, 0])
    with pytest.raises(ValueError, match=r"law has shape \(3,\); expected \(4,\)"):
        fit_bradley_terry(game, np.full(3, 1 / 3))
    with pytest.raises(ValueError, match="law sums to 2"):
        fit_bradley_terry(game, np.full((4, 4), 1 / 8))
    one = fit_bradley_terry(PreferenceGame([[0.5]]))
    assert (one.best, one.misfit, one.finite) == (0, 0, True)


def test_it_says_when_it_does_not_converge(monkeypatch):
    monkeypatch.setattr("preflab.algorithms.estimation.bradley_terry._STEPS", 1)
    with pytest.raises(ArithmeticError, match=r"win rates are off by .* after 1 steps of Newton's method"):
        fit_bradley_terry(random_game(6, 0))
