r"""Reward learning over policy optimisation as a bilevel problem, by the penalty method: first-order, two policies.

J. Kwon, D. Kwon, S. Wright, R. Nowak, "On Penalty Methods for Nonconvex Bilevel Optimization and First-Order Stochastic
Approximation", ICLR 2024 (arXiv 2309.01753), on its RLHF instance with n responses:

  x (d,)   reward parameters, r_x = features @ x, features (n, d)
  y, z     laws over responses (n,); y answers to the penalised, z to the plain lower problem
  g(x, y)  = -E_y r_x + beta KL(y, reference)                the lower level   `Problem.lower`
  y*(x)    = argmin_y g = reference exp(r_x/beta) / Z(x),    g*(x) = -beta log Z(x)           `Problem.plain`
  f(x, y)  any upper objective (`Upper`): `PreferenceRisk`, the negative log-likelihood of preferences between rollouts
           of y itself, so that the data depend on the policy; or `Quadratic`
  F(x)     = f(x, y*(x))                                     the exact problem                `value`, `gradient`
  psi_s(x) = min_y f(x, y) + (g(x, y) - g*(x)) / s           the penalised one, s = sigma     `penalised`
  grad psi_s = grad_x f(x, y) + (grad_x g(x, y) - grad_x g(x, z)) / s, at y = y_s(x), z = y*(x)   `three_terms`

g - g* = beta KL(y, y*(x)). psi_s <= F rises to F as s falls: F - psi_s = s Var_{y*}(grad_y f) / (2 beta) + O(s^2), and
the gradients differ by O(s). The three terms need samples of two policies and no second derivative.

`run` is the double loop: inner steps on y and z, then x <- x - b (the three terms). Departures: the inner projected
gradient steps are entropic (Bregman) ones, y ∝ y exp(-a grad h), which stay inside the simplex, where grad g is finite;
no noise, no momentum. psi is differentiable where the penalised problem has one solution, for which
sigma < `largest_sigma` suffices (there the paper's error bound holds; at beta = 0 it fails at the boundary).

Not asserted: the paper's counts of oracle calls, whose constants are hidden.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import expit, log_expit, rel_entr

from ..envs.kernels import Array
from .kl_bayes import check_distribution, posterior
from .optimisation.losses import check_positive
from .planning.games import softmax


class Upper(Protocol):
    """The upper objective f(x, y), differentiable, and defined for all y >= 0."""

    def value(self, x: Array, y: Array) -> float: ...

    def grad_x(self, x: Array, y: Array) -> Array: ...

    def grad_y(self, x: Array, y: Array) -> Array: ...

    def hessian_y(self, x: Array) -> Array:
        """(n, n); f is quadratic in y."""
        ...


@dataclass(frozen=True, eq=False)
class PreferenceRisk:
    """f(x, y) = E_{i, j ~ y}[-P_ij log s(r_i - r_j) - P_ji log s(r_j - r_i)] + ridge |x|^2 / 2, s the logistic curve.

    features (n, d), r = features @ x; P (n, n) = probability that i is preferred to j, P + P^T = 1.
    """

    features: Array
    P: Array
    ridge: float = 0.0

    def _margins(self, x: Array) -> Array:
        r = self.features @ x
        return r[:, None] - r[None, :]

    def losses(self, x: Array) -> Array:
        """The loss of every pair, (n, n), symmetric."""
        m = self._margins(x)
        return np.asarray(-self.P * log_expit(m) - self.P.T * log_expit(-m))

    def value(self, x: Array, y: Array) -> float:
        return float(y @ self.losses(x) @ y) + self.ridge * float(x @ x) / 2

    def grad_x(self, x: Array, y: Array) -> Array:
        residual = expit(self._margins(x)) - self.P  # antisymmetric
        return np.asarray(2 * (y * (residual @ y)) @ self.features + self.ridge * x)

    def grad_y(self, x: Array, y: Array) -> Array:
        return np.asarray(2 * self.losses(x) @ y)

    def hessian_y(self, x: Array) -> Array:
        return 2 * self.losses(x)


@dataclass(frozen=True, eq=False)
class Quadratic:
    """f(x, y) = |y - target|^2 / 2 + ridge |x|^2 / 2."""

    target: Array
    ridge: float = 0.0

    def value(self, x: Array, y: Array) -> float:
        return (float(((y - self.target) ** 2).sum()) + self.ridge * float(x @ x)) / 2

    def grad_x(self, x: Array, y: Array) -> Array:
        return self.ridge * x

    def grad_y(self, x: Array, y: Array) -> Array:
        return y - self.target

    def hessian_y(self, x: Array) -> Array:
        return np.eye(len(self.target))


@dataclass(frozen=True, eq=False)
class Problem:
    """features (n, d); reference (n,) positive; beta > 0; the upper objective."""

    features: Array
    reference: Array
    beta: float
    upper: Upper

    def __post_init__(self) -> None:
        check_positive(self.beta, "beta")
        mu, phi = check_distribution(self.reference, "reference"), np.asarray(self.features)
        if not (mu > 0).all():
            i = int(np.argmin(mu))
            raise ValueError(f"reference[{i}] is 0; a response without mass never returns: leave it out")
        if phi.ndim != 2 or len(phi) != len(mu):
            raise ValueError(f"features has shape {phi.shape}; expected ({len(mu)}, d), one row a response")

    def lower(self, x: Array, y: Array) -> float:
        """g(x, y)."""
        return -float(y @ (self.features @ x)) + self.beta * float(rel_entr(y, self.reference).sum())

    def plain(self, x: Array) -> tuple[Array, float]:
        """y*(x) and g*(x)."""
        star = posterior(self.reference, self.features @ x, self.beta)
        return star.law, -self.beta * star.log_evidence


# ---- the exact problem -----------------------------------------------------------------------------------------------


def value(problem: Problem, x: Array) -> float:
    """F(x) = f(x, y*(x))."""
    return problem.upper.value(x, problem.plain(x)[0])


def gradient(problem: Problem, x: Array) -> Array:
    """grad F = grad_x f + Cov_{y*}(grad_y f, features) / beta, by the implicit function theorem."""
    star = problem.plain(x)[0]
    slope = problem.upper.grad_y(x, star)
    covariance = (star * (slope - star @ slope)) @ problem.features
    return problem.upper.grad_x(x, star) + covariance / problem.beta


# ---- the penalised problem -------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Penalised:
    """y = y_sigma(x), value = psi_sigma(x), gradient (d,) = its gradient; residual of y's fixed-point equation."""

    y: Array
    value: float
    gradient: Array
    residual: float
    iterations: int = field(compare=False)


def largest_sigma(problem: Problem, x: Array) -> float:
    """The penalised lower problem is strictly convex below it: beta over the most negative curvature of f along the
    simplex, as KL has curvature at least beta there. inf where f is convex in y."""
    H = problem.upper.hessian_y(x)
    along = np.eye(len(H)) - 1 / len(H)
    least = float(np.linalg.eigvalsh(along @ (H + H.T) @ along / 2)[0])
    return problem.beta / -least if least < -1e-12 else math.inf


def _check_sigma(problem: Problem, x: Array, sigma: float) -> None:
    check_positive(sigma, "sigma")
    largest = largest_sigma(problem, x)
    if sigma >= largest:
        raise ValueError(f"sigma is {sigma}; below {largest:.4g} the penalised problem has one solution")


def penalised(problem: Problem, x: ArrayLike, sigma: float, tolerance: float = 1e-13) -> Penalised:
    """psi_sigma(x) exactly: Newton's method for log y = log reference + (r_x - sigma grad_y f(x, y)) / beta + constant.

    ArithmeticError where 100 damped steps do not reach the tolerance (in log y).
    """
    x = np.asarray(x, dtype=np.float64)
    _check_sigma(problem, x, sigma)
    upper, beta = problem.upper, problem.beta
    base, share = np.log(problem.reference) + problem.features @ x / beta, sigma / beta
    H = share * upper.hessian_y(x)

    def state(u: Array) -> tuple[Array, Array, float]:
        y, log_y = softmax(u)
        step = base - share * upper.grad_y(x, y) - log_y
        step = step - y @ step  # the constant
        return y, step, float(np.abs(step).max())

    u = base
    y, step, residual = state(u)
    for iteration in range(100):
        if residual <= tolerance * max(1.0, float(np.abs(u).max())):
            z, lowest = problem.plain(x)
            psi = upper.value(x, y) + (problem.lower(x, y) - lowest) / sigma
            return Penalised(y, psi, three_terms(problem, x, y, z, sigma), residual, iteration)
        jacobian = (
            np.eye(len(y)) + H * y - np.outer(H @ y, y)
        )  # d(u + share grad_y f)/du, softmax' = diag(y) - y y^T
        direction, length = np.linalg.solve(jacobian, step), 1.0
        while length > 1e-6 and state(u + length * direction)[2] > residual:
            length /= 2
        u = u + length * direction
        y, step, residual = state(u)
    raise ArithmeticError(
        f"the penalised policy's residual is {residual:.3g} after 100 steps; sigma is {sigma}"
    )


def three_terms(problem: Problem, x: Array, y: Array, z: Array, sigma: float) -> Array:
    """grad_x f(x, y) + (grad_x g(x, y) - grad_x g(x, z)) / sigma, with grad_x g(x, y) = -E_y features."""
    return problem.upper.grad_x(x, y) + (z - y) @ problem.features / sigma


# ---- the algorithm ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Run:
    """The double loop's last x, y, z; stationarity = |grad psi_sigma(x)| recomputed from the exact y_sigma and y*."""

    x: Array
    y: Array
    z: Array
    stationarity: float
    steps: int


def inner_step(problem: Problem, x: Array, y: Array, step: float, sigma: float = 0.0) -> Array:
    """One entropic step y ∝ y exp(-step grad_y(sigma f + g)): for y at sigma, for z at 0. step beta <= 1."""
    slope = -(problem.features @ x)
    if sigma > 0:
        slope = slope + sigma * problem.upper.grad_y(x, y)
    share = step * problem.beta
    log_y = np.log(np.maximum(y, np.finfo(np.float64).tiny))  # what underflowed may come back
    return softmax((1 - share) * log_y + share * np.log(problem.reference) - step * slope)[0]


def run(
    problem: Problem,
    start: ArrayLike,
    sigma: float,
    *,
    steps: int,
    step: float,
    inner: int = 4,
    inner_step_size: float | None = None,
    tolerance: float = 1e-9,
) -> Run:
    """The double loop from x = start, y = z = reference, until a step of x would move it by less than step tolerance.

    step = b, inner = M, inner_step_size = a in (0, 1/beta], by default 1/beta (for which one step finds z).
    """
    x = np.array(start, dtype=np.float64)
    a = 1 / problem.beta if inner_step_size is None else check_positive(inner_step_size, "inner_step_size")
    if a * problem.beta > 1:
        raise ValueError(f"inner_step_size is {a}; it must be at most 1/beta = {1 / problem.beta:.4g}")
    if inner < 1 or steps < 1:
        raise ValueError(f"inner is {inner} and steps is {steps}; both must be at least 1")
    b = check_positive(step, "step")
    _check_sigma(problem, x, sigma)
    y = z = np.asarray(problem.reference, dtype=np.float64)
    done = 0
    while done < steps:
        done += 1
        for _ in range(inner):
            y, z = inner_step(problem, x, y, a, sigma), inner_step(problem, x, z, a)
        slope = three_terms(problem, x, y, z, sigma)
        x = x - b * slope
        if np.abs(slope).max() <= tolerance:
            break
    certificate = float(np.linalg.norm(penalised(problem, x, sigma).gradient))
    return Run(x, y, z, certificate, done)


def two_stage(
    problem: Problem, start: ArrayLike, *, steps: int, step: float, tolerance: float = 1e-9
) -> Array:
    """What standard RLHF does: x minimises f(x, reference), with data that the policy does not change; x (d,)."""
    x = np.array(start, dtype=np.float64)
    for _ in range(steps):
        slope = problem.upper.grad_x(x, problem.reference)
        x = x - check_positive(step, "step") * slope
        if np.abs(slope).max() <= tolerance:
            break
    return x
