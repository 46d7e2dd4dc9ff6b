"""Claims about the reward that a Bradley-Terry fit finds (`algorithms/estimation/bradley_terry.py`).

Where preferences follow a reward, it does not matter which comparisons are made. Where they do not, the law of the
comparisons decides what the reward is, and which response is its best.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..cells import Cell
from ..claim import Claim, Control, Judgement, Outcome, Plan
from ..statistics import all_of, judge_identity, judge_inequality
from ._structure_runs import cell

PAPER = "Munos et al., ICML 2024 (arXiv 2312.00886)"
STEPS = (1e-3, 1e-5, 1e-7)


def populations(plan: Plan, fault: str = "none") -> list[Cell]:
    return [cell("sampling_free", s, fault=fault) for s in plan.seed_range(quick=30, full=200)]


def judge_populations(outcomes: Sequence[Outcome]) -> Judgement:
    return judge_identity([e for o in outcomes for e in o["errors"]], 1e-8)


def rates(plan: Plan, fault: str = "none") -> list[Cell]:
    return [cell("win_rates", s, fault=fault) for s in plan.seed_range(quick=30, full=200)]


def judge_rates(outcomes: Sequence[Outcome]) -> Judgement:
    return all_of(
        {
            "the order": judge_identity([o["order"] for o in outcomes]),
            "the win rates": judge_identity([o["rates"] for o in outcomes]),
        }
    )


def laws(plan: Plan, fault: str = "none") -> list[Cell]:
    return [cell("two_laws", s, fault=fault) for s in plan.seed_range(quick=30, full=200)]


def judge_laws(outcomes: Sequence[Outcome]) -> Judgement:
    return all_of(
        {
            "the best response": judge_identity([o["wrong"] for o in outcomes]),
            "each is the best of a law": judge_identity([o["winners"] - 3 for o in outcomes]),
            "the rewards differ": judge_inequality([o["spread"] - 1e-3 for o in outcomes]),
            "the bound": judge_inequality([o["slack"] for o in outcomes], 1e-9),
        }
    )


def people(plan: Plan, fault: str = "none") -> list[Cell]:
    return [
        cell("jump", s, step=step, fault=fault) for s in plan.seed_range(quick=10, full=40) for step in STEPS
    ]


def judge_people(outcomes: Sequence[Outcome]) -> Judgement:
    return all_of(
        {
            "the best policy jumps": judge_identity([o["policy"] - 1 for o in outcomes]),
            "on both sides it is as said": judge_identity([0.0 if o["best"] else 1.0 for o in outcomes]),
            "the equilibrium in closed form": judge_identity([o["closed"] for o in outcomes]),
            "the equilibrium moves by 2 e": judge_identity([o["nash"] - 2 * o["step"] for o in outcomes]),
            "the reward moves by less than 5 e": judge_inequality(
                [5 * o["step"] - o["reward"] for o in outcomes]
            ),
        }
    )


CLAIMS = (
    Claim(
        name="bradley_terry_fit.sampling_free",
        kind="identity",
        title="Where preferences follow a reward, every connected law of comparisons finds it",
        statement=r"If $P_{ij} = \sigma(r_i - r_j)$, the likelihood over comparisons from any law whose graph is "
        "connected is largest at $r$, up to a constant.",
        assumptions=("3 to 8 responses", "laws on a random spanning tree and some further pairs"),
        source=f"{PAPER}, appendix A (the converse of proposition 2)",
        cells=populations,
        judge=judge_populations,
        controls=(
            Control(
                "random", "a random game, which no reward explains", lambda plan: populations(plan, "random")
            ),
        ),
    ),
    Claim(
        name="bradley_terry_fit.win_rates",
        kind="identity",
        title="The fitted reward is the win rate against the data, on another scale",
        statement=r"If both responses of a comparison are iid from $\pi$, the best reward has "
        r"$\sum_j \pi_j \sigma(r_i - r_j) = P(i \succ \pi)$ for every $i$, and orders the responses as "
        r"$P(\cdot \succ \pi)$ does.",
        assumptions=("any game", r"$\pi$ positive everywhere"),
        source="stationarity of the likelihood",
        cells=rates,
        judge=judge_rates,
        controls=(
            Control("uniform", "win rates against the uniform law", lambda plan: rates(plan, "uniform")),
            Control(
                "joint", "comparisons from a joint law that is not iid", lambda plan: rates(plan, "joint")
            ),
        ),
    ),
    Claim(
        name="bradley_terry_fit.two_laws",
        kind="identity",
        title="In a cycle the data decide who is best: any response, for some law of the comparisons",
        statement=r"For $a \succ m \succ c \succ a$ and comparisons iid from $\pi$ with $\pi_a, \pi_c < "
        r"\pi_m \min(P_{am}, P_{mc}) - \pi_m/2$ the best reward has its largest value at $a$, with "
        r"$\sigma(r_a - r_m) \geq P_{am} - \pi_c/\pi_m$.",
        assumptions=("three responses in a cycle",),
        source=f"{PAPER}, proposition 2 (the law matters); the example is derived in `_structure_runs.two_laws`",
        cells=laws,
        judge=judge_laws,
        controls=(
            Control(
                "bradley_terry",
                "people whose answers follow a reward",
                lambda plan: laws(plan, "bradley_terry"),
            ),
            Control("uniform", "the same law of comparisons three times", lambda plan: laws(plan, "uniform")),
        ),
    ),
    Claim(
        name="bradley_terry_fit.jump",
        kind="identity",
        title="Three types of people: the policy that is best for the fitted reward jumps, the equilibrium does not",
        statement=r"With $f_A = f_C = 1/3 - e/4$, $f_B = 1/3 + e/2$ and uniform comparisons the highest reward is "
        r"response 1's for $e < 0$ and response 2's for $e > 0$: the best policies from both sides of 0 share "
        r"nothing, while the equilibria at $\pm e$ are $2e$ apart in total variation. The reward itself is "
        "continuous; its maximiser is not.",
        assumptions=(r"$e \in [-0.6, 0.3]$", r"both sides at $10^{-3}, 10^{-5}, 10^{-7}$"),
        source=f"{PAPER}, section 3.2 and appendix A",
        cells=people,
        judge=judge_people,
        controls=(
            Control(
                "bradley_terry",
                "people whose answers follow a reward",
                lambda plan: people(plan, "bradley_terry"),
            ),
            Control(
                "nash", "the equilibrium in place of the best response", lambda plan: people(plan, "nash")
            ),
        ),
    ),
)
