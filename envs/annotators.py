"""Annotators: they answer which of two trajectories is preferred, and count, log and limit the answers.

Every annotator is a law P(first preferred over second) with P(a, b) + P(b, a) = 1 (`probability`, exact) and a
stream of uniforms from which answers are drawn (`compare`): outcome 1 where the first is preferred, 0 where the
second is. One comparison consumes a fixed amount of the stream, so asking N and then M gives the same answers as
asking N + M at once, also through `checkpoint` and `restore`.

    BradleyTerry      P = sigma(r(first) - r(second))
    Thurstone         P = Phi_normal(r(first) - r(second))
    RegretPreference  as these, with the sum of optimal advantages in place of the return
    KernelAnnotator   any antisymmetric kernel, by matrix or by function

In other files: `populations` (label noise, mixture of users), `recorded` (answers that people gave), `replay` (of a
log), `ranking` (Plackett-Luce, for K trajectories at once).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .attainable import optimal_advantage, reward_layers, reward_range
from .budget import Asked, BudgetExhausted, Seed
from .comparisons import NO_USER, ComparisonLog, pack, unpack
from .kernels import Array, Index
from .links import LOGISTIC, PROBIT, Link
from .links import link as named_link
from .mdp import FiniteMDP, Layered
from .trajectories import Trajectories

__all__ = [
    "Annotator",
    "BradleyTerry",
    "BudgetExhausted",
    "KernelAnnotator",
    "LinkAnnotator",
    "RegretPreference",
    "Thurstone",
    "check_preference_matrix",
    "response_number",
]

SYMMETRY_TOLERANCE = 1e-9


class Annotator(Asked, ABC):
    """Answers comparisons of trajectories of one model.

    log      every answered comparison (None with keep_log=False)
    link     Phi where P(first) = Phi(difference of a score), else None
    kappa    sup 1 / Phi' over the attainable differences (of a noisy answer: of its law), None where unknown
    """

    link: Link | None = None

    def __init__(self, model: FiniteMDP, seed: Seed, *, budget: int | None = None, keep_log: bool = True):
        super().__init__(seed, budget)
        self.model = model
        horizon = model.horizon
        states, actions = list(model.sizes[:horizon]), [model.n_actions] * horizon
        self._limits = np.array(2 * (states + actions), dtype=np.uint64).reshape(2, 2, horizon)
        self.log = ComparisonLog(horizon) if keep_log else None

    @property
    def kappa(self) -> float | None:
        return None

    @abstractmethod
    def _probability(self, pairs: Index) -> Array:
        """P(first preferred) for checked pairs (n, 2, 2, H): (n,)."""

    def _draw(self, pairs: Index) -> tuple[NDArray[np.int8], Index | int]:
        """Outcomes and users. The law is evaluated before the stream is touched, so an error loses nothing."""
        p = self._probability(pairs)
        return (self.rng.random(len(pairs)) < p).view(np.int8), NO_USER

    def probability(self, first: Trajectories, second: Trajectories) -> Array:
        """P(first[i] preferred over second[i]): (n,). Free: neither counted nor drawn."""
        return self._probability(self._pack(first, second))

    def compare(self, first: Trajectories, second: Trajectories) -> NDArray[np.int8]:
        """Answers (n,): 1 where first[i] is preferred, 0 where second[i] is. Raises `BudgetExhausted`."""
        pairs = self._pack(first, second)
        self._reserve(len(pairs))
        outcomes, users = self._draw(pairs)
        self._book(pairs, outcomes, users)
        return outcomes

    def _book(self, pairs: Index, outcomes: NDArray[np.int8], users: Index | int) -> None:
        self.count += len(pairs)
        if self.log is not None:
            self.log.append(pairs, outcomes, users)

    def _pack(self, first: Trajectories, second: Trajectories) -> Index:
        pairs = pack(first, second)
        if pairs.shape[3] != self._limits.shape[2]:
            raise ValueError(
                f"the trajectories have {pairs.shape[3]} steps but the model's horizon is {self._limits.shape[2]}"
            )
        bad = pairs.view(np.uint64) >= self._limits  # a negative index is a huge unsigned one
        if np.count_nonzero(bad):
            i, side, what, h = (int(k) for k in np.argwhere(bad)[0])
            raise ValueError(
                f"{('first', 'second')[side]}.{('states', 'actions')[what]}[{i}, {h}] is {pairs[i, side, what, h]}; "
                f"layer {h} has {self._limits[side, what, h]}"
            )
        return pairs

    def checkpoint(self) -> dict[str, Any]:
        return super().checkpoint() | {"log": None if self.log is None else self.log.to_text()}

    def restore(self, saved: dict[str, Any]) -> None:
        log = None if saved.get("log") is None else ComparisonLog.from_text(saved["log"])
        if log is not None and log.horizon != self._limits.shape[2]:
            raise ValueError(
                f"the checkpoint compares trajectories of {log.horizon} steps, this model's have {self.model.horizon}"
            )
        super().restore(saved)
        self.log = log


class LinkAnnotator(Annotator):
    """P(first) = Phi(r(first) - r(second)), r(tau) = sum_h r_h(s_h, a_h), Phi = `link`.

    reward: layered (S_h, A), or a parameter theta (dim,) of the model's features; None = the model's own reward.
    kappa = Phi.kappa(R), R = `radius` = the largest minus the smallest attainable return.
    """

    def __init__(
        self,
        model: FiniteMDP,
        seed: Seed,
        *,
        link: Link | str = LOGISTIC,
        reward: Layered | Array | None = None,
        budget: int | None = None,
        keep_log: bool = True,
    ):
        super().__init__(model, seed, budget=budget, keep_log=keep_log)
        self.link = named_link(link)
        self.reward = reward_layers(model, reward)
        self._flat = np.concatenate([np.ravel(r) for r in self.reward])
        sizes = np.array([r.size for r in self.reward], dtype=np.int64)
        self._offsets = np.cumsum(sizes) - sizes
        self._actions = model.n_actions

    def _probability(self, pairs: Index) -> Array:
        cells = pairs[:, :, 0] * self._actions + pairs[:, :, 1] + self._offsets
        total = np.add.reduce(self._flat.take(cells), axis=2)
        return self.link.value(total[:, 0] - total[:, 1])  # type: ignore[union-attr]

    @cached_property
    def radius(self) -> float:
        """The largest difference of two attainable returns."""
        low, high = reward_range(self.model, self.reward)
        return high - low

    @property
    def kappa(self) -> float | None:
        return self.link.kappa(self.radius)  # type: ignore[union-attr]


class BradleyTerry(LinkAnnotator):
    """P(first) = sigma(r(first) - r(second)) with the logistic sigma."""

    def __init__(self, model: FiniteMDP, seed: Seed, **rest: Any):
        super().__init__(model, seed, link=LOGISTIC, **rest)


class Thurstone(LinkAnnotator):
    """P(first) = Phi(r(first) - r(second)) with the standard normal Phi (case V, unit variance of the difference)."""

    def __init__(self, model: FiniteMDP, seed: Seed, **rest: Any):
        super().__init__(model, seed, link=PROBIT, **rest)


class RegretPreference(LinkAnnotator):
    """People who prefer the smaller regret: the score is sum_h A*_h(s_h, a_h), A* = Q* - V*, the optimal advantage.

    With deterministic transitions the score is r(tau) - V*(s_0), so trajectories of one start compare as by return.
    The advantage of an action that is not available is set to 0: no trajectory holds one.
    """

    def __init__(self, model: FiniteMDP, seed: Seed, **rest: Any):
        super().__init__(model, seed, reward=optimal_advantage(model, rest.pop("reward", None)), **rest)


PairFunction = Callable[[Trajectories, Trajectories], ArrayLike]


def response_number(model: FiniteMDP) -> Callable[[Trajectories], Index]:
    """The number of (s_0, a_0, ..., a_{H-1}): s_0 * A^H + sum_h a_h A^(H-1-h). With H = 1: s * A + a.

    It names a trajectory where transitions are deterministic; a tree's prefixes that end early have several.
    """
    powers = model.n_actions ** np.arange(model.horizon - 1, -1, -1, dtype=np.int64)
    return lambda tau: tau.states[:, 0] * (powers[0] * model.n_actions) + tau.actions @ powers


class KernelAnnotator(Annotator):
    """Any antisymmetric preference, cyclic ones included.

    kernel      a matrix P (n, n) over trajectories' numbers with P + P^T = 1, or a function of a batch
                (first, second) -> (n,) probabilities; with a `link`, of antisymmetric scores g, P = Phi(g)
    identify    Trajectories -> (n,) numbers of the matrix's rows; default `response_number(model)`
    names       of the rows, for messages
    A function is asked in both orders each time, and an answer that is not antisymmetric raises.
    """

    def __init__(
        self,
        model: FiniteMDP,
        seed: Seed,
        kernel: ArrayLike | PairFunction,
        *,
        identify: Callable[[Trajectories], Index] | None = None,
        link: Link | str | None = None,
        names: Sequence[str] | None = None,
        budget: int | None = None,
        keep_log: bool = True,
    ):
        super().__init__(model, seed, budget=budget, keep_log=keep_log)
        self.link = None if link is None else named_link(link)
        self._identify = identify or response_number(model)
        self._function: PairFunction | None = None
        if callable(kernel):
            self._function = kernel
        else:
            scores = np.asarray(kernel, dtype=np.float64)
            if scores.ndim != 2 or scores.shape[0] != scores.shape[1]:
                raise ValueError(f"the preference matrix has shape {scores.shape}; expected (n, n)")
            self.matrix = scores if self.link is None else self.link.value(scores)
            check_preference_matrix(self.matrix, names)

    def _probability(self, pairs: Index) -> Array:
        first, second = unpack(pairs)
        if self._function is not None:
            forth, back = self._ask(first, second), self._ask(second, first)
            bad = ~((forth >= 0) & (back >= 0) & (np.abs(forth + back - 1) <= SYMMETRY_TOLERANCE))
            if bad.any():
                i = int(np.flatnonzero(bad)[0])
                raise ValueError(
                    f"pair {i}: the kernel gives P(first, second) = {forth[i]:.10g} and P(second, first) = "
                    f"{back[i]:.10g}; probabilities must sum to 1 (antisymmetric scores to 0)"
                )
            return forth
        row, column = self._identify(first), self._identify(second)
        n = len(self.matrix)
        outside = (row < 0) | (row >= n) | (column < 0) | (column >= n)
        if outside.any():
            k = int(np.flatnonzero(outside)[0])
            raise ValueError(
                f"pair {k} has the numbers ({row[k]}, {column[k]}) but the preference matrix has {n} rows"
            )
        return self.matrix[row, column]

    def _ask(self, first: Trajectories, second: Trajectories) -> Array:
        given = np.asarray(self._function(first, second), dtype=np.float64)  # type: ignore[misc]
        if given.shape != (len(first),):
            raise ValueError(f"the kernel returned shape {given.shape}; expected ({len(first)},)")
        return given if self.link is None else self.link.value(given)


def check_preference_matrix(P: Array, names: Sequence[str] | None = None) -> None:
    """Raise, with the cell named, unless P (n, n) is a preference matrix: P >= 0 and P + P^T = 1."""
    bad = ~((P >= 0) & (np.abs(P + P.T - 1) <= SYMMETRY_TOLERANCE))
    if bad.any():
        i, j = (int(k) for k in np.argwhere(bad)[0])
        a, b = (i, j) if names is None else (repr(names[i]), repr(names[j]))
        raise ValueError(
            f"P[{a}, {b}] = {P[i, j]:.10g} and P[{b}, {a}] = {P[j, i]:.10g}: both must be in [0, 1] and sum to 1"
        )
