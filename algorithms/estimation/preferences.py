"""Maximum likelihood of a linear reward from comparisons, to the optimum, with a certificate.

Pair i of trajectories has the feature difference D_i = phi(first) - phi(second) (d,), was compared n_i times,
and the first was preferred w_i times. Under P(first preferred) = Phi(<D_i, theta>) with a log-concave
link Phi,

    maximise  f(theta) = sum_i [ w_i log Phi(<D_i,theta>) + (n_i - w_i) log Phi(-<D_i,theta>) ]
                         - ridge/2 |theta|^2            over |theta| <= radius,

a concave problem. (w_i, n_i) are sufficient: see `merge_repeated`. The solver is Newton's method in which
every step maximises the second-order model over the whole ball (secular equation for the multiplier nu),
followed by backtracking: globally convergent, quadratic at the end, and feasible throughout. The certificate
is the Karush-Kuhn-Tucker system  grad f(theta) = nu theta,  nu >= 0,  nu (radius - |theta|) = 0.

When the differences do not span R^d the answer is the maximiser of least norm, which lies in their span.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.linalg.lapack import dpocon, dpotrf, dpotrs
from scipy.optimize import linprog
from scipy.sparse import csr_array, eye_array, hstack

from ...envs.links import LOGISTIC, Link
from ...envs.links import link as named_link

Array = NDArray[np.float64]

EPSILON = float(np.finfo(np.float64).eps)
# Below this reciprocal condition number of D^T D the fit moves to orthonormal coordinates of the span.
SAFE_CONDITION = 1e-9
# Past this margin, a maximiser is taken for real only after a linear program has said that one exists.
SUSPICIOUS_MARGIN = 25.0
SUSPICIOUS_ITERATION = 15


class SeparableDataError(ValueError):
    """The likelihood has no maximiser: some direction of theta explains every answer, or contradicts none."""


@dataclass(frozen=True)
class PreferenceFit:
    """What `fit_preferences` returns.

    theta (d,); `gradient_norm` = |grad f(theta) - multiplier theta|, the certificate; `hessian` (d, d) =
    minus the Hessian of f at theta (ridge included, multiplier not); `log_likelihood` without the ridge term;
    `multiplier` = nu of the ball; `converged`: the certificate is at most tolerance times the largest
    gradient the data allow, that is sum_i n_i |D_i|.
    """

    theta: Array
    gradient_norm: float
    hessian: Array
    log_likelihood: float
    multiplier: float
    iterations: int
    converged: bool


@dataclass(frozen=True)
class _Chart:
    """Coordinates z of the span of the signed rows X: theta = basis z, Z = X basis, |theta|^2 = z^T
    diag(metric) z."""

    Z: Array
    metric: Array
    basis: Array | None  # None: the identity
    pull: Array | None  # z = pull theta is the orthogonal projection on the span

    def theta(self, z: Array) -> Array:
        return z if self.basis is None else self.basis @ z

    def coordinates(self, theta: Array) -> Array:
        return theta.copy() if self.pull is None else self.pull @ theta


def _first(bad: Any) -> int:
    return int(np.flatnonzero(bad)[0])


def _checked(differences: ArrayLike, wins: ArrayLike, counts: ArrayLike | None) -> tuple[Array, Array, Array]:
    D = np.ascontiguousarray(differences, dtype=np.float64)
    if D.ndim != 2 or D.shape[1] == 0:
        raise ValueError(f"differences has shape {D.shape}; (q, d) is needed, one row a pair, with d >= 1")
    w = np.asarray(wins, dtype=np.float64)
    n = np.ones(len(D)) if counts is None else np.asarray(counts, dtype=np.float64)
    for name, given in (("wins", w), ("counts", n)):
        if given.shape != (len(D),):
            raise ValueError(
                f"{name} has shape {given.shape}; differences has {len(D)} rows: ({len(D)},) is needed"
            )
    bad = ~np.isfinite(D).all(axis=1)
    if bad.any():
        raise ValueError(f"differences[{_first(bad)}] is not finite")
    bad = ~(np.isfinite(n) & (n >= 0))
    if bad.any():
        raise ValueError(f"counts[{_first(bad)}] is {n[_first(bad)]:g}; a finite number >= 0 is needed")
    bad = ~((w >= 0) & (w <= n))
    if bad.any():
        i = _first(bad)
        raise ValueError(
            f"wins[{i}] is {w[i]:g}; it must lie between 0 and the number of comparisons, {n[i]:g}"
        )
    return D, w, n


def merge_repeated(
    differences: ArrayLike, wins: ArrayLike, counts: ArrayLike | None = None
) -> tuple[Array, Array, Array]:
    """(differences, wins, counts) with one row for each distinct pair; the likelihood is the same function.

    A pair shown in the other order (-D_i) is the same pair with wins and losses exchanged. Rows that say
    nothing (D_i = 0 or n_i = 0) are dropped.
    """
    D, w, n = _checked(differences, wins, counts)
    said = (n > 0) & D.any(axis=1)
    D, w, n = D[said], w[said], n[said]
    if len(D) == 0:
        return D, w, n
    leading = D[np.arange(len(D)), (D != 0).argmax(axis=1)]
    flipped = leading < 0
    D = np.where(flipped[:, None], -D, D) + 0.0  # + 0.0: no negative zeros, which would tell equal rows apart
    w = np.where(flipped, n - w, w)
    rows, index = np.unique(D, axis=0, return_inverse=True)
    total_wins, total_counts = np.zeros(len(rows)), np.zeros(len(rows))
    np.add.at(total_wins, index.ravel(), w)
    np.add.at(total_counts, index.ravel(), n)
    return rows, total_wins, total_counts


def _signed(D: Array, w: Array, n: Array) -> tuple[Array, Array]:
    """Rows X and weights such that f = sum weight_j log Phi(<X_j, theta>): a loss is a win, reversed."""
    moves = D.any(axis=1)
    won, lost = moves & (w > 0), moves & (w < n)
    if not (won & lost).any():  # every pair is one-sided, as single comparisons are: no row is needed twice
        sided = won | lost
        sign = np.where(won, 1.0, -1.0)[sided]
        return D[sided] * sign[:, None], np.where(won, w, n - w)[sided]
    return np.concatenate([D[won], -D[lost]]), np.concatenate([w[won], (n - w)[lost]])


def _chart(X: Array) -> _Chart:
    """The features themselves if they are well conditioned; else coordinates of their span.

    The span comes from the spectrum of X^T X where that has a clear gap (as one-hot features give), and
    otherwise from an SVD, in coordinates in which the rows are orthonormal: then the scales of the features
    do not matter.
    """
    m, d = X.shape
    if m >= d:
        gram = X.T @ X
        factor, info = dpotrf(gram, lower=1)
        if info == 0 and dpocon(factor, np.abs(gram).sum(axis=0).max(), uplo="L")[0] > SAFE_CONDITION:
            return _Chart(X, np.ones(d), None, None)
        spectrum, V = np.linalg.eigh(gram)
        kept = spectrum > 1e-6 * spectrum[-1]
        # Rows orthogonal to the rest to the last digit; a feature in small units would be only nearly so.
        if np.linalg.norm(X @ V[:, ~kept]) <= m * EPSILON * np.sqrt(spectrum[-1]):
            V = V[:, kept]
            return _Chart(np.ascontiguousarray(X @ V), np.ones(V.shape[1]), V, V.T)
    U, s, Vt = np.linalg.svd(X, full_matrices=False)
    rank = int((s > s[0] * max(m, d) * EPSILON).sum())
    U, s, Vt = np.ascontiguousarray(U[:, :rank]), s[:rank], Vt[:rank]
    return _Chart(U, s**-2.0, Vt.T / s, Vt * s[:, None])


def ball_maximum(A: Array, metric: Array, rhs: Array, radius: float) -> tuple[Array, float]:
    """argmax of rhs^T y - y^T A y / 2 over y^T diag(metric) y <= radius^2, with its multiplier nu.

    y(nu) = (A + nu M)^{-1} rhs; Newton's method on 1/radius - 1/|y(nu)|, which is nearly linear and, from the
    left of its root, monotone (Hebden; More and Sorensen).
    """
    nu = 0.0
    floor = EPSILON * float(np.trace(A)) / float(metric.sum()) + 1e-300
    for _ in range(100):
        factor, info = dpotrf(A + np.diag(nu * metric), lower=1)
        if (
            info != 0
        ):  # A is singular to working precision (all answers explained): the least shift that is not
            nu = max(10 * nu, floor)
            continue
        y = dpotrs(factor, rhs, lower=1)[0]
        length = float(np.sqrt(y @ (metric * y)))
        if length <= radius * (1 + 4 * EPSILON):
            return y, nu
        pulled = metric * y
        slope = float(pulled @ dpotrs(factor, pulled, lower=1)[0])
        step = length * length / slope * (length - radius) / radius
        if length <= radius * (1 + 1e-13) or step <= EPSILON * nu:
            break
        nu += step
    return y * (radius / length), nu


def _separable(Z: Array) -> bool:
    """Is there a direction u with Z u >= 0 and Z u != 0? A linear program: max sum t, Z u >= t, 0 <= t <=
    1."""
    rows = Z / np.linalg.norm(Z, axis=1, keepdims=True)
    m, r = rows.shape
    answer = linprog(
        np.concatenate([np.zeros(r), -np.ones(m)]),
        A_ub=hstack([csr_array(-rows), eye_array(m)]),
        b_ub=np.zeros(m),
        bounds=[(None, None)] * r + [(0.0, 1.0)] * m,
        method="highs",
    )
    # By homogeneity the optimum is 0 (no such direction) or at least 1.
    return bool(answer.status == 3 or (answer.x is not None and -answer.fun > 0.5))


def fit_preferences(
    differences: ArrayLike,
    wins: ArrayLike,
    *,
    counts: ArrayLike | None = None,
    link: Link | str = LOGISTIC,
    radius: float | None = None,
    ridge: float = 0.0,
    start: ArrayLike | None = None,
    tolerance: float = 1e-10,
    max_iterations: int = 100,
) -> PreferenceFit:
    """The preference MLE of the module docstring; differences (q, d), wins (q,), counts (q,) or None (ones).

    radius: the bound B on |theta|, None for no bound. ridge >= 0. start: a warm start (d,). Fractional wins
    (soft labels) are allowed. Zero comparisons give theta = 0. Without radius and ridge, separable data have
    no maximiser: `SeparableDataError`. If the iterations run out, `converged` is False and theta is the best
    point found. Each iteration costs q d^2 + d^3 / 3 multiplications, in BLAS.
    """
    D, w, n = _checked(differences, wins, counts)
    link = named_link(link)
    d = D.shape[1]
    if radius is not None and not (np.isfinite(radius) and radius > 0):
        raise ValueError(f"radius is {radius}; it must be positive and finite, or None for no ball")
    if not (np.isfinite(ridge) and ridge >= 0):
        raise ValueError(f"ridge is {ridge}; it must be finite and >= 0")
    if not tolerance > 0:
        raise ValueError(f"tolerance is {tolerance}; it must be positive")
    if max_iterations < 0:
        raise ValueError(f"max_iterations is {max_iterations}; it must be >= 0")
    theta0 = np.zeros(d) if start is None else np.asarray(start, dtype=np.float64)
    if theta0.shape != (d,) or not np.isfinite(theta0).all():
        raise ValueError(f"start must be a finite vector of shape ({d},), got shape {theta0.shape}")

    X, weight = _signed(D, w, n)
    silent = float((n.sum() - weight.sum()) * link.log(np.float64(0.0)))  # comparisons of equal features
    if len(X) == 0:
        return PreferenceFit(np.zeros(d), 0.0, ridge * np.eye(d), silent, 0.0, 0, True)
    chart = _chart(X)
    Z, metric = chart.Z, chart.metric
    ball = np.inf if radius is None else float(radius)
    attained = radius is not None or ridge > 0  # a maximiser is known to exist
    largest_gradient = float(weight @ np.linalg.norm(X, axis=1))

    def objective(z: Array, margins: Array) -> float:
        return float(weight @ link.log(margins) - 0.5 * ridge * (z @ (metric * z)))

    z = chart.coordinates(theta0)
    length = np.sqrt(z @ (metric * z))
    if length > ball:
        z *= ball / length
    margins = Z @ z
    value = objective(z, margins)
    if start is not None:
        zero = objective(np.zeros_like(z), np.zeros_like(margins))
        if value < zero:  # a start worse than none
            z, margins, value = np.zeros_like(z), np.zeros_like(margins), zero

    iterations, previous = 0, np.inf
    while True:
        residual = weight * link.dlog(margins)
        curvature = np.maximum(-weight * link.d2log(margins), 0.0)
        theta = chart.theta(z)
        gradient = X.T @ residual - ridge * theta
        multiplier, certificate = _certificate(gradient, theta, ball)
        converged = certificate <= tolerance * largest_gradient

        scaled = Z * np.sqrt(curvature)[:, None]
        A = scaled.T @ scaled
        A[np.diag_indices_from(A)] += ridge * metric
        g = Z.T @ residual - ridge * (metric * z)
        y, nu = ball_maximum(A, metric, g + A @ z, ball)
        step = y - z
        decrement = float(np.sqrt(max(step @ (g - nu * (metric * z)), 0.0)))
        # Once the certificate holds, go on only while Newton still gains: the affine-invariant half.
        if converged and (decrement <= tolerance or 1e-8 > decrement > 0.9 * previous):
            if attained or _exists(residual, curvature, Z @ step, margins):
                break
            if _separable(Z):
                raise _separable_error(len(D))
            attained = True
        if iterations >= max_iterations:
            break
        if not attained and (iterations >= SUSPICIOUS_ITERATION or np.abs(margins).max() > SUSPICIOUS_MARGIN):
            if _separable(Z):
                raise _separable_error(len(D))
            attained = True

        slope, t = float(g @ step), 1.0
        noise = 8 * EPSILON * (float(weight.sum()) + abs(value))  # differences of f below this are rounding
        along = Z @ step
        while True:
            moved, moved_margins = z + t * step, margins + t * along
            moved_value = objective(moved, moved_margins)
            if moved_value >= value + 1e-4 * t * slope - noise or t < 1e-12:
                break
            t *= 0.5
        iterations += 1
        if t < 1e-12:  # no ascent is left in float64
            break
        z, margins, value, previous = moved, Z @ moved, moved_value, decrement

    hessian = (X * curvature[:, None]).T @ X
    hessian[np.diag_indices_from(hessian)] += ridge
    likelihood = float(weight @ link.log(margins)) + silent
    return PreferenceFit(theta, certificate, hessian, likelihood, multiplier, iterations, converged)


def _certificate(gradient: Array, theta: Array, ball: float) -> tuple[float, float]:
    """The multiplier nu >= 0 that fits grad f = nu theta best (0 inside the ball), and what is left."""
    square = float(theta @ theta)
    multiplier = 0.0
    if square > 0 and np.sqrt(square) >= ball * (1 - 1e-10):
        multiplier = max(float(gradient @ theta) / square, 0.0)
    return multiplier, float(np.linalg.norm(gradient - multiplier * theta))


def _exists(residual: Array, curvature: Array, step_margins: Array, margins: Array) -> bool:
    """A proof that the unconstrained maximum is attained.

    It is, exactly if some lambda > 0 has Z^T lambda = 0 (Stiemke). With the Newton step s, Z^T W Z s = Z^T r,
    so that
    lambda = r - W Z s is one as soon as it is positive. Far out, r is lost in rounding and proves nothing.
    """
    return bool(
        (curvature * np.abs(step_margins) <= 0.5 * residual).all()
        and np.abs(margins).max() <= SUSPICIOUS_MARGIN
    )


def _separable_error(rows: int) -> SeparableDataError:
    return SeparableDataError(
        f"the {rows} comparison(s) are separable: a direction of theta contradicts none of them, so that the "
        "likelihood has no maximiser; give radius= (the bound B on |theta|) or ridge= (a Gaussian prior)"
    )
