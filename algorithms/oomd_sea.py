r"""Optimistic online mirror descent for stochastically extended adversarial losses, and its self-play on games.

S. Chen, Y.-J. Zhang, W.-W. Tu, P. Zhao, L. Zhang, "Optimistic Online Mirror Descent for Bridging Stochastic and
Adversarial Online Convex Optimization", ICML 2023 (arXiv 2302.04552). In round t the learner plays x_t of a convex set,
the environment picks a law D_t, f_t ~ D_t is seen, and F_t = E f_t counts:

  regret of u      sum_t F_t(x_t) - F_t(u)             against F_t, not against the noisy f_t
  sigma_t^2        max_x E |grad f_t(x) - grad F_t(x)|^2        the noise
  Sigma_t^2        max_x |grad F_t(x) - grad F_{t-1}(x)|^2      the drift

The learner keeps two sequences, with M_t the hint, the last gradient g_{t-1} = grad f_{t-1}(x_{t-1}), M_1 = 0:

  x_t         = argmin_x eta_t <M_t, x> + D_psi(x, xhat_t)             what is played      `OptimisticOMD.x`
  xhat_{t+1}  = argmin_x eta_t <g_t, x> + D_psi(x, xhat_t)             from xhat_t, not from x_t   `observe`

M_t = 0 is plain mirror descent. Steps (`adaptive`, `strongly_convex`, `fixed`): convex losses
eta_t = D / sqrt(delta + 4 G^2 + V_{t-1}), V = sum_s |g_s - M_s|^2; lambda-strongly convex ones 2 / (lambda t).

Guarantee: regret O(sqrt(sigma_{1:T}^2 + Sigma_{1:T}^2)) for smooth convex losses, so that it stays bounded where there
is neither noise nor drift; O((sigma_max^2 + Sigma_max^2) log T / lambda) for strongly convex ones. In every run at a
fixed step (the constants: Rakhlin and Sridharan 2013; Syrgkanis et al. 2015)

  sum_t <g_t, x_t - u> <= D_psi(u, xhat_1) / eta + eta sum_t |g_t - M_t|^2 - 1 / (4 eta) sum_{t>1} |x_t - x_{t-1}|^2.

Two geometries: `Ball`, psi = |x|^2 / 2; `Simplex`, psi = sum x log x, with |.| the l1 norm and the largest entry as its
dual. Departures: on the simplex D_psi is unbounded, D = sqrt(2 log n) bounds it from the uniform law only, so that the
guarantee at varying steps is not the paper's there. The online-Newton form for exp-concave losses is not here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike

from ..envs.kernels import Array
from ..envs.preference_games import Game
from .planning.games import softmax
from .self_play import SelfPlay, Step


class Geometry(Protocol):
    """A set with a mirror map. A state is x in the coordinates in which a step is taken.

    size  D, with D_psi(u, start) <= D^2 / 2
    """

    @property
    def size(self) -> float: ...
    def start(self) -> Array: ...
    def point(self, state: Array) -> Array: ...
    def move(self, state: Array, gradient: Array, eta: float) -> Array: ...
    def dual_norm(self, gradient: Array) -> float: ...


@dataclass(frozen=True)
class Ball:
    """{x : |x| <= radius} in R^dimension with Euclidean steps, from the origin."""

    dimension: int
    radius: float = 1.0

    @property
    def size(self) -> float:
        """The diameter."""
        return 2 * self.radius

    def start(self) -> Array:
        return np.zeros(self.dimension)

    def point(self, state: Array) -> Array:
        return state

    def move(self, state: Array, gradient: Array, eta: float) -> Array:
        x = state - eta * gradient
        length = math.sqrt(x @ x)
        return x if length <= self.radius else x * (self.radius / length)

    def dual_norm(self, gradient: Array) -> float:
        return math.sqrt(gradient @ gradient)


@dataclass(frozen=True)
class Simplex:
    """The laws over n responses with multiplicative steps, from the uniform law. A state is log x."""

    n: int

    @property
    def size(self) -> float:
        return math.sqrt(2 * math.log(self.n))

    def start(self) -> Array:
        return np.full(self.n, -math.log(self.n))

    def point(self, state: Array) -> Array:
        return np.exp(state)

    def move(self, state: Array, gradient: Array, eta: float) -> Array:
        return softmax(state - eta * gradient)[1]

    def dual_norm(self, gradient: Array) -> float:
        return float(np.abs(gradient).max())


StepRule = Callable[[int, float], float]
"""(t, V_{t-1}) -> eta_t, t = 1, 2, ..."""


def adaptive(D: float, G: float, delta: float = 1.0) -> StepRule:
    """eta_t = D / sqrt(delta + 4 G^2 + V_{t-1}), with |grad f_t| <= G: needs no sigma, no Sigma and no T."""
    for what, value in (("D", D), ("delta", delta)):
        if not 0 < value < math.inf:
            raise ValueError(f"{what} is {value}; it must be positive and finite")
    if not 0 <= G < math.inf:
        raise ValueError(f"G is {G}; it must be finite and at least 0")
    return lambda t, V: D / math.sqrt(delta + 4 * G**2 + V)


def strongly_convex(modulus: float) -> StepRule:
    """eta_t = 2 / (lambda t) for F_t that are lambda-strongly convex, lambda = modulus."""
    if not 0 < modulus < math.inf:
        raise ValueError(f"modulus is {modulus}; it must be positive and finite")
    return lambda t, V: 2 / (modulus * t)


def fixed(eta: float) -> StepRule:
    """eta_t = eta."""
    if not 0 < eta < math.inf:
        raise ValueError(f"the step is {eta}; it must be positive and finite")
    return lambda t, V: eta


class OptimisticOMD:
    """A learner: play `x`, then `observe` the gradient of f_t there.

    optimistic  False: M_t = 0, plain mirror descent
    x           x_t, to be played in round t
    t           the round, 1, 2, ...
    V           sum over past rounds of |g_s - M_s|^2 in the dual norm
    """

    def __init__(self, geometry: Geometry, step: StepRule, *, optimistic: bool = True) -> None:
        self.geometry, self.step, self.optimistic = geometry, step, optimistic
        self.t, self.V = 1, 0.0
        self._hat = geometry.start()
        self._choose(np.zeros_like(self._hat))

    def _choose(self, hint: Array) -> None:
        self.hint, self.eta = hint, self.step(self.t, self.V)
        self._state = self.geometry.move(self._hat, hint, self.eta)
        self.x = self.geometry.point(self._state)

    def observe(self, gradient: ArrayLike) -> None:
        """grad f_t(x_t), in the shape of x."""
        g = np.asarray(gradient, dtype=np.float64)
        if g.shape != self.x.shape or not np.isfinite(g).all():
            raise ValueError(
                f"the gradient of round {self.t} has shape {g.shape}; expected finite {self.x.shape}"
            )
        self._hat = self._base(g)
        self.V += self.geometry.dual_norm(g - self.hint) ** 2
        self.t += 1
        self._choose(g if self.optimistic else np.zeros_like(g))

    def _base(self, gradient: Array) -> Array:
        """xhat_{t+1}."""
        return self.geometry.move(self._hat, gradient, self.eta)


class OptimisticMWU(SelfPlay):
    """Optimistic multiplicative weights against oneself: the learner above on the loss -P(. > pi_t).

    pi_t ∝ pihat_t exp(eta_t P(. > pi_{t-1})),   pihat_{t+1} ∝ pihat_t exp(eta_t P(. > pi_t)),   pi_0 = pihat_0;

    at a constant step log pi_{t+1} = log pi_t + eta (2 P(. > pi_t) - P(. > pi_{t-1})) + const: the step of SPPO with a
    combined target. One product with P a step. Where the equilibrium is unique the last policy converges at small
    constant steps, also where SPPO goes round. eta: a constant step, or a function t -> eta_t.
    """

    tempered = False

    def __init__(self, game: Game, eta: float | Step, start: ArrayLike | None = None) -> None:
        super().__init__(game, 0.0, eta, start)
        self._log_hat = self.log_policy

    def _next(self, eta: float) -> tuple[Array, Array]:
        wins = self.game.wins(self.policy)
        hat = self._log_hat + eta * wins
        hat -= hat.max()
        self._log_hat = hat
        wins *= self.step(self.t + 1)
        wins += hat
        return softmax(wins)
