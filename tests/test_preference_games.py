"""Preference games: what is refused, what is known in closed form, and what the recorded listeners say."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from preflab.envs import (
    PreferenceGame,
    bradley_terry_game,
    cyclic_game,
    random_game,
    sound_quality_game,
    three_type_game,
)
from preflab.envs.preference_games import check_law, cyclic_nash, three_type_nash
from preflab.envs.sound_quality import borda, condorcet_winner, sound_quality

GOOD = np.array([[0.5, 0.7], [0.3, 0.5]])


@pytest.mark.parametrize(
    ("P", "message"),
    [
        (np.full((2, 3), 0.5), r"shape \(2, 3\); expected \(n, n\)"),
        (np.zeros((0, 0)), r"expected \(n, n\), n >= 1"),
        ([[0.5, 1.2], [-0.2, 0.5]], r"P\[0, 1\] is 1.2; a probability lies in \[0, 1\]"),
        ([[0.5, np.nan], [0.5, 0.5]], r"P\[0, 1\] is nan"),
        ([[0.5, 0.7], [0.4, 0.5]], r"P\[0, 1\] \+ its mirror image is 1.1, not 1"),
        ([[0.5, 0.7], [0.3, 1.0]], r"P\[1, 1\] \+ its mirror image is 2, not 1; give ties half"),
    ],
)
def test_a_bad_matrix_is_refused_with_the_cell(P, message):
    with pytest.raises(ValueError, match=message):
        PreferenceGame(P)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"reference": [1.0]}, r"reference has shape \(1,\); expected \(2,\)"),
        ({"reference": [1.2, -0.2]}, r"reference\[1\] is -0.2"),
        ({"reference": [0.5, 0.4]}, r"reference sums to 0.9, not to 1"),
        ({"reference": [1.0, 0.0]}, r"reference\[1\] is 0.0; every response needs mass"),
        ({"names": ("a",)}, r"names are 1 \(1 different\) for 2 responses"),
        ({"names": ("a", "a")}, r"names are 2 \(1 different\)"),
    ],
)
def test_a_bad_reference_or_name_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        PreferenceGame(GOOD, **fields)


def test_a_game_keeps_its_own_arrays():
    P = GOOD.copy()
    game = PreferenceGame(P, names=("tea", "coffee"))
    P[0, 1] = 0.0
    assert game.P[0, 1] == 0.7
    with pytest.raises(ValueError, match="read-only"):
        game.P[0, 1] = 0.0
    assert len(game) == 2
    assert game.index("coffee") == 1
    np.testing.assert_array_equal(game.log_reference, np.log([0.5, 0.5]))
    with pytest.raises(ValueError, match="did you mean 'coffee'"):
        game.index("cofee")


def test_probability_is_the_mean_over_both_laws():
    game = PreferenceGame(GOOD)
    assert game.probability([1, 0], [0, 1]) == 0.7
    assert game.probability([0.5, 0.5], [0.25, 0.75]) == pytest.approx(
        (0.25 * 0.5 + 0.75 * 0.7 + 0.25 * 0.3 + 0.75 * 0.5) / 2
    )
    with pytest.raises(ValueError, match="second sums to 2"):
        game.probability([1, 0], [1, 1])
    assert check_law([1, 0], 2).dtype == np.float64


@given(n=st.integers(1, 12), seed=st.integers(0, 10**6))
def test_every_random_game_is_antisymmetric(n, seed):
    P = random_game(n, seed).P
    np.testing.assert_allclose(P + P.T, 1, atol=1e-15)
    np.testing.assert_array_equal(P, random_game(n, np.random.default_rng(seed)).P)


@given(st.lists(st.floats(-20, 20), min_size=1, max_size=8))
def test_bradley_terry_wins_like_its_rewards(rewards):
    game = bradley_terry_game(rewards)
    r = np.array(rewards)
    np.testing.assert_allclose(game.P, 1 / (1 + np.exp(-(r[:, None] - r))), atol=1e-12)


@pytest.mark.parametrize("rewards", [np.zeros((2, 2)), [np.inf, 0.0]])
def test_bradley_terry_needs_a_finite_vector(rewards):
    with pytest.raises(ValueError, match="vector of finite numbers"):
        bradley_terry_game(rewards)


@given(st.lists(st.floats(0.51, 1.0), min_size=3, max_size=3))
def test_a_cycle_has_no_condorcet_winner_and_a_known_equilibrium(wins):
    game, pi = cyclic_game(wins), cyclic_nash(wins)
    assert condorcet_winner(game.P) is None
    assert pi.sum() == pytest.approx(1, abs=1e-12)
    np.testing.assert_allclose(game.P @ pi, 0.5, atol=1e-12)


@pytest.mark.parametrize("wins", [(0.9, 0.8), (0.9, 0.8, 0.5), (0.9, 0.8, 1.1)])
def test_a_cycle_needs_three_wins(wins):
    with pytest.raises(ValueError, match="three probabilities"):
        cyclic_game(wins)


@given(st.floats(-2 / 3, 1 / 3))
def test_three_types_by_counting_people(e):
    """P from the rankings themselves, the equilibrium from P, Borda scores from P."""
    game = three_type_game(e)
    rankings = {(0, 1, 2): 1 / 3 - e / 4, (1, 2, 0): 1 / 3 + e / 2, (2, 0, 1): 1 / 3 - e / 4}
    for i in range(3):
        for j in range(3):
            above = sum(f for ranking, f in rankings.items() if ranking.index(i) < ranking.index(j))
            assert game.P[i, j] == pytest.approx(above if i != j else 0.5, abs=1e-12)
    nash = three_type_nash(e)
    np.testing.assert_allclose(nash, [1 / 3 + e / 2, 1 / 3 + e / 2, 1 / 3 - e], atol=1e-12)
    np.testing.assert_allclose(game.P @ nash, 0.5, atol=1e-12)
    np.testing.assert_allclose(2 * borda(game.P), [1 - 0.75 * e, 1 + 0.75 * e, 1], atol=1e-12)


@pytest.mark.parametrize("e", [-0.7, 0.34, np.nan])
def test_three_types_have_no_majority(e):
    with pytest.raises(ValueError, match="no type is a majority"):
        three_type_game(e)


def test_the_listeners_are_a_game():
    game = sound_quality_game("Sting")
    np.testing.assert_allclose(game.P, sound_quality().preferences("progmat")[3], atol=1e-12)
    assert game.names[2] == "Stereo"
    one = sound_quality_game("Sting", "04")
    assert not np.allclose(one.P, game.P)
    with pytest.raises(ValueError, match="did you mean 'Sting'"):
        sound_quality_game("Stin")
    with pytest.raises(ValueError, match="rater '99' is not one of"):
        sound_quality_game("Sting", "99")
