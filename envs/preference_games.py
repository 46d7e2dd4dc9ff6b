"""Preference games: who is preferred to whom, with no reward behind it.

A game is a matrix P (n, n), P[i, j] = the probability that response i is preferred to response j, with P + P^T = 1:
a symmetric constant-sum game of value 1/2. A policy is a law (n,) over the responses, and P(pi > pi') = pi^T P pi'.
A reward explains P only if P[i, j] = sigma(r_i - r_j) (Bradley-Terry); a cycle has none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike

from .kernels import Array
from .links import LOGISTIC
from .option_table import nearest

TOLERANCE = 1e-9  # of P + P^T = 1 and of the sum of a law


class Game(Protocol):
    """What solvers and self-play ask of a game of n responses. Its matrix P need not be stored.

    reference, log_reference  mu (n,), positive everywhere, and its logarithm
    wins(policy)              P policy (n,): how often each response is preferred to the policy's
    probability(a, b)         P(a > b) of two laws
    """

    @property
    def name(self) -> str: ...
    @property
    def reference(self) -> Array: ...
    @property
    def log_reference(self) -> Array: ...
    def __len__(self) -> int: ...
    def wins(self, policy: Array) -> Array: ...
    def probability(self, first: ArrayLike, second: ArrayLike) -> float: ...


@dataclass(frozen=True, eq=False)
class PreferenceGame:
    """A preference matrix with a reference policy.

    P          (n, n), entries in [0, 1], P + P^T = 1, so that the diagonal is 1/2 (ties count for half)
    reference  mu (n,), positive everywhere, sums to 1; None = uniform
    names      of the n responses; empty = "0", "1", ...
    The arrays are copied and cannot be written to. Rounding errors in P + P^T and in sum(mu) are removed.
    """

    P: Array
    reference: Array = None  # type: ignore[assignment]  # always an array after __post_init__
    names: tuple[str, ...] = ()
    name: str = "PreferenceGame"

    def __post_init__(self) -> None:
        P = np.array(self.P, dtype=np.float64)
        if P.ndim != 2 or P.shape[0] != P.shape[1] or not len(P):
            raise ValueError(f"P has shape {P.shape}; expected (n, n), n >= 1")
        n = len(P)
        _refuse(P, ~((P >= 0) & (P <= 1)), "{cell} is {value}; a probability lies in [0, 1]")
        sums = P + P.T
        where = "{cell} + its mirror image is {value}, not 1; give ties half to each side"
        _refuse(sums, ~(np.abs(sums - 1) <= TOLERANCE), where)
        mu = check_reference(self.reference, n)
        names = tuple(map(str, self.names)) or tuple(map(str, range(n)))
        if len(names) != n or len(set(names)) < n:
            raise ValueError(f"names are {len(names)} ({len(set(names))} different) for {n} responses")
        P = (P + (1 - P.T)) / 2
        for key, array in (("P", P), ("reference", mu)):
            array.setflags(write=False)
            object.__setattr__(self, key, array)
        object.__setattr__(self, "names", names)

    def __len__(self) -> int:
        return len(self.P)

    @cached_property
    def log_reference(self) -> Array:
        return np.log(self.reference)

    def index(self, name: str) -> int:
        """The number of a response."""
        if name not in self.names:
            raise ValueError(f"response {name!r} {nearest(name, self.names)}")
        return self.names.index(name)

    def wins(self, policy: Array) -> Array:
        """P policy (n,): the probability that each response is preferred to one of the policy's."""
        return self.P @ policy

    def probability(self, first: ArrayLike, second: ArrayLike) -> float:
        """P(first > second) = E_{y ~ first, y' ~ second} P[y, y']; both are laws (n,)."""
        n = len(self)
        return float(check_law(first, n, "first") @ self.P @ check_law(second, n, "second"))


def _refuse(values: Array, bad: np.ndarray, message: str) -> None:
    """ValueError at the first bad entry of P."""
    if bad.any():
        i, j = np.argwhere(bad)[0]
        raise ValueError(message.format(cell=f"P[{i}, {j}]", value=f"{values[i, j]:.6g}"))


def check_law(law: ArrayLike, n: int, name: str = "policy") -> Array:
    """A law over n responses as a float64 array (n,)."""
    law = np.asarray(law, dtype=np.float64)
    if law.shape != (n,):
        raise ValueError(f"{name} has shape {law.shape}; expected ({n},)")
    if not (law >= 0).all():
        i = int(np.argmin(law))
        raise ValueError(f"{name}[{i}] is {law[i]}; a probability is at least 0")
    if not abs(law.sum() - 1) <= TOLERANCE:
        raise ValueError(f"{name} sums to {law.sum():.6g}, not to 1")
    return law


def check_reference(reference: ArrayLike | None, n: int) -> Array:
    """A law with mass everywhere, summing to 1 up to rounding; None = uniform."""
    mu = np.full(n, 1 / n) if reference is None else check_law(reference, n, "reference")
    if not (mu > 0).all():
        i = int(np.argmin(mu))
        raise ValueError(
            f"reference[{i}] is {mu[i]}; every response needs mass: leave the response out of the game"
        )
    return mu / mu.sum()


def bradley_terry_game(rewards: ArrayLike, **fields: object) -> PreferenceGame:
    """P[i, j] = sigma(r_i - r_j) for rewards r (n,): the only games that a reward explains."""
    r = np.asarray(rewards, dtype=np.float64)
    if r.ndim != 1 or not np.isfinite(r).all():
        raise ValueError(f"rewards must be a vector of finite numbers, got shape {r.shape}")
    return PreferenceGame(LOGISTIC.value(r[:, None] - r), **{"name": "BradleyTerry"} | fields)  # type: ignore[arg-type]


def cyclic_game(wins: Sequence[float] = (0.9, 0.8, 0.8), **fields: object) -> PreferenceGame:
    """0 beats 1, 1 beats 2 and 2 beats 0, with the given probabilities."""
    if len(wins) != 3 or not all(0.5 < w <= 1 for w in wins):
        raise ValueError(f"wins is {tuple(wins)}; a cycle has three probabilities in (1/2, 1]")
    P = np.full((3, 3), 0.5)
    for i, w in enumerate(wins):
        j = (i + 1) % 3
        P[i, j], P[j, i] = w, 1 - w
    return PreferenceGame(P, **{"name": "Cyclic"} | fields)  # type: ignore[arg-type]


def cyclic_nash(wins: Sequence[float] = (0.9, 0.8, 0.8)) -> Array:
    """The only Nash equilibrium of `cyclic_game`: each response in proportion to the margin between the other two."""
    margins = np.asarray(wins, dtype=np.float64) - 0.5
    return np.roll(margins, -1) / margins.sum()


def three_type_game(e: float, **fields: object) -> PreferenceGame:
    """Three kinds of people, three responses (Munos et al., arXiv 2312.00886, section 3.2).

    Rankings A: 0 > 1 > 2, B: 1 > 2 > 0, C: 2 > 0 > 1, in shares f_A = f_C = 1/3 - e/4, f_B = 1/3 + e/2. P[i, j] is the
    share of the people who rank i above j. The Nash equilibrium is (1/3 + e/2, 1/3 + e/2, 1/3 - e) (`three_type_nash`),
    smooth in e; the best response by Borda score, (1 - 3e/4, 1 + 3e/4, 1) / 2, jumps from 0 to 1 as e crosses 0.
    e in [-2/3, 1/3], where no type is a majority.
    """
    shares = _three_shares(e)
    P = np.full((3, 3), 0.5)
    for i, j, prefer in ((0, 1, (0, 2)), (1, 2, (0, 1)), (2, 0, (1, 2))):
        P[i, j] = shares[list(prefer)].sum()
        P[j, i] = 1 - P[i, j]
    return PreferenceGame(P, **{"name": f"ThreeTypes(e={e:g})"} | fields)  # type: ignore[arg-type]


def _three_shares(e: float) -> Array:
    if not -2 / 3 <= e <= 1 / 3:
        raise ValueError(f"e is {e}; it lies in [-2/3, 1/3], where no type is a majority")
    return np.array([1 / 3 - e / 4, 1 / 3 + e / 2, 1 / 3 - e / 4])


def three_type_nash(e: float) -> Array:
    """1 - 2 (f_C, f_A, f_B) = (1/3 + e/2, 1/3 + e/2, 1/3 - e); unique for e inside the interval."""
    return 1 - 2 * np.roll(_three_shares(e), 1)


def random_game(n: int, seed: int | np.random.Generator, **fields: object) -> PreferenceGame:
    """P[i, j] = 1 - P[j, i] uniform in [0, 1], independent for i < j."""
    rng = np.random.default_rng(seed)
    P = np.triu(rng.random((n, n)), 1)
    P += np.tril(1 - P.T, -1) + np.eye(n) / 2
    return PreferenceGame(P, **{"name": f"RandomGame({n})"} | fields)  # type: ignore[arg-type]


def sound_quality_game(piece: str, listener: str | None = None) -> PreferenceGame:
    """The recorded answers about one piece of music as a game of the 8 reproduction modes.

    P[i, j] is the share of the answers that prefer mode i; listener: one of 40 ("04"), None = all of them.
    """
    from .sound_quality import CONTEXT, MODES, PIECES, sound_quality

    if piece not in PIECES:
        raise ValueError(f"piece {piece!r} {nearest(piece, PIECES)}")
    table = sound_quality() if listener is None else sound_quality().where(rater=listener)
    whose = "everybody" if listener is None else listener
    P = table.preferences(CONTEXT)[PIECES.index(piece)]
    return PreferenceGame(P, names=MODES, name=f"SoundQuality({piece}, {whose})")
