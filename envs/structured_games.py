"""Preference games with structure: of low rank, with a million responses; random kernels; games with many equilibria.

A game of rank k is P = 1/2 + U C U^T with features U (n, k), a row u_i a response, and C (k, k) antisymmetric. It is
never formed: P pi = 1/2 + U (C (U^T pi)) costs 2 n k multiplications. A constant feature makes C's row to it a reward
(u = (1, v): the margin is r.(v_i - v_j) + v_i^T C' v_j); all else is cyclic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike

from .kernels import Array
from .links import LOGISTIC, Link
from .links import link as named
from .preference_games import TOLERANCE, PreferenceGame, check_law, check_reference

EXACT = 4096  # responses up to which every margin is looked at when the bound does not suffice


@dataclass(frozen=True, eq=False)
class LowRankGame:
    """P[i, j] = 1/2 + u_i^T C u_j.

    U          (n, k), the responses' features
    C          (k, k), antisymmetric, of margins in [-1/2, 1/2] (checked, see `bound`)
    reference  mu (n,), positive everywhere, sums to 1; None = uniform
    The arrays are copied and cannot be written to.
    """

    U: Array
    C: Array
    reference: Array = None  # type: ignore[assignment]  # always an array after __post_init__
    name: str = "LowRankGame"

    def __post_init__(self) -> None:
        U, C = np.array(self.U, dtype=np.float64), np.array(self.C, dtype=np.float64)
        if U.ndim != 2 or not U.size or C.shape != (U.shape[1],) * 2:
            raise ValueError(f"U has shape {U.shape} and C {C.shape}; expected (n, k) and (k, k), n, k >= 1")
        for what, array in (("U", U), ("C", C)):
            if not np.isfinite(array).all():
                i, j = np.argwhere(~np.isfinite(array))[0]
                raise ValueError(f"{what}[{i}, {j}] is {array[i, j]}; features and margins are finite")
        sums = C + C.T
        if not (np.abs(sums) <= TOLERANCE * max(1.0, float(np.abs(C).max()))).all():
            i, j = np.unravel_index(np.argmax(np.abs(sums)), C.shape)
            raise ValueError(
                f"C[{i}, {j}] + C[{j}, {i}] is {sums[i, j]:.6g}, not 0; take (C - C^T) / 2: what one side wins the "
                "other loses"
            )
        for key, array in (
            ("U", U),
            ("C", (C - C.T) / 2),
            ("reference", check_reference(self.reference, len(U))),
        ):
            array.setflags(write=False)
            object.__setattr__(self, key, array)
        if self.bound > 0.5 + TOLERANCE:
            self._look_at_margins()

    @cached_property
    def bound(self) -> float:
        """max_i u_i^T |C| u_i >= every |margin|, where |C| = (C^T C)^{1/2}: O(n k^2), and an equality for k = 2 when
        two of the longest features are orthogonal.

        C = |C|^{1/2} O |C|^{1/2} with |O| <= 1, so that u^T C v is at most the product of both lengths in |C|.
        """
        _, singular, V = np.linalg.svd(self.C)
        return float((((self.U @ V.T) ** 2) @ singular).max())

    def _look_at_margins(self) -> None:
        n = len(self)
        if n > EXACT:
            raise ValueError(
                f"margins are at most {self.bound:.6g}, which is all that can be said without looking at {n} x {n} of "
                f"them; they must be at most 1/2: multiply C by {0.5 / self.bound:.6g}"
            )
        margins = self.U @ self.C @ self.U.T
        if np.abs(margins).max() > 0.5 + TOLERANCE:
            i, j = np.unravel_index(np.argmax(margins), margins.shape)
            raise ValueError(
                f"P[{i}, {j}] is {0.5 + margins[i, j]:.6g}; a probability lies in [0, 1]: multiply C by "
                f"{0.5 / margins[i, j]:.6g}"
            )

    def __len__(self) -> int:
        return len(self.U)

    @property
    def rank(self) -> int:
        """k, the number of features; the rank of P - 1/2 is at most that."""
        return self.U.shape[1]

    @cached_property
    def log_reference(self) -> Array:
        return np.log(self.reference)

    def wins(self, policy: Array) -> Array:
        """P policy (n,), in O(n k)."""
        wins = self.U @ (self.C @ (policy @ self.U))
        wins += 0.5 * policy.sum()
        return wins

    def probability(self, first: ArrayLike, second: ArrayLike) -> float:
        """P(first > second) of two laws (n,)."""
        n = len(self)
        p, q = check_law(first, n, "first"), check_law(second, n, "second")
        return float(0.5 + (p @ self.U) @ self.C @ (q @ self.U))

    def block(self, responses: ArrayLike) -> PreferenceGame:
        """The game of some of the responses alone, with its matrix; the reference restricted to them."""
        chosen = np.asarray(responses, dtype=np.int64)
        U, mu = self.U[chosen], self.reference[chosen]
        P = np.clip(0.5 + U @ self.C @ U.T, 0.0, 1.0)  # the bound allows 1e-9 too much
        return PreferenceGame(P, mu / mu.sum(), name=f"{self.name}, {len(chosen)} responses")

    def dense(self) -> PreferenceGame:
        """The same game with its matrix: 8 n^2 bytes."""
        return self.block(np.arange(len(self)))


def random_low_rank_game(
    n: int, rank: int, seed: int | np.random.Generator, *, strength: float = 0.5, **fields: object
) -> LowRankGame:
    """n features on the unit sphere of which the first coordinate is constant (a reward), C a random antisymmetric
    matrix with largest singular value `strength` in (0, 1/2], which bounds every margin. rank >= 2."""
    if rank < 2:
        raise ValueError(
            f"rank is {rank}; an antisymmetric matrix has rank at least 2: a game needs two features"
        )
    if not 0 < strength <= 0.5:
        raise ValueError(f"strength is {strength}; margins lie in (0, 1/2]")
    rng = np.random.default_rng(seed)
    V = rng.standard_normal((n, rank - 1))
    V /= np.linalg.norm(V, axis=1, keepdims=True)
    U = np.hstack([np.ones((n, 1)), V]) / np.sqrt(2)
    C = rng.standard_normal((rank, rank))
    C = C - C.T
    C *= strength / np.linalg.norm(C, 2)
    return LowRankGame(U, C, **{"name": f"RandomLowRank({n}, {rank})"} | fields)  # type: ignore[arg-type]


def random_kernel_game(
    n: int,
    seed: int | np.random.Generator,
    *,
    scale: float = 1.0,
    link: Link | str = LOGISTIC,
    **fields: object,
) -> PreferenceGame:
    """P = link(K) with K antisymmetric, K[i, j] ~ N(0, scale^2) independent for i < j: no reward explains it.

    link  one of `preflab.envs.LINKS`, or its name
    """
    phi = named(link)
    if not 0 <= scale < np.inf:
        raise ValueError(f"scale is {scale}; it must be finite and at least 0")
    K = np.triu(np.random.default_rng(seed).standard_normal((n, n)), 1) * scale
    P = phi.value(K - K.T)
    return PreferenceGame(P, **{"name": f"RandomKernel({n}, {phi.name})"} | fields)  # type: ignore[arg-type]


def duplicated_game(game: PreferenceGame, copies: ArrayLike, **fields: object) -> PreferenceGame:
    """copies[i] >= 1 equal responses for response i, ties among them: mass moves between copies at no cost, so that an
    equilibrium with mass there is one of a continuum. The reference is uniform unless given."""
    counts = np.asarray(copies, dtype=np.int64)
    if counts.shape != (len(game),) or (counts < 1).any():
        raise ValueError(f"copies is {tuple(counts.tolist())}; expected {len(game)} numbers, each at least 1")
    of = np.repeat(np.arange(len(game)), counts)
    P = game.P[np.ix_(of, of)]
    return PreferenceGame(P, **{"name": f"{game.name}, duplicated"} | fields)  # type: ignore[arg-type]


def block_game(games: Sequence[PreferenceGame], **fields: object) -> PreferenceGame:
    """Games side by side, responses of different games preferred to each other half of the time: every mixture of
    equilibria of the parts is an equilibrium. The reference is uniform unless given."""
    n = sum(map(len, games))
    P, start = np.full((n, n), 0.5), 0
    for part in games:
        P[start : start + len(part), start : start + len(part)] = part.P
        start += len(part)
    return PreferenceGame(P, **{"name": f"Blocks({len(games)})"} | fields)  # type: ignore[arg-type]
