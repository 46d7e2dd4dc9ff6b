"""Claims about a majority of four judges on the answers of a language model (`envs/judges.py`).

Sentiment, real words, readability and length each rank the answers to a prompt; their majority runs in circles on all
eight prompts. Everything is exact, over all answers under the reference law of the model: a prompt is a case, and
there are no others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...envs.judges import JUDGES
from ..cells import Cell
from ..claim import Claim, Control, Judgement, Outcome, Plan
from ..statistics import all_of, judge_identity, judge_inequality
from ._structure_runs import cell

WORLD = "SmolLM2-135M-Instruct on eight prompts, at most five tokens, four a step"
PROMPTS = range(8)
TWO = (0, 4)  # prompts are enough for a control
ALONE = tuple((judge,) for judge in JUDGES)
TAUS = (0.05, 0.1, 0.2)


def majorities(plan: Plan, judges: Sequence[Sequence[str]] = (JUDGES,)) -> list[Cell]:
    return [
        cell("majority_cycles", 0, prompt=x, judges=list(some), strict=strict)
        for some in judges
        for x in PROMPTS
        for strict in plan.pick(quick=(False,), full=(False, True))
    ]


def judge_majorities(outcomes: Sequence[Outcome]) -> Judgement:
    return all_of(
        {
            "cycles": judge_inequality([o["count"] - 1 for o in outcomes]),
            "cycles that the model writes": judge_inequality([o["share"] - 1e-3 for o in outcomes]),
            "no Condorcet winner": judge_identity([float(o["condorcet"]) for o in outcomes]),
        }
    )


def only(judge: str) -> Control:
    name = f"only_{judge.replace(' ', '_')}"
    return Control(name, f"the {judge} alone", lambda plan: majorities(plan, ((judge,),)))


def rankings(
    plan: Plan,
    judges: Sequence[Sequence[str]] = ALONE,
    prompts: Sequence[int] = PROMPTS,
) -> list[Cell]:
    return [cell("one_judge", 0, prompt=x, judges=list(some)) for some in judges for x in prompts]


def judge_rankings(outcomes: Sequence[Outcome]) -> Judgement:
    return all_of(
        {
            "ranked by the score": judge_identity([o["ranking"] for o in outcomes]),
            "no cycle": judge_identity([o["cycles"] for o in outcomes]),
            "a limit of rewards": judge_identity([o["misfit"] for o in outcomes]),
        }
    )


def rewards(plan: Plan, judges: Sequence[str] = JUDGES, fault: str = "none") -> list[Cell]:
    """The seed matters for the random reward alone."""
    return [
        cell("reward_errors", s, prompt=x, judges=list(judges), fault=fault)
        for x in PROMPTS
        for s in range(plan.pick(quick=1, full=4))
    ]


def judge_rewards(outcomes: Sequence[Outcome]) -> Judgement:
    return all_of(
        {
            "there are cycles": judge_inequality([o["share"] - 1e-3 for o in outcomes]),
            "every reward": judge_inequality(
                [wrong - o["share"] / 3 for o in outcomes for wrong in o["wrong"].values()], 1e-12
            ),
        }
    )


def duels(plan: Plan, prompts: Sequence[int] = PROMPTS, **broken: Any) -> list[Cell]:
    return [
        cell("duel", 0, prompt=x, tau=tau, **broken)
        for x in prompts
        for tau in plan.pick(quick=TAUS[:1], full=TAUS)
    ]


def judge_duels(outcomes: Sequence[Outcome]) -> Judgement:
    """Ahead by more than rounding, which is what the solvers' certificates leave."""
    return all_of(
        {
            "the equilibrium is ahead": judge_inequality([o["lead"] - 1e-6 for o in outcomes]),
            "equal KL": judge_identity([o["kl"][1] - o["kl"][0] for o in outcomes]),
            "certificates": judge_identity([o["certificate"] for o in outcomes]),
        }
    )


CLAIMS = (
    Claim(
        name="judges.intransitive",
        kind="inequality",
        title="A majority of four readable judges runs in circles on every prompt, and no answer beats all others",
        statement="On each of the eight prompts more than one in a thousand triples of answers drawn from the "
        "reference is cyclic under the majority of sentiment, real words, readability and length, and there is no "
        "Condorcet winner.",
        assumptions=(WORLD, "each judge has a vote, half to each side in a tie"),
        source="Condorcet's paradox, on the shipped world",
        cells=majorities,
        judge=judge_majorities,
        controls=tuple(only(judge) for judge in JUDGES),
    ),
    Claim(
        name="judges.one_judge",
        kind="identity",
        title="Each judge alone ranks the answers, as rewards do in the limit",
        statement="The answers to a prompt are totally preordered by a judge's score, and no KL is left between its "
        "preferences and Bradley-Terry laws of ever larger rewards.",
        assumptions=(WORLD,),
        source="a score orders",
        cells=rankings,
        judge=judge_rankings,
        controls=(
            Control(
                "two_judges", "two judges", lambda plan: rankings(plan, (("sentiment", "readability"),), TWO)
            ),
            Control("majority", "all four judges", lambda plan: rankings(plan, (JUDGES,), TWO)),
        ),
    ),
    Claim(
        name="judges.reward_errs",
        kind="inequality",
        title="Every reward ranks answers against the majority, at least a third as often as triples run in circles",
        statement=r"For every reward $r$: two draws from the reference have $y \succ y'$ by majority and $r(y) \leq "
        r"r(y')$ with probability at least a third of that of a cyclic triple. Measured for the Bradley-Terry fit, "
        "for each judge's score, for wins minus losses and for a random reward.",
        assumptions=(WORLD,),
        source="of three pairs of a cyclic triple a reward gets one wrong",
        cells=rewards,
        judge=judge_rewards,
        controls=(
            Control("one_judge", "readability alone", lambda plan: rewards(plan, ("readability",))),
            Control(
                "preference",
                "the preference itself in place of rewards",
                lambda plan: rewards(plan, fault="preference"),
            ),
        ),
    ),
    Claim(
        name="judges.reward_cannot",
        kind="inequality",
        title="At equal KL the policy of the fitted reward loses to the equilibrium on every prompt",
        statement=r"With $r$ the Bradley-Terry reward of comparisons of the reference's answers and $\beta$ such that "
        r"$\pi_r \propto \mu e^{r/\beta}$ has the KL to $\mu$ of $\pi^*_\tau$: $P(\pi^*_\tau \succ \pi_r) > 1/2$.",
        assumptions=(WORLD, r"$\tau = 0.05$ (quick), and 0.1, 0.2", "both have the same KL to the reference"),
        source=r"$P_\tau(\pi^*_\tau \succ \pi) \geq 1/2$ for every $\pi$ (Munos et al., arXiv 2312.00886), at equal KL",
        cells=duels,
        judge=judge_duels,
        controls=(
            Control(
                "more_kl",
                "the reward's policy may have four times the KL",
                lambda plan: duels(plan, TWO, times=4.0),
            ),
            Control("exchanged", "both policies exchanged", lambda plan: duels(plan, TWO, exchanged=True)),
        ),
    ),
)
