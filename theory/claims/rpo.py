"""Claims about RPO (`algorithms/rpo.py`): its saddle, its imitation term, and over-optimisation from few
comparisons."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .. import figures
from ..cells import Cell
from ..claim import Claim, Control, Judgement, Outcome, Plan
from ..statistics import all_of, conjunction, judge_identity, judge_inequality, judge_rate, slope_loglog
from .vpo import (
    STRENGTHS,
    each,
    imitation_curves,
    imitations,
    judge_errors,
    judge_fits,
    judge_imitations,
)

PAPER = "Liu et al., NeurIPS 2024 (arXiv 2405.16436)"
ETAS = (0.02, 0.1, 0.5, 2.0)
NS = (256, 512, 1024, 2048, 4096, 8192, 16384)
CS = (0.1, 0.2)


def saddles(plan: Plan, fault: str = "none") -> list[Cell]:
    return each(plan, "saddle", 6, 40, fault=fault)


def judge_saddles(outcomes: Sequence[Outcome]) -> Judgement:
    """The policies to 1e-6: the outer maximisation sees values, which are flat at the top."""
    return all_of(
        {
            "values": judge_identity([o["value"] for o in outcomes]),
            "policies": judge_identity([o["policy"] for o in outcomes], 1e-6),
        }
    )


def forms(plan: Plan, fault: str = "none") -> list[Cell]:
    return each(plan, "rpo_two_forms", 8, 40, fault=fault)


def slopes(plan: Plan, fault: str = "none") -> list[Cell]:
    return each(plan, "imitation_slope", 20, 100, fault=fault)


def relatives(plan: Plan, fault: str = "none") -> list[Cell]:
    return each(plan, "rpo_is_vpo", 8, 40, fault=fault)


def few(plan: Plan, fault: str = "none") -> list[Cell]:
    return each(plan, "unseen", 10, 60, etas=ETAS, fault=fault)


def judge_few(outcomes: Sequence[Outcome]) -> Judgement:
    return all_of(
        {
            "unseen": judge_identity([e for o in outcomes for e in o["unseen"]], 1e-8),
            "seen once": judge_identity([e for o in outcomes for e in o["lucky"]], 1e-8),
            "falls in eta": judge_inequality([f - 1e-6 for o in outcomes for f in o["falls"]]),
        }
    )


def draw_imitations(outcomes: Sequence[Outcome], judgement: Judgement) -> Any:
    Y = imitation_curves(outcomes)
    line = figures.Curve("RPO", STRENGTHS, Y, slope_loglog(STRENGTHS, Y))
    return figures.loglog([line], x=r"$\eta$", y=r"max $|\pi_\eta - \pi_{base}|$", reference=-1.0)


# ---- over-optimisation -----------------------------------------------------------------------------------------------


def gaps(plan: Plan, fixed: bool = False, cs: Sequence[float] = CS) -> list[Cell]:
    methods = ("rpo", "vpo")
    return [
        run
        for method in methods
        for c in cs
        for run in each(plan, "offline_gaps", 40, 200, Ns=NS, method=method, c=c, fixed=fixed)
    ]


def all_gaps(plan: Plan) -> list[Cell]:
    return [*gaps(plan), *each(plan, "offline_gaps", 40, 200, Ns=NS, method="rpo", c=0.0)]


def only(c: float, fixed: bool = False) -> Any:
    """The control: one strength for all, judged as the real ones are."""
    return lambda plan: [
        *gaps(plan, fixed, (c,)),
        *each(plan, "offline_gaps", 40, 40, Ns=NS, method="rpo", c=0.0),
    ]


def curves(outcomes: Sequence[Outcome]) -> dict[str, np.ndarray]:
    def kind(o: Outcome) -> str:
        return f"{o['method']}, c = {o['c']:g}" if (o["method"], o["c"]) != ("rpo", 0) else "dpo"

    kinds = dict.fromkeys(kind(o) for o in outcomes)
    return {k: np.array([o["gaps"] for o in outcomes if kind(o) == k]) for k in kinds}


def judge_gaps(outcomes: Sequence[Outcome]) -> Judgement:
    def part(kind: str, Y: np.ndarray) -> Any:
        expected = 0.0 if kind == "dpo" else -0.5
        return lambda level: judge_rate(slope_loglog(NS, Y, level=level), expected)

    return conjunction({kind: part(kind, Y) for kind, Y in curves(outcomes).items()})


def draw_gaps(outcomes: Sequence[Outcome], judgement: Judgement) -> Any:
    lines = [figures.Curve(kind, NS, Y, slope_loglog(NS, Y)) for kind, Y in curves(outcomes).items()]
    return figures.loglog(lines, x="comparisons N", y="gap of the regularised value", reference=-0.5)


CLAIMS = (
    Claim(
        name="rpo.saddle",
        kind="identity",
        title="The best policy against an adversarial reward is the optimal policy of the worst reward",
        statement=r"$\max_\pi \min_{r \in R} \{\eta(J_\beta(\pi; r) - \mathbb{E}_{\mathrm{base}} r) + L_D(r)\} = "
        r"\min_{r \in R} \{L_D(r) + \eta(\max_\pi J_\beta(\pi; r) - \mathbb{E}_{\mathrm{base}} r)\}$, with the same "
        r"policy; "
        r"60 sampled comparisons of 5 responses, $\beta = 0.5$, $\eta = 0.8$.",
        assumptions=("R is convex: rewards that differ by at most 8",),
        source=f"{PAPER}, the equivalence of the maximin and the minimax objective",
        cells=saddles,
        judge=judge_saddles,
        controls=(
            Control(
                "rejected", "the baseline of the rejected responses", lambda plan: saddles(plan, "rejected")
            ),
            Control("eta_twice", "eta beta in place of eta", lambda plan: saddles(plan, "eta_twice")),
            Control("no_adversary", "eta = 0: DPO", lambda plan: saddles(plan, "no_adversary")),
        ),
    ),
    Claim(
        name="rpo.two_forms",
        kind="identity",
        title="The imitation term is the adversary",
        statement=r"$L_{\mathrm{RPO}}(\pi_r) = L_D(r) + \eta(J^*(r) - \mathbb{E}_{\mathrm{base}} r) - \eta\beta\, "
        r"\mathbb{E}_{\mathrm{base}}[\log\pi_{\mathrm{ref}}]$ for every $r$, on the responses of a token tree, with "
        r"the chosen "
        r"responses as the baseline.",
        assumptions=("sums of token log-probabilities",),
        source=f"{PAPER}, the loss of RPO",
        cells=forms,
        judge=judge_errors,
        controls=(
            Control("rejected", "the rejected responses are imitated", lambda plan: forms(plan, "rejected")),
            Control("eta_twice", "eta is multiplied by beta twice", lambda plan: forms(plan, "eta_twice")),
            Control(
                "mean_tokens",
                "the imitation term averages over tokens",
                lambda plan: forms(plan, "mean_tokens"),
            ),
        ),
    ),
    Claim(
        name="rpo.imitation_gradient",
        kind="identity",
        title="In the reward, the imitation term pushes from the baseline to the policy",
        statement=r"$\nabla_r [\beta \log\mathbb{E}_{\mathrm{ref}} e^{r/\beta} - \mathbb{E}_{\mathrm{base}} r] = "
        r"\pi_r - "
        r"\pi_{\mathrm{base}}$.",
        source=f"{PAPER}, the loss of RPO; the envelope theorem",
        cells=slopes,
        judge=judge_errors,
        controls=(
            Control("reference", "the reference as the baseline", lambda plan: slopes(plan, "reference")),
            Control("beta_twice", "beta squared", lambda plan: slopes(plan, "beta_twice")),
            Control("reversed", "the sign", lambda plan: slopes(plan, "reversed")),
        ),
    ),
    Claim(
        name="rpo.vpo",
        kind="identity",
        title="RPO is VPO offline, calibrated on the baseline",
        statement=r"RPO's loss with the chosen responses and $\eta$, and VPO's reward form with $s = -1$, $\alpha = "
        r"\eta$ and "
        r"$\pi_{\mathrm{cal}}$ the law of the chosen responses, have the same minimiser, to $10^{-8}$ in $\log\pi$.",
        source=f"{PAPER}; Cen et al. (arXiv 2405.19320)",
        cells=relatives,
        judge=judge_fits,
        controls=(
            Control("wrong_sign", "VPO with the online sign", lambda plan: relatives(plan, "wrong_sign")),
            Control("eta_twice", "eta beta in place of eta", lambda plan: relatives(plan, "eta_twice")),
            Control("rejected", "VPO calibrates on the rejected", lambda plan: relatives(plan, "rejected")),
        ),
    ),
    Claim(
        name="rpo.few_comparisons",
        kind="identity",
        title="What nobody compared gets the baseline's mass; what won once gets a little more, the less the larger "
        "eta",
        statement=r"For every $\eta > 0$ and every start, an uncompared $u$ has $\hat\pi(u) = "
        r"\pi_{\mathrm{base}}(u)$. A "
        r"response $l$ compared once in $N$, with $j$, and preferred has $\hat\pi(l) = \pi_{\mathrm{base}}(l) + "
        r"\sigma(\hat r_j "
        r"- \hat r_l)/(N\eta)$, which falls in $\eta$.",
        assumptions=(r"$\pi_{\mathrm{base}}$ has mass on both, and the class does not bind",),
        source=f"{PAPER}, the loss of RPO: where its gradient vanishes",
        cells=few,
        judge=judge_few,
        controls=(
            Control(
                "dpo",
                "eta = 0: the unseen response stays where the start has it",
                lambda plan: few(plan, "dpo"),
            ),
            Control("bonus", "the sign of eta", lambda plan: few(plan, "bonus")),
            Control("reference", "the reference is imitated", lambda plan: few(plan, "reference")),
        ),
    ),
    Claim(
        name="rpo.imitation",
        kind="rate",
        title="With a strong adversary the policy is the baseline",
        statement=r"$\max|\pi_\eta - \pi_{\mathrm{base}}| = \Theta(1/\eta)$.",
        source=f"{PAPER}, the loss of RPO",
        cells=imitations,
        judge=judge_imitations,
        controls=(
            Control("bonus", "the sign of eta", lambda plan: imitations(plan, "wrong_sign")),
            Control(
                "rejected", "the rejected responses are imitated", lambda plan: imitations(plan, "rejected")
            ),
        ),
        figure=draw_imitations,
    ),
    Claim(
        name="rpo.over_optimisation",
        kind="rate",
        title="One lucky comparison ruins DPO for ever, and RPO and VPO offline less and less",
        statement=r"The worst of three responses is compared once and wins, the other two $N - 1$ times. DPO's gap "
        r"does not "
        r"fall in $N$; with $\eta = c/\sqrt{N}$ that of RPO (baseline: chosen responses) and of VPO offline "
        r"(calibrated on all "
        r"responses) falls like $N^{-1/2}$.",
        assumptions=(
            r"$\beta = 0.05$: the optimal policy is covered, its mass on the lucky response is below $10^{-5}$",
            "rewards differ by at most 2 in the class; a slack of 0.1 on each exponent",
        ),
        source=f"{PAPER}, theorem on the gap with partial coverage",
        cells=all_gaps,
        judge=judge_gaps,
        controls=(
            Control("no_adversary", "eta = 0", only(0.0)),
            Control("fixed", "eta = 1 for every N: a bias that stays", only(1.0, fixed=True)),
        ),
        figure=draw_gaps,
    ),
)
