"""Claims about the penalty method on reward learning over policy optimisation (`algorithms/bilevel_penalty.py`).

The instances have 6 responses, a reward of 3 parameters and preferences that no such reward expresses; the upper level
is the risk of the preferences between the policy's own rollouts, or a quadratic. Derivatives are held against complex
steps through the value functions, with the penalised policy solved anew at complex parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy.special import expit

from ...algorithms.bilevel_penalty import (
    PreferenceRisk,
    Problem,
    Quadratic,
    gradient,
    inner_step,
    largest_sigma,
    penalised,
    run,
    three_terms,
    two_stage,
    value,
)
from ...algorithms.kl_bayes import divergence
from ...envs.kernels import Array
from .. import figures
from ..cells import Cell
from ..claim import Claim, Judgement, Outcome, Plan
from ..statistics import (
    conjunction,
    judge_identity,
    judge_inequality,
    judge_ordering,
    judge_rate,
    slope_loglog,
)
from ._declare import cells_of, controls

PAPER = "Kwon et al., ICLR 2024 (arXiv 2309.01753)"
UPPERS = ("preferences", "quadratic")
SIGMAS = (0.002, 0.004, 0.008, 0.016)


cell = cells_of(__name__)


def instance(seed: int, upper: str = "preferences") -> tuple[Problem, np.random.Generator]:
    """6 responses with random features; the preferences are those of 6 free rewards."""
    rng = np.random.default_rng([seed, 1])
    phi, reference = rng.normal(size=(6, 3)), 0.8 * rng.dirichlet(np.ones(6)) + 0.2 / 6
    rewards = rng.normal(size=6)
    risk = PreferenceRisk(phi, expit(rewards[:, None] - rewards[None, :]), ridge=0.1)
    chosen = risk if upper == "preferences" else Quadratic(rng.dirichlet(np.ones(6)), ridge=0.1)
    return Problem(phi, reference, float(rng.uniform(0.5, 1.5)), chosen), rng


# ---- the value gap ---------------------------------------------------------------------------------------------------


def gap(*, seed: int, fault: str = "none") -> dict[str, Any]:
    """g(x, y) - g*(x) - beta KL(y, y*(x)) at random x and y."""
    problem, rng = instance(seed)
    errors = []
    for _ in range(5):
        x, y = rng.normal(size=3), rng.dirichlet(np.ones(6))
        star, lowest = problem.plain(x)
        away = divergence(star, y) if fault == "reversed_kl" else divergence(y, star)
        scale = problem.beta**2 if fault == "beta_twice" else problem.beta
        errors.append(problem.lower(x, y) - lowest - scale * away)
    return {"errors": errors}


def gaps(plan: Plan, **broken: Any) -> list[Cell]:
    return [cell("gap", s, **broken) for s in plan.seed_range(quick=10, full=60)]


def judge_errors(outcomes: Sequence[Outcome]) -> Judgement:
    return judge_identity([e for o in outcomes for e in o["errors"]])


# ---- gradients -------------------------------------------------------------------------------------------------------


def _upper(problem: Problem, x: Array, y: Array) -> Any:
    """f(x, y) for complex x and y."""
    upper = problem.upper
    if isinstance(upper, Quadratic):
        return ((y - upper.target) ** 2).sum() / 2 + upper.ridge * (x @ x) / 2
    assert isinstance(upper, PreferenceRisk)
    return y @ _losses(upper, x) @ y + upper.ridge * (x @ x) / 2


def _losses(upper: PreferenceRisk, x: Array) -> Array:
    r = upper.features @ x
    m = r[:, None] - r[None, :]
    return np.asarray(upper.P * np.log1p(np.exp(-m)) + upper.P.T * np.log1p(np.exp(m)))


def _slope_y(problem: Problem, x: Array, y: Array) -> Array:
    upper = problem.upper
    if isinstance(upper, Quadratic):
        return np.asarray(y - upper.target)
    assert isinstance(upper, PreferenceRisk)
    return 2 * _losses(upper, x) @ y


def _value(problem: Problem, x: Array, sigma: float) -> Any:
    """psi_sigma at complex x, F at sigma = 0: y by 200 fixed-point rounds, the penalty term by term."""
    base = np.log(problem.reference) + problem.features @ x / problem.beta
    log_z = np.log(np.exp(base).sum())
    y = np.exp(base - log_z)
    for _ in range(200 if sigma > 0 else 0):
        log_y = base - sigma / problem.beta * _slope_y(problem, x, y)
        y = np.exp(log_y - np.log(np.exp(log_y).sum()))
    penalty = (y * (np.log(y) - base + log_z)).sum() * problem.beta
    return _upper(problem, x, y) + (penalty / sigma if sigma > 0 else 0.0)


def gradients(*, seed: int, upper: str, fault: str = "none") -> dict[str, Any]:
    """The implicit gradient of F and the three terms of psi, against complex steps through both value functions.

    Faults: z dropped (without grad g*); z at the reference; the implicit term dropped, and y = z in the three terms,
    which is the gradient when the data do not come from y.
    """
    problem, rng = instance(seed, upper)
    x, sigma, eps = 0.5 * rng.normal(size=3), float(rng.uniform(0.01, 0.05)), 1e-30

    def slope(s: float) -> Array:
        return np.array([_value(problem, x + 1j * eps * e, s).imag / eps for e in np.eye(3)])

    exact = penalised(problem, x, sigma)
    y, (z, _) = exact.y, problem.plain(x)
    implicit, three = gradient(problem, x), exact.gradient
    if fault == "z_dropped":
        three = three_terms(problem, x, y, np.zeros(6), sigma)
    elif fault == "z_at_reference":
        three = three_terms(problem, x, y, problem.reference, sigma)
    elif fault == "fixed_data":
        implicit, three = problem.upper.grad_x(x, z), three_terms(problem, x, z, z, sigma)
    value_errors = [value(problem, x) - _value(problem, x, 0.0), exact.value - _value(problem, x, sigma)]
    return {"errors": [*(implicit - slope(0.0)), *(three - slope(sigma)), *value_errors]}


def gradient_cells(plan: Plan, **broken: Any) -> list[Cell]:
    seeds = plan.seed_range(quick=5, full=30)
    return [cell("gradients", s, upper=upper, **broken) for s in seeds for upper in UPPERS]


# ---- a lower bound, first order in sigma -----------------------------------------------------------------------------


def bias(*, seed: int, upper: str, fault: str = "none") -> dict[str, Any]:
    """F - psi, |grad F - grad psi| and F - psi - sigma Var / (2 beta) at a random x, for every sigma.

    Faults: g* not subtracted; y_sigma for -f in place of f; the gradient with y = z, as if the data were fixed; the
    constant without the 1/2.
    """
    problem, rng = instance(seed, upper)
    x = 0.5 * rng.normal(size=3)
    star, lowest = problem.plain(x)
    slope = problem.upper.grad_y(x, star)
    constant = float(star @ (slope - star @ slope) ** 2) / (2 * problem.beta)
    if fault == "no_half":
        constant *= 2
    best, exact = value(problem, x), gradient(problem, x)
    below, apart, rest = [], [], []
    for sigma in SIGMAS:
        found = penalised(problem, x, sigma)
        psi, grad = found.value, found.gradient
        if fault == "no_z":
            psi += lowest / sigma
            grad = three_terms(problem, x, found.y, np.zeros(6), sigma)
        elif fault == "ascends":
            weight = star * np.exp(sigma / problem.beta * slope)
            y = weight / weight.sum()
            psi = problem.upper.value(x, y) + (problem.lower(x, y) - lowest) / sigma
        elif fault == "fixed_data":
            grad = three_terms(problem, x, star, star, sigma)
        below.append(best - psi)
        apart.append(float(np.linalg.norm(exact - grad)))
        rest.append(abs(best - psi - sigma * constant))
    return {"below": below, "apart": apart, "rest": rest, "constant": constant}


def bias_cells(plan: Plan, **broken: Any) -> list[Cell]:
    seeds = plan.seed_range(quick=10, full=40)
    return [cell("bias", s, upper=upper, **broken) for s in seeds for upper in UPPERS]


def judge_below(outcomes: Sequence[Outcome]) -> Judgement:
    """psi <= F, and psi rises as sigma falls."""
    slack = [np.diff([0.0, *o["below"]]) for o in outcomes]
    return judge_inequality(np.concatenate(slack), 1e-12)


def curves(outcomes: Sequence[Outcome], upper: str, what: str) -> Array:
    return np.array([o[what] for o in outcomes if o["upper"] == upper])


def judge_bias(outcomes: Sequence[Outcome]) -> Judgement:
    def part(upper: str, what: str, exponent: float) -> Callable[[float], Judgement]:
        Y = np.maximum(np.abs(curves(outcomes, upper, what)), 1e-300)
        return lambda level: judge_rate(slope_loglog(SIGMAS, Y, level=level), exponent)

    names = {"below": ("F - psi", 1.0), "apart": ("the gradients", 1.0), "rest": ("beyond the constant", 2.0)}
    return conjunction({f"{t}, {u}": part(u, w, e) for u in UPPERS for w, (t, e) in names.items()})


def draw_bias(outcomes: Sequence[Outcome], judgement: Judgement) -> Any:
    lines = []
    for what, label in (("below", r"$F - \psi_\sigma$"), ("apart", r"$|\nabla F - \nabla\psi_\sigma|$")):
        Y = curves(outcomes, "preferences", what)
        lines.append(figures.Curve(label, SIGMAS, Y, slope_loglog(SIGMAS, Y)))
    return figures.loglog(lines, x=r"$\sigma$", y="bias of the penalty", reference=1.0)


# ---- the algorithm ---------------------------------------------------------------------------------------------------

RUN_SIGMAS = (0.01, 0.02, 0.04, 0.08)


def stationary(*, seed: int, fault: str = "none") -> dict[str, Any]:
    """The double loop from x = 0 to the end: |grad psi| from exact policies, and |grad F|, for every sigma.

    Faults: z dropped (20 steps of 0.4 sigma, as its gradient is of order 1 / sigma); the reference's rollouts in place
    of the policy's, the two stages of RLHF.
    """
    problem, _ = instance(seed)
    certificates, slopes, steps = [], [], []
    for sigma in RUN_SIGMAS:
        if fault == "none":
            found = run(problem, np.zeros(3), sigma, steps=6000, step=0.4)
            x, certificate = found.x, found.stationarity
            steps.append(found.steps)
        else:
            x = two_stage(problem, np.zeros(3), steps=6000, step=0.4)
            if fault == "z_dropped":
                x = _without_z(problem, sigma)
            safe = sigma < largest_sigma(problem, x)
            slope = penalised(problem, x, sigma).gradient if safe else gradient(problem, x)
            certificate = float(np.linalg.norm(slope))
        certificates.append(certificate)
        slopes.append(float(np.linalg.norm(gradient(problem, x))))
    return {"certificate": certificates, "slope": slopes, "steps": steps}


def _without_z(problem: Problem, sigma: float) -> Array:
    """The double loop whose gradient lacks -grad g(x, z)."""
    x, y = np.zeros(3), problem.reference
    for _ in range(20):
        for _ in range(4):
            y = inner_step(problem, x, y, 1 / problem.beta, sigma)
        x = x - 0.4 * sigma * three_terms(problem, x, y, np.zeros(6), sigma)
    return x


def runs(plan: Plan, **broken: Any) -> list[Cell]:
    return [cell("stationary", s, **broken) for s in plan.seed_range(quick=5, full=20)]


def judge_stationary(outcomes: Sequence[Outcome]) -> Judgement:
    Y = np.array([o["slope"] for o in outcomes])
    found = judge_identity([c for o in outcomes for c in o["certificate"]], 1e-8)
    return conjunction(
        {
            "stationary for psi": lambda level: found,
            "for F up to sigma": lambda level: judge_rate(slope_loglog(RUN_SIGMAS, Y, level=level), 1.0),
        }
    )


# ---- two stages ------------------------------------------------------------------------------------------------------


def two_stages(*, seed: int, fault: str = "none") -> dict[str, Any]:
    """F of the reward that standard RLHF learns from the reference's rollouts, minus F of the penalty method's.

    reference_data: the risk on the reference's rollouts in place of the policy's.
    """
    problem, _ = instance(seed)
    first = two_stage(problem, np.zeros(3), steps=6000, step=0.4)
    found = run(problem, first, 0.01, steps=6000, step=0.4)
    if fault == "reference_data":
        risks = [problem.upper.value(x, problem.reference) for x in (first, found.x)]
    else:
        risks = [value(problem, x) for x in (first, found.x)]
    return {"difference": risks[0] - risks[1], "certificate": found.stationarity}


def stage_cells(plan: Plan, **broken: Any) -> list[Cell]:
    return [cell("two_stages", s, **broken) for s in plan.seed_range(quick=10, full=40)]


def judge_stages(outcomes: Sequence[Outcome]) -> Judgement:
    return judge_ordering([o["difference"] for o in outcomes])


# ---- the claims ------------------------------------------------------------------------------------------------------


SMALL = r"$\sigma$ below the value up to which the penalised lower problem is strictly convex (checked)"

CLAIMS = (
    Claim(
        name="bilevel_penalty.gap",
        kind="identity",
        title="The lower level's gap is a divergence from its solution",
        statement=r"$g(x, y) - g^*(x) = \beta\, \mathrm{KL}(y, y^*(x))$ for every law $y$ and every reward $x$.",
        source=f"{PAPER}, the penalty, on its RLHF instance",
        cells=gaps,
        judge=judge_errors,
        controls=controls(gaps, reversed_kl="KL from the solution to y", beta_twice="beta applied twice"),
    ),
    Claim(
        name="bilevel_penalty.gradients",
        kind="identity",
        title="Three terms of first order are the penalised problem's exact gradient",
        statement=r"$\nabla\psi_\sigma = \nabla_x f(x,y) + (\nabla_x g(x,y) - \nabla_x g(x,z))/\sigma$ at "
        r"$y = y_\sigma(x)$, $z = y^*(x)$; and $\nabla F = \nabla_x f + "
        r"\mathrm{Cov}_{y^*}(\nabla_y f, \nabla r)/\beta$.",
        assumptions=(SMALL,),
        source=f"{PAPER}, the algorithm's update of x; the implicit function theorem",
        cells=gradient_cells,
        judge=judge_errors,
        controls=controls(
            gradient_cells,
            z_dropped="without the plain policy z",
            z_at_reference="the reference in place of z",
            fixed_data="the upper level's data taken for independent of the policy",
        ),
    ),
    Claim(
        name="bilevel_penalty.below",
        kind="inequality",
        title="The penalised value bounds the exact one from below, the better the smaller sigma",
        statement=r"$\psi_\sigma(x) \leq \psi_{\sigma'}(x) \leq F(x)$ for $\sigma' < \sigma$.",
        assumptions=(SMALL,),
        source=f"{PAPER}, the penalty function",
        cells=bias_cells,
        judge=judge_below,
        controls=controls(
            bias_cells, no_z="g in place of g - g*", ascends="a policy that ascends the upper objective"
        ),
    ),
    Claim(
        name="bilevel_penalty.bias",
        kind="rate",
        title="The bias of the penalty is of first order in sigma, with a known constant",
        statement=r"$F - \psi_\sigma$ and $|\nabla F - \nabla\psi_\sigma|$ have exponent 1 in $\sigma$, and "
        r"$|F - \psi_\sigma - \frac{\sigma}{2\beta}\mathrm{Var}_{y^*}(\nabla_y f)|$ has exponent 2.",
        assumptions=(SMALL, r"$\sigma$ in 0.002 to 0.016"),
        source=f"{PAPER}, the bias of the penalty function is O(sigma); the constant: second-order expansion",
        cells=bias_cells,
        judge=judge_bias,
        controls=controls(
            bias_cells,
            no_z="g in place of g - g*",
            fixed_data="the upper level's data taken for independent of the policy",
            no_half="the constant without 1/2",
        ),
        figure=draw_bias,
    ),
    Claim(
        name="bilevel_penalty.stationary",
        kind="rate",
        title="The double loop ends where the penalised gradient vanishes, and the exact one is of order sigma",
        statement=r"$|\nabla\psi_\sigma(x_K)| \leq 10^{-8}$ (certified with exact policies), and "
        r"$|\nabla F(x_K)|$ has exponent 1 in $\sigma$.",
        assumptions=(SMALL, r"$\sigma$ in 0.01 to 0.08", "preferences that the reward class cannot express"),
        source=f"{PAPER}, the double-loop algorithm, without noise",
        cells=runs,
        judge=judge_stationary,
        controls=controls(
            runs, z_dropped="without the plain policy z", two_stage="the data of the reference in place of y"
        ),
    ),
    Claim(
        name="bilevel_penalty.two_stages",
        kind="ordering",
        title="A reward fitted to the reference's rollouts is worse on its own policy's than a bilevel one",
        statement=r"$F(x_{\text{two stages}}) > F(x_{\text{penalty}})$: standard RLHF ignores that the data follow the "
        r"policy.",
        assumptions=("preferences that the reward class cannot express", r"$\sigma = 0.01$"),
        source="RLHF as a bilevel problem whose upper-level data come from the lower level",
        cells=stage_cells,
        judge=judge_stages,
        controls=controls(stage_cells, reference_data="both compared on the reference's rollouts"),
    ),
)
