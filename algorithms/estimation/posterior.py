"""Gaussian posteriors of a linear reward, confidence ellipsoids, and the disagreement rule in closed form.

N(theta_hat, sigma^2 Sigma^{-1})   with Sigma = lambda I + sum_q D_q D_q^T  (`from_gram`), or with Sigma the
                                   Hessian of the negative log-likelihood at theta_hat (`laplace`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import solve_triangular
from scipy.stats import chi2

from .gram import Gram
from .preferences import PreferenceFit

Array = NDArray[np.float64]


@dataclass(frozen=True)
class GaussianPosterior:
    """N(mean, scale^2 (L L^T)^{-1}): mean (d,), factor L (d, d) lower, scale = sigma >= 0."""

    mean: Array
    factor: Array
    scale: float = 1.0

    def __post_init__(self) -> None:
        d = len(self.mean)
        if self.mean.shape != (d,) or self.factor.shape != (d, d):
            raise ValueError(f"mean {self.mean.shape} and factor {self.factor.shape} are not (d,) and (d, d)")
        if not (np.isfinite(self.scale) and self.scale >= 0):
            raise ValueError(f"scale is {self.scale}; sigma must be finite and >= 0")

    @classmethod
    def from_gram(cls, mean: ArrayLike, gram: Gram, scale: float = 1.0) -> GaussianPosterior:
        """Precision Lambda / scale^2. The factor is copied: later updates of `gram` do not reach the posterior."""
        return cls(np.array(mean, dtype=np.float64), gram.factor.copy(), scale)

    @classmethod
    def laplace(cls, fit: PreferenceFit, scale: float = 1.0) -> GaussianPosterior:
        """Precision Hessian / scale^2 at the fit (its ridge is the Gaussian prior's precision)."""
        try:
            factor = np.asarray(np.linalg.cholesky(fit.hessian), dtype=np.float64)
        except np.linalg.LinAlgError:
            raise ValueError(
                "the Hessian is singular: the comparisons do not determine every direction; fit with ridge > 0"
            ) from None
        return cls(fit.theta.copy(), factor, scale)

    def from_normals(self, normals: ArrayLike) -> Array:
        """mean + scale L^{-T} z for each standard normal vector z of `normals` (..., d)."""
        z = np.asarray(normals, dtype=np.float64)
        if z.ndim == 0 or z.shape[-1] != len(self.mean):
            raise ValueError(f"normals has shape {z.shape}; the last axis must be {len(self.mean)}")
        flat = z.reshape(-1, z.shape[-1]).T
        return self.mean + self.scale * solve_triangular(self.factor, flat, lower=True, trans="T").T.reshape(
            z.shape
        )

    def draw(self, rng: np.random.Generator, size: int | None = None) -> Array:
        """(d,), or (size, d)."""
        d = len(self.mean)
        return self.from_normals(rng.standard_normal(d if size is None else (size, d)))

    def deviation(self, X: ArrayLike) -> Array:
        """Standard deviation of <x, theta> for rows X (n, d): scale ||x||_{Sigma^{-1}}, (n,)."""
        half = solve_triangular(self.factor, np.asarray(X, dtype=np.float64).T, lower=True)
        return self.scale * np.sqrt((half * half).sum(axis=0))

    def distance(self, theta: ArrayLike) -> float:
        """||theta - mean||_Sigma (the scale does not enter)."""
        return float(
            np.linalg.norm(np.tril(self.factor).T @ (np.asarray(theta, dtype=np.float64) - self.mean))
        )

    def contains(self, theta: ArrayLike, radius: float) -> bool:
        """Is theta in the ellipsoid ||theta - mean||_Sigma <= radius?"""
        return self.distance(theta) <= radius

    def credible_radius(self, level: float) -> float:
        """The radius whose ellipsoid has posterior probability `level`: scale sqrt(chi2_d quantile)."""
        if not 0 < level < 1:
            raise ValueError(f"level is {level}; it must be between 0 and 1")
        return float(self.scale * np.sqrt(chi2.ppf(level, len(self.mean))))


def confidence_radius(
    log_determinant: float, *, delta: float, kappa: float, regularisation: float, radius: float
) -> float:
    """A radius beta with P(for all q: ||theta_hat_q - theta*||_{Sigma_q} <= beta_q) >= 1 - delta; logistic link.

        beta = kappa/2 sqrt(2 log(1/delta) + log det(Sigma / lambda)) + 2 sqrt(lambda) B

    for the MLE over |theta| <= B = `radius` with |theta*| <= B, kappa = sup 1 / Phi' over the margins |<D, theta>| of
    that ball, lambda = `regularisation`, `log_determinant` = log det(Sigma / lambda), pairs chosen from the past at
    will. Proof: with the score S = sum D (o - Phi(<D, theta*>)), whose noise is 1/2-sub-Gaussian, optimality on the
    ball gives |e|_V^2 / kappa <= <S, e> for e = theta_hat - theta*, V = Sigma - lambda I; hence |e|_Sigma^2 <= kappa
    |S|_{Sigma^-1} |e|_Sigma + 4 lambda B^2, and |S|_{Sigma^-1} obeys the self-normalised bound of Abbasi-Yadkori,
    Pal and Szepesvari (2011), theorem 1.
    """
    if not 0 < delta < 1:
        raise ValueError(f"delta is {delta}; it must be between 0 and 1")
    for name, value in (("kappa", kappa), ("regularisation", regularisation), ("radius", radius)):
        if not value > 0:
            raise ValueError(f"{name} is {value}; it must be positive")
    noise = 0.5 * np.sqrt(2 * np.log(1 / delta) + log_determinant)
    return float(kappa * noise + 2 * np.sqrt(regularisation) * radius)


def disagreement(norm: ArrayLike, sigma: float) -> Array | float:
    """E |<D, theta_0 - theta_1>| for independent theta_i ~ N(., sigma^2 Sigma^{-1}), norm = ||D||_{Sigma^{-1}}.

    <D, theta_0 - theta_1> ~ N(0, 2 sigma^2 norm^2), and E|N(0, s^2)| = s sqrt(2 / pi), so the value is exactly
    2 / sqrt(pi) sigma norm. A pair is worth a query when it exceeds eps, on the scale of the reward.
    """
    return 2 / np.sqrt(np.pi) * sigma * np.asarray(norm, dtype=np.float64)[()]
