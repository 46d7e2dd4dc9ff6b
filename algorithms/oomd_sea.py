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

M_t = 0 is plain mirror descent. Steps (`adaptive`, `strongly_convex`, `fixed`, `tracking`): convex losses
eta_t = D / sqrt(delta + 4 G^2 + V_{t-1}), V = sum_s |g_s - M_s|^2; lambda-strongly convex ones 2 / (lambda t).

Three geometries: `Ball`, psi = |x|^2 / 2; `Simplex`, psi = sum x log x, with |.| the l1 norm and the largest entry as
its dual; for alpha-exp-concave f_t `NewtonBall`, psi_t(x) = x^T A_t x / 2, at the step 1 (`fixed(1)`), with

  A_t = (1 + beta G^2 / 2) I + beta / 2 sum_{s<t} g_s g_s^T,      beta = min{1 / (4 G D), alpha} / 2,      |g_t| <= G.

Guarantee: regret O(sqrt(sigma_{1:T}^2 + Sigma_{1:T}^2)) for smooth convex losses, so that it stays bounded where there
is neither noise nor drift; O((sigma_max^2 + Sigma_max^2) log T / lambda) for strongly convex ones;
O(d log(sigma_{1:T}^2 + Sigma_{1:T}^2)) for exp-concave ones, with 1 / beta in the constant. In every run at a fixed
step (the constants: Rakhlin and Sridharan 2013; Syrgkanis et al. 2015)

  sum_t <g_t, x_t - u> <= D_psi(u, xhat_1) / eta + eta sum_t |g_t - M_t|^2 - 1 / (4 eta) sum_{t>1} |x_t - x_{t-1}|^2.

Against a path u_1, ..., u_T in the ball, P_T = sum_{t>1} |u_t - u_{t-1}|, D P_T / eta is added to the right; with a
step that balances the two the regret is O(P_T + sqrt(1 + P_T) (sqrt(sigma_{1:T}^2) + sqrt(Sigma_{1:T}^2))). With
`NewtonBall`, for every u of the ball (the growth of A_t, beta / 4 <g_t, u - xhat_{t+1}>^2, is at most the square on the
left and beta / 2 <g_t, x_t - xhat_{t+1}>^2, which the term with G^2 in A_t keeps below |x_t - xhat_{t+1}|_{A_t}^2)

  sum_t [<g_t, x_t - u> - beta / 2 <g_t, x_t - u>^2]
      <= |u - xhat_1|_{A_1}^2 / 2 + 3/2 sum_t |g_t - M_t|_{A_t^{-1}}^2 - 1/2 sum_t |x_t - xhat_t|_{A_t}^2,

and the left is at least sum_t f_t(x_t) - f_t(u).

Departures: on the simplex D_psi is unbounded, D = sqrt(2 log n) bounds it from the uniform law only, so that the
guarantee at varying steps is not the paper's there. The paper needs no P_T: it runs many steps at once and weighs
them; here one step is tuned to a known P_T (`tracking`), and the ensemble is not here.
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
from .estimation.linear_algebra import cholesky_update, solve_factored, solve_lower
from .estimation.preferences import ball_maximum
from .planning.games import softmax
from .self_play import SelfPlay, Step


class Geometry(Protocol):
    """A set with a mirror map. A state is x in the coordinates in which a step is taken.

    size   D, with D_psi(u, start) <= D^2 / 2
    after  the geometry of the next round, once g_t was seen
    """

    @property
    def size(self) -> float: ...
    def start(self) -> Array: ...
    def point(self, state: Array) -> Array: ...
    def move(self, state: Array, gradient: Array, eta: float) -> Array: ...
    def dual_norm(self, gradient: Array) -> float: ...
    def after(self, gradient: Array) -> Geometry: ...


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

    def after(self, gradient: Array) -> Ball:
        return self


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

    def after(self, gradient: Array) -> Simplex:
        return self


@dataclass(frozen=True, eq=False)
class NewtonBall:
    """{x : |x| <= radius} with the metric A_t of the past gradients, from the origin; see `online_newton`.

    beta    A_{t+1} = A_t + beta / 2 g_t g_t^T
    factor  (d, d), the lower Cholesky factor of A_t
    """

    radius: float
    beta: float
    factor: Array

    @property
    def size(self) -> float:
        """The longest |u|_{A_t}."""
        return self.radius * float(np.linalg.norm(self.factor, 2))

    @property
    def metric(self) -> Array:
        """A_t (d, d)."""
        return self.factor @ self.factor.T

    def start(self) -> Array:
        return np.zeros(len(self.factor))

    def point(self, state: Array) -> Array:
        return state

    def move(self, state: Array, gradient: Array, eta: float) -> Array:
        """A Newton step, and where it leaves the ball the closest point of it in the norm of A_t:

        x = (A_t + nu I)^{-1} (A_t state - eta gradient), with the nu >= 0 that makes |x| = radius (`ball_maximum`).
        """
        x = state - eta * solve_factored(self.factor, gradient)
        if x @ x <= self.radius**2:
            return x
        A = self.metric
        return ball_maximum(A, np.ones(len(x)), A @ x, self.radius)[0]

    def dual_norm(self, gradient: Array) -> float:
        half = solve_lower(self.factor, gradient)
        return math.sqrt(half @ half)

    def after(self, gradient: Array) -> NewtonBall:
        factor = self.factor.copy()
        cholesky_update(factor, math.sqrt(self.beta / 2) * gradient)
        return NewtonBall(self.radius, self.beta, factor)


def _positive(**given: float) -> None:
    for what, value in given.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{what} is {value}; it must be positive and finite")


def exp_concave_rate(D: float, G: float, alpha: float) -> float:
    """beta = min{1 / (4 G D), alpha} / 2: f(x) - f(u) <= <g, x - u> - beta / 2 <g, x - u>^2 with g = grad f(x), where
    exp(-alpha f) is concave, |g| <= G and |x - u| <= D."""
    _positive(D=D, G=G, alpha=alpha)
    return min(1 / (4 * G * D), alpha) / 2


def online_newton(dimension: int, G: float, alpha: float, radius: float = 1.0) -> NewtonBall:
    """The first round's geometry: A_1 = (1 + beta G^2 / 2) I, for f_t alpha-exp-concave on the ball and |g_t| <= G.

    The Bradley-Terry loss log(1 + e^{-<phi, x>}) has G = |phi| and alpha = e^{-|phi| radius}.
    """
    if dimension < 1:
        raise ValueError(f"dimension is {dimension}; it must be at least 1")
    _positive(radius=radius)
    beta = exp_concave_rate(2 * radius, G, alpha)
    return NewtonBall(radius, beta, math.sqrt(1 + beta * G**2 / 2) * np.eye(dimension))


StepRule = Callable[[int, float], float]
"""(t, V_{t-1}) -> eta_t, t = 1, 2, ..."""


def adaptive(D: float, G: float, delta: float = 1.0) -> StepRule:
    """eta_t = D / sqrt(delta + 4 G^2 + V_{t-1}), with |grad f_t| <= G: needs no sigma, no Sigma and no T."""
    _positive(D=D, delta=delta)
    if not 0 <= G < math.inf:
        raise ValueError(f"G is {G}; it must be finite and at least 0")
    return lambda t, V: D / math.sqrt(delta + 4 * G**2 + V)


def tracking(D: float, G: float, path: float, delta: float = 1.0) -> StepRule:
    """`adaptive` against a path of length P_T <= path, known beforehand: sqrt(D^2 + 2 D P_T) takes the place of D."""
    if not 0 <= path < math.inf:
        raise ValueError(f"path is {path}; it must be finite and at least 0")
    _positive(D=D)
    return adaptive(math.sqrt(D**2 + 2 * D * path), G, delta)


def strongly_convex(modulus: float) -> StepRule:
    """eta_t = 2 / (lambda t) for F_t that are lambda-strongly convex, lambda = modulus."""
    _positive(modulus=modulus)
    return lambda t, V: 2 / (modulus * t)


def fixed(eta: float) -> StepRule:
    """eta_t = eta."""
    if not 0 < eta < math.inf:
        raise ValueError(f"the step is {eta}; it must be positive and finite")
    return lambda t, V: eta


class OptimisticOMD:
    """A learner: play `x`, then `observe` the gradient of f_t there.

    optimistic  False: M_t = 0, plain mirror descent
    geometry    that of round t
    x           x_t, to be played in round t
    t           the round, 1, 2, ...
    V           sum over past rounds of |g_s - M_s|^2 in the dual norm
    """

    def __init__(self, geometry: Geometry, step: StepRule, *, optimistic: bool = True) -> None:
        self.geometry: Geometry = geometry
        self.step, self.optimistic = step, optimistic
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
        self.geometry = self.geometry.after(g)
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
