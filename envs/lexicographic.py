r"""Preferences by a ranking of factors: a decision tree that asks the most important factor first.

HERON, "RL from Hierarchical Weak Preference Feedback" (arXiv 2309.02632). A response has factors z_1, ..., z_L, higher
is better, in the designer's order of importance. For l = 1, ..., L: if z_l(y) - z_l(y') > d_l, y is preferred; if it
is below -d_l, y' is; else the next factor decides. A tie on all levels is no label in the paper, and 1/2 here, half a
win each. The margins d_l are in units of the factor's standard deviation.

Without margins (d = 0) the tree is the lexicographic order, a total preorder: see `lexicographic_weights`. With a
margin a small difference passes to the next factor and two small ones do not: 1 beats 2 and 2 beats 3 on the second
factor, 3 beats 1 on the first, a cycle. `uniform_cycle_share` says how often.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from .annotators import KernelAnnotator
from .budget import Seed
from .kernels import Array
from .mdp import FiniteMDP
from .preference_games import PreferenceGame, check_law
from .trajectories import Trajectories


@dataclass(frozen=True)
class LexicographicComparator:
    """The tree.

    order    columns of z, the most important first; columns that are not named are not asked
    margins  d_l >= 0, one a level of `order`; () = all 0
    units    what a margin of 1 is worth at each level, positive; () = all 1. `measured` takes standard deviations
    """

    order: tuple[int, ...]
    margins: tuple[float, ...] = ()
    units: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        order = tuple(int(column) for column in self.order)
        if not order or min(order) < 0 or len(set(order)) < len(order):
            raise ValueError(f"order is {order}; it names at least one column of z, each at most once")
        object.__setattr__(self, "order", order)
        for what, default, least in (("margins", 0.0, "at least 0"), ("units", 1.0, "positive")):
            values = tuple(float(x) for x in getattr(self, what)) or (default,) * len(order)
            if len(values) != len(order):
                raise ValueError(
                    f"there are {len(values)} {what} for {len(order)} levels; give one a level, or none"
                )
            for level, x in enumerate(values):
                if not (np.isfinite(x) and x >= 0 and (x > 0 or what == "margins")):
                    raise ValueError(f"{what}[{level}] is {x}; it must be finite and {least}")
            object.__setattr__(self, what, values)

    @classmethod
    def measured(
        cls,
        z: ArrayLike,
        order: Sequence[int],
        margins: Sequence[float] = (),
        law: ArrayLike | None = None,
    ) -> LexicographicComparator:
        """Margins in units of the factors' standard deviations over the responses z (n, factors).

        law  of the responses (n,), None = uniform. A factor that does not vary has unit 1: it never decides.
        """
        table = check_factors(z)
        mu = np.full(len(table), 1 / len(table)) if law is None else check_law(law, len(table), "law")
        chosen = table[:, cls(tuple(order))._columns(table)]
        deviation = np.sqrt(mu @ (chosen - mu @ chosen) ** 2)
        return cls(tuple(order), tuple(margins), tuple(np.where(deviation > 0, deviation, 1.0)))

    def _columns(self, z: Array) -> list[int]:
        if max(self.order) >= z.shape[-1]:
            raise ValueError(
                f"order names column {max(self.order)}; z has {z.shape[-1]} columns, numbered from 0"
            )
        return list(self.order)

    def compare(self, first: ArrayLike, second: ArrayLike) -> Array:
        """1 where the first is preferred, 0 where the second is, 1/2 for ties; z (..., factors), broadcast."""
        a, b = check_factors(first), check_factors(second)
        outcome = np.full(np.broadcast_shapes(a.shape[:-1], b.shape[:-1]), 0.5)
        open_ = np.ones(outcome.shape, dtype=bool)
        for column, margin, unit in zip(self._columns(a), self.margins, self.units, strict=True):
            # exactly antisymmetric: x - y of two floats is -(y - x)
            difference = a[..., column] - b[..., column]
            decided = open_ & (np.abs(difference) > margin * unit)
            outcome[decided] = difference[decided] > 0
            open_ &= ~decided
        return outcome

    def game(self, z: ArrayLike, reference: ArrayLike | None = None, **fields: Any) -> PreferenceGame:
        """Responses with factors z (n, factors) as a game, P in {0, 1/2, 1}."""
        table = check_factors(z)
        if table.ndim != 2:
            raise ValueError(f"z has shape {table.shape}; expected (n, factors), a row a response")
        P = self.compare(table[:, None], table)
        return PreferenceGame(P, **{"reference": reference, "name": "Lexicographic"} | fields)

    def annotator(
        self, model: FiniteMDP, seed: Seed, factors: Callable[[Trajectories], ArrayLike], **options: Any
    ) -> KernelAnnotator:
        """An annotator that answers by the tree, and by a fair coin where it ties.

        factors  trajectories (n) -> z (n, factors)
        """
        return KernelAnnotator(model, seed, lambda a, b: self.compare(factors(a), factors(b)), **options)


def check_factors(z: ArrayLike) -> Array:
    """Factors as a float64 array (..., factors), finite."""
    table = np.asarray(z, dtype=np.float64)
    if table.ndim < 1 or not table.size:
        raise ValueError(f"z has shape {table.shape}; expected (..., factors), not empty")
    if not np.isfinite(table).all():
        where = ", ".join(map(str, np.argwhere(~np.isfinite(table))[0]))
        raise ValueError(
            f"z[{where}] is {table[tuple(np.argwhere(~np.isfinite(table))[0])]}; factors are finite"
        )
    return table


def lexicographic_weights(ranges: ArrayLike) -> Array:
    """w_l = prod_{m > l} ranges[m], most important first: with whole-numbered factors in 0, ..., ranges[l] - 1 the sum
    of w_l z_l orders responses lexicographically, as a number in mixed radix. With real factors it does not."""
    sizes = np.asarray(ranges)
    if sizes.ndim != 1 or not len(sizes) or sizes.dtype.kind not in "iu" or (sizes < 1).any():
        raise ValueError(f"ranges is {sizes.tolist()}; expected whole numbers of at least 1, a level each")
    if np.log2(sizes.astype(np.float64)).sum() > 53:
        raise ValueError("the product of ranges exceeds 2^53: the weighted sum is not exact in float64")
    return np.append(np.cumprod(sizes[:0:-1].astype(np.float64))[::-1], 1.0)


def uniform_cycle_share(margin: float) -> float:
    """The probability that three independent responses form a cycle, whichever way round, when the first factor is
    uniform on [0, 1], with an absolute margin d on it, and an independent continuous second one decides the rest.

    With the first factors in order, x_1 < x_2 < x_3, a cycle needs x_3 - x_1 > d and both gaps at most d: then 3 beats
    1, and 1 beats 2 and 2 beats 3 for one of six orders of the second factors. Integrating over the gaps,

        (3 d^2 - 4 d^3) / 6   for d <= 1/2,        (1 - d)^2 (4 d - 1) / 6   for 1/2 <= d <= 1.
    """
    d = float(margin)
    if not 0 <= d <= 1:
        raise ValueError(f"margin is {margin}; differences of numbers in [0, 1] need a margin in [0, 1]")
    return (3 * d**2 - 4 * d**3) / 6 if d <= 0.5 else (1 - d) ** 2 * (4 * d - 1) / 6
