"""Cycles, Condorcet winner and Smith set against their definitions, by brute force; the recorded listeners."""

from __future__ import annotations

from itertools import combinations, permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from preflab.envs import PreferenceGame, bradley_terry_game, cyclic_game, sound_quality_game, three_type_game
from preflab.envs.sound_quality import PIECES
from preflab.envs.tournaments import beats, condorcet_winner, cycles, is_preorder, schwartz_set, smith_set


def drawn(n, seed, ties=0.2):
    """Probabilities among 0, 1/4, ..., 1, so that ties and duplicates are frequent, and a random reference."""
    rng = np.random.default_rng(seed)
    margin = np.triu(
        rng.choice([-0.5, -0.25, 0.0, 0.25, 0.5], size=(n, n), p=[0.2, 0.2, ties, 0.3, 0.3 - ties]), 1
    )
    return PreferenceGame(0.5 + margin - margin.T, rng.dirichlet(np.ones(n)) * 0.9 + 0.1 / n)


def cyclic_triples(game):
    P = game.P
    return [
        t
        for t in permutations(range(len(game)), 3)
        if P[t[0], t[1]] > 0.5 and P[t[1], t[2]] > 0.5 and P[t[2], t[0]] > 0.5
    ]


def smith_by_search(game):
    """The smallest set that beats all others, over all subsets."""
    n = len(game)
    for size in range(1, n + 1):
        for inside in combinations(range(n), size):
            outside = [j for j in range(n) if j not in inside]
            if all(game.P[i, j] > 0.5 for i in inside for j in outside):
                return list(inside)
    raise AssertionError


def schwartz_by_search(game):
    """The union of the smallest non-empty sets that nobody outside beats, over all subsets."""
    n, minimal = len(game), []
    for size in range(1, n + 1):
        for inside in map(set, combinations(range(n), size)):
            beaten = any(game.P[j, i] > 0.5 for i in inside for j in set(range(n)) - inside)
            if not beaten and not any(m <= inside for m in minimal):
                minimal.append(inside)
    return sorted(set().union(*minimal))


@given(st.integers(1, 7), st.integers(0, 10**6))
def test_by_brute_force(n, seed):
    game = drawn(n, seed)
    mu, P, found, triples = game.reference, game.P, cycles(game), cyclic_triples(game)
    assert found.count == len(triples) / 3  # a cycle can be read from each of its members
    product = [mu[i] * mu[j] * mu[k] for i, j, k in triples]
    assert found.share == pytest.approx(2 * sum(product), abs=1e-15)
    assert (found.likely is None) == (not triples)
    if found.likely is not None:
        assert found.likely in triples
        i, j, k = found.likely
        assert mu[i] == max(mu[[i, j, k]])
        assert mu[i] * mu[j] * mu[k] == pytest.approx(max(product), rel=1e-12)
    winners = [i for i in range(n) if all(P[i, j] > 0.5 for j in range(n) if j != i)]
    assert condorcet_winner(game) == (winners[0] if winners else None)
    assert smith_set(game).tolist() == smith_by_search(game)
    assert schwartz_set(game).tolist() == schwartz_by_search(game)
    at_least = P >= 0.5
    transitive = all(
        at_least[i, k] for i, j, k in permutations(range(n), 3) if at_least[i, j] and at_least[j, k]
    )
    assert is_preorder(game) is transitive


@given(st.integers(2, 7), st.integers(0, 10**6))
def test_a_reward_makes_no_cycle(n, seed):
    reward = np.random.default_rng(seed).integers(0, 4, n).astype(float)
    game = bradley_terry_game(reward)
    assert is_preorder(game)
    assert cycles(game).count == 0
    assert set(smith_set(game)) == set(np.flatnonzero(reward == reward.max()))
    np.testing.assert_array_equal(beats(game), reward[:, None] > reward)


def test_small_examples():
    game = cyclic_game(reference=[0.5, 0.25, 0.25])
    found = cycles(game)
    assert (found.count, found.likely) == (1, (0, 1, 2))
    assert found.share == pytest.approx(6 / 32)  # six orders of three different draws
    assert condorcet_winner(game) is None
    assert smith_set(game).tolist() == [0, 1, 2]
    assert not is_preorder(game)
    assert cycles(three_type_game(0.1)).count == 1
    tied = PreferenceGame(np.full((3, 3), 0.5))
    assert smith_set(tied).tolist() == [0, 1, 2]
    assert condorcet_winner(tied) is None
    assert is_preorder(tied)
    assert schwartz_set(tied).tolist() == [0, 1, 2]
    # ties that are not transitive: 0 beats 2, and 1 ties with both
    P = np.full((3, 3), 0.5)
    P[0, 2], P[2, 0] = 1, 0
    assert not is_preorder(PreferenceGame(P))
    assert smith_set(PreferenceGame(P)).tolist() == [0, 1, 2]
    assert schwartz_set(PreferenceGame(P)).tolist() == [0, 1]


def test_where_the_listeners_are_intransitive():
    """Of the four pieces one, Rachmaninov, makes the majority of the listeners run in a circle, in fact in two."""
    found = {}
    for piece in PIECES:
        game = sound_quality_game(piece)
        assert cycles(game).count == len(cyclic_triples(game)) / 3
        assert smith_set(game).tolist() == smith_by_search(game)
        assert (condorcet_winner(game) is None) == (len(smith_set(game)) > 1)
        found[piece] = [game.names[i] for i in smith_set(game)]
    assert {piece for piece, top in found.items() if len(top) > 1} == {"Rachmaninov"}
    game = sound_quality_game("Rachmaninov")
    assert cycles(game).count == 2
    # the closest of the majorities of a circle: 100 of 195 answers, so another sample may well have none
    closest = min(game.P[a, b] for t in cyclic_triples(game) for a, b in zip(t, t[1:] + t[:1], strict=True))
    assert closest == pytest.approx(100 / 195, abs=1e-12)
    assert len(found["Rachmaninov"]) == 4
