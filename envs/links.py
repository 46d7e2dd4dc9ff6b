"""Link functions Phi: P(first preferred) = Phi(r(first) - r(second)).

A link is increasing with Phi(-x) = 1 - Phi(x). Everything is elementwise on arrays or numbers, in float64
and keeps full relative accuracy in both tails (|x| up to 700), where the naive formulas give log 0 or 0 / 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import erfcx, expit, log_expit, log_ndtr, logit, ndtr, ndtri

Elementwise = Callable[[Any], Any]

SQRT_2PI = float(np.sqrt(2 * np.pi))
# Below this, x + (log Phi)'(x) of the probit cancels, and a continued fraction replaces the sum.
PROBIT_TAIL = -8.0


@dataclass(frozen=True)
class Link:
    """A link and what estimation needs of it.

    value       Phi(x), in (0, 1)
    log         log Phi(x)
    dlog        (log Phi)'(x) = Phi'(x) / Phi(x), positive
    d2log       (log Phi)''(x), negative: the log-likelihood of comparisons is concave
    derivative  Phi'(x), largest at 0
    inverse     Phi^{-1}(p)
    lipschitz   max_x Phi'(x)
    curvature   R -> 1 / Phi'(R) in closed form, see `kappa`
    """

    name: str
    value: Elementwise
    log: Elementwise
    dlog: Elementwise
    d2log: Elementwise
    derivative: Elementwise
    inverse: Elementwise
    lipschitz: float
    curvature: Callable[[float], float]

    def kappa(self, radius: float) -> float:
        """sup_{|x| <= radius} 1 / Phi'(x), radius = the largest return difference; inf on overflow."""
        if not radius >= 0:
            raise ValueError(f"kappa needs a radius of reward differences >= 0, got {radius}")
        with np.errstate(over="ignore"):
            return float(self.curvature(np.float64(radius)))


def _logistic_derivative(x: Any) -> Any:
    return expit(x) * expit(-np.asarray(x))


def _logistic_d2log(x: Any) -> Any:
    return -_logistic_derivative(x)


def _logistic_dlog(x: Any) -> Any:
    return expit(-np.asarray(x))


def _logistic_curvature(radius: float) -> float:
    return 2.0 + np.exp(radius) + np.exp(-radius)


def _normal_density(x: Any) -> Any:
    return np.exp(-0.5 * np.square(x)) / SQRT_2PI


def _probit_dlog(x: Any) -> Any:
    # phi / Phi = sqrt(2/pi) / erfcx(-x / sqrt 2): no log of nearly 0, no difference of large numbers.
    return np.sqrt(2 / np.pi) / erfcx(-np.asarray(x, dtype=np.float64) / np.sqrt(2))


def _probit_d2log(x: Any) -> Any:
    """-m (x + m) with m = (log Phi)'; for x = -t far out, x + m = 1/(t + 2/(t + 3/(t + ...))) (Laplace)."""
    x = np.asarray(x, dtype=np.float64)
    m = _probit_dlog(x)
    gap = x + m
    if (x < PROBIT_TAIL).any():
        t = np.maximum(-x, -PROBIT_TAIL)
        fraction = t
        for k in range(24, 1, -1):
            fraction = t + k / fraction
        gap = np.where(x < PROBIT_TAIL, 1 / fraction, gap)
    return -m * gap


def _probit_curvature(radius: float) -> float:
    return SQRT_2PI * np.exp(0.5 * radius * radius)


LOGISTIC = Link(
    name="logistic",
    value=expit,
    log=log_expit,
    dlog=_logistic_dlog,
    d2log=_logistic_d2log,
    derivative=_logistic_derivative,
    inverse=logit,
    lipschitz=0.25,
    curvature=_logistic_curvature,
)
PROBIT = Link(
    name="probit",
    value=ndtr,
    log=log_ndtr,
    dlog=_probit_dlog,
    d2log=_probit_d2log,
    derivative=_normal_density,
    inverse=ndtri,
    lipschitz=1 / SQRT_2PI,
    curvature=_probit_curvature,
)
LINKS = {each.name: each for each in (LOGISTIC, PROBIT)}


def link(given: Link | str) -> Link:
    """The link itself, or the one of that name."""
    if isinstance(given, Link):
        return given
    if given not in LINKS:
        raise ValueError(f"link {given!r} is not one of {', '.join(LINKS)}")
    return LINKS[given]
