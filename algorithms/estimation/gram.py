"""Regularised Gram matrices, ridge regression and ellipsoid norms on sufficient statistics.

    Lambda_n = lambda I + sum_{i <= n} x_i x_i^T   is held as its Cholesky factor L (d, d), updated by
    rotations; b_n      = sum_{i <= n} x_i y_i^T              (d, m);
    theta_n  = Lambda_n^{-1} b_n                   the ridge estimate;
    ||x||_{Lambda^{-1}} = |L^{-1} x|,   log det(Lambda / lambda) = 2 sum_i log(L_ii) - d log(lambda).

One datum costs O(d^2 + d m), however many came before. No matrix is ever inverted.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import solve_triangular

from .linear_algebra import cholesky_update, downdate_norms, solve_factored, solve_lower, solve_upper

Array = NDArray[np.float64]


def _vector(x: ArrayLike, d: int, name: str) -> Array:
    out = np.ascontiguousarray(x, dtype=np.float64)
    if out.shape != (d,):
        raise ValueError(f"{name} has shape {out.shape}; a vector of dimension {d} is needed")
    if not np.isfinite(out).all():
        raise ValueError(f"{name}[{int(np.flatnonzero(~np.isfinite(out))[0])}] is not finite")
    return out


def _rows(x: ArrayLike, d: int, name: str) -> Array:
    out = np.ascontiguousarray(x, dtype=np.float64)
    if out.ndim != 2 or out.shape[1] != d:
        raise ValueError(f"{name} has shape {out.shape}; rows of dimension {d} are needed, that is (n, {d})")
    bad = ~np.isfinite(out).all(axis=1)
    if bad.any():
        raise ValueError(f"{name}[{int(np.flatnonzero(bad)[0])}] is not finite")
    return out


class Gram:
    """Lambda = lambda I + sum x x^T on its Cholesky factor.

    `factor` is L (d, d), lower, C-contiguous (compiled code may update it by `cholesky_update`; then `count`
    is the caller's to keep); `regularisation` is lambda > 0; `count` is the number of updates.
    """

    def __init__(self, dimension: int, regularisation: float = 1.0) -> None:
        if dimension < 1:
            raise ValueError(f"dimension is {dimension}; it must be at least 1")
        if not (np.isfinite(regularisation) and regularisation > 0):
            raise ValueError(f"regularisation is {regularisation}; lambda must be positive and finite")
        self.regularisation = float(regularisation)
        self.factor: Array = np.sqrt(self.regularisation) * np.eye(dimension)
        self.count = 0

    @property
    def dimension(self) -> int:
        return self.factor.shape[0]

    @property
    def matrix(self) -> Array:
        """Lambda (d, d)."""
        return self.factor @ self.factor.T

    @property
    def log_determinant(self) -> float:
        """log det(Lambda) - log det(lambda I): zero before the first update."""
        d = self.dimension
        return float(2 * np.log(np.diagonal(self.factor)).sum() - d * np.log(self.regularisation))

    def update(self, x: ArrayLike) -> None:
        """Lambda += x x^T; x (d,)."""
        cholesky_update(self.factor, _vector(x, self.dimension, "x"))
        self.count += 1

    def update_many(self, X: ArrayLike) -> None:
        """Lambda += X^T X; X (n, d). One factorisation where that is cheaper than n updates."""
        X = _rows(X, self.dimension, "X")
        if len(X) > self.dimension:
            self.factor = np.ascontiguousarray(np.linalg.cholesky(self.matrix + X.T @ X))
        else:
            for x in X:
                cholesky_update(self.factor, x)
        self.count += len(X)

    def solve(self, b: ArrayLike) -> Array:
        """Lambda^{-1} b for b (d,) or (d, m)."""
        b = np.ascontiguousarray(b, dtype=np.float64)
        if b.ndim == 1:
            return solve_factored(self.factor, _vector(b, self.dimension, "b"))
        half = solve_triangular(self.factor, b, lower=True, check_finite=False)
        return solve_triangular(self.factor, half, lower=True, trans="T", check_finite=False)

    def norm(self, X: ArrayLike) -> Array | float:
        """||x||_{Lambda^{-1}}: a float for X (d,), an array (n,) for rows X (n, d)."""
        X = np.ascontiguousarray(X, dtype=np.float64)
        if X.ndim == 1:
            half = solve_lower(self.factor, _vector(X, self.dimension, "X"))
            return float(np.sqrt(half @ half))
        X = _rows(X, self.dimension, "X")
        half = solve_triangular(self.factor, X.T, lower=True, check_finite=False)
        return np.sqrt(np.einsum("dn,dn->n", half, half))

    def weighted_norm(self, v: ArrayLike) -> float:
        """||v||_Lambda = |L^T v|, the norm in which estimates are close: v (d,)."""
        return float(np.linalg.norm(np.tril(self.factor).T @ _vector(v, self.dimension, "v")))

    def draw(
        self,
        mean: ArrayLike,
        scale: float,
        *,
        rng: np.random.Generator | None = None,
        normals: ArrayLike | None = None,
    ) -> Array:
        """One draw of N(mean, scale^2 Lambda^{-1}): mean + scale L^{-T} z, with z (d,) given or drawn from
        `rng`."""
        d = self.dimension
        if normals is None and rng is not None:
            normals = rng.standard_normal(d)
        elif rng is not None or normals is None:
            raise ValueError("give either rng or normals, and not both")
        z = _vector(normals, d, "normals")
        return _vector(mean, d, "mean") + scale * solve_upper(self.factor, z)

    def arrays(self) -> dict[str, Array]:
        """The state as arrays; `Gram.from_arrays` restores it bit for bit."""
        return {
            "factor": self.factor.copy(),
            "regularisation": np.array(self.regularisation),
            "count": np.array(self.count),
        }

    @classmethod
    def from_arrays(cls, arrays: dict[str, Array]) -> Gram:
        factor = np.array(arrays["factor"], dtype=np.float64, order="C")
        if factor.ndim != 2 or factor.shape[0] != factor.shape[1] or not (np.diagonal(factor) > 0).all():
            raise ValueError(
                f"factor {factor.shape} is not a Cholesky factor: square, with a positive diagonal"
            )
        gram = cls(len(factor), float(arrays["regularisation"]))
        gram.factor = factor
        gram.count = int(arrays["count"])
        return gram


@dataclass
class RidgeRegression:
    """theta = Lambda^{-1} sum x y^T on sufficient statistics, for m targets at once (`moment` is b (d, m)).

    With y = e_{s'} the columns of `moment` count next states: theta_V = Lambda^{-1} (b V) is then the
    regression on V(s') for any V, without the data (`estimate(V)`).
    """

    gram: Gram
    moment: Array

    @classmethod
    def empty(cls, dimension: int, targets: int = 1, regularisation: float = 1.0) -> RidgeRegression:
        return cls(Gram(dimension, regularisation), np.zeros((dimension, targets)))

    def update(self, x: ArrayLike, y: ArrayLike) -> None:
        """Add the datum (x (d,), y (m,) or a number)."""
        x = _vector(x, self.gram.dimension, "x")
        y = _vector(np.atleast_1d(np.asarray(y, dtype=np.float64)), self.moment.shape[1], "y")
        self.gram.update(x)
        self.moment += np.outer(x, y)

    def update_index(self, x: ArrayLike, target: int) -> None:
        """Add the datum (x, e_target) at O(d^2): the unit vector is never written out."""
        x = _vector(x, self.gram.dimension, "x")
        if not 0 <= target < self.moment.shape[1]:
            raise ValueError(f"target is {target}; it must be in 0, ..., {self.moment.shape[1] - 1}")
        self.gram.update(x)
        self.moment[:, target] += x

    def estimate(self, values: ArrayLike | None = None) -> Array:
        """theta (d, m); with `values` (m,), the estimate (d,) for the scalar target y^T values."""
        if values is None:
            return self.gram.solve(self.moment)
        return self.gram.solve(self.moment @ _vector(values, self.moment.shape[1], "values"))


@dataclass
class TrackedNorms:
    """||x||_{Lambda^{-1}} for fixed rows X (n, d), kept current at O(n d) an update instead of O(n d^2).

    `update(x)` updates the Gram matrix too (it owns it). Subtractions drift by rounding, so the norms are
    computed afresh every `refresh` updates; `drift` is the largest change of a squared norm that the last
    refresh made, relative to the largest squared norm.
    """

    gram: Gram
    X: Array
    refresh: int = 1000
    squared: Array = field(init=False)
    since_refresh: int = field(init=False, default=0)
    drift: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        if self.refresh < 1:
            raise ValueError(f"refresh is {self.refresh}; it must be at least 1")
        self.X = _rows(self.X, self.gram.dimension, "X")
        self.squared = self._fresh()

    def _fresh(self) -> Array:
        return np.asarray(self.gram.norm(self.X)) ** 2

    @property
    def norms(self) -> Array:
        """(n,)"""
        return np.sqrt(self.squared)

    def update(self, x: ArrayLike) -> None:
        """Lambda += x x^T, and every norm with it."""
        x = _vector(x, self.gram.dimension, "x")
        u = solve_factored(self.gram.factor, x)
        downdate_norms(self.squared, self.X, u, float(x @ u))
        self.gram.update(x)
        self.since_refresh += 1
        if self.since_refresh >= self.refresh:
            fresh = self._fresh()
            self.drift = float(np.abs(fresh - self.squared).max(initial=0.0) / fresh.max(initial=1e-300))
            self.squared = fresh
            self.since_refresh = 0
