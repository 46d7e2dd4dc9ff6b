"""Claims about preferences by ranked factors (`envs/lexicographic.py`), the decision tree of HERON.

Without margins the tree ranks; with margins it runs in circles, exactly as often as a small integral says. What a
reward fitted to its labels then cannot express, and what it loses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .. import figures
from ..cells import Cell
from ..claim import Claim, Control, Judgement, Outcome, Plan
from ..statistics import (
    all_of,
    conjunction,
    judge_identity,
    judge_inequality,
    judge_probability,
    judge_rate,
    slope_loglog,
)
from ._structure_runs import cell

PAPER = "HERON (arXiv 2309.02632)"
MARGINS = (0.3, 0.5, 0.8)
SIZES = (16, 32, 64, 128, 256)
CLOSE = 0.05  # of a share: the interval lies within 5 % of it


def rankings(plan: Plan, kinds: Sequence[str] = ("integers", "reals"), **broken: Any) -> list[Cell]:
    return [
        cell("preorder", s, kind=kind, **broken)
        for s in plan.seed_range(quick=20, full=100)
        for kind in kinds
    ]


def judge_rankings(outcomes: Sequence[Outcome]) -> Judgement:
    return all_of(
        {
            "no cycle, ties are transitive": judge_identity([o["cycles"] for o in outcomes]),
            "the lexicographic order": judge_identity([o["ranking"] for o in outcomes]),
            "the weighted sum": judge_identity([o["weights"] for o in outcomes if o["kind"] == "integers"]),
        }
    )


def weights_on_reals(plan: Plan) -> list[Cell]:
    """Real factors that are taken for whole numbers."""
    return [cell("preorder", s, kind="integers", real=True) for s in plan.seed_range(quick=20, full=100)]


def invariances(plan: Plan, fault: str = "none") -> list[Cell]:
    return [cell("invariance", s, fault=fault) for s in plan.seed_range(quick=20, full=100)]


def judge_invariances(outcomes: Sequence[Outcome]) -> Judgement:
    names = ("antisymmetry", "monotone", "rescaled", "single", "comonotone")
    return all_of({name: judge_identity([o[name] for o in outcomes]) for name in names})


def circles(plan: Plan, fault: str = "none") -> list[Cell]:
    """At each margin some 10^6 triples (quick): the share of the rarest kind is then known to a few per cent."""
    return [
        cell("circles", s, margin=margin, draws=100_000, fault=fault)
        for margin in MARGINS
        for s in plan.seed_range(quick=10, full=40)
    ]


def judge_circles(outcomes: Sequence[Outcome]) -> Judgement:
    def part(margin: float) -> Callable[[float], Judgement]:
        mine = [o for o in outcomes if o["margin"] == margin]
        found, n, expected = sum(o["found"] for o in mine), sum(o["draws"] for o in mine), mine[0]["expected"]
        return lambda level: all_of(
            {
                "not below": judge_probability(found, n, (1 - CLOSE) * expected, level=level),
                "not above": judge_probability(n - found, n, 1 - (1 + CLOSE) * expected, level=level),
            }
        )

    return conjunction(
        {f"margin {margin:g}": part(margin) for margin in dict.fromkeys(o["margin"] for o in outcomes)}
    )


def lightest(plan: Plan, whole: bool = False) -> list[Cell]:
    return [cell("lightest", s, sizes=SIZES, whole=whole) for s in plan.seed_range(quick=200, full=800)]


def judge_lightest(outcomes: Sequence[Outcome]) -> Judgement:
    return judge_rate(slope_loglog(SIZES, [o["weight"] for o in outcomes]), -2.0, slack=0.15)


def draw_lightest(outcomes: Sequence[Outcome], judgement: Judgement) -> Any:
    Y = [o["weight"] for o in outcomes]
    line = figures.Curve("uniform factors", SIZES, Y, slope_loglog(SIZES, Y))
    return figures.loglog([line], x="responses n", y="largest weight of the second factor", reference=-2.0)


def misfits(plan: Plan, margin: float = 0.3, fault: str = "none") -> list[Cell]:
    return [
        cell("misfit", s, n=n, margin=margin, fault=fault)
        for s in plan.seed_range(quick=15, full=60)
        for n in (20, 40)
    ]


def judge_misfits(outcomes: Sequence[Outcome]) -> Judgement:
    return all_of(
        {
            "there are cycles": judge_inequality([o["cycles"] - 1 for o in outcomes]),
            "the bound": judge_inequality([o["misfit"] - o["bound"] for o in outcomes], 1e-12),
            "nothing is left without a margin": judge_identity([o["without_margin"] for o in outcomes]),
            "certificates": judge_identity([o["certificate"] for o in outcomes]),
        }
    )


def winners(plan: Plan, **broken: Any) -> list[Cell]:
    return [cell("winner", s, n=40, **{"margin": 0.3} | broken) for s in plan.seed_range(quick=40, full=200)]


def judge_winners(outcomes: Sequence[Outcome]) -> Judgement:
    """In every game; and both kinds of games occurred."""
    loses = [0.0 if o["condorcet"] else 0.5 for o in outcomes]
    with_winner = sum(bool(o["condorcet"]) for o in outcomes)
    both = min(with_winner, len(outcomes) - with_winner)
    return all_of(
        {
            "what the reward's choice loses": judge_identity(
                [o["reward"] - x for o, x in zip(outcomes, loses, strict=True)]
            ),
            "what Nash's policy loses": judge_identity([o["nash"] for o in outcomes]),
            "both kinds of games": judge_inequality([both - 1]),
        }
    )


UNIFORM = "two independent factors uniform on [0, 1], a margin on the first, none on the second"

CLAIMS = (
    Claim(
        name="heron.total_preorder",
        kind="identity",
        title="Without margins ranked factors rank the responses, and with whole numbers one weighted sum does",
        statement=r"With $d = 0$ the tree is the lexicographic order, a total preorder; with factors $z_l \in "
        r"\{0, \ldots, m_l - 1\}$ it is the order of $\sum_l w_l z_l$, $w_l = \prod_{k > l} m_k$.",
        assumptions=("three factors in a random order of importance",),
        source=f"{PAPER}, its decision tree; the weights are those of a number in mixed radix",
        cells=rankings,
        judge=judge_rankings,
        controls=(
            Control(
                "margins",
                "a margin on the most important factor",
                lambda plan: rankings(plan, ("reals",), margin=0.5),
            ),
            Control("real_factors", "the same weights on real factors", weights_on_reals),
            Control(
                "reversed", "the order of importance reversed", lambda plan: rankings(plan, fault="reversed")
            ),
        ),
    ),
    Claim(
        name="heron.no_weight",
        kind="rate",
        title="With real factors no weights do for all samples: the second one falls like one over n squared",
        statement=r"For $n$ responses with two independent uniform factors the largest $w$ such that $z_1 + w z_2$ "
        r"orders them lexicographically is positive, and falls like $n^{-2}$.",
        assumptions=(r"$n$ from 16 to 256", "the mean over samples"),
        source="some of n(n-1)/2 pairs have ever closer first factors; every finite sample has a weight, all have none",
        cells=lightest,
        judge=judge_lightest,
        controls=(
            Control("whole_numbers", "ten values of each factor", lambda plan: lightest(plan, whole=True)),
        ),
        figure=draw_lightest,
    ),
    Claim(
        name="heron.invariances",
        kind="identity",
        title="Ranked factors do not care for the factors' scales",
        statement=r"$P(y \succ y') + P(y' \succ y) = 1$, ties included. With $d = 0$ increasing functions of the "
        "factors change nothing, one factor is its ranking, and factors that rise together agree with every sum "
        "of positive weights. With margins in standard deviations positive factors of scale change nothing.",
        source=PAPER,
        cells=invariances,
        judge=judge_invariances,
        controls=(
            Control(
                "margins",
                "increasing functions where there are margins",
                lambda plan: invariances(plan, "margin"),
            ),
            Control(
                "absolute", "margins in the units of the factors", lambda plan: invariances(plan, "absolute")
            ),
        ),
    ),
    Claim(
        name="heron.cycle_share",
        kind="probability",
        title="With a margin ranked factors run in circles, and how often is a small integral",
        statement=r"Three responses run in a circle of a given orientation with probability $(3d^2 - 4d^3)/12$ for "
        r"$d \leq 1/2$ and $(1-d)^2(4d-1)/12$ above; measured within 5 % at $d = 0.3, 0.5, 0.8$.",
        assumptions=(UNIFORM,),
        source="derived in `envs/lexicographic.py`; at d = 0.3 it is 1.35 %",
        cells=circles,
        judge=judge_circles,
        controls=(
            Control("both", "circles of both orientations", lambda plan: circles(plan, "both")),
            Control(
                "deviations",
                "the margin in standard deviations in place of the range",
                lambda plan: circles(plan, "deviations"),
            ),
        ),
    ),
    Claim(
        name="heron.misfit",
        kind="inequality",
        title="No reward explains labels that run in circles: the misfit grows with their number",
        statement=r"$(n - 2) \sum_{i<j} \mathrm{KL}(P_{ij}, \sigma(r_i - r_j)) \geq 3 \log 2 \cdot$ the number of "
        "cyclic triples, for every $r$; without margins the misfit is 0, in the limit of large rewards.",
        assumptions=(UNIFORM, "all pairs are compared equally often"),
        source="convexity of $-\\log \\sigma$ on each triple",
        cells=misfits,
        judge=judge_misfits,
        controls=(
            Control("no_margin", "labels without a margin", lambda plan: misfits(plan, 0.0)),
            Control(
                "alone", "as if each pair lay in one triple only", lambda plan: misfits(plan, fault="alone")
            ),
        ),
    ),
    Claim(
        name="heron.winner",
        kind="identity",
        title="The fitted reward finds a Condorcet winner, and where there is none its choice is beaten for certain",
        statement="With a Condorcet winner the highest Bradley-Terry reward is that response's; without one the "
        "response with the highest reward loses to some response with probability 1, while the Nash policy "
        "loses to none more than half of the time.",
        assumptions=(
            UNIFORM,
            "labels are the tree's, without noise",
            "40 responses, all pairs equally often",
        ),
        source="a Condorcet winner never loses, so that its reward is infinite",
        cells=winners,
        judge=judge_winners,
        controls=(
            Control(
                "noisy_level",
                "labels of the first factor that are wrong in one of five cases",
                lambda plan: winners(plan, noise=0.4),
            ),
            Control(
                "no_margin",
                "no margin, so that there is always a winner",
                lambda plan: winners(plan, margin=0.0),
            ),
        ),
    ),
)
