"""The preference MLE on a growing stream of comparisons, at amortised O(d^2) a comparison.

Exact refits (`fit_preferences`, warm-started) happen whenever the number of comparisons has grown by the factor
1 + growth since the last one; a refit costs O(q d^2), so that all of them up to q cost O(q d^2 / growth). Between
two refits the log-likelihood is replaced by its second-order model b^T theta - theta^T H theta / 2, to which each
new comparison adds its own second-order terms at the current theta: with m = <x, theta> for the signed x,

    w = -(log Phi)''(m),   H += w x x^T,   b += ((log Phi)'(m) + w m) x,   theta = argmax of the model on the ball.

That is an online Newton step. It costs O(d^2) while theta = H^{-1} b stays inside the ball, and a few
factorisations, O(d^3), when the ball is active; never more as the stream grows. growth = 0 refits at every
comparison: theta is then the exact MLE throughout.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ...envs.links import LOGISTIC, Link
from ...envs.links import link as named_link
from .linear_algebra import cholesky_update, solve_factored
from .preferences import ball_maximum, fit_preferences

Array = NDArray[np.float64]


class OnlinePreferenceMLE:
    """`add` one comparison at a time; `theta` (d,) is the current estimate, zero before the first.

    Parameters: radius (the ball |theta| <= B) and/or ridge, as in `fit_preferences`; one of them is needed, since
    the first comparisons are always separable. growth in [0, 1].
    Exposed: count; refits; fitted, the count at the last refit; gradient_norm and multiplier, the certificate of
    the last refit; factor and linear, the Cholesky factor of H and b. Without ridge, H carries 1 / radius^2 on its
    diagonal, centred at the last refit: a direction that no comparison has shown moves by the ball at most.
    """

    def __init__(
        self,
        dimension: int,
        *,
        radius: float | None = None,
        ridge: float = 0.0,
        link: Link = LOGISTIC,
        growth: float = 0.05,
    ) -> None:
        if dimension < 1:
            raise ValueError(f"dimension is {dimension}; it must be at least 1")
        if radius is None and not ridge > 0:
            raise ValueError(
                "give radius= or ridge=: the first comparisons of a stream have no maximiser otherwise"
            )
        if not 0 <= growth <= 1:
            raise ValueError(
                f"growth is {growth}; it must be in [0, 1] (0.05: a refit when 5 % more have come)"
            )
        fit_preferences(
            np.zeros((0, dimension)), [], radius=radius, ridge=ridge
        )  # its checks of radius and ridge
        self.radius, self.ridge, self.link, self.growth = radius, float(ridge), link, float(growth)
        self.theta: Array = np.zeros(dimension)
        self.factor: Array = np.sqrt(self._damping() + self.ridge) * np.eye(dimension)
        self.linear: Array = np.zeros(dimension)
        self.count = self.fitted = self.refits = 0
        self.gradient_norm = self.multiplier = 0.0
        self._differences: Array = np.empty((16, dimension))
        self._wins: Array = np.empty(16)

    def _damping(self) -> float:
        return 0.0 if self.ridge > 0 or self.radius is None else self.radius**-2

    @property
    def differences(self) -> Array:
        """(count, d), a view."""
        return self._differences[: self.count]

    @property
    def wins(self) -> Array:
        """(count,), a view."""
        return self._wins[: self.count]

    def add(self, difference: ArrayLike, won: float) -> None:
        """One comparison: difference (d,) = phi(first) - phi(second); won = 1 if the first was preferred, else 0."""
        x = np.asarray(difference, dtype=np.float64)
        if x.shape != self.theta.shape or not np.isfinite(x).all():
            raise ValueError(
                f"comparison {self.count}: the difference must be a finite vector of shape {self.theta.shape}, "
                f"got {np.array2string(x, threshold=8)} of shape {x.shape}"
            )
        if won not in (0, 1):
            raise ValueError(f"comparison {self.count}: won must be 1 (first preferred) or 0, got {won!r}")
        if self.count == len(self._wins):
            self._differences = np.concatenate([self._differences, np.empty_like(self._differences)])
            self._wins = np.concatenate([self._wins, np.empty_like(self._wins)])
        self._differences[self.count] = x
        self._wins[self.count] = won
        self.count += 1
        if self.count >= self.fitted + max(1, int(self.growth * self.fitted)):
            self.refit()
        else:
            self._newton_step(x if won else -x)

    def _newton_step(self, x: Array) -> None:
        margin = self.theta @ x
        curvature = max(-float(self.link.d2log(margin)), 0.0)
        cholesky_update(self.factor, np.sqrt(curvature) * x)
        self.linear += (self.link.dlog(margin) + curvature * margin) * x
        theta = solve_factored(self.factor, self.linear)
        if self.radius is not None and theta @ theta > self.radius**2:
            theta, _ = ball_maximum(
                self.factor @ self.factor.T, np.ones(len(theta)), self.linear, self.radius
            )
        self.theta = theta

    def refit(self) -> None:
        """Make theta the exact MLE of all comparisons so far."""
        fit = fit_preferences(
            self.differences,
            self.wins,
            link=self.link,
            radius=self.radius,
            ridge=self.ridge,
            start=self.theta,
        )
        self.theta, self.gradient_norm, self.multiplier = fit.theta, fit.gradient_norm, fit.multiplier
        H = fit.hessian + self._damping() * np.eye(len(fit.theta))
        self.factor = np.asarray(np.linalg.cholesky(H), dtype=np.float64)
        self.linear = (
            H @ fit.theta + fit.multiplier * fit.theta
        )  # so that theta is the model's maximum on the ball
        self.fitted = self.count
        self.refits += 1

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The whole state as arrays (for `numpy.savez`); what continues from it continues bit for bit."""
        return {
            "differences": self.differences.copy(),
            "wins": self.wins.copy(),
            "theta": self.theta.copy(),
            "factor": self.factor.copy(),
            "linear": self.linear.copy(),
            "counters": np.array([self.count, self.fitted, self.refits]),
            "certificate": np.array([self.gradient_norm, self.multiplier]),
            "settings": np.array([np.nan if self.radius is None else self.radius, self.ridge, self.growth]),
            "link": np.array(self.link.name),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> OnlinePreferenceMLE:
        """The inverse of `arrays`."""
        radius, ridge, growth = (float(x) for x in arrays["settings"])
        differences = np.array(arrays["differences"], dtype=np.float64, order="C")
        count, dimension = differences.shape
        new = cls(
            dimension,
            radius=None if np.isnan(radius) else radius,
            ridge=ridge,
            link=named_link(str(arrays["link"])),
            growth=growth,
        )
        new.count, new.fitted, new.refits = (int(x) for x in arrays["counters"])
        shapes = {
            "wins": (count,),
            "theta": (dimension,),
            "linear": (dimension,),
            "factor": (dimension, dimension),
        }
        for name, shape in shapes.items():
            if arrays[name].shape != shape:
                raise ValueError(
                    f"{name} has shape {arrays[name].shape}; {shape} goes with {count} comparisons"
                )
        if new.count != count:
            raise ValueError(f"counters[0] is {new.count}, but differences has {count} rows")
        capacity = 16
        while capacity < count:
            capacity *= 2
        new._differences, new._wins = np.empty((capacity, dimension)), np.empty(capacity)
        new._differences[:count], new._wins[:count] = differences, arrays["wins"]
        new.theta = np.array(arrays["theta"], dtype=np.float64)
        new.linear = np.array(arrays["linear"], dtype=np.float64)
        new.factor = np.array(arrays["factor"], dtype=np.float64, order="C")
        new.gradient_norm, new.multiplier = (float(x) for x in arrays["certificate"])
        return new
