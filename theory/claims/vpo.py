"""Claims about VPO (`algorithms/vpo.py`): its two forms, the sign of its incentive, what it explores and what it
cannot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .. import figures
from ..cells import Cell
from ..claim import Claim, Control, Judgement, Outcome, Plan
from ..statistics import (
    all_of,
    conjunction,
    judge_identity,
    judge_inequality,
    judge_ordering,
    judge_rate,
    slope_loglog,
)
from ._optimism_runs import cell

PAPER = "Cen et al., ICLR 2025 (arXiv 2405.19320)"
SIGNS = (1, -1)
ALPHAS = (0.0, 0.02, 0.05, 0.1, 0.3, 1.0, 3.0)
STRENGTHS = (1e2, 1e3, 1e4, 1e5)
HORIZONS = (128, 256, 512, 1024)
C = 0.3  # alpha = C sqrt(T)


def each(plan: Plan, function: str, quick: int, full: int, **parameters: Any) -> list[Cell]:
    return [cell(function, s, **parameters) for s in plan.seed_range(quick=quick, full=full)]


def both_signs(plan: Plan, function: str, quick: int = 10, full: int = 60, **parameters: Any) -> list[Cell]:
    return [c for sign in SIGNS for c in each(plan, function, quick, full, sign=sign, **parameters)]


def broken(cells: Callable[..., list[Cell]], sizes: tuple[Any, ...], **faults: str) -> tuple[Control, ...]:
    """A control for each fault by name, with its description."""

    def one(fault: str) -> Callable[[Plan], list[Cell]]:
        return lambda plan: cells(plan, *sizes, fault=fault)

    return tuple(Control(fault, text, one(fault)) for fault, text in faults.items())


def judge_errors(outcomes: Sequence[Outcome]) -> Judgement:
    return judge_identity([e for o in outcomes for e in o["errors"]])


def fits(plan: Plan, fault: str = "none") -> list[Cell]:
    return both_signs(plan, "two_fits", 6, 30, share=0.5, fault=fault)


def judge_fits(outcomes: Sequence[Outcome]) -> Judgement:
    """To 1e-8: two optimisers, each with a gradient of 1e-11 or less, on weights that may be 1e-2."""
    return judge_identity([o["error"] for o in outcomes], 1e-8)


# ---- the path in alpha -----------------------------------------------------------------------------------------------


def paths(plan: Plan, fault: str = "none") -> list[Cell]:
    return both_signs(plan, "value_path", 8, 40, alphas=ALPHAS, fault=fault)


def judge_paths(outcomes: Sequence[Outcome]) -> Judgement:
    return all_of(
        {
            "every step of alpha": judge_inequality([s for o in outcomes for s in o["steps"]], 1e-9),
            "all steps together move the value": judge_inequality([o["moved"] - 1e-3 for o in outcomes]),
            "the slope is the implicit function's": judge_identity([o["slope"] for o in outcomes], 1e-5),
        }
    )


def imitations(plan: Plan, fault: str = "none") -> list[Cell]:
    return each(plan, "imitation", 8, 40, strengths=STRENGTHS, fault=fault)


def imitation_curves(outcomes: Sequence[Outcome]) -> np.ndarray:
    return np.array([o["distances"] for o in outcomes])


def judge_imitations(outcomes: Sequence[Outcome]) -> Judgement:
    return judge_rate(slope_loglog(STRENGTHS, imitation_curves(outcomes)), -1.0)


def draw_imitations(outcomes: Sequence[Outcome], judgement: Judgement) -> Any:
    Y = imitation_curves(outcomes)
    line = figures.Curve("offline", STRENGTHS, Y, slope_loglog(STRENGTHS, Y))
    return figures.loglog([line], x=r"$\alpha$", y=r"max $|\pi_\alpha - \pi_{cal}|$", reference=-1.0)


# ---- rounds online ---------------------------------------------------------------------------------------------------


def online(plan: Plan, method: str, world: str, c: float = C, blocks: int = 2) -> list[Cell]:
    Ts, size = HORIZONS[: plan.pick(quick=3, full=4)], plan.pick(quick=24, full=48)
    return each(plan, "online", 1, blocks, Ts=Ts, world=world, method=method, c=c, size=size)


def explorers(plan: Plan, method: str = "vpo", c: float = C) -> list[Cell]:
    return [*online(plan, method, "best", c), *online(plan, "passive", "best", 0.0)]


def regrets(outcomes: Sequence[Outcome], passive: bool) -> np.ndarray:
    """(runs, horizons): of iterative DPO, or of the method that is held against it."""
    return np.concatenate([o["regret"] for o in outcomes if (o["method"] == "passive") == passive])


def judge_explorers(outcomes: Sequence[Outcome]) -> Judgement:
    """At the last horizon: paired over seeds, by more than half of what the passive learner loses on average."""
    active, passive = (regrets(outcomes, p)[:, -1] for p in (False, True))
    return judge_ordering(passive - active, margin=float(passive.mean()) / 2)


def draw_explorers(outcomes: Sequence[Outcome], judgement: Judgement) -> Any:
    Ts = outcomes[0]["Ts"]
    lines = [
        figures.Curve(name, Ts, regrets(outcomes, passive))
        for name, passive in (("VPO", False), ("iterative DPO", True))
    ]
    return figures.loglog(lines, x="comparisons T", y="cumulative regret", reference=0.5)


def own_pairs(plan: Plan, world: str = "worst", first: str = "vpo") -> list[Cell]:
    return [*online(plan, first, world), *online(plan, "vpo_reference", world)]


def judge_own_pairs(outcomes: Sequence[Outcome]) -> Judgement:
    blocks = len(outcomes) // 2
    Ts = np.asarray(outcomes[0]["Ts"], dtype=float)
    own, mixed = (
        np.concatenate([o["regret"] for o in part]) for part in (outcomes[:blocks], outcomes[blocks:])
    )
    return conjunction(
        {
            "both responses from the policy": lambda level: judge_rate(
                slope_loglog(Ts, own, level=level), 1.0, sense="at_least"
            ),
            "the second from the reference": lambda level: judge_rate(
                slope_loglog(Ts, mixed, level=level), 0.5, sense="at_most"
            ),
        }
    )


CLAIMS = (
    Claim(
        name="vpo.value_identity",
        kind="identity",
        title="The optimal value can be read off the optimal policy under any law",
        statement=r"$J^*(r) = \mathbb{E}_q[r] - \beta\, \mathbb{E}_q[\log \pi_r/\pi_{\mathrm{ref}}]$ for every $r$ and "
        r"every law $q$.",
        source=f"{PAPER}, the derivation of the policy form",
        cells=lambda plan: each(plan, "value_identity", 20, 100),
        judge=judge_errors,
        controls=broken(
            each,
            ("value_identity", 20, 20),
            beta_dropped="the second term without beta",
            minus="the sign of the second term",
            own_reward="the optimal policy's mean reward in place of q's",
        ),
    ),
    Claim(
        name="vpo.two_forms",
        kind="identity",
        title="The policy form and the reward form have the same value, for both signs and every constant",
        statement=r"With $r = \beta\log\pi/\pi_{\mathrm{ref}} + c$, calibrated to $\mathbb{E}_{\mathrm{cal}}[r] = 0$: "
        r"$\ell(r) - s\alpha J^*(r) = L_{\mathrm{DPO}}(\pi) + s\alpha\beta\, \mathbb{E}_{\mathrm{cal}}[\log\pi - "
        r"\log\pi_{\mathrm{ref}}]$ for $s = \pm 1$ and every $c$.",
        source=f"{PAPER}, the reward form and the policy form",
        cells=lambda plan: both_signs(plan, "two_forms"),
        judge=judge_errors,
        controls=broken(
            both_signs,
            ("two_forms", 6, 6),
            wrong_sign="the other sign",
            beta_dropped="the calibration term without beta",
            own_responses="responses of the policy itself calibrate",
            uncalibrated="the reward form sees the constant",
        ),
    ),
    Claim(
        name="vpo.two_fits",
        kind="identity",
        title="Both forms have the same minimiser",
        statement=r"$\hat\pi = \pi_{\hat r}$, the policy form by automatic differentiation and the reward form by "
        r"Newton's "
        r"method, to $10^{-8}$ in $\log\pi$.",
        assumptions=(
            r"online: $\alpha$ small enough for a finite minimum",
            "pairs that connect all responses",
        ),
        source=f"{PAPER}, the reward form and the policy form",
        cells=fits,
        judge=judge_fits,
        controls=(
            Control(
                "wrong_sign", "the policy form with the other sign", lambda plan: fits(plan, "wrong_sign")
            ),
            Control(
                "beta_dropped", "the calibration term without beta", lambda plan: fits(plan, "beta_dropped")
            ),
            Control("other_law", "the policy form calibrates on ref", lambda plan: fits(plan, "other_law")),
        ),
    ),
    Claim(
        name="vpo.dpo",
        kind="identity",
        title="Without incentive it is DPO",
        statement=r"At $\alpha = 0$ the minimiser of the population loss is $\pi_{\mathrm{ref}} e^{r/\beta} / Z$.",
        source=f"{PAPER}, the policy form",
        cells=lambda plan: both_signs(plan, "two_fits", 6, 30, share=0.0),
        judge=judge_fits,
        controls=(
            Control(
                "bonus",
                "alpha is not 0",
                lambda plan: both_signs(plan, "two_fits", 6, 6, share=0.0, fault="bonus"),
            ),
        ),
    ),
    Claim(
        name="vpo.calibration_gradient",
        kind="identity",
        title="The incentive pulls from the calibration law to the policy, and vanishes on the policy's own responses",
        statement=r"In the logits the incentive has the gradient $s\alpha\beta(\pi_{\mathrm{cal}} - \pi)$: with "
        r"$y_{\mathrm{cal}} \sim \pi$ its expectation is 0.",
        source=f"{PAPER}, the policy form; the score function has mean 0",
        cells=lambda plan: both_signs(plan, "calibration_slope", 20, 100),
        judge=judge_errors,
        controls=broken(
            both_signs,
            ("calibration_slope", 10, 10),
            own_responses="calibration on the policy's own responses",
            wrong_sign="the other sign",
            beta_dropped="the term without beta",
        ),
    ),
    Claim(
        name="vpo.sign",
        kind="inequality",
        title="Online the promised value rises with alpha, offline it falls",
        statement=r"$s\,\frac{d}{d\alpha} [J^*(r_\alpha) - \mathbb{E}_{\mathrm{cal}} r_\alpha] = (\pi_\alpha - "
        r"\pi_{\mathrm{cal}})^\top H^{+} (\pi_\alpha - \pi_{\mathrm{cal}}) \geq 0$, $s = 1$ online and $-1$ offline, "
        r"$H$ the "
        r"Hessian of the objective.",
        assumptions=(r"global minimisers over $\max r - \min r \leq 12$",),
        source=f"{PAPER}, the reward form; the envelope of a family that is linear in alpha",
        cells=paths,
        judge=judge_paths,
        controls=(
            Control("wrong_sign", "the other sign is minimised", lambda plan: paths(plan, "wrong_sign")),
            Control("no_incentive", "alpha is ignored", lambda plan: paths(plan, "no_incentive")),
        ),
    ),
    Claim(
        name="vpo.imitation",
        kind="rate",
        title="With a strong incentive the offline method imitates its calibration law",
        statement=r"$\max|\pi_\alpha - \pi_{\mathrm{cal}}| = \Theta(1/\alpha)$ for $s = -1$.",
        assumptions=(r"$\pi_{\mathrm{cal}}$, the chosen responses, has full support",),
        source=f"{PAPER}: the incentive is SFT on the calibration law",
        cells=imitations,
        judge=judge_imitations,
        controls=(
            Control("wrong_sign", "the online sign", lambda plan: imitations(plan, "wrong_sign")),
            Control(
                "rejected", "the rejected responses calibrate", lambda plan: imitations(plan, "rejected")
            ),
        ),
        figure=draw_imitations,
    ),
    Claim(
        name="vpo.explores",
        kind="ordering",
        title="Where the best response is rare under the reference, optimism finds it and iterative DPO does not",
        statement=r"The best response has $\pi_{\mathrm{ref}} = e^{-10}$ at $\beta = 0.05$. After the last horizon "
        r"VPO's "
        r"regret is lower than iterative DPO's by more than half of the latter's mean, paired over seeds.",
        assumptions=(
            rf"$\alpha = {C}\sqrt{{T}}$, 8 comparisons a round",
            "rewards differ by at most 2 in the class",
        ),
        source=f"{PAPER}, the regret of the online method",
        cells=explorers,
        judge=judge_explorers,
        controls=(
            Control("no_incentive", "alpha = 0", lambda plan: explorers(plan, c=0.0)),
            Control("wrong_sign", "the offline sign", lambda plan: explorers(plan, "vpo_pessimist")),
        ),
        figure=draw_explorers,
    ),
    Claim(
        name="vpo.own_pairs",
        kind="rate",
        title="At low temperature two responses of the policy itself cannot correct an optimism that errs",
        statement=r"Where the rare response is the worst, VPO with both responses from $\pi_t$ has regret of exponent "
        r"1: "
        r"$\pi_t$ is nearly certain of it and compares it with itself (the factor $e^{B/\beta}$ of the theorem). With "
        r"the "
        r"second response from the calibration law the exponent is at most $1/2$.",
        assumptions=(rf"$\beta = 0.05$, $B = 2$, $\alpha = {C}\sqrt{{T}}$, 8 comparisons a round",),
        source=f"{PAPER}, theorem on the online regret: its constant; Xie et al. (arXiv 2405.21046), section 3",
        cells=own_pairs,
        judge=judge_own_pairs,
        controls=(
            Control("best", "the rare response is the best", lambda plan: own_pairs(plan, "best")),
            Control(
                "mixed",
                "the second response from the reference in both",
                lambda plan: own_pairs(plan, first="vpo_reference"),
            ),
        ),
    ),
)
