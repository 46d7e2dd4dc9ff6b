"""Claims about XPO (`algorithms/xpo.py`): why its plus sign is optimism, and what it costs not to explore."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .. import figures
from ..cells import Cell
from ..claim import Claim, Control, Judgement, Outcome, Plan
from ..statistics import all_of, conjunction, judge_identity, judge_inequality, judge_rate, slope_loglog
from .vpo import each, judge_errors, judge_explorers

PAPER = "Xie et al., ICLR 2025 (arXiv 2405.21046)"
HORIZONS = (128, 256, 512, 1024, 2048)
C = 1.0  # alpha = C beta / sqrt(T)


def identities(plan: Plan, fault: str = "none") -> list[Cell]:
    return each(plan, "value_identity", 20, 100, law="reference", fault=fault)


def relatives(plan: Plan, fault: str = "none") -> list[Cell]:
    return each(plan, "xpo_is_vpo", 8, 40, fault=fault)


def judge_relatives(outcomes: Sequence[Outcome]) -> Judgement:
    return all_of(
        {
            "losses, up to a constant": judge_identity([e for o in outcomes for e in o["constant"]], 1e-12),
            "minimisers": judge_identity([o["minima"] for o in outcomes], 1e-8),
        }
    )


def promises(plan: Plan, method: str = "xpo") -> list[Cell]:
    T = plan.pick(quick=100, full=300)
    return each(plan, "promises", 1, 4, T=T, method=method)


def judge_promises(outcomes: Sequence[Outcome]) -> Judgement:
    """Up to rounding of the minimiser's value."""
    return judge_inequality([o["slack"] for o in outcomes], 1e-8)


# ---- regret ----------------------------------------------------------------------------------------------------------


def horizons(plan: Plan) -> tuple[int, ...]:
    return HORIZONS[:4] if plan.quick else HORIZONS


def courses(
    plan: Plan, method: str = "xpo", c: float = C, worlds: Sequence[str] = ("best", "worst")
) -> list[Cell]:
    worlds = worlds[:1] if plan.quick else worlds
    active = [
        run
        for world in worlds
        for run in each(plan, "online", 1, 2, Ts=horizons(plan), world=world, method=method, c=c)
    ]
    return [*active, *each(plan, "online", 1, 2, Ts=horizons(plan), world="best", method="passive")]


def curves(outcomes: Sequence[Outcome]) -> dict[str, np.ndarray]:
    """Regrets (runs, horizons) by what made them."""
    kinds = [f"{o['method']}, rare = {o['world']}" for o in outcomes]
    return {
        kind: np.concatenate([o["regret"] for o, k in zip(outcomes, kinds, strict=True) if k == kind])
        for kind in dict.fromkeys(kinds)
    }


def root_with_logarithm(Ts: Sequence[float]) -> float:
    """The exponent of sqrt(T log T), the theorem's rate, over a window of horizons."""
    T = np.asarray(Ts, dtype=float)
    return float(np.polyfit(np.log(T), 0.5 * np.log(T * np.log(T)), 1)[0])


def judge_courses(outcomes: Sequence[Outcome]) -> Judgement:
    Ts = outcomes[0]["Ts"]

    def part(kind: str, Y: np.ndarray) -> Any:
        if kind.startswith("passive"):
            return lambda level: judge_rate(slope_loglog(Ts, Y, level=level), 1.0, sense="at_least")
        promised = root_with_logarithm(Ts)
        return lambda level: judge_rate(slope_loglog(Ts, Y, level=level), promised, sense="at_most")

    return conjunction({kind: part(kind, Y) for kind, Y in curves(outcomes).items()})


def draw_courses(outcomes: Sequence[Outcome], judgement: Judgement) -> Any:
    Ts = outcomes[0]["Ts"]
    lines = [figures.Curve(kind, Ts, Y, slope_loglog(Ts, Y)) for kind, Y in curves(outcomes).items()]
    return figures.loglog(lines, x="comparisons T", y="cumulative regret", reference=0.5)


def against_passive(plan: Plan, method: str = "xpo", c: float = C) -> list[Cell]:
    return courses(plan, method, c, ("best",))


CLAIMS = (
    Claim(
        name="xpo.value_identity",
        kind="identity",
        title="The less the optimal policy likes the reference's samples, the higher its value",
        statement=r"$J(\pi_r) = \mathbb{E}_{\mathrm{ref}}[r] - \beta\, \mathbb{E}_{\mathrm{ref}}[\log\pi_r / "
        r"\pi_{\mathrm{ref}}]$.",
        source=f"{PAPER}, the idea of implicit optimism",
        cells=identities,
        judge=judge_errors,
        controls=(
            Control("minus", "the sign of the second term", lambda plan: identities(plan, "minus")),
            Control("beta_twice", "beta squared", lambda plan: identities(plan, "beta_twice")),
        ),
    ),
    Claim(
        name="xpo.vpo",
        kind="identity",
        title="XPO is VPO online, calibrated on the reference's samples",
        statement=r"On pairs $(y, \tilde y)$, $\tilde y \sim \pi_{\mathrm{ref}}$: $L_{\mathrm{XPO}}(\pi; \alpha) = "
        r"L_{\mathrm{VPO}}(\pi; s = 1, \alpha/\beta, \pi_{\mathrm{cal}} = \tilde y) + \mathrm{const}$; so the "
        r"minimisers agree.",
        source=f"{PAPER}, the loss; Cen et al. (arXiv 2405.19320), the policy form",
        cells=relatives,
        judge=judge_relatives,
        controls=(
            Control("minus", "minus alpha log pi: an SFT term", lambda plan: relatives(plan, "minus")),
            Control(
                "beta_twice", "alpha in place of alpha / beta", lambda plan: relatives(plan, "beta_twice")
            ),
            Control(
                "own_samples",
                "VPO calibrates on the policy's responses",
                lambda plan: relatives(plan, "own_samples"),
            ),
        ),
    ),
    Claim(
        name="xpo.optimism",
        kind="inequality",
        title="In every round the fitted policy promises at least what the truth does, up to what the data deny",
        statement=r"With $c = \alpha t/\beta$ and $q$ the law of the reference's samples so far: $J^*(r_t) - "
        r"\mathbb{E}_q[r_t] \geq J^*(r^*) - \mathbb{E}_q[r^*] - (\ell(r^*) - \ell(r_t))/c$ in every round.",
        assumptions=("the true reward is in the class", "the fit is a global minimum"),
        source=f"{PAPER}, the regret decomposition",
        cells=promises,
        judge=judge_promises,
        controls=(
            Control("minus", "minus alpha log pi", lambda plan: promises(plan, "pessimist")),
            Control("passive", "no bonus", lambda plan: promises(plan, "passive")),
        ),
    ),
    Claim(
        name="xpo.regret",
        kind="rate",
        title="Regret grows like the root of T, that of iterative DPO like T",
        statement=r"Three responses, one with $\pi_{\mathrm{ref}} = e^{-10}$ at $\beta = 0.05$. With $\alpha = \beta/"
        r"\sqrt{T}$ the exponent of XPO's regret is at most that of $\sqrt{T \log T}$ over the window, be the rare "
        r"response "
        r"the best or the worst; that of iterative DPO, where it is the best, is 1.",
        assumptions=(
            "a slack of 0.1 on each exponent",
            r"8 comparisons a round; T up to 1024 (quick) or 2048, far below $e^{10}$",
        ),
        source=f"{PAPER}, theorem on the regret, and the lower bound for passive exploration",
        cells=courses,
        judge=judge_courses,
        controls=(
            Control("no_bonus", "alpha = 0", lambda plan: courses(plan, c=0.0, worlds=("best",))),
            Control("minus", "minus alpha log pi", lambda plan: courses(plan, "pessimist", worlds=("best",))),
        ),
        figure=draw_courses,
    ),
    Claim(
        name="xpo.beats_passive",
        kind="ordering",
        title="Where coverage is the bottleneck, XPO loses less than half of what iterative DPO loses",
        statement=r"At the last horizon, paired over seeds, the regret of XPO is lower than iterative DPO's by more "
        r"than half of the latter's mean.",
        assumptions=(r"the rare response is the best, $\pi_{\mathrm{ref}} = e^{-10}$",),
        source=f"{PAPER}, theorem on the regret, and the lower bound for passive exploration",
        cells=against_passive,
        judge=judge_explorers,
        controls=(
            Control("no_bonus", "alpha = 0", lambda plan: against_passive(plan, c=0.0)),
            Control("minus", "minus alpha log pi", lambda plan: against_passive(plan, "pessimist")),
        ),
    ),
)
