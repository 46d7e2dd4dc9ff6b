"""Games of low rank against their own matrix: products, solvers, self-play; random kernels; games put together."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from preflab.algorithms.inpo import INPO
from preflab.algorithms.nash_md import NashMD
from preflab.algorithms.oomd_sea import OptimisticMWU
from preflab.algorithms.planning import (
    best_response,
    best_response_value,
    exploitability,
    mirror_prox,
    nash,
    regularised_nash,
    regularised_preference,
)
from preflab.algorithms.planning.games import kl
from preflab.algorithms.sppo import SPPO
from preflab.envs import PROBIT, cyclic_game, random_game
from preflab.envs.structured_games import (
    LowRankGame,
    block_game,
    duplicated_game,
    random_kernel_game,
    random_low_rank_game,
)

J = np.array([[0.0, 1.0], [-1.0, 0.0]])
sizes, ranks, seeds = st.integers(2, 40), st.integers(2, 6), st.integers(0, 10**6)


def drawn(n, rank, seed):
    """A game with its own reference, the same with its matrix, and two laws."""
    rng = np.random.default_rng(seed)
    mu, p, q = 0.9 * rng.dirichlet(np.ones(n), size=3) + 0.1 / n
    low = random_low_rank_game(n, rank, rng, reference=mu)
    return low, low.dense(), p, q


@given(sizes, ranks, seeds)
def test_products_are_those_of_the_matrix(n, rank, seed):
    low, dense, p, q = drawn(n, rank, seed)
    assert (len(low), low.rank) == (n, rank)
    np.testing.assert_allclose(low.wins(p), dense.P @ p, atol=1e-14)
    np.testing.assert_array_equal(dense.wins(p), dense.P @ p)
    assert low.probability(p, q) == pytest.approx(dense.probability(p, q), abs=1e-14)
    np.testing.assert_allclose(low.log_reference, dense.log_reference, atol=1e-14)
    some = np.random.default_rng(seed).permutation(n)[: max(1, n // 2)]
    block = low.block(some)
    np.testing.assert_allclose(block.P, dense.P[np.ix_(some, some)], atol=1e-14)
    np.testing.assert_allclose(block.reference, low.reference[some] / low.reference[some].sum())


@given(sizes, ranks, seeds)
def test_the_bound_holds_for_every_margin(n, rank, seed):
    rng = np.random.default_rng(seed)
    G = rng.standard_normal((rank, rank))
    low = random_low_rank_game(n, rank, seed)
    margins = low.U @ low.C @ low.U.T
    assert np.abs(margins).max() <= low.bound + 1e-12 <= 0.5 + 2e-12
    scaled = LowRankGame(low.U, 1e-3 * (G - G.T))
    assert np.abs(scaled.U @ scaled.C @ scaled.U.T).max() <= scaled.bound + 1e-15


def test_the_bound_is_sharp_on_a_circle():
    angles = np.arange(8) * np.pi / 4
    low = LowRankGame(np.column_stack([np.cos(angles), np.sin(angles)]), J / 2)
    assert low.bound == pytest.approx(0.5)
    assert low.dense().P.max() == pytest.approx(1.0)


@given(sizes, ranks, seeds, st.sampled_from([1.0, 0.1, 0.01, 0.001]))
def test_newton_in_k_dimensions_finds_what_newton_in_n_finds(n, rank, seed, tau):
    low, dense, p, _ = drawn(n, rank, seed)
    found, other = regularised_nash(low, tau), regularised_nash(dense, tau)
    np.testing.assert_allclose(found.policy, other.policy, atol=1e-11)
    np.testing.assert_allclose(np.exp(found.log_policy), found.policy, rtol=1e-12)
    assert found.exploitability <= 1e-20
    # the certificate is the dense one
    assert exploitability(dense, found.policy, tau) <= 1e-20
    if tau >= 0.1:
        there = regularised_nash(low, tau, start=p)
        np.testing.assert_allclose(there.policy, found.policy, atol=1e-12)


@given(st.integers(2, 60), ranks, seeds)
def test_the_double_oracle_finds_an_equilibrium(n, rank, seed):
    low, dense, _, _ = drawn(n, rank, seed)
    found = nash(low)
    assert found.exploitability <= 2e-9
    assert exploitability(dense, found.policy) <= 2e-9
    assert found.policy.sum() == pytest.approx(1)


def test_the_double_oracle_looks_at_few_responses():
    low = random_low_rank_game(20_000, 6, 3)
    found = nash(low)
    assert found.exploitability <= 1e-9
    assert (found.policy > 0).sum() <= low.rank + 1


@given(sizes, ranks, seeds, st.floats(0.05, 2))
def test_values_and_responses_are_those_of_the_matrix(n, rank, seed, tau):
    low, dense, p, q = drawn(n, rank, seed)
    for f in (best_response_value, exploitability):
        for t in (0.0, tau):
            assert f(low, q, t) == pytest.approx(f(dense, q, t), abs=1e-12)
    np.testing.assert_allclose(best_response(low, q, tau), best_response(dense, q, tau), atol=1e-12)
    assert regularised_preference(low, p, q, tau) == pytest.approx(
        regularised_preference(dense, p, q, tau), abs=1e-12
    )
    np.testing.assert_allclose(
        mirror_prox(low, tau, iterations=5).policy, mirror_prox(dense, tau, iterations=5).policy, atol=1e-12
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda g: NashMD(g, 0.2),
        lambda g: INPO(g, 0.2, 0.5),
        lambda g: SPPO(g, 0.5),
        lambda g: OptimisticMWU(g, 0.5),
    ],
)
def test_self_play_needs_no_matrix(make):
    low, dense, _, _ = drawn(50, 4, 1)
    a, b = make(low).advance(40), make(dense).advance(40)
    np.testing.assert_allclose(a.policy, b.policy, atol=1e-12)
    np.testing.assert_allclose(a.average, b.average, atol=1e-12)


def test_a_large_game_converges_in_self_play():
    low = random_low_rank_game(30_000, 5, 0)
    star = regularised_nash(low, 0.3)
    assert star.exploitability <= 1e-20
    assert kl(star.log_policy, INPO(low, 0.3, 1.0).advance(120).log_policy) <= 1e-14


def test_newton_says_when_it_has_not_arrived():
    with pytest.raises(ArithmeticError, match=r"RandomLowRank\(30, 4\): residual .* after 1 Newton steps"):
        regularised_nash(random_low_rank_game(30, 4, 0), 0.01, max_iterations=1)


@pytest.mark.parametrize(
    ("U", "C", "message"),
    [
        (np.zeros((3, 2)), np.zeros((3, 3)), r"U has shape \(3, 2\) and C \(3, 3\); expected \(n, k\) and"),
        (np.zeros(3), J, r"U has shape \(3,\)"),
        (np.zeros((0, 2)), J, r"U has shape \(0, 2\)"),
        ([[0.0, np.nan]], J, r"U\[0, 1\] is nan; features and margins are finite"),
        (np.eye(2), [[0.0, np.inf], [0.0, 0.0]], r"C\[0, 1\] is inf"),
        (np.eye(2), [[0.0, 0.2], [0.1, 0.0]], r"C\[0, 1\] \+ C\[1, 0\] is 0.3, not 0; take \(C - C\^T\) / 2"),
        (np.eye(2), 0.8 * J, r"P\[0, 1\] is 1.3; a probability lies in \[0, 1\]: multiply C by 0.625"),
    ],
)
def test_a_bad_game_is_refused_with_the_place(U, C, message):
    with pytest.raises(ValueError, match=message):
        LowRankGame(U, C)


def test_what_the_bound_refuses_is_looked_at_where_that_is_cheap(monkeypatch):
    U = np.array([[1.0, 0.0], [2.0, 0.0]])  # long, but parallel
    game = LowRankGame(U, 0.3 * J)
    assert game.bound == pytest.approx(1.2)
    np.testing.assert_allclose(game.dense().P, 0.5)
    monkeypatch.setattr("preflab.envs.structured_games.EXACT", 1)
    with pytest.raises(ValueError, match=r"margins are at most 1.2, .* 2 x 2 of .* multiply C by 0.416667"):
        LowRankGame(U, 0.3 * J)


def test_arrays_are_the_game_s_own_and_the_reference_is_checked():
    U, C = np.eye(2), J / 4
    game = LowRankGame(U, C)
    U[0, 0] = 9.0
    assert game.U[0, 0] == 1.0
    with pytest.raises(ValueError, match="read-only"):
        game.C[0, 1] = 0.0
    np.testing.assert_array_equal(game.reference, [0.5, 0.5])
    with pytest.raises(ValueError, match=r"reference\[1\] is 0.0; every response needs mass"):
        LowRankGame(np.eye(2), C, reference=[1.0, 0.0])
    with pytest.raises(ValueError, match="first sums to 2"):
        game.probability([1, 1], [1, 0])


def test_random_low_rank_games_have_seeds_and_limits():
    a, b = (random_low_rank_game(9, 3, seed) for seed in (4, np.random.default_rng(4)))
    np.testing.assert_array_equal(a.U, b.U)
    np.testing.assert_array_equal(a.C, b.C)
    assert not np.array_equal(a.C, random_low_rank_game(9, 3, 5).C)
    assert np.linalg.norm(random_low_rank_game(9, 3, 4, strength=0.1).C, 2) == pytest.approx(0.1)
    with pytest.raises(ValueError, match="rank is 1; an antisymmetric matrix has rank at least 2"):
        random_low_rank_game(9, 1, 0)
    for strength in (0.0, 0.6, np.nan):
        with pytest.raises(ValueError, match="strength is"):
            random_low_rank_game(9, 2, 0, strength=strength)


@given(st.integers(1, 9), seeds, st.sampled_from(["logistic", "probit"]))
def test_random_kernels_are_antisymmetric_behind_their_link(n, seed, link):
    game = random_kernel_game(n, seed, scale=0.7, link=link)
    np.testing.assert_allclose(game.P + game.P.T, 1, atol=1e-15)
    np.testing.assert_array_equal(
        game.P, random_kernel_game(n, np.random.default_rng(seed), scale=0.7, link=link).P
    )


def test_random_kernels_are_gaussian_and_checked():
    game = random_kernel_game(200, 0, scale=0.5, link=PROBIT)
    K = PROBIT.inverse(game.P[np.triu_indices(200, 1)])
    assert K.std() == pytest.approx(0.5, rel=0.02)
    assert abs(K.mean()) < 0.01
    np.testing.assert_array_equal(random_kernel_game(3, 0, scale=0.0).P, np.full((3, 3), 0.5))
    with pytest.raises(ValueError, match="link 'logit'"):
        random_kernel_game(3, 0, link="logit")
    for scale in (-1.0, np.inf, np.nan):
        with pytest.raises(ValueError, match="scale is"):
            random_kernel_game(3, 0, scale=scale)


def test_duplicates_and_blocks_have_the_equilibria_of_their_parts():
    game = cyclic_game()
    twice = duplicated_game(game, [1, 2, 3])
    assert len(twice) == 6
    np.testing.assert_array_equal(twice.P[1:3, 1:3], 0.5)
    pi = nash(game).policy
    for share in (0.0, 0.3, 1.0):
        law = np.array([pi[0], share * pi[1], (1 - share) * pi[1], pi[2], 0, 0])
        assert exploitability(twice, law) <= 1e-9
    other = random_game(4, 0)
    both = block_game([game, other])
    np.testing.assert_array_equal(both.P[:3, 3:], 0.5)
    for share in (0.0, 0.4, 1.0):
        law = np.concatenate([share * pi, (1 - share) * nash(other).policy])
        assert exploitability(both, law) <= 1e-9
    with pytest.raises(ValueError, match=r"copies is \(1, 0, 1\); expected 3 numbers"):
        duplicated_game(game, [1, 0, 1])
    with pytest.raises(ValueError, match="expected 3 numbers"):
        duplicated_game(game, [1, 1])
