r"""The worst expectation under a regularised change of law, in closed form: total variation, KL, chi-square.

C. Tang, Z. Liu, P. Xu, "Robust Offline Reinforcement Learning with Linearly Structured f-Divergence Regularization",
ICML 2025 (arXiv 2411.18612): the inner problem of a robust Bellman backup, for values V (n,), a law p (n,), lam > 0:

  nu = inf over laws mu of  E_mu V + lam D(mu || p)

  total variation  D = sum |mu - p| / 2       nu = E_p min(V, min V + lam)                              `tv`
  KL               D = sum mu log(mu / p)     nu = -lam log E_p exp(-V / lam), the mirrored soft-max     `kl`
  chi-square       D = sum (mu - p)^2 / p     nu = sup over a in [min V, max V] of
                                                   E_p min(V, a) - Var_p min(V, a) / (4 lam)             `chi_square`

The supremum of the last is at the a with E_p (a - V)_+ = 2 lam (at max V where that is larger), found by sorting: no
grid. (The authors' code for the simulated MDP minimises over a, which is min V whatever lam.) With lam -> infinity all
tend to E_p V, with lam -> 0 to the minimum of V: for total variation over all outcomes, for the others over the support
of p, outside of which their D is infinite. nu is increasing and concave in lam, and at most E_p V.

Each function returns the law that attains nu: E_law V + lam D(law || p) = nu is a certificate, since every dual value
is below every primal one. Only these duals are here; the algorithm R2PVI is not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import rel_entr

from ..envs.kernels import Array
from .kl_bayes import check_distribution
from .optimisation.losses import check_positive
from .planning.soft import soft_maximum


@dataclass(frozen=True, eq=False)
class WorstCase:
    """value = nu, the dual's; law (n,), the primal's minimiser; gap = E_law V + lam D(law || p) - value, 0 up to
    rounding."""

    value: float
    law: Array
    gap: float = field(compare=False)


def _checked(values: ArrayLike, law: ArrayLike, lam: float) -> tuple[Array, Array, float]:
    p, V = check_distribution(law, "law"), np.asarray(values, dtype=np.float64)
    if V.shape != p.shape:
        raise ValueError(f"values has shape {V.shape}; the law has {len(p)} outcomes: expected ({len(p)},)")
    if not np.isfinite(V).all():
        i = int(np.flatnonzero(~np.isfinite(V))[0])
        raise ValueError(f"values[{i}] is {V[i]}; values must be finite")
    return V, p, check_positive(lam, "lam")


def total_variation_distance(mu: ArrayLike, p: ArrayLike) -> float:
    return float(np.abs(np.asarray(mu, dtype=np.float64) - np.asarray(p, dtype=np.float64)).sum()) / 2


def kl_divergence(mu: ArrayLike, p: ArrayLike) -> float:
    return float(rel_entr(np.asarray(mu, dtype=np.float64), np.asarray(p, dtype=np.float64)).sum())


def chi_square_divergence(mu: ArrayLike, p: ArrayLike) -> float:
    m, q = np.asarray(mu, dtype=np.float64), np.asarray(p, dtype=np.float64)
    if ((q == 0) & (m > 0)).any():
        return math.inf
    held = q > 0
    return float(((m[held] - q[held]) ** 2 / q[held]).sum())


def tv(values: ArrayLike, law: ArrayLike, lam: float) -> WorstCase:
    """Mass moves to the smallest value from all that exceed it by more than lam."""
    V, p, lam = _checked(values, law, lam)
    low = V.min()
    value = float(p @ np.minimum(V, low + lam))
    moved = low + lam < V
    worst = np.where(moved, 0.0, p)
    worst[np.argmin(V)] += p[moved].sum()
    return WorstCase(value, worst, float(worst @ V) + lam * total_variation_distance(worst, p) - value)


def kl(values: ArrayLike, law: ArrayLike, lam: float) -> WorstCase:
    """The law in proportion to p exp(-V / lam)."""
    V, p, lam = _checked(values, law, lam)
    top, rows = soft_maximum(-V[None, :], p[None, :], lam)
    value, worst = -float(top[0]), rows[0]
    return WorstCase(value, worst, float(worst @ V) + lam * kl_divergence(worst, p) - value)


def chi_square_dual(values: ArrayLike, law: ArrayLike, lam: float, alpha: float) -> float:
    """E_p min(V, alpha) - Var_p min(V, alpha) / (4 lam): at most nu for every alpha >= min V."""
    V, p, lam = _checked(values, law, lam)
    capped = np.minimum(V, alpha)
    mean = float(p @ capped)
    return mean - float(p @ (capped - mean) ** 2) / (4 * lam)


def chi_square(values: ArrayLike, law: ArrayLike, lam: float) -> WorstCase:
    """The law p (a - V)_+ / (2 lam), with a such that it sums to 1."""
    V, p, lam = _checked(values, law, lam)
    order = np.argsort(V, kind="stable")
    order = order[p[order] > 0]
    v, mass = V[order], np.cumsum(p[order])
    below = np.cumsum(p[order] * v)
    # with the k smallest values below a: a = (2 lam + sum p V) / sum p, the first k for which the next is above it
    alphas = (2 * lam + below) / mass
    k = int(np.argmax(np.append(alphas[:-1] <= v[1:], True)))
    alpha = float(alphas[k])
    worst = np.zeros_like(p)
    kept = order[: k + 1]
    worst[kept] = p[kept] * (alpha - V[kept]) / (2 * lam)
    worst /= worst.sum()
    value = chi_square_dual(V, p, lam, min(alpha, float(v[-1])))
    return WorstCase(value, worst, float(worst @ V) + lam * chi_square_divergence(worst, p) - value)
