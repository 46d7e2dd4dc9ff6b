r"""GSHF: iterative preference learning under a KL constraint, with an enhancer online and pessimism offline.

W. Xiong, H. Dong, C. Ye, et al., "Iterative Preference Learning from Human Feedback: Bridging Theory and Practice for
RLHF under KL-Constraint", ICML 2024 (arXiv 2312.11456; GSHF: Gibbs sampling from human feedback), for one prompt with n
responses and a linear reward <phi(y), theta*>. The paper's KL coefficient eta is beta here; Sigma is the sum over
comparisons of D D^T, D = phi(y_1) - phi(y_2), plus ridge I; norms are ||x|| = sqrt(x^T Sigma^-1 x).

online, batch t = 1, 2, ...                                                              `GSHF`
  theta_t  = MLE of all comparisons so far, |theta| <= ball
  pi_t^1   = ref exp(<phi, theta_t> / beta) / Z                    main, which is charged  `main_policy`
  pi_t^2   = argmax over Pi_t of ||E_pi phi - E_{pi_t^1} phi||     enhancer, which looks   `enhancer`
  Pi_t     = {pi : beta KL(pi, pi_t^1) <= radius ||E_pi phi - E_{pi_t^1} phi||}   what may still be optimal
  m comparisons of y_1 ~ pi_t^1 with y_2 ~ pi_t^2
offline, once
  `pessimistic_policy`, form = "pointwise" (option I) or "expected" (option II):
  I    pi = ref exp((<phi, theta_hat> - radius ||phi - nu||) / beta) / Z
  II   pi = argmax E_pi <phi, theta_hat> - radius ||E_pi phi - nu|| - beta KL(pi, ref)
hybrid: online, on top of comparisons that are given (`GSHF.given`).

nu is a reference vector (E_ref phi, or a common response's); it takes out the constant that comparisons leave free.
Guarantee: if |<x, theta_hat - theta*>| <= radius ||x|| for the x in question, option II is worse than any pi by at most
2 radius ||E_pi phi - nu|| - beta KL(pi, pi_hat), option I by 2 radius E_pi ||phi - nu||, and Pi_t holds pi*.
The paper's constants (its radius, its batch m) are arguments.
Departures: one prompt; the maximum over Pi_t is sought by alternating maximisation from every response (`enhancer`),
where the paper's practice takes the best and the worst of n samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import expit

from ..envs.kernels import Array
from .estimation import fit_preferences
from .estimation.preferences import ball_maximum
from .incentives import policy_of, shortfall
from .optimisation.losses import check_positive
from .planning.games import kl, softmax

_NEWTON_STEPS = 100


def check_radius(radius: float) -> float:
    if not 0 <= radius < np.inf:
        raise ValueError(f"radius is {radius}; it must be at least 0 and finite (0 is the greedy choice)")
    return float(radius)


def covariance(features: ArrayLike, counts: ArrayLike, ridge: float) -> Array:
    """Sigma (d, d) = sum_{i<j} (counts_ij + counts_ji) D D^T + ridge I; features (n, d), counts (n, n)."""
    phi, N = np.asarray(features, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    N = N + N.T
    laplacian = np.diag(N.sum(1)) - N  # equal responses drop out
    return np.asarray(phi.T @ laplacian @ phi + check_positive(ridge, "ridge") * np.eye(phi.shape[1]))


def inverse_root(sigma: ArrayLike) -> Array:
    """L (d, d) with L L^T = Sigma^-1, so that ||x|| = |L^T x|."""
    try:
        factor = np.linalg.cholesky(np.asarray(sigma, dtype=np.float64))
    except np.linalg.LinAlgError:
        raise ValueError("sigma is not positive definite; give `covariance` a ridge > 0") from None
    return np.linalg.inv(factor).T


def main_policy(
    theta: ArrayLike, features: ArrayLike, log_reference: ArrayLike, beta: float
) -> tuple[Array, Array]:
    """pi^1 = ref exp(<phi, theta> / beta) / Z and its logarithm, (n,) each."""
    return policy_of(np.asarray(features, dtype=np.float64) @ np.asarray(theta), log_reference, beta)


@dataclass(frozen=True, eq=False)
class Enhancer:
    """policy, log_policy (n,); norm = ||E_pi phi - E_main phi||; slack = radius norm - beta KL(pi, main) >= 0."""

    policy: Array
    log_policy: Array
    norm: float
    slack: float


def enhancer(
    log_main: ArrayLike, features: ArrayLike, sigma: ArrayLike, beta: float, radius: float, sweeps: int = 50
) -> Enhancer:
    """The law of the largest norm in Pi_t, among those that alternating maximisation finds from every response.

    ||x|| is the maximum of <x, u> over the ball of Sigma. For fixed u the best law is pi_l ∝ main exp(l <phi, u>) with
    the largest l that Pi_t allows, where f(l) = beta KL - radius <E_pi phi - E_main phi, u> has f' = (beta l - radius)
    Var: it falls up to radius / beta and rises from there on, so that l is its root beyond, or infinite. For a fixed
    law the best u is that of the norm. Each half step raises the norm and stays in Pi_t. A convex function has many
    local maxima: one start a response, the best is kept.
    """
    beta, radius = check_positive(beta, "beta"), check_radius(radius)
    log_pi = np.asarray(log_main, dtype=np.float64)
    pi, white = np.exp(log_pi), np.asarray(features, dtype=np.float64) @ inverse_root(sigma)
    centred = white - pi @ white  # <phi - E_main phi, u> = centred . v with |v| <= 1
    if radius == 0:
        return Enhancer(pi, log_pi, 0.0, 0.0)
    lengths = np.linalg.norm(centred, axis=1)
    v = centred[lengths > 0] / lengths[lengths > 0, None]
    if not len(v):  # the main policy is certain, or the features are all equal
        return Enhancer(pi, log_pi, 0.0, 0.0)
    best = np.zeros(len(v))
    for _ in range(sweeps):
        laws = _furthest(log_pi, centred @ v.T, beta, radius)
        moved = laws @ centred
        norms = np.linalg.norm(moved, axis=1)
        if (norms <= best * (1 + 1e-9)).all():
            break
        best, v = norms, moved / np.maximum(norms, 1e-300)[:, None]
    k = int(np.argmax(norms))
    with np.errstate(divide="ignore"):
        log_law = np.log(laws[k])
    return Enhancer(laws[k], log_law, float(norms[k]), radius * float(norms[k]) - beta * kl(log_law, log_pi))


def _furthest(log_pi: Array, along: Array, beta: float, radius: float) -> Array:
    """pi_l (k, n) with the largest allowed l in k directions; along (n, k) = <phi - E_main phi, u>, of mean 0."""
    rows = along.T
    top = rows.max(1, keepdims=True)
    at_top = rows >= top - 1e-12 * np.abs(top)

    def law(strength: Array) -> tuple[Array, Array, Array]:
        """pi_l, f(l) and f'(l); KL = l <.> - log E_main exp(l along)."""
        weights = log_pi + strength * (rows - top)
        peak = weights.max(1, keepdims=True)
        p = np.exp(weights - peak)
        total = p.sum(1, keepdims=True)
        p /= total
        mean = (p * rows).sum(1, keepdims=True)
        f = beta * (strength * (mean - top) - peak - np.log(total)) - radius * mean
        return p, f, (beta * strength - radius) * (p * (rows - mean) ** 2).sum(1, keepdims=True)

    mass = np.where(at_top, np.exp(log_pi), 0.0)
    total = mass.sum(1, keepdims=True)
    with np.errstate(divide="ignore"):
        free = -beta * np.log(total) <= radius * top  # all the mass on the furthest responses is allowed
    low, high = np.full((len(rows), 1), radius / beta), np.full((len(rows), 1), 2 * radius / beta)
    for _ in range(200):
        beyond = (law(high)[1] > 0) | free
        if beyond.all():
            break
        low, high = np.where(beyond, low, high), np.where(beyond, high, 2 * high)
    at = high
    for _ in range(100):  # Newton's method, by bisection where it leaves the bracket
        p, f, slope = law(at)
        low, high = np.where(f <= 0, at, low), np.where(f <= 0, high, at)
        new = at - f / np.maximum(slope, 1e-300)
        new = np.where((new > low) & (new < high), new, (low + high) / 2)
        done = (np.abs(new - at) <= 1e-14 * at) | (np.abs(f) <= 1e-15) | free
        if done.all():
            break
        at = np.where(done, at, new)
    return np.where(free, mass / np.where(total > 0, total, 1.0), p)


# ---- offline ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Pessimist:
    """policy, log_policy (n,); value = its pessimistic objective; gap >= the distance of that value from the
    maximum."""

    policy: Array
    log_policy: Array
    value: float
    gap: float


def pessimistic_value(
    log_policy: ArrayLike,
    theta: ArrayLike,
    features: ArrayLike,
    nu: ArrayLike,
    sigma: ArrayLike,
    radius: float,
    log_reference: ArrayLike,
    beta: float,
    form: Literal["pointwise", "expected"] = "expected",
) -> float:
    """E_pi <phi - nu, theta> - radius (||E_pi phi - nu||, or E_pi ||phi - nu||) - beta KL(pi, ref)."""
    log_pi = np.asarray(log_policy, dtype=np.float64)
    pi, x = np.exp(log_pi), np.asarray(features, dtype=np.float64) - np.asarray(nu, dtype=np.float64)
    L = inverse_root(sigma)
    norm = pi @ np.linalg.norm(x @ L, axis=1) if form == "pointwise" else np.linalg.norm(pi @ x @ L)
    reward = pi @ x @ np.asarray(theta)
    return float(reward - check_radius(radius) * norm) - beta * kl(log_pi, np.asarray(log_reference))


def pessimistic_policy(
    theta: ArrayLike,
    features: ArrayLike,
    nu: ArrayLike,
    sigma: ArrayLike,
    radius: float,
    log_reference: ArrayLike,
    beta: float,
    form: Literal["pointwise", "expected"] = "expected",
) -> Pessimist:
    r"""The offline policy; nu (d,) the reference vector, sigma (d, d), radius >= 0 (0 is the KL optimum of theta).

    "expected" is solved by its dual, a minimum over rewards instead of a maximum over laws: over |z| <= 1,
    g(z) = beta log E_ref exp(<phi - nu, theta - radius L z> / beta), L L^T = Sigma^-1, by Newton's method on the ball
    (`ball_maximum`) with backtracking. Every z has a law pi_z, and g(z) - value(pi_z) bounds what is missing: the gap.
    ArithmeticError where it stays above 1e-9 (of 1 + |value|).
    """
    if form not in ("pointwise", "expected"):
        raise ValueError(f"form is {form!r}; it is 'pointwise' (option I) or 'expected' (option II)")
    theta, ref = np.asarray(theta, dtype=np.float64), np.asarray(log_reference, dtype=np.float64)
    beta, radius = check_positive(beta, "beta"), check_radius(radius)
    x = np.asarray(features, dtype=np.float64) - np.asarray(nu, dtype=np.float64)
    white = x @ inverse_root(sigma)
    reward = x @ theta
    if form == "pointwise" or radius == 0:
        penalty = radius * np.linalg.norm(white, axis=1)
        pi, log_pi = policy_of(reward - penalty, ref, beta)
        return Pessimist(pi, log_pi, float(pi @ (reward - penalty)) - beta * kl(log_pi, ref), 0.0)

    def dual(z: Array) -> tuple[float, Array, Array]:
        logits = ref + (reward - radius * white @ z) / beta
        pi, log_pi = softmax(logits)
        return beta * float(logits[0] - log_pi[0]), pi, log_pi

    z = np.zeros(white.shape[1])
    value, pi, log_pi = dual(z)
    best = Pessimist(pi, log_pi, -np.inf, np.inf)
    for _ in range(_NEWTON_STEPS):
        mean = pi @ white
        primal = float(pi @ reward) - radius * float(np.linalg.norm(mean)) - beta * kl(log_pi, ref)
        if value - primal < best.gap:
            best = Pessimist(pi, log_pi, primal, max(value - primal, 0.0))
        if best.gap <= 1e-13 * (1 + abs(value)):
            break
        gradient = -radius * mean
        H = radius**2 / beta * ((white.T * pi) @ white - np.outer(mean, mean))
        H += 1e-12 * max(float(np.trace(H)), 1e-300) * np.eye(len(z))
        y, _ = ball_maximum(H, np.ones(len(z)), H @ z - gradient, 1.0)
        step, length = y - z, 1.0
        noise = 1e-14 * (1 + abs(value))  # below it Newton goes on by the gradient alone
        while (trial := dual(z + length * step))[0] > value + 1e-4 * length * float(gradient @ step) + noise:
            length /= 2
        z, (value, pi, log_pi) = z + length * step, trial
    if not best.gap <= 1e-9 * (1 + abs(best.value)):
        raise ArithmeticError(f"the duality gap is {best.gap:.2g} after {_NEWTON_STEPS} Newton steps")
    return best


# ---- online ----------------------------------------------------------------------------------------------------------


class GSHF:
    """A run of the online method on one bandit: advance(N) then advance(M) equals advance(N + M), bit for bit.

    theta          theta* (d,), |theta*| <= ball; features (n, d); log_reference (n,)
    radius         of Pi_t: larger looks further; 0 makes the enhancer the main policy, which is iterative DPO
    batch          m comparisons an iteration
    given          (n, n) numbers of wins to begin with (the hybrid variant); None = no data
    regret         (t,): J*(r*) - J(r*, pi_t^1) of each iteration so far, exact; norms (t,): of the enhancer
    """

    def __init__(
        self,
        theta: ArrayLike,
        features: ArrayLike,
        log_reference: ArrayLike,
        beta: float,
        *,
        radius: float,
        batch: int,
        ball: float,
        ridge: float = 1.0,
        seed: int = 0,
        given: ArrayLike | None = None,
    ) -> None:
        self.features = np.asarray(features, dtype=np.float64)
        self.log_reference = np.asarray(log_reference, dtype=np.float64)
        theta = np.asarray(theta, dtype=np.float64)
        if self.features.shape != (len(self.log_reference), len(theta)):
            raise ValueError(
                f"features has shape {self.features.shape}; expected ({len(self.log_reference)}, {len(theta)})"
            )
        if not np.linalg.norm(theta) <= ball:
            raise ValueError(
                f"|theta| is {np.linalg.norm(theta):.4g}, beyond the ball {ball}; take ball at least that"
            )
        if batch < 1:
            raise ValueError(f"batch is {batch}; an iteration has at least 1 comparison")
        n = len(self.features)
        self.true, self.beta, self.ball = self.features @ theta, check_positive(beta, "beta"), float(ball)
        self.radius, self.ridge, self.batch = check_radius(radius), check_positive(ridge, "ridge"), int(batch)
        self.wins = np.zeros((n, n)) if given is None else np.array(given, dtype=np.float64)
        if self.wins.shape != (n, n) or not (self.wins >= 0).all():
            raise ValueError(
                f"given has shape {self.wins.shape}; expected ({n}, {n}) numbers of wins, at least 0"
            )
        self._rng = np.random.default_rng(seed)
        self._first, self._second = np.triu_indices(n, 1)
        self._differences = self.features[self._first] - self.features[self._second]
        self.regret: list[float] = []
        self.norms: list[float] = []
        self._fit(np.zeros(len(theta)))

    def _fit(self, start: Array) -> None:
        won = self.wins[self._first, self._second]
        counts = won + self.wins[self._second, self._first]
        self.theta = fit_preferences(
            self._differences, won, counts=counts, radius=self.ball, start=start
        ).theta
        self.policy, self.log_policy = main_policy(self.theta, self.features, self.log_reference, self.beta)

    def advance(self, iterations: int) -> Self:
        for _ in range(iterations):
            sigma = covariance(self.features, self.wins, self.ridge)
            second = enhancer(self.log_policy, self.features, sigma, self.beta, self.radius)
            self.regret.append(float(shortfall(self.log_policy, self.true, self.log_reference, self.beta)))
            self.norms.append(second.norm)
            u = self._rng.random((self.batch, 3))
            y1, y2 = (
                np.minimum(np.searchsorted(np.cumsum(p), u[:, k], side="right"), len(p) - 1)
                for k, p in enumerate((self.policy, second.policy))
            )
            won = u[:, 2] < expit(self.true[y1] - self.true[y2])
            np.add.at(self.wins, (np.where(won, y1, y2), np.where(won, y2, y1)), 1.0)
            self._fit(self.theta)
        return self
