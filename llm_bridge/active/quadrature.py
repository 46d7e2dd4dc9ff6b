r"""The Bayesian posterior of a reward with few features, exact up to a quadrature that bounds its own error.

    p(theta | answers)  proportional to  exp(-|theta|^2 / (2 tau^2)) prod_i Phi(+-<Delta_i, theta>)

is what PR-LSVI's Gaussian and the ensemble of heads stand for. With d = 2 it is a sum over a grid, and so are its mean,
its covariance, and the expected disagreement of two draws about a pair,

    E |<Delta, theta_0 - theta_1>| = 2 int F(1 - F), F the distribution function of <Delta, theta>.

The grid lies in the coordinates of Laplace's approximation, theta = mode + L^{-T} z, |z_i| <= `width`, and moves with
each answer. On a smooth density that vanishes at the border the trapezoidal sum converges faster than any power of the
spacing; `edge` is the mass that sits on the border.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.linalg import solve_triangular

from ...algorithms.estimation import GaussianPosterior, fit_preferences
from ...envs.kernels import Array
from ...envs.links import LOGISTIC, Link


class GridPosterior:
    """A belief (`beliefs.Belief`) that is the posterior itself. Its draws are points of the grid.

    dimension  1 or 2 (the grid has points^d nodes)
    precision  1 / tau^2, of the prior N(0, tau^2 I)

    nodes, weights  (points^d, d), (points^d,); edge: the largest share of mass on one face of the grid
    theta, covariance  the posterior's mean and covariance; the greedy policy of the mean is Bayes-optimal
    """

    def __init__(
        self,
        dimension: int,
        precision: float,
        *,
        points: int = 121,
        width: float = 7.0,
        link: Link = LOGISTIC,
    ) -> None:
        if not 1 <= dimension <= 2:
            raise ValueError(
                f"dimension is {dimension}; a grid serves 1 or 2: cut the pool's features, `cut_to_axes`"
            )
        if not 0 < precision < np.inf:
            raise ValueError(f"precision is {precision}; the prior's 1 / tau^2 is positive and finite")
        self.precision, self.link = precision, link
        axis = np.linspace(-width, width, points)
        self._z = np.stack(np.meshgrid(*[axis] * dimension, indexing="ij"), -1).reshape(-1, dimension)
        self._faces = [self._z[:, k] == side for k in range(dimension) for side in (-width, width)]
        self.differences, self.wins = np.empty((0, dimension)), np.empty(0)
        self._lay(np.zeros(dimension), precision**0.5 * np.eye(dimension))

    def _lay(self, mode: Array, factor: Array) -> None:
        """The grid around the mode, precision = factor factor^T, and the posterior's weights on it."""
        self.mode = mode
        self.nodes = mode + solve_triangular(factor, self._z.T, lower=True, trans="T").T
        signed = self.differences * (2 * self.wins - 1)[:, None]
        log_p = self.link.log(self.nodes @ signed.T).sum(axis=1) - self.precision / 2 * (self.nodes**2).sum(
            axis=1
        )
        weights = np.exp(log_p - log_p.max())
        self.weights = weights / weights.sum()
        self.edge = max(float(self.weights[face].sum()) for face in self._faces)
        self._cdf = np.cumsum(self.weights)

    @property
    def theta(self) -> Array:
        return np.asarray(self.weights @ self.nodes)

    @property
    def covariance(self) -> Array:
        off = self.nodes - self.theta
        return np.asarray((off * self.weights[:, None]).T @ off)

    def draw(self, rng: np.random.Generator) -> Array:
        at = np.searchsorted(self._cdf, rng.random() * self._cdf[-1], side="right")
        return np.asarray(self.nodes[min(int(at), len(self.nodes) - 1)])

    def ahead(self) -> NodesAhead:
        return NodesAhead(self.nodes, self.weights)

    def add(self, differences: Array, wins: ArrayLike) -> None:
        self.differences = np.concatenate([self.differences, np.reshape(differences, (-1, self._z.shape[1]))])
        self.wins = np.concatenate([self.wins, np.asarray(wins, dtype=np.float64)])
        fit = fit_preferences(
            self.differences, self.wins, ridge=self.precision, link=self.link, start=self.mode
        )
        self._lay(fit.theta, GaussianPosterior.laplace(fit).factor)

    def arrays(self) -> dict[str, Any]:
        return {"differences": self.differences, "wins": self.wins}


@dataclass(frozen=True)
class NodesAhead:
    """The expected disagreement of two draws from weighted nodes: exact for the grid, pair by pair."""

    nodes: Array
    weights: Array

    def gaps(self, differences: Array) -> Array:
        found = np.empty(len(differences))
        for i, difference in enumerate(differences):
            margins = self.nodes @ difference
            order = np.argsort(margins)
            F = np.cumsum(self.weights[order])[:-1]
            found[i] = 2 * float((F * (1 - F)) @ np.diff(margins[order]))
        return found

    def count(self, difference: Array) -> None:
        """The average over answers that are not known yet is not taken: pairs of a batch are measured alike."""
