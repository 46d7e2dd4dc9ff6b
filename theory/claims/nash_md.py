"""Claims about Nash-MD (`algorithms/nash_md.py`) and the regularised equilibrium on exact preference games.

The games are random (3 to 8 responses, a random reference), cycles, and the recorded answers of the listeners of
SoundQuality; the equilibrium pi* is Newton's, certified by its exploitability. The constants of Theorem 1 are loose, so
the exponent behind them is claimed as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .. import figures
from ..cells import Cell
from ..claim import Claim, Control, Judgement, Outcome, Plan
from ..statistics import all_of, conjunction, judge_identity, judge_inequality, judge_rate, slope_loglog
from ._equilibrium_runs import WORLDS
from ._equilibrium_runs import cell as equilibrium
from ._game_runs import cell, seeds_of

PAPER = "Munos et al., ICML 2024 (arXiv 2312.00886)"
TAUS = (0.05, 0.2, 1.0)
SHARES = (0.01, 0.02, 0.04, 0.08)  # eta tau of the constant steps
CHECKPOINTS = (250, 500, 1000, 2000)


# ---- the step --------------------------------------------------------------------------------------------------------


def steps(plan: Plan, kind: str = "nash_md") -> list[Cell]:
    return [
        cell("mirror_step", s, share=share, kind=kind)
        for s in plan.seed_range(quick=10, full=40)
        for share in (0.1, 0.3, 0.7)  # 1/2 would not see swapped weights
    ]


def judge_errors(outcomes: Sequence[Outcome]) -> Judgement:
    return judge_identity([e for o in outcomes for e in o["errors"]])


# ---- Theorem 1 -------------------------------------------------------------------------------------------------------


def recursions(plan: Plan, **broken: Any) -> list[Cell]:
    """From mu and from a concentrated start, with the paper's steps, with small and with large constant ones."""
    return [
        cell("course", s, tau=tau, T=200, eta=eta, start=start, **broken)
        for s in plan.seed_range(quick=4, full=16)
        for tau in TAUS
        for eta in (None, 0.02 * tau, 0.5)
        for start in ("reference", "concentrated")
    ]


def judge_recursion(outcomes: Sequence[Outcome]) -> Judgement:
    return judge_inequality([o["recursion"] for o in outcomes], 1e-12)


def courses(
    plan: Plan, worlds: Sequence[str] = ("random", "cyclic", "listeners"), **broken: Any
) -> list[Cell]:
    return [
        cell("course", s, tau=tau, T=2000, world=world, checkpoints=CHECKPOINTS, **broken)
        for world in worlds
        for s in seeds_of(world, plan.seed_range(quick=3, full=8))
        for tau in TAUS
    ]


def judge_course(outcomes: Sequence[Outcome]) -> Judgement:
    """The bound at every step; and KL falls at least as fast as 1/T at the two higher temperatures."""
    curves = {tau: [o["divergence"] for o in outcomes if o["tau"] == tau] for tau in TAUS[1:]}
    bound = judge_inequality([o["bound"] for o in outcomes])

    def part(Y: Any) -> Callable[[float], Judgement]:
        return lambda level: judge_rate(slope_loglog(CHECKPOINTS, Y, level=level), -1.0, sense="at_most")

    rates = {f"exponent, tau = {tau:g}": part(Y) for tau, Y in curves.items()}
    return conjunction({"the bound": lambda level: bound, **rates})


def draw_course(outcomes: Sequence[Outcome], judgement: Judgement) -> Any:
    lines = []
    for tau in TAUS[1:]:
        Y = np.array([o["divergence"] for o in outcomes if o["tau"] == tau])
        lines.append(figures.Curve(rf"$\tau$ = {tau:g}", CHECKPOINTS, Y, slope_loglog(CHECKPOINTS, Y)))
    return figures.loglog(lines, x="steps T", y=r"KL$(\pi^*, \pi_T)$", reference=-1.0)


# ---- constant steps --------------------------------------------------------------------------------------------------


def biases(plan: Plan, seeds: int = 0, **broken: Any) -> list[Cell]:
    return [
        cell("bias", s, tau=tau, shares=SHARES, **broken)
        for s in plan.seed_range(quick=seeds or 4, full=seeds or 12)
        for tau in (0.2, 1.0)
    ]


def curves_of_bias(outcomes: Sequence[Outcome]) -> dict[float, np.ndarray]:
    taus = sorted({o["tau"] for o in outcomes})
    return {tau: np.array([o["divergence"] for o in outcomes if o["tau"] == tau]) for tau in taus}


def judge_bias(outcomes: Sequence[Outcome]) -> Judgement:
    def part(Y: Any) -> Callable[[float], Judgement]:
        return lambda level: judge_rate(slope_loglog(SHARES, Y, level=level), 2.0)

    return conjunction({f"tau = {tau:g}": part(Y) for tau, Y in curves_of_bias(outcomes).items()})


def draw_bias(outcomes: Sequence[Outcome], judgement: Judgement) -> Any:
    lines = [
        figures.Curve(rf"$\tau$ = {tau:g}", SHARES, Y, slope_loglog(SHARES, Y))
        for tau, Y in curves_of_bias(outcomes).items()
    ]
    return figures.loglog(lines, x=r"$\eta\tau$", y=r"KL$(\pi^*, \pi_\infty)$", reference=2.0)


def judge_own_mixture(outcomes: Sequence[Outcome]) -> Judgement:
    return judge_identity([d for o in outcomes for d in o["own_mixture"]])


# ---- what a reward cannot say ----------------------------------------------------------------------------------------


def people(plan: Plan, **broken: Any) -> list[Cell]:
    return [cell("three_types", s, **broken) for s in plan.seed_range(quick=10, full=40)]


def judge_people(outcomes: Sequence[Outcome]) -> Judgement:
    jumps = [0.0 if o["jump"] else 1.0 for o in outcomes]
    return all_of(
        {
            "linear program": judge_identity([o["linear_program"] for o in outcomes]),
            "temperature to 0": judge_identity([o["newton"] for o in outcomes]),
            "the highest Borda score jumps at e = 0": judge_identity(jumps),
        }
    )


# ---- the regularised equilibrium -------------------------------------------------------------------------------------


def cold_limits(plan: Plan, fault: str = "none") -> list[Cell]:
    return [
        equilibrium("cold_limit", s, world=world, taus=(1.0, 0.1, 0.01, 0.001, 1e-5), fault=fault)
        for s in plan.seed_range(quick=8, full=40)
        for world in WORLDS
    ]


def judge_cold_limit(outcomes: Sequence[Outcome]) -> Judgement:
    """To 1e-6: the extrapolation leaves what the second order in tau = 2e-6 does, the residual 64 eps / tau."""
    return all_of(
        {
            "the limit": judge_identity([o["limit"] for o in outcomes], 1e-6),
            "never further from the reference": judge_inequality(
                [s for o in outcomes for s in o["slack"]], 1e-12
            ),
            "the program's certificates": judge_identity([o["gap"] for o in outcomes]),
        }
    )


def proxes(plan: Plan, kind: str = "mirror_prox") -> list[Cell]:
    return [
        equilibrium("prox", s, world=world, tau=tau, step=step, T=200, kind=kind)
        for world in ("random", "cyclic")
        for s in plan.seed_range(quick=6, full=24)
        for tau in (0.02, 0.1, 1.0)
        for step in (0.5, 1.0, 2.0)
    ]


def judge_prox(outcomes: Sequence[Outcome]) -> Judgement:
    return all_of(
        {
            "every step": judge_inequality([o["contraction"] for o in outcomes]),
            "from the start": judge_inequality([o["bound"] for o in outcomes], 1e-15),
        }
    )


# ---- the claims ------------------------------------------------------------------------------------------------------

STEPS = r"$\eta_t \tau \leq 1$ (checked at every step)"

CLAIMS = (
    Claim(
        name="nash_md.mirror_step",
        kind="identity",
        title="The closed form is the mirror step, and the only one",
        statement=r"With $m = \pi_t^{1-\eta\tau} \mu^{\eta\tau} / Z$ and $F(q) = \eta P(q \succ m) - "
        r"\mathrm{KL}(q, m)$: $F(\pi_{t+1}) - F(q) = \mathrm{KL}(q, \pi_{t+1})$ for every law $q$.",
        assumptions=(STEPS,),
        source=f"{PAPER}, the definition of Nash-MD",
        cells=steps,
        judge=judge_errors,
        controls=(
            Control(
                "swapped_weights",
                "the mixture's weights exchanged",
                lambda plan: steps(plan, "swapped_weights"),
            ),
            Control(
                "own_opponent",
                "the opponent is the policy in place of the mixture",
                lambda plan: steps(plan, "own_opponent"),
            ),
            Control(
                "arithmetic_mixture",
                "an arithmetic in place of the geometric mixture",
                lambda plan: steps(plan, "arithmetic_mixture"),
            ),
        ),
    ),
    Claim(
        name="nash_md.recursion",
        kind="inequality",
        title="Every step brings the policy closer, up to twice the square of the step",
        statement=r"$\mathrm{KL}(\pi^*_\tau, \pi_{t+1}) \leq (1 - \eta_t\tau)\, \mathrm{KL}(\pi^*_\tau, \pi_t) + "
        r"2\eta_t^2$ at every step of every run.",
        assumptions=(STEPS, "a start with full support"),
        source=f"{PAPER}, theorem 1 (its proof)",
        cells=recursions,
        judge=judge_recursion,
        controls=(
            Control(
                "swapped_weights",
                "the mixture's weights exchanged",
                lambda plan: recursions(plan, kind="swapped_weights"),
            ),
            Control(
                "reversed_kl",
                "KL from the policy to the equilibrium",
                lambda plan: recursions(plan, reverse=True),
            ),
        ),
    ),
    Claim(
        name="nash_md.last_iterate",
        kind="inequality",
        title="The last policy converges to the regularised equilibrium, at least as fast as 1/T",
        statement=r"With $\eta_t = 2/(\tau(t+2))$: $\mathrm{KL}(\pi^*_\tau, \pi_T) \leq 8 / (\tau^2 (T+1))$ for every "
        r"$T$ in every run; and the exponent of $T$ is at most $-1$.",
        assumptions=(r"$\tau > 0$", r"exponent: over $T$ in 250 to 2000, $\tau \in \{0.2, 1\}$"),
        source=f"{PAPER}, theorem 1",
        cells=courses,
        judge=judge_course,
        controls=(
            Control(
                "swapped_weights",
                "the mixture's weights exchanged",
                lambda plan: courses(plan, ["random"], kind="swapped_weights"),
            ),
            Control("constant_step", "a constant step", lambda plan: courses(plan, ["random"], eta=0.5)),
        ),
        figure=draw_course,
    ),
    Claim(
        name="nash_md.constant_step_bias",
        kind="rate",
        title="With a constant step the limit is off by the square of the step",
        statement=r"$\mathrm{KL}(\pi^*_\tau, \lim_t \pi_t) = \Theta(\eta^2)$ at a constant step $\eta$.",
        assumptions=(STEPS, r"$\eta\tau$ in 0.01 to 0.08"),
        source="a consequence of the fixed point (see nash_md.own_mixture); theorem 1 gives an upper bound only",
        cells=biases,
        judge=judge_bias,
        controls=(
            Control(
                "own_opponent",
                "the opponent is the policy in place of the mixture: no bias",
                lambda plan: biases(plan, 3, kind="own_opponent"),
            ),
            Control(
                "swapped_weights",
                "the mixture's weights exchanged: a bias at every step",
                lambda plan: biases(plan, 3, kind="swapped_weights"),
            ),
        ),
        figure=draw_bias,
    ),
    Claim(
        name="nash_md.own_mixture",
        kind="identity",
        title="With a constant step the limit is the best response to its own mixture",
        statement=r"$\pi_\infty \propto \mu \exp(P(\cdot \succ m_\infty)/\tau)$, "
        r"$m_\infty \propto \pi_\infty^{1-\eta\tau} \mu^{\eta\tau}$.",
        assumptions=(STEPS,),
        source="the fixed points of the step",
        cells=biases,
        judge=judge_own_mixture,
        controls=(
            Control(
                "own_opponent",
                "the opponent is the policy in place of the mixture",
                lambda plan: biases(plan, 3, kind="own_opponent"),
            ),
        ),
    ),
    Claim(
        name="nash_md.three_types",
        kind="identity",
        title="Three types of people: the equilibrium is smooth where the best reward jumps",
        statement=r"Shares $f_A = f_C = 1/3 - e/4$, $f_B = 1/3 + e/2$ of three cyclic rankings have the equilibrium "
        r"$(1/3 + e/2,\, 1/3 + e/2,\, 1/3 - e)$; the highest Borda score moves from response 1 to 2 at $e = 0$.",
        source=f"{PAPER}, section 3.2",
        cells=people,
        judge=judge_people,
        controls=(
            Control(
                "exchanged",
                "two types exchanged in the closed form",
                lambda plan: people(plan, exchanged=True),
            ),
            Control(
                "bradley_terry",
                "the response with the highest Borda score in place of the equilibrium",
                lambda plan: people(plan, rule="bradley_terry"),
            ),
        ),
    ),
    Claim(
        name="nash_md.cold_limit",
        kind="identity",
        title="As the temperature falls to 0 the equilibrium goes to the Nash equilibrium closest to the reference",
        statement=r"$\lim_{\tau \to 0} \pi^*_\tau = \arg\min \{\mathrm{KL}(\pi, \mu) : \pi$ a Nash equilibrium of "
        r"$P\}$, and $\mathrm{KL}(\pi^*_\tau, \mu)$ is at most this minimum at every $\tau$.",
        assumptions=("games with a continuum of equilibria, and with one",),
        source=f"{PAPER}; proved in `algorithms/planning/max_entropy.py`",
        cells=cold_limits,
        judge=judge_cold_limit,
        controls=(
            Control(
                "vertex",
                "the equilibrium that linear programming finds",
                lambda plan: cold_limits(plan, "vertex"),
            ),
            Control(
                "uniform",
                "the equilibrium of maximal entropy, whatever the reference",
                lambda plan: cold_limits(plan, "uniform"),
            ),
        ),
    ),
    Claim(
        name="nash_md.mirror_prox",
        kind="inequality",
        title="Mirror-prox converges linearly to the regularised equilibrium",
        statement=r"With the penalty taken implicitly and steps $s \leq 2$: $(1 + s\tau)\, \mathrm{KL}(\pi^*_\tau, "
        r"\pi_{t+1}) \leq \mathrm{KL}(\pi^*_\tau, \pi_t)$ at every step of every run.",
        assumptions=(
            r"$\tau > 0$",
            r"$s \leq 2$, the inverse of the Lipschitz constant",
            "a start with full support",
        ),
        source="the three-point inequality of both half steps; cf. Nash mirror-prox (arXiv 2505.19731)",
        cells=proxes,
        judge=judge_prox,
        controls=(
            Control(
                "one_projection",
                "mirror ascent: the step without its look ahead",
                lambda plan: proxes(plan, "one_projection"),
            ),
            Control(
                "from_the_half",
                "the second half starts where the first ended",
                lambda plan: proxes(plan, "from_the_half"),
            ),
        ),
    ),
)
