"""Where a preference game is intransitive: cycles, Condorcet winner, Smith and Schwartz sets, exactly.

Response i *beats* j when P[i, j] > 1/2; neither beats the other when P[i, j] = 1/2. A *cycle* is a triple i > j > k > i
of responses that beat each other in turn. Without cycles and with transitive ties the relation is a total preorder: the
majority ranks the responses, as a reward would (which then still need not explain the probabilities).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .kernels import Array, Index
from .preference_games import TOLERANCE, PreferenceGame

Relation = np.ndarray  # bool (n, n)


@dataclass(frozen=True)
class Cycles:
    """The cycles of a game.

    count   of triples {i, j, k} that beat each other in turn, whichever way round
    share   the probability that three independent draws from the reference are such a triple. In one orientation alone
            (the first beats the second, the second the third, the third the first) it is half of that.
    likely  the triple (i, j, k), i > j > k > i, with the largest product of reference probabilities, i its likeliest
            member; None without cycles
    """

    count: int
    share: float
    likely: tuple[int, int, int] | None


def beats(game: PreferenceGame) -> Relation:
    """(n, n): whether i is preferred to j more than half of the time (by more than the rounding 1e-9)."""
    return np.asarray(game.P > 0.5 + TOLERANCE)


def cycles(game: PreferenceGame) -> Cycles:
    """All 3-cycles, by two products of matrices, n^3 multiplications each: exact up to n = 16 million."""
    D = beats(game)
    # Integers below 2^24 are exact in float32: (D D)[i, j] counts the k with i > k > j.
    between = D.astype(np.float32)
    between = between @ between
    count = int(between.sum(where=D.T, dtype=np.float64)) // 3
    if not count:
        return Cycles(0, 0.0, None)
    weighted = D * game.reference  # D[i, j] mu_j
    once = float(np.einsum("ij,ji->", weighted @ weighted, weighted))
    return Cycles(count, 2 * once, _likeliest(D, game.reference))


def _likeliest(D: Relation, mu: Array) -> tuple[int, int, int]:
    """The cycle with the largest product of probabilities; D must have one.

    Responses in the order of their probability; i is the likeliest member. For each i the best j and k follow from one
    look at the block of those that i beats and those that beat i; the search ends when no later i can do better.
    """
    order = np.argsort(-mu, kind="stable")
    D, mu = D[np.ix_(order, order)], mu[order]
    best, found = -1.0, (0, 0, 0)
    for i in range(len(mu) - 2):
        if mu[i] * mu[i + 1] * mu[i + 2] <= best:
            break
        j, k = (i + 1 + np.flatnonzero(x) for x in (D[i, i + 1 :], D[i + 1 :, i]))
        closing = D[np.ix_(j, k)]  # j > k
        rows = np.flatnonzero(closing.any(axis=1))
        if not len(rows):
            continue
        first = closing[rows].argmax(axis=1)  # the likeliest k for each j
        products = mu[i] * mu[j[rows]] * mu[k[first]]
        top = int(np.argmax(products))
        if products[top] > best:
            best, found = float(products[top]), (i, int(j[rows[top]]), int(k[first[top]]))
    a, b, c = (int(order[x]) for x in found)
    return a, b, c


def condorcet_winner(game: PreferenceGame) -> int | None:
    """The response that beats every other; None when there is none."""
    wins = beats(game).sum(axis=1)
    top = int(np.argmax(wins))
    return top if wins[top] == len(game) - 1 else None


def smith_set(game: PreferenceGame) -> Index:
    """The top cycle: the smallest non-empty set whose every member beats every response outside, increasing.

    It holds the response with the most wins (a tie is half a win), and with each response all that it does not beat.
    """
    D = beats(game)
    inside = np.zeros(len(game), dtype=bool)
    inside[np.argmax(D.sum(axis=1) - D.sum(axis=0))] = True
    while True:
        grown = inside | ~D[inside].all(axis=0)
        if grown.sum() == inside.sum():
            return np.flatnonzero(inside)
        inside = grown


def schwartz_set(game: PreferenceGame) -> Index:
    """The responses that can reach along wins every response that can reach them: the top cycle where ties say nothing.

    In other words, the union of the smallest sets no member of which is beaten from outside; increasing. It is part of
    the Smith set, and equal to it without ties.
    """
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import connected_components

    D = csr_array(beats(game))
    count, label = connected_components(D, connection="strong")
    winner, loser = (label[side] for side in D.nonzero())
    beaten = np.zeros(count, dtype=bool)
    beaten[loser[winner != loser]] = True
    return np.flatnonzero(~beaten[label])


def is_preorder(game: PreferenceGame) -> bool:
    """Is "is beaten by or ties with" a total preorder: can the responses be ranked, equal ranks where they tie?

    Then, and only then, i beats j exactly where its wins minus its losses are more.
    """
    D = beats(game)
    score = D.sum(axis=1) - D.sum(axis=0)
    return bool((D ^ (score[:, None] <= score)).all())
