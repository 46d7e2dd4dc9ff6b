"""Annotators made of annotators: label noise, and a population of users."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .annotators import Annotator
from .budget import Seed
from .kernels import Array, Index
from .mdp import check_distribution
from .trajectories import Trajectories


def _bare(part: Annotator) -> Annotator:
    if part.budget is not None:
        raise ValueError(
            "an inner annotator has a budget; give the budget to the outermost one, which is asked"
        )
    return part


class LabelNoise(Annotator):
    """The answers of `base`, each flipped with probability `flip` in [0, 1/2]: P = (1 - flip) p + flip (1 - p).

    Only this annotator is asked, counts and logs; `base` lends its law. kappa is that of the noisy law,
    base.kappa / (1 - 2 flip), infinite at flip = 1/2, where answers say nothing.
    """

    def __init__(
        self, base: Annotator, seed: Seed, flip: float, *, budget: int | None = None, keep_log: bool = True
    ):
        super().__init__(_bare(base).model, seed, budget=budget, keep_log=keep_log)
        if not 0 <= flip <= 0.5:
            raise ValueError(f"flip is {flip}; the probability of a flipped label must be in [0, 1/2]")
        self.base, self.flip = base, float(flip)
        self.link = base.link if flip == 0 else None

    def _probability(self, pairs: Index) -> Array:
        p = self.base._probability(pairs)
        return (1 - self.flip) * p + self.flip * (1 - p)

    @property
    def kappa(self) -> float | None:
        if self.base.kappa is None:
            return None
        return self.base.kappa / (1 - 2 * self.flip) if self.flip < 0.5 else float("inf")


class Mixture(Annotator):
    """A population: each comparison is answered by user k, drawn with probability weights[k] (default: equal).

    probability(first, second) is the average over users; with user=k, that user's. compare(..., user=k) asks user
    k; the log says who answered. Naming a user does not change which uniforms the later comparisons get.
    """

    def __init__(
        self,
        users: Sequence[Annotator],
        seed: Seed,
        weights: ArrayLike | None = None,
        *,
        budget: int | None = None,
        keep_log: bool = True,
    ):
        if not users:
            raise ValueError("a mixture needs at least one user")
        for k, user in enumerate(users):
            if not np.array_equal(_bare(user)._limits, users[0]._limits):
                raise ValueError(f"user {k} annotates a model of other layers or actions than user 0")
        super().__init__(users[0].model, seed, budget=budget, keep_log=keep_log)
        self.users = tuple(users)
        n = len(users)
        self.weights = np.full(n, 1 / n) if weights is None else np.asarray(weights, dtype=np.float64)
        if self.weights.shape != (n,):
            raise ValueError(f"weights has shape {self.weights.shape}; expected ({n},)")
        check_distribution(self.weights, "weights")
        self._cdf = np.cumsum(self.weights) / self.weights.sum()

    def _user(self, user: int) -> int:
        if not 0 <= int(user) < len(self.users):
            raise ValueError(f"user {user} is not one of 0..{len(self.users) - 1}")
        return int(user)

    def _probability(self, pairs: Index) -> Array:
        return self.weights @ np.stack([user._probability(pairs) for user in self.users])

    def probability(self, first: Trajectories, second: Trajectories, user: int | None = None) -> Array:
        pairs = self._pack(first, second)
        return self._probability(pairs) if user is None else self.users[self._user(user)]._probability(pairs)

    def compare(self, first: Trajectories, second: Trajectories, user: int | None = None) -> NDArray[np.int8]:
        pairs = self._pack(first, second)
        self._reserve(len(pairs))
        outcomes, users = self._draw(pairs, None if user is None else self._user(user))
        self._book(pairs, outcomes, users)
        return outcomes

    def _draw(self, pairs: Index, user: int | None = None) -> tuple[NDArray[np.int8], Index | int]:
        before = self.rng.bit_generator.state
        u = self.rng.random((len(pairs), 2))
        users = np.searchsorted(self._cdf, u[:, 0], side="right") if user is None else np.full(len(u), user)
        outcomes = np.empty(len(pairs), dtype=np.int8)
        try:
            for k in np.unique(users):
                mine = users == k
                outcomes[mine] = u[mine, 1] < self.users[k]._probability(pairs[mine])
        except Exception:
            self.rng.bit_generator.state = before  # who answers is drawn before the law is known
            raise
        return outcomes, users
