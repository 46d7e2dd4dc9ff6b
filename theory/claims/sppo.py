"""Claims about SPPO (`algorithms/sppo.py`), multiplicative weights in self-play, on exact preference games."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .. import figures
from ..cells import Cell
from ..claim import Claim, Control, Judgement, Outcome, Plan
from ..statistics import conjunction, judge_inequality, judge_rate, slope_loglog
from ._game_runs import cell, seeds_of
from ._loss_runs import cell as loss_cell

PAPER = "Wu et al. (arXiv 2405.00675)"
TS = (100, 400, 1600, 6400)
ETAS = (0.4, 0.2, 0.1, 0.05)


def averages(
    plan: Plan, worlds: Sequence[str] = ("random", "listeners"), seeds: int = 0, fault: str = "none"
) -> list[Cell]:
    return [
        cell("averages", s, world=w, Ts=TS, fault=fault)
        for w in worlds
        for s in seeds_of(w, plan.seed_range(quick=seeds or 16, full=seeds or 40))
    ]


def curves(outcomes: Sequence[Outcome]) -> dict[str, np.ndarray]:
    """World -> exploitability (seeds, Ts)."""
    worlds = dict.fromkeys(o["world"] for o in outcomes)
    return {w: np.array([o["exploitability"] for o in outcomes if o["world"] == w]) for w in worlds}


def judge_averages(outcomes: Sequence[Outcome]) -> Judgement:
    slack = [b - e for o in outcomes for b, e in zip(o["bound"], o["exploitability"], strict=True)]
    bound = judge_inequality(slack)

    def part(Y: Any) -> Callable[[float], Judgement]:
        return lambda level: judge_rate(slope_loglog(TS, Y, level=level), -0.5, sense="at_most")

    rates = {f"exponent, {w}": part(Y) for w, Y in curves(outcomes).items()}
    return conjunction({"the regret bound": lambda level: bound, **rates})


def draw_averages(outcomes: Sequence[Outcome], judgement: Judgement) -> Any:
    lines = [figures.Curve(w, TS, Y, slope_loglog(TS, Y)) for w, Y in curves(outcomes).items()]
    return figures.loglog(lines, x="steps T", y="exploitability of the average", reference=-0.5)


def minimisers(plan: Plan, fault: str = "none") -> list[Cell]:
    return [
        loss_cell("sppo_minimiser", s, etas=ETAS, fault=fault) for s in plan.seed_range(quick=12, full=40)
    ]


def distances(outcomes: Sequence[Outcome]) -> np.ndarray:
    return np.array([o["distances"] for o in outcomes])


def judge_minimisers(outcomes: Sequence[Outcome]) -> Judgement:
    return judge_rate(slope_loglog(ETAS, distances(outcomes)), 3.0)


def draw_minimisers(outcomes: Sequence[Outcome], judgement: Judgement) -> Any:
    Y = distances(outcomes)
    line = figures.Curve("minimiser", ETAS, Y, slope_loglog(ETAS, Y))
    return figures.loglog([line], x="step eta", y="distance to the step in log pi", reference=3.0)


CLAIMS = (
    Claim(
        name="sppo.average_policy",
        kind="rate",
        title="The average policy's exploitability falls like one over the root of T",
        statement=r"With $\eta = \sqrt{8 \log n / T}$: $\max_y P(y \succ \bar\pi_T) - 1/2 \leq "
        r"\log(1/\min\mu)/(\eta T) + \eta/8 = O(1/\sqrt{T})$ in every run.",
        assumptions=(
            r"$\pi_0 = \mu$ has full support",
            r"a slack of 0.1 on the exponent $-1/2$, $T$ in 100 to 6400",
        ),
        source=f"{PAPER}, its convergence theorem; the constants are those of multiplicative weights",
        cells=averages,
        judge=judge_averages,
        controls=(
            Control(
                "last_policy",
                "the last policy in place of the average",
                lambda plan: averages(plan, ("random",), 8, "last_policy"),
            ),
            Control(
                "losing",
                "climbs the probability to lose",
                lambda plan: averages(plan, ("random",), 8, "losing"),
            ),
        ),
        figure=draw_averages,
    ),
    Claim(
        name="sppo.population_minimiser",
        kind="rate",
        title="The loss with 1/2 for its normaliser misses the step by the cube of the step size",
        statement=r"$\max_y |\log\pi(y) - \log\pi_{t+1}(y)| = \Theta(\eta^3)$ for $\pi$ the minimiser of "
        r"$\mathbb{E}_{\pi_t}[(\log(\pi/\pi_t) - \eta(P(\cdot \succ \pi_t) - 1/2))^2]$.",
        assumptions=(r"$\pi_t$ has full support", r"$\eta$ in 0.05 to 0.4, a slack of 0.1 on the exponent"),
        source=f"{PAPER}, its objective; the order is derived: see `algorithms/sppo.py`",
        cells=minimisers,
        judge=judge_minimisers,
        controls=(
            Control("no_half", "the 1/2 is missing", lambda plan: minimisers(plan, "no_half")),
            Control("losing", "the target has the other sign", lambda plan: minimisers(plan, "losing")),
        ),
        figure=draw_minimisers,
    ),
)
