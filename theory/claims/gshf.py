"""Claims about GSHF (`algorithms/gshf.py`): the enhancer, pessimism in two forms, regret online and with given data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .. import figures
from ..cells import Cell
from ..claim import Claim, Control, Judgement, Outcome, Plan
from ..statistics import (
    all_of,
    conjunction,
    judge_inequality,
    judge_ordering,
    judge_rate,
    slope_loglog,
)
from ._gshf_runs import cell

PAPER = "Xiong et al., ICML 2024 (arXiv 2312.11456)"
CHECKPOINTS = (4, 8, 16, 32, 64)
RADIUS, BATCH = 4.0, 8


def each(plan: Plan, function: str, quick: int, full: int, **parameters: Any) -> list[Cell]:
    return [cell(function, s, **parameters) for s in plan.seed_range(quick=quick, full=full)]


def enhancers(plan: Plan, fault: str = "none") -> list[Cell]:
    return each(plan, "furthest", 20, 150, fault=fault)


def judge_enhancers(outcomes: Sequence[Outcome]) -> Judgement:
    return all_of(
        {
            "in the set": judge_inequality([o["slack"] for o in outcomes], 1e-9),
            "no law of the cloud is further": judge_inequality([o["beats"] for o in outcomes], 1e-9),
        }
    )


def insides(plan: Plan, fault: str = "none") -> list[Cell]:
    return each(plan, "optimum_inside", 100, 400, fault=fault)


def judge_insides(outcomes: Sequence[Outcome]) -> Judgement:
    return judge_inequality([o["slack"] for o in outcomes], 1e-9)


def pessimists(plan: Plan, fault: str = "none") -> list[Cell]:
    return [
        run
        for form in ("pointwise", "expected")
        for run in each(plan, "pessimism", 40, 200, form=form, fault=fault)
    ]


def judge_pessimists(outcomes: Sequence[Outcome]) -> Judgement:
    return all_of(
        {
            "values from below": judge_inequality([o["lower"] for o in outcomes], 1e-9),
            "the loss": judge_inequality([o["loss"] for o in outcomes], 1e-9),
            "the dual's gap": judge_inequality([1e-9 - o["gap"] for o in outcomes]),
        }
    )


# ---- online ----------------------------------------------------------------------------------------------------------


def courses(plan: Plan, radius: float = RADIUS, seeds: int = 0) -> list[Cell]:
    return [
        run
        for r in (radius, 0.0)
        for run in each(
            plan, "online", seeds or 16, seeds or 64, iterations=CHECKPOINTS[-1], radius=r, batch=BATCH
        )
    ]


def regrets(outcomes: Sequence[Outcome]) -> dict[str, np.ndarray]:
    """(seeds, batches): of the first half of the outcomes, and of the passive learner."""
    half = len(outcomes) // 2
    halves = {"GSHF": outcomes[:half], "iterative DPO": outcomes[half:]}
    return {kind: np.array([o["regret"] for o in part]) for kind, part in halves.items()}


def judge_courses(outcomes: Sequence[Outcome]) -> Judgement:
    T = np.array(CHECKPOINTS)

    def part(kind: str, Y: np.ndarray) -> Any:
        if kind == "iterative DPO":
            return lambda level: judge_rate(slope_loglog(T, Y, level=level), 1.0, sense="at_least")
        return lambda level: judge_rate(slope_loglog(T, Y, level=level), 0.5, sense="at_most")

    return conjunction({kind: part(kind, Y[:, T - 1]) for kind, Y in regrets(outcomes).items()})


def draw_courses(outcomes: Sequence[Outcome], judgement: Judgement) -> Any:
    T = np.array(CHECKPOINTS)
    lines = [
        figures.Curve(kind, T, Y[:, T - 1], slope_loglog(T, Y[:, T - 1]))
        for kind, Y in regrets(outcomes).items()
    ]
    return figures.loglog(lines, x="batches", y="cumulative regret", reference=0.5)


def judge_against_passive(outcomes: Sequence[Outcome]) -> Judgement:
    """By more than half of what the passive learner loses on average."""
    active, passive = (Y[:, -1] for Y in regrets(outcomes).values())
    return judge_ordering(passive - active, margin=float(passive.mean()) / 2)


def hybrids(plan: Plan, given: str = "covering") -> list[Cell]:
    return [
        run
        for data in (given, "none")
        for run in each(plan, "online", 24, 48, iterations=16, radius=RADIUS, batch=BATCH, given=data)
    ]


def judge_hybrids(outcomes: Sequence[Outcome]) -> Judgement:
    half = len(outcomes) // 2
    ours, online = (np.array([o["regret"][-1] for o in part]) for part in (outcomes[:half], outcomes[half:]))
    return judge_ordering(online - ours)


CLAIMS = (
    Claim(
        name="gshf.enhancer",
        kind="inequality",
        title="The enhancer stays in the set of what may be optimal, and nothing there is further away",
        statement=r"$\beta\, \mathrm{KL}(\pi^2, \pi^1) \leq \Gamma \|\Delta\|$ and $\|\Delta\| \geq "
        r"\|\mathbb{E}_\pi\phi - "
        r"\mathbb{E}_{\pi^1}\phi\|_{\Sigma^{-1}}$ for every $\pi \in \Pi_t$ among 20,000 laws, $\Delta = "
        r"\mathbb{E}_{\pi^2}\phi - \mathbb{E}_{\pi^1}\phi$.",
        source=f"{PAPER}, the online algorithm",
        cells=enhancers,
        judge=judge_enhancers,
        controls=(
            Control("main", "the main policy for the enhancer", lambda plan: enhancers(plan, "main")),
            Control(
                "uncapped", "the furthest response, however far", lambda plan: enhancers(plan, "uncapped")
            ),
            Control("identity", "norms that know no data", lambda plan: enhancers(plan, "identity")),
        ),
    ),
    Claim(
        name="gshf.optimum_inside",
        kind="inequality",
        title="While the confidence set covers, the optimal policy is among those that may be optimal",
        statement=r"If $\|\hat\theta - \theta^*\|_\Sigma \leq \Gamma$ then $\pi^* \in \Pi_t$; measured at equality.",
        source=f"{PAPER}, the proof of the online bound",
        cells=insides,
        judge=judge_insides,
        controls=(
            Control("uncovered", "a twentieth of the radius", lambda plan: insides(plan, "uncovered")),
            Control(
                "foreign", "the optimal policy of the opposite reward", lambda plan: insides(plan, "foreign")
            ),
        ),
    ),
    Claim(
        name="gshf.pessimism",
        kind="inequality",
        title="Pessimism bounds every value from below and its own loss from above, in both forms",
        statement=r"If $\|\hat\theta - \theta^*\|_\Sigma \leq \Gamma$: the pessimistic value of every $\pi$ is at "
        r"most $J(\pi) - "
        r"\langle\nu, \theta^*\rangle$, and $J(\pi) - J(\hat\pi) \leq 2\Gamma \|\mathbb{E}_\pi\phi - "
        r"\nu\|_{\Sigma^{-1}} - "
        r"\beta\, \mathrm{KL}(\pi, \hat\pi)$ (option II; with $\mathbb{E}_\pi\|\phi - \nu\|$ in option I). Measured "
        r"at equality.",
        source=f"{PAPER}, the offline theorem, both options",
        cells=pessimists,
        judge=judge_pessimists,
        controls=(
            Control("greedy", "no penalty", lambda plan: pessimists(plan, "greedy")),
            Control("optimistic", "the penalty is added", lambda plan: pessimists(plan, "optimistic")),
            Control("small", "a tenth of the radius", lambda plan: pessimists(plan, "small")),
        ),
    ),
    Claim(
        name="gshf.regret",
        kind="rate",
        title="Regret of the main policy grows like the root of the batches at most, that of iterative DPO linearly",
        statement=r"Three responses, one with $\pi_{\mathrm{ref}} = e^{-10}$ at $\beta = 0.05$; exponents over 4 to "
        r"64 batches "
        r"of 8 comparisons. GSHF: at most $1/2$; iterative DPO (radius 0): 1.",
        assumptions=(rf"radius {RADIUS:g}, ridge 1", "a slack of 0.1 on each exponent"),
        source=f"{PAPER}, the online theorem",
        cells=courses,
        judge=judge_courses,
        controls=(
            Control(
                "no_enhancer",
                "radius 0: both responses from the main policy",
                lambda plan: courses(plan, 0.0, 6),
            ),
            Control(
                "timid",
                "a radius of 0.2, which covers too little",
                lambda plan: courses(plan, 0.2, 6),
            ),
        ),
        figure=draw_courses,
    ),
    Claim(
        name="gshf.beats_passive",
        kind="ordering",
        title="Where coverage is the bottleneck, the enhancer saves more than half of the regret",
        statement=r"After 64 batches, paired over seeds, the regret is lower than iterative DPO's by more than half "
        r"of the "
        r"latter's mean.",
        assumptions=(r"the rare response is the best, $\pi_{\mathrm{ref}} = e^{-10}$",),
        source=f"{PAPER}, the online theorem",
        cells=courses,
        judge=judge_against_passive,
        controls=(
            Control("no_enhancer", "radius 0", lambda plan: courses(plan, 0.0, 6)),
            Control("timid", "a radius of 0.2", lambda plan: courses(plan, 0.2, 6)),
        ),
    ),
    Claim(
        name="gshf.hybrid",
        kind="ordering",
        title="Sixty-four given comparisons that cover the rare response lower the regret",
        statement=r"After 16 batches, paired over seeds, with 64 comparisons of the rare response to begin with.",
        source=f"{PAPER}, hybrid learning",
        cells=hybrids,
        judge=judge_hybrids,
        controls=(Control("nothing", "no data are given", lambda plan: hybrids(plan, "none")),),
    ),
)
