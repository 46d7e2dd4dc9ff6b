"""The Nash equilibrium of maximal entropy against closed forms and the limit of tau -> 0."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from preflab.algorithms.planning import exploitability, nash, regularised_nash
from preflab.algorithms.planning.games import kl
from preflab.algorithms.planning.max_entropy import essential_responses, max_entropy_nash
from preflab.envs import PreferenceGame, cyclic_game, random_game
from preflab.envs.preference_games import cyclic_nash
from preflab.envs.structured_games import block_game, duplicated_game, random_kernel_game


def many(seed):
    """Duplicates beside another game: a polytope of equilibria; a random reference."""
    rng = np.random.default_rng(seed)
    first = duplicated_game(random_game(4, rng), rng.integers(1, 4, 4))
    n = len(first) + 3
    return block_game([first, random_game(3, rng)], reference=0.8 * rng.dirichlet(np.ones(n)) + 0.2 / n)


def test_where_there_is_one_equilibrium_it_is_that():
    found = max_entropy_nash(cyclic_game())
    np.testing.assert_allclose(found.policy, cyclic_nash(), atol=1e-12)
    assert (found.dimension, found.iterations) == (0, 0)
    assert found.essential.all()


def test_among_equal_responses_it_is_the_reference():
    mu = [0.7, 0.2, 0.1]
    found = max_entropy_nash(PreferenceGame(np.full((3, 3), 0.5), reference=mu))
    np.testing.assert_allclose(found.policy, mu, atol=1e-9)
    assert found.dimension == 2
    assert found.divergence == pytest.approx(0, abs=1e-15)


def test_duplicates_share_their_mass_like_the_reference():
    mu = np.array([0.3, 0.3, 0.1, 0.05, 0.15, 0.1])
    found = max_entropy_nash(duplicated_game(cyclic_game((0.75, 0.75, 0.75)), [1, 2, 3], reference=mu))
    np.testing.assert_allclose(found.policy, [1 / 3, 0.25, 1 / 12, 1 / 18, 1 / 6, 1 / 9], atol=1e-9)


def test_an_inequality_that_binds():
    """0 and 1 tie, 2 beats 0 and loses to 1 by as much: equilibria (p, 1 - p, 0), p <= 1/2; mu wants p = 8/9."""
    P = np.array([[0.5, 0.5, 0.4], [0.5, 0.5, 0.6], [0.6, 0.4, 0.5]])
    found = max_entropy_nash(PreferenceGame(P, reference=[0.8, 0.1, 0.1]))
    np.testing.assert_array_equal(found.essential, [True, True, False])
    np.testing.assert_allclose(found.policy, [0.5, 0.5, 0], atol=1e-9)
    # stationarity: log(pi / mu) + 0.1 lambda (1, -1) is constant
    assert found.multipliers[2] == pytest.approx(np.log(8) / 0.2, rel=1e-6)
    assert abs(found.gap) <= 1e-9
    # the limit is reached from inside, more slowly than where nothing binds: the error is of order tau log(1 / tau)
    errors = [np.abs(regularised_nash(found.game, tau).policy - found.policy).max() for tau in (1e-4, 1e-6)]
    assert 1e-6 < errors[1] < errors[0] / 20


@given(st.integers(0, 10**6))
def test_games_side_by_side_with_duplicates_in_closed_form(seed):
    """Each part has one equilibrium q. Duplicates share by mu; parts in proportion to exp(-KL(q, mu there))."""
    rng = np.random.default_rng(seed)
    parts = [random_game(int(n), rng) for n in rng.integers(1, 5, 3)]
    copies = [rng.integers(1, 4, len(part)) for part in parts]
    n = sum(c.sum() for c in copies)
    mu = 0.8 * rng.dirichlet(np.ones(n)) + 0.2 / n
    game = block_game([duplicated_game(*pair) for pair in zip(parts, copies, strict=True)], reference=mu)
    laws, costs, start = [], [], 0
    for part, c in zip(parts, copies, strict=True):
        of, here = np.repeat(np.arange(len(part)), c), mu[start : start + c.sum()]
        start += c.sum()
        q, group = nash(part).policy, np.bincount(of, here)
        laws.append(q[of] * here / group[of])
        costs.append(float(q[q > 0] @ np.log(q[q > 0] / group[q > 0])))
    shares = np.exp(-np.array(costs))
    found = max_entropy_nash(game)
    closed = np.concatenate([a / shares.sum() * law for a, law in zip(shares, laws, strict=True)])
    np.testing.assert_allclose(found.policy, closed, atol=1e-8)
    assert found.divergence == pytest.approx(-np.log(shares.sum()), abs=1e-9)
    np.testing.assert_array_equal(found.essential, closed > 0)


@given(st.integers(0, 10**6))
def test_its_certificates_and_the_limit_of_the_temperature(seed):
    game = many(seed)
    found = max_entropy_nash(game)
    assert found.exploitability <= 1e-12
    assert abs(found.gap) <= 1e-9
    assert found.divergence == pytest.approx(kl(found.log_policy, game.log_reference))
    assert found.policy.sum() == pytest.approx(1, abs=1e-12)
    assert (found.multipliers[~found.essential] >= 0).all()
    assert found.divergence <= kl(nash(game).log_policy, game.log_reference) + 1e-9
    for tau in (1.0, 0.01, 1e-4):
        assert kl(regularised_nash(game, tau).log_policy, game.log_reference) <= found.divergence + 1e-12


@given(st.integers(1, 9), st.integers(0, 10**6))
def test_essential_responses_are_complementary(n, seed):
    """Either an equilibrium uses a response, or one makes it lose."""
    game = random_game(n, seed)
    essential, x = essential_responses(game)
    pi = x / x.sum()
    assert exploitability(game, pi) <= 1e-9
    np.testing.assert_array_equal(pi > 1e-9, essential)
    assert ((game.P @ pi)[~essential] < 0.5 - 1e-9).all()


def test_newton_says_when_it_has_not_arrived(monkeypatch):
    from preflab.algorithms.planning import max_entropy

    monkeypatch.setattr(max_entropy, "_STEPS", 1)
    with pytest.raises(ArithmeticError, match="Newton's decrement is"):
        max_entropy_nash(many(0))


def test_a_linear_program_that_fails_is_not_believed(monkeypatch):
    import scipy.optimize

    class Found:
        x, message = np.zeros(6), "nothing"

    monkeypatch.setattr(scipy.optimize, "linprog", lambda *args, **options: Found)
    with pytest.raises(ArithmeticError, match="Cyclic: no strictly complementary equilibrium found"):
        max_entropy_nash(cyclic_game())


@pytest.mark.parametrize("scale", [0.02, 1.0])
def test_a_hundred_responses_with_small_margins(scale):
    """Where the program in its homogeneous form is called infeasible: x reaches 15,000."""
    found = max_entropy_nash(random_kernel_game(100, 4, scale=scale))
    assert found.exploitability <= 1e-12
    assert found.dimension == 0
    assert found.essential.sum() % 2 == 1  # of a generic antisymmetric game
