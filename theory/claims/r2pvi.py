"""Claims about regularised worst-case expectations (`algorithms/robust_duals.py`): R2PVI's duals, not R2PVI itself.

The closed forms are held against other solvers of the primal: a linear program for total variation, Newton's method on
the simplex for KL, and the enumeration of all supports, each a linear system, for chi-square.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.optimize import linprog

from ...algorithms.robust_duals import (
    chi_square,
    chi_square_divergence,
    chi_square_dual,
    kl,
    kl_divergence,
    total_variation_distance,
    tv,
)
from ...envs.kernels import Array
from ..cells import Cell
from ..claim import Claim, Control, Judgement, Outcome, Plan
from ..statistics import all_of, judge_identity, judge_inequality
from ._declare import cells_of

PAPER = "Tang, Liu and Xu, ICML 2025 (arXiv 2411.18612)"
DUALS = {"tv": tv, "kl": kl, "chi2": chi_square}
DISTANCES = {"tv": total_variation_distance, "kl": kl_divergence, "chi2": chi_square_divergence}
LAMBDAS = (0.03, 0.1, 0.3, 1.0, 3.0)


cell = cells_of(__name__)


def instance(seed: int) -> tuple[Array, Array, np.random.Generator]:
    """Values in [0, 3] (one of them repeated), and a law with a small mass on the least, as of a fail state."""
    rng = np.random.default_rng([seed, 1])
    n = int(rng.integers(3, 7))
    V, p = 3 * rng.random(n), 0.9 * rng.dirichlet(np.ones(n)) + 0.1 / n
    V[rng.integers(n)] = V[0]
    p[np.argmin(V)] = 0.001
    return V, p / p.sum(), rng


# ---- primal solvers --------------------------------------------------------------------------------------------------


def primal_tv(V: Array, p: Array, lam: float) -> float:
    """Linear program in (mu, t): mu V + lam sum t / 2 with t >= |mu - p|."""
    n, eye = len(V), np.eye(len(V))
    cost = np.concatenate([V, np.full(n, lam / 2)])
    above, limits = np.block([[eye, -eye], [-eye, -eye]]), np.concatenate([p, -p])
    one = np.concatenate([np.ones(n), np.zeros(n)])[None, :]
    found = linprog(cost, above, limits, one, [1.0], bounds=[(0, None)] * (2 * n), method="highs")
    return float(found.fun)


def primal_kl(V: Array, p: Array, lam: float) -> float:
    """Newton's method on the simplex from the uniform law, damped so that no mass falls below a tenth at a step."""
    mu = np.full(len(V), 1 / len(V))
    for _ in range(2000):
        slope = V + lam * (np.log(mu / p) + 1)
        step = -mu * (slope - mu @ slope) / lam  # the Hessian is lam / mu; the multiplier keeps the sum
        decrement = float(step @ slope)
        mu = mu + min(1.0, 0.9 / max(float((-step / mu).max()), 1e-300)) * step
        mu /= mu.sum()
        if -decrement <= 1e-15:
            break
    return float(mu @ V) + lam * kl_divergence(mu, p)


def primal_chi2(V: Array, p: Array, lam: float) -> float:
    """The least value over all supports of the stationary point on each, where that is a law."""
    best = np.inf
    for size in range(1, len(V) + 1):
        for support in itertools.combinations(range(len(V)), size):
            i = list(support)
            system = np.zeros((size + 1, size + 1))
            system[:-1, :-1], system[:-1, -1], system[-1, :-1] = np.diag(2 * lam / p[i]), -1.0, 1.0
            mu = np.zeros(len(V))
            mu[i] = np.linalg.solve(system, np.append(2 * lam - V[i], 1.0))[:-1]
            if (mu >= 0).all():
                best = min(best, float(mu @ V) + lam * chi_square_divergence(mu, p))
    return best


PRIMALS = {"tv": primal_tv, "kl": primal_kl, "chi2": primal_chi2}


# ---- cells -----------------------------------------------------------------------------------------------------------


def duality(*, seed: int, kind: str, fault: str = "none") -> dict[str, Any]:
    """Dual minus primal at every lambda, the gap of the attaining law, and how far 20 other laws are above.

    Faults: chi-square's dual minimised over a (as in the released code); 2 lam for 4 lam in it; lam for lam / 2 in
    total variation; KL's soft-max in place of its mirror image.
    """
    V, p, rng = instance(seed)
    errors, above = [], []
    for lam in LAMBDAS:
        found = DUALS[kind](V, p, lam)
        value = found.value
        if fault == "minimised":
            value = min(chi_square_dual(V, p, lam, a) for a in np.linspace(V.min(), V.max(), 200))
        elif fault == "half_variance":
            value = chi_square(V, p, lam / 2).value
        elif fault == "full_distance":
            value = tv(V, p, 2 * lam).value
        elif fault == "unmirrored":
            value = -kl(-V, p, lam).value
        errors += [value - PRIMALS[kind](V, p, lam), found.gap]
        for mu in rng.dirichlet(np.ones(len(V)), size=20):
            above.append(float(mu @ V) + lam * DISTANCES[kind](mu, p) - value)
    return {"errors": errors, "above": above}


def duals(plan: Plan, only: str | None = None, **broken: Any) -> list[Cell]:
    seeds = plan.seed_range(quick=15, full=60)
    return [cell("duality", s, kind=k, **broken) for s in seeds for k in DUALS if only in (None, k)]


def judge_duality(outcomes: Sequence[Outcome]) -> Judgement:
    return all_of(
        {
            "equal": judge_identity([e for o in outcomes for e in o["errors"]], 1e-8),
            "no law is below": judge_inequality([x for o in outcomes for x in o["above"]], 1e-9),
        }
    )


def shape(*, seed: int, fault: str = "none") -> dict[str, Any]:
    """In lambda: increasing, concave, below the mean, its limits; KL below chi-square; first orders at large lambda.

    Faults: chi-square's dual minimised; the entropic soft-max (an optimist) in place of KL; chi-square's and KL's first
    orders exchanged.
    """
    V, p, _ = instance(seed)
    mean, grid = float(p @ V), np.geomspace(1e-3, 1e3, 40)
    variance = float(p @ (V - mean) ** 2)

    def value(kind: str, lam: float) -> float:
        if fault == "minimised" and kind == "chi2":
            return min(chi_square_dual(V, p, lam, a) for a in np.linspace(V.min(), V.max(), 200))
        return -kl(-V, p, lam).value if fault == "optimist" and kind == "kl" else DUALS[kind](V, p, lam).value

    slack, limits = [], []
    for kind in DUALS:
        nu = np.array([value(kind, lam) for lam in grid])
        slopes = np.diff(nu) / np.diff(grid)
        slack += [*np.diff(nu), *(mean - nu), *-np.diff(slopes)]
        small, large = value(kind, 1e-7), value(kind, 1e6)
        limits += [small - float(V.min()), large - mean]
    slack += [value("chi2", lam) - value("kl", lam) for lam in grid]
    lam = 1e3
    halves = (4, 2) if fault == "exchanged" else (2, 4)
    orders = [
        (mean - value(kind, lam)) * h * lam / variance - 1
        for kind, h in zip(("kl", "chi2"), halves, strict=True)
    ]
    exact = value("chi2", 2.0) - (mean - variance / 8)  # E(max V - V) <= 3 <= 2 lam: no mass is driven to 0
    flat = value("tv", float(np.ptp(V))) - mean
    return {"slack": slack, "limits": limits, "orders": orders, "exact": [exact, flat]}


def shapes(plan: Plan, **broken: Any) -> list[Cell]:
    return [cell("shape", s, **broken) for s in plan.seed_range(quick=15, full=60)]


def judge_shape(outcomes: Sequence[Outcome]) -> Judgement:
    return all_of(
        {
            "increasing, concave, below the mean, KL below chi-square": judge_inequality(
                [x for o in outcomes for x in o["slack"]], 1e-9
            ),
            "the limits": judge_identity([x for o in outcomes for x in o["limits"]], 1e-3),
            "first order": judge_identity([x for o in outcomes for x in o["orders"]], 1e-2),
            "exact": judge_identity([x for o in outcomes for x in o["exact"]]),
        }
    )


def control(cells: Any, name: str, text: str, **parameters: Any) -> Control:
    return Control(name, text, lambda plan: cells(plan, fault=name, **parameters))


CLAIMS = (
    Claim(
        name="r2pvi.duals",
        kind="identity",
        title="The three duals equal their primal problems",
        statement=r"$\inf_\mu E_\mu V + \lambda D(\mu \| p)$ is $E_p\min(V, \min V + \lambda)$ for total variation, "
        r"$-\lambda\log E_p e^{-V/\lambda}$ for KL, and $\sup_\alpha E_p\min(V,\alpha) - "
        r"\mathrm{Var}_p\min(V,\alpha)/(4\lambda)$ for chi-square, to $10^{-8}$.",
        assumptions=(r"$\lambda$ from 0.03 to 3, values in $[0, 3]$, up to 6 outcomes",),
        source=f"{PAPER}, the duals of the regularised Bellman operator",
        cells=duals,
        judge=judge_duality,
        controls=(
            control(duals, "minimised", "chi-square's dual minimised, as in the released code", only="chi2"),
            control(duals, "half_variance", "Var / (2 lambda) in chi-square's dual", only="chi2"),
            control(duals, "full_distance", "the sum of |mu - p| without its half", only="tv"),
            control(duals, "unmirrored", "KL's soft-max in place of its mirror image", only="kl"),
        ),
    ),
    Claim(
        name="r2pvi.shape",
        kind="inequality",
        title="Robust values rise with lambda from the worst value to the mean",
        statement=r"$\nu_\lambda$ is increasing and concave in $\lambda$, at most $E_p V$, tends to $\min V$ and to "
        r"$E_p V$; $\nu^{\mathrm{KL}} \leq \nu^{\chi^2}$; $E_p V - \nu_\lambda$ is $\mathrm{Var}/(2\lambda)$ for KL "
        r"and $\mathrm{Var}/(4\lambda)$ for chi-square to first order, exactly so for chi-square once "
        r"$2\lambda \geq E_p(\max V - V)$.",
        assumptions=("limits at 1e-7 and 1e6 to 1e-3, first order at 1e3 to 1e-2", "p positive"),
        source=f"{PAPER}; elementary",
        cells=shapes,
        judge=judge_shape,
        controls=(
            control(shapes, "minimised", "chi-square's dual minimised, as in the released code"),
            control(shapes, "optimist", "the entropic soft-max in place of its mirror image"),
            control(shapes, "exchanged", "the first orders of KL and chi-square exchanged"),
        ),
    ),
)
