"""Claims about DPO (`algorithms/dpo.py`): where its population loss is least, what it leaves free, what data buy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .. import figures
from ..cells import Cell
from ..claim import Claim, Control, Judgement, Outcome, Plan
from ..statistics import all_of, judge_identity, judge_inequality, judge_rate, slope_loglog
from ._loss_runs import cell

PAPER = "Rafailov et al., NeurIPS 2023 (arXiv 2305.18290)"
NS = (256, 512, 1024, 2048, 4096, 8192)


def minimisers(plan: Plan, worlds: Sequence[str] = ("table", "tree"), fault: str = "none") -> list[Cell]:
    seeds = plan.seed_range(quick=8, full=40)
    return [cell("dpo_minimiser", s, world=world, fault=fault) for s in seeds for world in worlds]


def judge_minimisers(outcomes: Sequence[Outcome]) -> Judgement:
    return judge_identity([o["error"] for o in outcomes])


def rankings(plan: Plan, fault: str = "none") -> list[Cell]:
    return [cell("ranking_minimiser", s, fault=fault) for s in plan.seed_range(quick=8, full=40)]


def noisy(plan: Plan, fault: str = "none") -> list[Cell]:
    return [cell("noisy_minimiser", s, fault=fault) for s in plan.seed_range(quick=8, full=40)]


def gaps(plan: Plan, fault: str = "none") -> list[Cell]:
    return [cell("dpo_gap", s, fault=fault) for s in plan.seed_range(quick=20, full=100)]


def judge_gaps(outcomes: Sequence[Outcome]) -> Judgement:
    return judge_identity([e for o in outcomes for e in o["errors"]])


def components(plan: Plan, joined: bool = False) -> list[Cell]:
    return [cell("dpo_components", s, joined=joined) for s in plan.seed_range(quick=8, full=30)]


def judge_components(outcomes: Sequence[Outcome]) -> Judgement:
    parts = {
        "mass moved between components changes the loss by": [e for o in outcomes for e in o["moved"]],
        "within a component the law differs from the optimum's by": [
            e for o in outcomes for e in o["within"]
        ],
    }
    return all_of({name: judge_identity(errors) for name, errors in parts.items()})


def slopes(plan: Plan, kind: str = "dpo") -> list[Cell]:
    return [cell("certain_slope", s, kind=kind) for s in plan.seed_range(quick=8, full=30)]


def judge_slopes(outcomes: Sequence[Outcome]) -> Judgement:
    """Strictly positive: the smallest number that is not 0 is the tolerance's other side."""
    return judge_inequality([s for o in outcomes for s in o["slopes"]], tolerance=-np.finfo(np.float64).tiny)


def samples(plan: Plan, fault: str = "none", seeds: int = 0) -> list[Cell]:
    chosen = plan.seed_range(quick=seeds or 120, full=seeds or 200)
    return [cell("dpo_samples", s, Ns=NS, fault=fault) for s in chosen]


def curves(outcomes: Sequence[Outcome]) -> np.ndarray:
    return np.array([o["gaps"] for o in outcomes])


def judge_samples(outcomes: Sequence[Outcome]) -> Judgement:
    return judge_rate(slope_loglog(NS, curves(outcomes)), -1.0)


def draw_samples(outcomes: Sequence[Outcome], judgement: Judgement) -> Any:
    Y = curves(outcomes)
    line = figures.Curve("DPO", NS, Y, slope_loglog(NS, Y))
    return figures.loglog([line], x="comparisons N", y="gap of the regularised value", reference=-1.0)


CLAIMS = (
    Claim(
        name="dpo.population_minimiser",
        kind="identity",
        title="The population loss is least at the KL-regularised optimum, whatever the law of the pairs",
        statement=r"If $P(y \succ y') = \sigma(r(y) - r(y'))$ and the pairs connect all responses, "
        r"$\arg\min_\pi L = \pi_{\mathrm{ref}} e^{r/\beta} / Z$, on softmax tables and on token trees.",
        assumptions=("the comparison graph is connected", "sums of token log-probabilities"),
        source=f"{PAPER}, equations 4 and 7, theorem 1",
        cells=minimisers,
        judge=judge_minimisers,
        controls=(
            Control(
                "beta_twice",
                "beta multiplies the margin twice",
                lambda plan: minimisers(plan, fault="beta_twice"),
            ),
            Control(
                "mean_tokens",
                "log-probabilities are averaged over the tokens",
                lambda plan: minimisers(plan, ("tree",), "mean_tokens"),
            ),
            Control(
                "no_reference",
                "log pi without the reference",
                lambda plan: minimisers(plan, fault="no_reference"),
            ),
            Control(
                "exchanged",
                "the loser's label for the winner's",
                lambda plan: minimisers(plan, fault="exchanged"),
            ),
        ),
    ),
    Claim(
        name="dpo.rankings",
        kind="identity",
        title="The loss on rankings has the same minimiser",
        statement=r"If rankings of three follow Plackett-Luce with reward $r$, the minimiser of "
        r"$-\mathbb{E}\log\prod_k e^{\hat r(y_k)} / \sum_{j \geq k} e^{\hat r(y_j)}$ is "
        r"$\pi_{\mathrm{ref}} e^{r/\beta} / Z$.",
        source=f"{PAPER}, appendix A.3",
        cells=rankings,
        judge=judge_minimisers,
        controls=(
            Control("reversed", "worst first", lambda plan: rankings(plan, "reversed")),
            Control("uniform", "all orders equally likely", lambda plan: rankings(plan, "uniform")),
            Control(
                "beta_twice", "beta multiplies the scores twice", lambda plan: rankings(plan, "beta_twice")
            ),
        ),
    ),
    Claim(
        name="dpo.label_noise",
        kind="identity",
        title="Smoothed labels shrink the log-odds as flipped ones do",
        statement=r"With two responses the minimiser of cDPO's loss has $\beta h = "
        r"\mathrm{logit}((1 - 2\varepsilon) p + \varepsilon)$.",
        source="cDPO (Mitchell, 2023), as in the authors' code",
        cells=noisy,
        judge=judge_minimisers,
        controls=(
            Control("unsmoothed", "the loss without smoothing", lambda plan: noisy(plan, "unsmoothed")),
            Control("additive", "p + eps for the smoothed probability", lambda plan: noisy(plan, "additive")),
        ),
    ),
    Claim(
        name="dpo.gap_identity",
        kind="identity",
        title="What a policy falls short of is its divergence from the optimum",
        statement=r"$J(\pi_r) - J(\pi) = \beta\, \mathrm{KL}(\pi, \pi_r)$ with "
        r"$J(\pi) = \mathbb{E}_\pi[r] - \beta\, \mathrm{KL}(\pi, \pi_{\mathrm{ref}})$, for every policy.",
        source=f"{PAPER}, appendix A.1",
        cells=gaps,
        judge=judge_gaps,
        controls=(
            Control("reversed", "KL(pi_r, pi) in place of KL(pi, pi_r)", lambda plan: gaps(plan, "reversed")),
            Control("beta_twice", "beta^2 in place of beta", lambda plan: gaps(plan, "beta_twice")),
        ),
    ),
    Claim(
        name="dpo.mass_outside_the_data",
        kind="identity",
        title="Mass that moves between what nobody compares changes nothing",
        statement=r"If the pairs fall into components, $L$ does not change when a component's logits rise together; "
        r"within each component the minimiser is $\pi_r$'s conditional law, and the shares stay as the start has them.",
        source=f"{PAPER}, equation 7: only differences within pairs enter",
        cells=components,
        judge=judge_components,
        controls=(
            Control(
                "joined", "one more pair joins the components", lambda plan: components(plan, joined=True)
            ),
        ),
    ),
    Claim(
        name="dpo.certain_preference",
        kind="inequality",
        title="A preference that is certain is never satisfied",
        statement=r"For $p = 1$, $-\partial L / \partial h = \beta\sigma(-\beta h) > 0$ at every margin $h$, "
        r"for every $\beta$; IPO stops at $1 / (2\tau)$.",
        source=f"{PAPER}, equation 7; Azar et al. (arXiv 2310.12036), section 4.2",
        cells=slopes,
        judge=judge_slopes,
        controls=(
            Control("ipo", "IPO's loss", lambda plan: slopes(plan, "ipo")),
            Control("smoothed", "labels smoothed by 0.1", lambda plan: slopes(plan, "smoothed")),
        ),
    ),
    Claim(
        name="dpo.sample_rate",
        kind="rate",
        title="With all pairs covered, the gap falls like one over the number of comparisons",
        statement=r"$\mathbb{E}[J(\pi_r) - J(\hat\pi_N)] = \Theta(1/N)$ on four responses, all pairs equally often.",
        assumptions=("Bradley-Terry labels", "a slack of 0.1 on the exponent, N in 256 to 8192"),
        source="asymptotic normality of the maximum-likelihood reward; the gap is quadratic in its error",
        cells=samples,
        judge=judge_samples,
        controls=(
            Control("noise", "one label in ten is flipped", lambda plan: samples(plan, "noise", 40)),
            Control(
                "disconnected",
                "two pairs are all that is compared",
                lambda plan: samples(plan, "disconnected", 40),
            ),
        ),
        figure=draw_samples,
    ),
)
