"""Claims about INPO (`algorithms/inpo.py`) on exact preference games: its loss, its limit, and its relatives."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..cells import Cell
from ..claim import Claim, Control, Judgement, Outcome, Plan
from ..statistics import judge_identity
from ._game_runs import cell
from ._loss_runs import cell as loss_cell

PAPER = "Zhang et al., ICLR 2025 (arXiv 2407.00617)"


def minimisers(plan: Plan, shares: Sequence[float] = (0.1, 0.3, 0.7, 1.0), fault: str = "none") -> list[Cell]:
    return [
        loss_cell("inpo_minimiser", s, share=share, fault=fault)
        for s in plan.seed_range(quick=8, full=30)
        for share in shares
    ]


def judge_minimiser(outcomes: Sequence[Outcome]) -> Judgement:
    return judge_identity([o[name] for o in outcomes for name in ("error", "step")])


def limits(plan: Plan, kind: str = "inpo") -> list[Cell]:
    return [
        cell("bias", s, tau=tau, shares=(0.02, 0.08, 0.3), kind=kind)
        for s in plan.seed_range(quick=4, full=12)
        for tau in (0.2, 1.0)
    ]


def judge_limit(outcomes: Sequence[Outcome]) -> Judgement:
    """sqrt(2 KL), which bounds the distance in total variation twice over."""
    return judge_identity([float(np.sqrt(2 * kl)) for o in outcomes for kl in o["divergence"]])


def relatives(plan: Plan, fault: str = "none") -> list[Cell]:
    return [
        cell("steps_agree", s, share=share, fault=fault)
        for s in plan.seed_range(quick=8, full=30)
        for share in (0.1, 0.3, 0.7)
    ]


def judge_relatives(outcomes: Sequence[Outcome]) -> Judgement:
    return judge_identity([e for o in outcomes for e in o["errors"]])


CLAIMS = (
    Claim(
        name="inpo.population_minimiser",
        kind="identity",
        title="The loss that sees only who won has the mirror step as its minimiser; at eta tau = 1 it is IPO",
        statement=r"$\arg\min_\pi \mathbb{E}_{y,y' \sim \pi_t}[(h_t(y_w, y_l) - \eta/2)^2] \propto "
        r"e^{\eta P(\cdot \succ \pi_t)} \mu^{\eta\tau} \pi_t^{1-\eta\tau}$; at $\eta\tau = 1$ it is the best response "
        r"to $\pi_t$, $\mu\, e^{P(\cdot \succ \pi_t)/\tau} / Z$.",
        assumptions=("both responses of a pair come from the same law, with full support",),
        source=f"{PAPER}, the loss of INPO; Azar et al. (arXiv 2310.12036), IPO",
        cells=minimisers,
        judge=judge_minimiser,
        controls=(
            Control(
                "no_policy_term",
                "the ratio to the policy of the round is missing",
                lambda plan: minimisers(plan, (0.3, 0.7), "no_policy_term"),
            ),
            Control(
                "pairs_of_reference",
                "pairs are drawn from the reference, not from the policy of the round",
                lambda plan: minimisers(plan, fault="pairs_of_reference"),
            ),
            Control(
                "inverse_step",
                "the margin takes the inverse step for the step",
                lambda plan: minimisers(plan, fault="inverse_step"),
            ),
        ),
    ),
    Claim(
        name="inpo.no_bias",
        kind="identity",
        title="At any constant step the limit is the regularised equilibrium",
        statement=r"$\lim_t \pi_t = \pi^*_\tau$ at constant steps $\eta \leq 0.3/\tau$.",
        source="pi* is a fixed point of the step for every eta",
        cells=limits,
        judge=judge_limit,
        controls=(
            Control(
                "mixture_opponent",
                "the opponent is Nash-MD's mixture in place of the policy",
                lambda plan: limits(plan, "mixture_opponent"),
            ),
        ),
    ),
    Claim(
        name="inpo.relatives",
        kind="identity",
        title="INPO is Nash-MD against the policy itself, and both are SPPO without temperature",
        statement=r"The steps in $\log\pi$ of INPO and Nash-MD differ by $\eta P(\cdot \succ \pi_t) - "
        r"\eta P(\cdot \succ \pi_t^\mu)$ alone; at $\tau \to 0$ both are $\pi_t\, e^{\eta P(\cdot \succ \pi_t)}$.",
        source=f"{PAPER}; the definitions of the three steps",
        cells=relatives,
        judge=judge_relatives,
        controls=(
            Control(
                "same_opponent",
                "the two opponents are taken to be one",
                lambda plan: relatives(plan, "same_opponent"),
            ),
            Control(
                "inverse_step",
                "Nash-MD gets INPO's inverse step",
                lambda plan: relatives(plan, "inverse_step"),
            ),
            Control(
                "warm", "the limit is taken at the temperature itself", lambda plan: relatives(plan, "warm")
            ),
        ),
    ),
)
