"""Policies that learn by playing against themselves: what Nash-MD, INPO, SPPO and their optimistic form share.

Each step is exact mirror ascent in KL geometry against a fixed opponent,

    log pi_{t+1} = (1 - eta tau) log pi_t + eta tau log mu + eta P(. > opponent) + const,

on the logarithms of the policy, so that no response is lost to underflow. It costs one product with P, `game.wins`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar, Self

import numpy as np
from numpy.typing import ArrayLike

from ..envs.kernels import Array
from ..envs.preference_games import Game, check_law
from .planning.games import check_tau, softmax

Step = Callable[[int], float]


def constant(eta: float) -> Step:
    """eta_t = eta."""
    if not 0 < eta < math.inf:
        raise ValueError(f"the step is {eta}; it must be positive and finite")
    return lambda t: eta


def decreasing(tau: float) -> Step:
    """eta_t = 2 / (tau (t + 2)), t = 0, 1, ...: eta_0 tau = 1, so that the first step forgets where it starts."""
    return lambda t: 2 / (tau * (t + 2))


def mixture(log_policy: Array, log_reference: Array, share: float) -> tuple[Array, Array]:
    """The geometric mixture pi^{1 - share} mu^{share} / Z and its logarithm; share = eta tau in [0, 1] is mu's."""
    return softmax((1 - share) * log_policy + share * log_reference)


class SelfPlay:
    """A run: advance(N) then advance(M) equals advance(N + M), bit for bit.

    eta    the steps: None = 2 / (tau (t + 2)) (`decreasing`), a number = that constant step, or a function t -> eta_t
    tau    positive; 0 for the methods without temperature, whose class says `tempered = False`
    start  a law with full support, None = mu
    policy, log_policy  pi_t (n,), normalised
    t                   steps made
    average             the mean of pi_0, ..., pi_{t-1}, the opponents so far (pi_0 before the first step)
    """

    tempered: ClassVar[bool] = True

    def __init__(
        self,
        game: Game,
        tau: float,
        eta: float | Step | None = None,
        start: ArrayLike | None = None,
    ) -> None:
        self.game, self.tau = game, check_tau(tau) if self.tempered else 0.0
        self.step = decreasing(self.tau) if eta is None else eta if callable(eta) else constant(eta)
        law = game.reference if start is None else check_law(start, len(game), "start")
        if not (law > 0).all():
            raise ValueError(f"start[{int(np.argmin(law))}] is 0; mirror ascent cannot bring a response back")
        self.policy, self.log_policy = softmax(np.log(law))
        self.t = 0
        self._total = np.zeros(len(game))

    @property
    def average(self) -> Array:
        return self._total / self.t if self.t else self.policy

    def advance(self, steps: int) -> Self:
        for _ in range(steps):
            eta = self.step(self.t)
            if not eta * self.tau <= 1 + 1e-12:
                too_far = f"eta tau = {eta * self.tau:.4g} at t = {self.t}"
                raise ValueError(f"{too_far}; it must be at most 1: take eta <= {1 / self.tau:.4g}")
            self._total += self.policy
            self.policy, self.log_policy = self._next(eta)
            self.t += 1
        return self

    def _next(self, eta: float) -> tuple[Array, Array]:
        raise NotImplementedError
