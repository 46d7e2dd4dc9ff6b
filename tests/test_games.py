"""Equilibria by three independent solvers, their certificates, and the limits of the temperature."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from preflab.algorithms.planning import (
    best_response,
    best_response_value,
    duality_gap,
    exploitability,
    mirror_prox,
    nash,
    regularised_nash,
    regularised_preference,
    soft_maximum,
)
from preflab.algorithms.planning.games import kl, logarithm, mirror_prox_step, softmax
from preflab.envs import (
    PreferenceGame,
    bradley_terry_game,
    cyclic_game,
    random_game,
    sound_quality_game,
    three_type_game,
)
from preflab.envs.preference_games import cyclic_nash, three_type_nash

seeds, sizes = st.integers(0, 10**6), st.integers(1, 9)
temperatures = st.floats(0.02, 5)


def drawn(n, seed):
    """A game with its own reference, and two laws."""
    rng = np.random.default_rng(seed)
    mu, p, q = rng.dirichlet(np.ones(n), size=3)
    return random_game(n, rng, reference=(mu + 0.01) / (1 + 0.01 * n)), p, q


@given(sizes, seeds)
def test_kl_against_its_definition(n, seed):
    _, p, q = drawn(n, seed)
    assert kl(np.log(p), np.log(q)) == pytest.approx(float(p @ np.log(p / q)), abs=1e-12)


def test_kl_of_close_and_of_disjoint_laws():
    p, d = np.full(4, 0.25), np.array([1, -1, 1, -1]) * 1e-9
    assert kl(np.log(p), np.log(p + d)) == pytest.approx(2 * 4 * 0.25 * (4e-9) ** 2 / 4, rel=1e-6)
    point = logarithm(np.array([1.0, 0.0, 0.0]))
    assert kl(point, np.log([0.5, 0.25, 0.25])) == pytest.approx(math.log(2))
    assert kl(point, logarithm(np.array([0.5, 0.5, 0.0]))) == pytest.approx(math.log(2))
    assert kl(np.log([0.5, 0.25, 0.25]), point) == math.inf
    assert kl(point, point) == 0


def test_softmax_neither_overflows_nor_forgets():
    law, log_law = softmax(np.array([1e5, 1e5 - 1, -1e5]))
    np.testing.assert_allclose(law, [1 / (1 + np.exp(-1)), 1 / (1 + np.exp(1)), 0])
    assert log_law[2] == pytest.approx(-2e5 - math.log1p(math.exp(-1)), rel=1e-12)


@given(sizes, seeds, temperatures)
def test_the_regularised_preference_is_antisymmetric(n, seed, tau):
    game, p, q = drawn(n, seed)
    total = regularised_preference(game, p, q, tau) + regularised_preference(game, q, p, tau)
    assert total == pytest.approx(1, abs=1e-12)
    assert regularised_preference(game, p, q, 0) == pytest.approx(game.probability(p, q))


@given(sizes, seeds, temperatures)
def test_a_best_response_is_best_and_beats_by_a_kl(n, seed, tau):
    """P_tau(best > q) - P_tau(p > q) = tau KL(p, best); the engine of soft value iteration gives the same law."""
    game, p, q = drawn(n, seed)
    best = best_response(game, q, tau)
    lost = regularised_preference(game, best, q, tau) - regularised_preference(game, p, q, tau)
    assert lost == pytest.approx(tau * kl(np.log(p), np.log(best)), abs=1e-10)
    assert regularised_preference(game, best, q, tau) == pytest.approx(
        best_response_value(game, q, tau), abs=1e-10
    )
    np.testing.assert_allclose(
        best, soft_maximum((game.P @ q)[None], game.reference[None], tau)[1][0], atol=1e-12
    )
    assert exploitability(game, q, tau) == pytest.approx(best_response_value(game, q, tau) - 0.5, abs=1e-10)


@given(sizes, seeds)
def test_without_temperature_a_pure_response_is_best(n, seed):
    game, p, q = drawn(n, seed)
    best = best_response(game, q, 0)
    assert game.probability(best, q) == pytest.approx(best_response_value(game, q), abs=1e-12)
    rows = [game.probability(row, q) for row in np.eye(n)]
    assert best_response_value(game, q) == pytest.approx(max(rows))
    columns = [game.probability(p, row) for row in np.eye(n)]
    assert duality_gap(game, p, q) == pytest.approx(max(rows) - min(columns), abs=1e-12)


@given(sizes, seeds)
def test_linear_programming_finds_what_nobody_exploits(n, seed):
    game = random_game(n, seed)
    found = nash(game)
    assert found.exploitability <= 1e-9
    assert (game.P @ found.policy).max() <= 0.5 + 1e-9
    assert found.policy.sum() == pytest.approx(1)


@given(sizes, seeds, st.floats(0.1, 5))
def test_newton_and_mirror_prox_agree(n, seed, tau):
    game, _, _ = drawn(n, seed)
    newton = regularised_nash(game, tau)
    other = mirror_prox(game, tau, iterations=int(60 / math.log1p(tau)))
    assert newton.exploitability <= 1e-20
    assert duality_gap(game, newton.policy, newton.policy, tau) <= 1e-15
    np.testing.assert_allclose(other.policy, newton.policy, atol=1e-10)
    assert other.exploitability <= 1e-15
    # the fixed point, in its own words
    np.testing.assert_allclose(best_response(game, newton.policy, tau), newton.policy, atol=1e-12)


@pytest.mark.parametrize("game", [cyclic_game(), three_type_game(0.2), three_type_game(-0.3)])
def test_closed_forms_by_every_solver(game):
    closed = cyclic_nash() if game.name == "Cyclic" else three_type_nash(float(game.name[13:-1]))
    np.testing.assert_allclose(nash(game).policy, closed, atol=1e-9)
    np.testing.assert_allclose(mirror_prox(game, iterations=4000).policy, closed, atol=3e-3)
    errors = [np.abs(regularised_nash(game, tau).policy - closed).max() for tau in (1e-2, 1e-3, 1e-4)]
    assert errors[2] < 1e-3
    assert errors[2] < errors[1] / 5 < errors[0] / 25  # proportional to tau


@pytest.mark.parametrize("seed", range(5))
def test_a_cold_equilibrium_is_the_linear_program_s(seed):
    game = random_game(7, seed)
    cold = regularised_nash(game, 1e-5)
    assert cold.exploitability <= 1e-15
    assert exploitability(game, cold.policy) <= 1e-5 * math.log(7)
    np.testing.assert_allclose(cold.policy, nash(game).policy, atol=2e-3)
    slow = mirror_prox(game, iterations=3000)
    assert slow.exploitability <= 4 * math.log(7) / 3000


def test_the_temperature_s_limits():
    game, _, _ = drawn(6, 3)
    np.testing.assert_allclose(regularised_nash(game, 1e6).policy, game.reference, atol=1e-6)
    # equal responses: every law is a Nash equilibrium, and the limit is the one closest to the reference
    flat = PreferenceGame(np.full((3, 3), 0.5), reference=[0.7, 0.2, 0.1])
    np.testing.assert_allclose(regularised_nash(flat, 1e-4).policy, [0.7, 0.2, 0.1], atol=1e-12)


def test_a_regularised_equilibrium_is_no_softmax_of_the_reward():
    r, tau = np.array([1.0, 0.0, -2.0]), 0.3
    pi = regularised_nash(bradley_terry_game(r), tau).policy
    averages = 1 / (1 + np.exp(-(r[:, None] - r))) @ pi
    np.testing.assert_allclose(pi, softmax(averages / tau)[0], atol=1e-12)
    assert np.abs(pi - softmax(r / tau)[0]).max() > 0.05


def test_newton_from_elsewhere_and_on_a_large_game():
    game = random_game(60, 1)
    here = regularised_nash(game, 0.05)
    there = regularised_nash(
        game, 0.05, start=np.random.default_rng(0).dirichlet(np.full(60, 0.1)) * 0.99 + 0.01 / 60
    )
    np.testing.assert_allclose(there.policy, here.policy, atol=1e-12)
    assert here.iterations <= 8
    with pytest.raises(ArithmeticError, match=r"after 1 Newton steps at tau = 0\.05"):
        regularised_nash(game, 0.05, max_iterations=1)


@pytest.mark.parametrize("tau", [0.2, 0.001])
def test_large_games_are_solved_by_products_or_by_factors(tau, monkeypatch):
    """GMRES suffices at the higher temperature; at the lower one some systems are left to the factorisation."""
    from preflab.algorithms.planning import games

    game, found = random_game(120, 2), []
    direct = regularised_nash(game, tau)
    krylov = games._krylov_step
    monkeypatch.setattr(games, "_LARGE", 100)
    monkeypatch.setattr(games, "_krylov_step", lambda *system: found.append(krylov(*system)) or found[-1])
    by_products = regularised_nash(game, tau)
    np.testing.assert_allclose(by_products.policy, direct.policy, atol=1e-12)
    assert by_products.exploitability <= 1e-20
    assert any(step is not None for step in found)
    if tau > 0.1:
        assert all(step is not None for step in found)


@pytest.mark.parametrize("tau", [1.0, 0.02, 1e-3])
def test_responses_without_mass_do_not_change_a_newton_step(tau):
    """The system over the responses with mass against the whole one."""
    from preflab.algorithms.planning.games import _direct_step

    rng = np.random.default_rng(0)
    A = (random_game(40, rng).P - 0.5) / tau
    pi = softmax(rng.standard_normal(40) * 20)[0]
    G, wins, least = rng.standard_normal(40), A @ pi, 1e-6 * tau
    assert 1 < (pi > least).sum() < 40
    whole = np.linalg.solve(np.eye(40) - A @ (np.diag(pi) - np.outer(pi, pi)), G)
    np.testing.assert_allclose(_direct_step(A, pi, wins, G, 0.0), whole, atol=1e-9 * np.abs(whole).max())
    np.testing.assert_allclose(_direct_step(A, pi, wins, G, least), whole, atol=1e-4 * np.abs(whole).max())


@pytest.mark.parametrize("tau", [1e-3, 1e-4, 1e-5, 1e-6])
def test_cold_equilibria_of_a_hundred_responses(tau):
    game = random_game(100, 4)
    found = regularised_nash(game, tau)
    assert found.exploitability <= 1e-20
    np.testing.assert_allclose(best_response(game, found.policy, tau), found.policy, atol=1e-10)


@given(sizes, seeds, st.floats(0.01, 3), st.floats(0.05, 2))
def test_a_step_of_mirror_prox_contracts(n, seed, tau, step):
    game, p, _ = drawn(n, seed)
    pi = 0.99 * p + 0.01 / n
    star = regularised_nash(game, tau).log_policy
    half, after, log_after = mirror_prox_step(game, pi, np.log(pi), tau, step)
    assert (1 + step * tau) * kl(star, log_after) <= kl(star, np.log(pi)) + 1e-13
    # in its own words
    law = (pi * game.reference ** (step * tau) * np.exp(step * (game.P @ half))) ** (1 / (1 + step * tau))
    np.testing.assert_allclose(after, law / law.sum(), atol=1e-12)


def test_gmres_that_does_not_finish_is_not_believed():
    from preflab.algorithms.planning.games import _krylov_step

    rng = np.random.default_rng(0)
    A = rng.standard_normal((200, 200)) * 1e4
    assert _krylov_step(A - A.T, rng.dirichlet(np.ones(200)), rng.standard_normal(200)) is None


def test_listeners_have_an_equilibrium_where_no_mode_beats_all():
    game = sound_quality_game("Rachmaninov")
    found = nash(game)
    assert found.exploitability <= 1e-12
    near = regularised_nash(game, 1e-5)
    assert exploitability(game, near.policy) <= 1e-4


@pytest.mark.parametrize("tau", [0.0, -1.0, math.nan, math.inf])
def test_a_temperature_is_positive(tau):
    with pytest.raises(ValueError, match="must be positive and finite"):
        regularised_nash(cyclic_game(), tau)
    if tau != 0:
        for refuse in (best_response, exploitability):
            with pytest.raises(ValueError, match="must be positive"):
                refuse(cyclic_game(), np.full(3, 1 / 3), tau)
        with pytest.raises(ValueError, match="must be positive"):
            mirror_prox(cyclic_game(), tau, iterations=1)


def test_bad_input_is_refused():
    game = cyclic_game()
    with pytest.raises(ValueError, match=r"start\[1\] is 0; every response needs mass"):
        regularised_nash(game, 0.1, start=[0.5, 0.0, 0.5])
    with pytest.raises(ValueError, match=r"step is 2; it lies in \(0, 2\)"):
        mirror_prox(game, iterations=1, step=2)
    with pytest.raises(ValueError, match=r"policy sums to 0\.9"):
        exploitability(game, [0.5, 0.2, 0.2])
    with pytest.raises(ValueError, match="opponent has shape"):
        best_response(game, [1.0], 0.1)
