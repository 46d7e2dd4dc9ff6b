"""Claims about IPO (`algorithms/ipo.py`) on preference games that no reward explains."""

from __future__ import annotations

from collections.abc import Sequence

from ..cells import Cell
from ..claim import Claim, Control, Judgement, Outcome, Plan
from ..statistics import judge_identity
from ._loss_runs import cell

PAPER = "Azar et al., AISTATS 2024 (arXiv 2310.12036)"


def minimisers(plan: Plan, fault: str = "none") -> list[Cell]:
    return [cell("ipo_minimiser", s, fault=fault) for s in plan.seed_range(quick=12, full=60)]


def judge_minimisers(outcomes: Sequence[Outcome]) -> Judgement:
    return judge_identity([e for o in outcomes for e in o["errors"]])


def stationary(plan: Plan, fault: str = "none") -> list[Cell]:
    return [cell("ipo_online", s, fault=fault) for s in plan.seed_range(quick=12, full=60)]


def judge_stationary(outcomes: Sequence[Outcome]) -> Judgement:
    return judge_identity([o["gradient"] for o in outcomes])


CLAIMS = (
    Claim(
        name="ipo.population_minimiser",
        kind="identity",
        title="The squared loss on who won is least at the best response to the data's law",
        statement=r"For every $P$: $\arg\min_\pi \mathbb{E}_{y,y'\sim\mu}[(h(y_w,y_l) - 1/(2\tau))^2] = "
        r"\pi_{\mathrm{ref}}\, e^{P(\cdot \succ \mu)/\tau} / Z$; the same from the loss multiplied out over win rates.",
        assumptions=(r"$y, y'$ iid from $\mu$ with full support",),
        source=f"{PAPER}, equations 10 and 17",
        cells=minimisers,
        judge=judge_minimisers,
        controls=(
            Control("target", "the margin is to be 1 / tau", lambda plan: minimisers(plan, "target")),
            Control(
                "pairs_of_reference",
                "pairs of another law",
                lambda plan: minimisers(plan, "pairs_of_reference"),
            ),
            Control(
                "logistic", "DPO's loss in place of the square", lambda plan: minimisers(plan, "logistic")
            ),
        ),
    ),
    Claim(
        name="ipo.online",
        kind="identity",
        title="On pairs of its own policy IPO stands still at the regularised equilibrium",
        statement=r"$\nabla_\theta L = 0$ at $\pi_\theta = \pi^*_\tau$ where the pairs are iid from $\pi^*_\tau$.",
        source="Calandriello et al. (arXiv 2403.08635): online IPO is self-play",
        cells=stationary,
        judge=judge_stationary,
        controls=(
            Control(
                "pairs_of_reference",
                "pairs of the reference",
                lambda plan: stationary(plan, "pairs_of_reference"),
            ),
            Control(
                "unregularised", "at the reference policy", lambda plan: stationary(plan, "unregularised")
            ),
        ),
    ),
)
