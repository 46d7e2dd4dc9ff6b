"""Greedy against pessimistic maximum likelihood (`algorithms/pessimistic_mle.py`), by enumeration of all answers.

Three arms with rewards r_1 > r_2 > r_3, m comparisons of the first two and one of arm 3 with arm 2: the answers
are a number of wins w in 0..m and the outcome of the one, so that every probability below is an exact sum. For large m
the estimate over the box comes from its two stationarity equations, which the general solver confirms at small m.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.special import expit, gammaln, log_expit

from ...algorithms.estimation import fit_preferences
from ...algorithms.pessimistic_mle import box_mle, design, pessimistic, set_norm
from ...envs.kernels import Array
from ..cells import Cell
from ..claim import Claim, Control, Judgement, Outcome, Plan
from ..statistics import all_of, judge_identity, judge_inequality
from ._declare import cells_of, controls

PAPER = "Zhu, Jiao and Jordan, ICML 2023 (arXiv 2301.11270)"
BOX = 1.0  # |theta_j| <= 1: differences of rewards are at most 2
RADIUS = 2.5  # of the confidence set, times sqrt(n)
RIDGE = 1e-8
SMALL, LARGE = (20, 50), (50, 200, 500, 2000, 5000)
PAIRS = np.array([[1.0, -1.0, 0.0], [0.0, -1.0, 1.0]])  # arm 1 with arm 2, arm 3 with arm 2


cell = cells_of(__name__)


def rewards(seed: int) -> Array:
    """(1, 0.5, 0) for the first seed; for others two random gaps in [0.3, 0.9]."""
    gaps = np.random.default_rng([seed, 1]).uniform(0.3, 0.9, 2) if seed != 1000 else np.array([0.5, 0.5])
    return np.array([gaps.sum(), gaps[1], 0.0])


def binomial(m: int, p: float) -> Array:
    """P(w wins of m), w = 0, ..., m."""
    w = np.arange(m + 1)
    log_choose = gammaln(m + 1) - gammaln(w + 1) - gammaln(m - w + 1)
    return np.asarray(np.exp(log_choose + w * np.log(p) + (m - w) * np.log1p(-p)))


def estimates(m: int, won: bool) -> tuple[Array, Array]:
    """theta_1 - theta_2 and theta_3 - theta_2 over the box for every w, (m + 1,) each.

    If arm 3 won, its lead is as large as the box leaves: the width 2 above arm 2, or above arm 1 where that is lower.
    So the likelihood of the first difference alone decides, with log sigma(2 + x) of the lead where x < 0; a concave
    function of x, maximised by bisection of its derivative. If arm 3 lost, the picture is its mirror image.
    """
    if not won:
        lead, last = (x[::-1] for x in estimates(m, True))
        return -lead, -last
    w, width = np.arange(m + 1.0), 2 * BOX
    low, high = np.full(m + 1, -width), np.full(m + 1, width)
    for _ in range(60):
        x = 0.5 * (low + high)
        slope = w - m * expit(x) + np.where(x < 0, expit(-(width + x)), 0.0)
        low, high = np.where(slope > 0, x, low), np.where(slope > 0, high, x)
    x = 0.5 * (low + high)
    return x, np.minimum(width, width + x)


def chosen(m: int, lead: Array, last: Array, rule: str) -> Array:
    """Scores (k, 3) of the arms by greedy or pessimistic estimates, for differences (k,) to arm 2."""
    theta = np.stack([lead, np.zeros_like(lead), last], axis=1)
    if rule == "greedy":
        return theta
    n = m + 1
    sigma = design(PAIRS, [m, 1], RIDGE)
    v = np.zeros(3) if rule == "uncentred" else np.eye(3)[1]
    penalty = pessimistic(np.zeros(3), np.eye(3), v, sigma, RADIUS / np.sqrt(n)).penalty
    return theta - penalty


# ---- greedy fails ----------------------------------------------------------------------------------------------------


def greedy(*, seed: int, n: int, rule: str = "greedy", repeats: int = 1) -> dict[str, Any]:
    """P(arm 3 has the highest estimate) and the expected loss, by enumeration with the general solver over the box.

    repeats: comparisons of arms 3 and 2 in place of the single one.
    """
    r, m = rewards(seed), n - repeats
    law, single = binomial(m, expit(r[0] - r[1])), binomial(repeats, expit(r[2] - r[1]))
    third, loss, worst, apart = 0.0, 0.0, 0.0, 0.0
    for k, chance in enumerate(single):
        fits = [box_mle(PAIRS, [w, k], [m, repeats], BOX) for w in range(m + 1)]
        theta = np.array([f.theta - f.theta[1] for f in fits])
        worst = max(worst, max(f.residual for f in fits))
        if repeats == 1:
            lead, last = estimates(m, bool(k))
            apart = max(apart, float(np.abs(theta[:, [0, 2]] - np.stack([lead, last], axis=1)).max()))
        scores = chosen(m, theta[:, 0], theta[:, 2], rule)
        top = scores.max(axis=1, keepdims=True)
        third += chance * float(law @ (scores[:, 2] >= top[:, 0] - 1e-6))
        loss += chance * float(
            law @ (r[0] - r[np.argmax(scores >= top - 1e-6, axis=1)])
        )  # ties to the better arm
    ties = float(law[np.arange(m + 1) / m >= expit(2 * BOX)].sum())
    failure = float(expit(r[2] - r[1]))
    return {
        "error": third - failure,
        "loss": loss - failure * (1 - ties) * (r[0] - r[2]),
        "residual": worst,
        "apart": apart,
        "third": third,
    }


def greedy_cells(plan: Plan, **broken: Any) -> list[Cell]:
    return [cell("greedy", s, n=n, **broken) for s in plan.seed_range(quick=3, full=10) for n in SMALL]


def judge_greedy(outcomes: Sequence[Outcome]) -> Judgement:
    return all_of(
        {
            "arm 3 comes first when it won": judge_identity([o["error"] for o in outcomes]),
            "the loss stays": judge_inequality([o["loss"] for o in outcomes], 1e-12),
            "the solver": judge_identity([o["residual"] for o in outcomes], 1e-7),
            "the stationarity equations": judge_identity([o["apart"] for o in outcomes], 1e-4),
        }
    )


# ---- pessimism recovers ----------------------------------------------------------------------------------------------


def recovery(*, seed: int, rule: str = "pessimistic") -> dict[str, Any]:
    """The exact expected loss at every n, against Hoeffding's bound of the probability that arm 1 seems no better."""
    r = rewards(seed)
    losses, bounds = [], []
    for n in LARGE:
        m = n - 1
        law, loss = binomial(m, expit(r[0] - r[1])), 0.0
        for won, chance in ((True, expit(r[2] - r[1])), (False, expit(r[1] - r[2]))):
            scores = chosen(m, *estimates(m, won), rule)
            loss += float(chance) * float(law @ (r[0] - r[np.argmax(scores, axis=1)]))
        margin = max(float(expit(r[0] - r[1]) - expit(RADIUS / np.sqrt(m))) - 1 / m, 0.0)
        losses.append(loss)
        bounds.append((r[0] - r[1]) * float(np.exp(-2 * m * margin**2)))
    return {"loss": losses, "slack": np.subtract(bounds, losses), "last": 1e-3 - losses[-1]}


def recovery_cells(plan: Plan, **broken: Any) -> list[Cell]:
    return [cell("recovery", s, **broken) for s in plan.seed_range(quick=10, full=40)]


def judge_recovery(outcomes: Sequence[Outcome]) -> Judgement:
    return all_of(
        {
            "Hoeffding's bound": judge_inequality([x for o in outcomes for x in o["slack"]], 1e-12),
            "at n = 5,000 below 0.001": judge_inequality([o["last"] for o in outcomes]),
        }
    )


# ---- the guarantee ---------------------------------------------------------------------------------------------------


def guarantee(*, seed: int, n: int, fault: str = "none") -> dict[str, Any]:
    """A random linear instance with 2 contexts of 4 responses: 16 policies, n comparisons between responses of one.

    The radius is the smallest that covers theta*, so that the guarantee has no slack to hide in. Faults: the sum form
    of the covariance for a radius in the mean form; the bonus added in place of subtracted; the greedy choice.
    """
    rng = np.random.default_rng([seed, 2])
    d, phi, rho = 3, rng.normal(size=(2, 4, 3)), rng.dirichlet(np.ones(2))
    theta = rng.normal(size=d)
    s = rng.integers(2, size=n)
    pair = np.array([rng.choice(4, 2, replace=False, p=[0.55, 0.35, 0.05, 0.05]) for _ in range(n)])
    D = phi[s, pair[:, 0]] - phi[s, pair[:, 1]]
    won = rng.random(n) < np.exp(log_expit(D @ theta))
    fit = fit_preferences(D, won.astype(float), radius=4.0)
    candidates = np.array([rho[0] * phi[0, i] + rho[1] * phi[1, j] for i in range(4) for j in range(4)])
    v, sigma = candidates[0], design(D, ridge=1 / n)
    radius = set_norm(fit.theta - theta, sigma)
    metric = n * sigma if fault == "sum_covariance" else sigma
    found = pessimistic(fit.theta, candidates, v, metric, 0.0 if fault == "greedy" else radius)
    lower = found.lower + 2 * found.penalty if fault == "optimistic" else found.lower
    values = (candidates - v) @ theta
    best, pick = int(np.argmax(values)), int(np.argmax(lower))
    return {
        "lower": float((values - lower).min()),
        "loss": 2 * float(found.penalty[best]) - float(values[best] - values[pick]),
    }


def guarantee_cells(plan: Plan, **broken: Any) -> list[Cell]:
    seeds = plan.seed_range(quick=20, full=200)
    return [cell("guarantee", s, n=n, **broken) for s in seeds for n in (20, 100)]


def judge_guarantee(outcomes: Sequence[Outcome]) -> Judgement:
    return all_of(
        {
            "a lower bound": judge_inequality([o["lower"] for o in outcomes], 1e-9),
            "the loss": judge_inequality([o["loss"] for o in outcomes], 1e-9),
        }
    )


# ---- the claims ------------------------------------------------------------------------------------------------------


LOG = "a single comparison of arm 3, with arm 2; all others are of arms 1 and 2"

CLAIMS = (
    Claim(
        name="baselines_theory.greedy_fails",
        kind="identity",
        title="One lucky answer makes the greedy MLE choose the worst arm, however many others there are",
        statement=r"Three arms, $r_1 > r_2 > r_3$: arm 3 maximises the box MLE with probability exactly "
        r"$\sigma(r_3 - r_2)$ ($= 0.3775$ for rewards $1, 1/2, 0$) at every $n$, and the expected loss is at least "
        r"$\sigma(r_3 - r_2)\,(r_1 - r_3)\,P(w/m < \sigma(2))$.",
        assumptions=(LOG, r"$|\theta_j| \leq 1$", r"$n \in \{20, 50\}$, all answers enumerated"),
        source=f"{PAPER}, the failure of the greedy MLE (its constants are recalled; these are derived)",
        cells=greedy_cells,
        judge=judge_greedy,
        controls=(
            *controls(greedy_cells, "rule", pessimistic="pessimism in place of the greedy choice"),
            Control(
                "five_comparisons", "five comparisons of arm 3", lambda plan: greedy_cells(plan, repeats=5)
            ),
        ),
    ),
    Claim(
        name="baselines_theory.pessimism_recovers",
        kind="inequality",
        title="On the same answers the pessimistic MLE's loss vanishes exponentially fast",
        statement=r"With radius $c/\sqrt n$, $c = 2.5$ above the box's width, and $v = \phi_2$: arm 3 is never chosen, "
        r"and the expected loss is at most $(r_1 - r_2)\exp(-2m(\sigma(r_1-r_2) - \sigma(c/\sqrt m) - 1/m)_+^2)$, "
        r"$m = n - 1$; at $n = 5000$ it is below $0.001$.",
        assumptions=(LOG, r"$|\theta_j| \leq 1$", r"$r_1 - r_2 \geq 0.3$", r"$n$ from 50 to 5,000"),
        source=f"{PAPER}, the pessimistic MLE; the bound: Hoeffding",
        cells=recovery_cells,
        judge=judge_recovery,
        controls=controls(
            recovery_cells,
            "rule",
            greedy="the greedy choice in place of pessimism",
            uncentred="v = 0: the penalty is all for the direction that comparisons leave free",
        ),
    ),
    Claim(
        name="baselines_theory.pessimistic_bound",
        kind="inequality",
        title="While the confidence set covers the truth, pessimism bounds every value and its own loss",
        statement=r"If $\|\hat\theta - \theta^*\|_\Sigma \leq f$: $\langle\theta^*, E_\pi\phi - v\rangle \geq "
        r"\langle\hat\theta, E_\pi\phi - v\rangle - f\|E_\pi\phi - v\|_{\Sigma^{-1}}$ for every policy, and the choice "
        r"loses at most $2f\|E_{\pi^*}\phi - v\|_{\Sigma^{-1}}$.",
        assumptions=(r"the smallest such $f$", "16 policies, enumerated"),
        source=f"{PAPER}, the theorem on the pessimistic MLE, given its event (the constants are not asserted)",
        cells=guarantee_cells,
        judge=judge_guarantee,
        controls=controls(
            guarantee_cells,
            "fault",
            sum_covariance="the covariance as a sum, the radius for a mean",
            optimistic="the penalty added in place of subtracted",
            greedy="radius 0",
        ),
    ),
)
