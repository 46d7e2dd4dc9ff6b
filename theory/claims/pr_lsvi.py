r"""The claims of PR-LSVI (Wu and Sun, ICLR 2024) and the faults that must not pass for it.

Identities and deterministic inequalities are asserted as numbers; the theorem's rates as exponents, since its constants
and logarithms are not known. The seeds of a claim vary the run; the worlds are fixed instances (`_pr_lsvi_runs.world`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np

from .. import figures
from ..cells import Cell
from ..claim import Claim, Control, Judgement, Outcome, Plan, Verdict
from ..statistics import (
    all_of,
    conjunction,
    judge_identity,
    judge_inequality,
    judge_ordering,
    judge_probability,
    judge_rate,
    slope_loglog,
)
from ._declare import cells_of

PAPER = "Wu and Sun, ICLR 2024 (arXiv 2310.14554)"
WORLDS = ("tabular", "random_linear", "hypercube", "language")
# The threshold at the shortest horizon T_0, of the order of the range of returns; larger ones are never exceeded.
EPS_0 = {"tabular": 1.0, "random_linear": 0.8, "hypercube": 0.8, "language": 1.0}
T_0, BURN_IN = 500, 1000
SEEDS = {"tabular": 16, "random_linear": 32, "hypercube": 16, "language": 12}  # by the spread of their regret
BETAS = (0.0, 0.25, 0.5)
LABELS = {
    0.0: r"constant $\varepsilon$",
    0.25: r"$\varepsilon \propto T^{-1/4}$",
    0.5: r"$\varepsilon \propto T^{-1/2}$",
}
DELTA = 0.1
ANTI_CONCENTRATION = NormalDist().cdf(-1)


cell = cells_of(f"{__package__}._pr_lsvi_runs")


def by(outcomes: Iterable[Outcome], *names: str) -> dict[tuple[Any, ...], list[Outcome]]:
    """Outcomes grouped by parameters, in order of appearance."""
    groups: dict[tuple[Any, ...], list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(tuple(outcome[name] for name in names), []).append(outcome)
    return groups


def worlds(plan: Plan) -> Sequence[str]:
    return plan.pick(quick=("tabular", "language"), full=WORLDS)


def rate_worlds(plan: Plan) -> Sequence[str]:
    return plan.pick(quick=("tabular",), full=WORLDS)


def threshold(world: str, T: int, beta: float) -> float:
    """eps = eps_0 (T / T_0)^-beta."""
    return EPS_0[world] * (T / T_0) ** -beta


# ---- identities and events of every run ------------------------------------------------------------------------------


def rules(plan: Plan, formula: str = "paper") -> list[Cell]:
    return [cell("rule", s, formula=formula) for s in plan.seed_range(quick=20, full=60)]


def judge_rule(outcomes: Sequence[Outcome]) -> Judgement:
    """To 1e-9 against a quadrature; and within the Monte-Carlo error, z at the 1e-6 level of the family."""
    z = [(o["closed"] - o["sampled"]) / o["standard_error"] for o in outcomes]
    limit = NormalDist().inv_cdf(1 - 5e-7 / len(z))
    return all_of(
        {
            "quadrature": judge_identity([o["closed"] / o["quadrature"] - 1 for o in outcomes]),
            "Monte Carlo, in standard errors": judge_identity(z, tolerance=limit),
        }
    )


def short_runs(plan: Plan, names: Sequence[str] = (), beta: float = 0.5, **broken: Any) -> list[Cell]:
    """Runs of every world, shared by the claims about every run; beta = 0 asks rarely, 0.5 often."""
    T = plan.pick(quick=2000, full=4000)
    return [
        cell("run", s, world=w, T=T, eps=threshold(w, T, beta), **broken)
        for w in names or worlds(plan)
        for s in plan.seed_range(quick=4, full=8)
    ]


def judge_potential(outcomes: Sequence[Outcome]) -> Judgement:
    return all_of(
        {
            "Sigma_r counts the queried pairs alone": judge_identity([o["log_det_error"] for o in outcomes]),
            "q log(1 + c) <= log det": judge_inequality([o["log_det_above"] for o in outcomes], 1e-9),
            "log det <= d log(1 + q L^2/(d lambda))": judge_inequality(
                [o["log_det_below"] for o in outcomes], 1e-9
            ),
        }
    )


def judge_equal(outcomes: Sequence[Outcome]) -> Judgement:
    seen = sum(o["equal"] for o in outcomes)
    asked = sum(o["equal_and_asked"] for o in outcomes)
    detail = f"{asked} queries in {seen} episodes with equal features of both trajectories"
    verdict: Verdict = "inconclusive" if not seen else "refuted" if asked else "verified"
    return Judgement(verdict, float(asked), 0.0, detail, {"episodes": seen})


def judge_regret_identity(outcomes: Sequence[Outcome]) -> Judgement:
    return judge_identity([o["regret_identity"] for o in outcomes])


def twins(plan: Plan, labels: str = "bradley_terry") -> list[Cell]:
    return [
        cell("twin", s, T=400, eps=0.6, shift=shift, labels=labels)
        for s in plan.seed_range(quick=3, full=10)
        for shift in (-0.2, 0.3)
    ]


def judge_invariance(outcomes: Sequence[Outcome]) -> Judgement:
    columns = ("queried", "label", "disagreement", "log_det", "regret")
    return judge_identity([o[name] for o in outcomes for name in columns])


def regressions(plan: Plan, fault: str = "none") -> list[Cell]:
    return [cell("regression", s, T=200, eps=0.6, fault=fault) for s in plan.seed_range(quick=5, full=20)]


def judge_regression(outcomes: Sequence[Outcome]) -> Judgement:
    return judge_identity([o["error"] for o in outcomes])


# ---- events of the proof, with a promised probability ----------------------------------------------------------------


def coverages(plan: Plan, names: Sequence[str] = (), labels: str = "bradley_terry") -> list[Cell]:
    return [
        cell("coverage", s, world=w, T=plan.pick(200, 300), eps=0.1, delta=DELTA, labels=labels)
        for w in names or worlds(plan)
        for s in plan.seed_range(quick=48, full=150)
    ]


def covered(outcome: Outcome) -> bool:
    return outcome["score"] <= 1 and outcome["ellipsoid"] <= 1


def judge_coverage(outcomes: Sequence[Outcome]) -> Judgement:
    def part(group: list[Outcome]) -> Callable[[float], Judgement]:
        return lambda level: judge_probability(sum(map(covered, group)), len(group), 1 - DELTA, level=level)

    return conjunction({w: part(group) for (w,), group in by(outcomes, "world").items()})


def draw_coverage(outcomes: Sequence[Outcome], judgement: Judgement) -> Any:
    rows = [(w, sum(map(covered, g)), len(g)) for (w,), g in by(outcomes, "world").items()]
    return figures.frequencies(rows, 1 - DELTA, x=r"runs with $\theta^*$ covered at every count")


def optimisms(plan: Plan, names: Sequence[str] = (), **broken: Any) -> list[Cell]:
    return [
        cell("optimism", s, world=w, T=T, eps=0.1, **broken)
        for w in names or worlds(plan)
        for T in plan.pick(quick=(100,), full=(20, 200))
        for s in plan.seed_range(quick=40, full=60)
    ]


def judge_optimism(outcomes: Sequence[Outcome]) -> Judgement:
    groups = by(outcomes, "world", "T")

    def part(group: list[Outcome]) -> Callable[[float], Judgement]:
        optimistic = sum(o["absolute"] >= 0 for o in group)
        return lambda level: judge_probability(optimistic, len(group), ANTI_CONCENTRATION, level=level)

    judgement = conjunction({f"{w}, T = {T}": part(group) for (w, T), group in groups.items()})
    relative = {
        f"{w}, T = {T}": float(np.mean([o["relative"] >= 0 for o in g])) for (w, T), g in groups.items()
    }
    numbers = dict(judgement.numbers) | {"frequency relative to the comparator": relative}
    return Judgement(judgement.verdict, judgement.statistic, judgement.threshold, judgement.detail, numbers)


def draw_optimism(outcomes: Sequence[Outcome], judgement: Judgement) -> Any:
    rows = [
        (f"{w}, T = {T}", sum(o["absolute"] >= 0 for o in g), len(g))
        for (w, T), g in by(outcomes, "world", "T").items()
    ]
    return figures.frequencies(rows, ANTI_CONCENTRATION, x="runs with an optimistic last plan")


# ---- rates -----------------------------------------------------------------------------------------------------------


def regret_runs(
    plan: Plan, names: Sequence[str] = (), betas: Sequence[float] = BETAS, seeds: int = 0, **broken: Any
) -> list[Cell]:
    """beta > 0: one run for every T, since eps depends on T. beta = 0: one long run shows every T."""
    Ts = plan.pick(quick=[500, 1000, 2000, 4000], full=[2000, 4000, 8000, 16000])
    long = [2 * BURN_IN * 2**k for k in range(4)]
    cells = []
    for w in names or rate_worlds(plan):
        for s in plan.seed_range(quick=seeds or 16, full=seeds or SEEDS[w]):
            # The full plan's window was chosen on the first seeds; its own are fresh.
            s = s + plan.pick(quick=0, full=1000)
            for beta in betas:
                if beta == 0:
                    at = [BURN_IN, *long]
                    cells.append(cell("run", s, world=w, T=long[-1], eps=EPS_0[w], checkpoints=at, **broken))
                else:
                    cells += [cell("run", s, world=w, T=T, eps=threshold(w, T, beta), **broken) for T in Ts]
    return cells


def regret_curves(outcomes: Sequence[Outcome]) -> dict[tuple[str, float], tuple[list[int], np.ndarray]]:
    """(world, beta) -> horizons (n,), regret (seeds, n). beta = 0 is known by its checkpoints; there, episodes and
    regret are counted from the burn-in on, which would bend the line."""
    curves: dict[tuple[str, float], tuple[list[int], np.ndarray]] = {}
    for (w,), group in by(outcomes, "world").items():
        long_runs = [o for o in group if "checkpoints" in o.cell.parameters]
        regret = {(o.seed, o["T"], o["eps"]): o["regret"][0] for o in group if o not in long_runs}
        Ts, seeds = sorted({T for _, T, _ in regret}), sorted({seed for seed, _, _ in regret})
        if long_runs:
            at, regrets = np.array(long_runs[0]["checkpoints"]), np.array([o["regret"] for o in long_runs])
            curves[w, 0.0] = (list(at[1:] - at[0]), regrets[:, 1:] - regrets[:, :1])
        for beta in BETAS[1:]:
            if all((seeds[0], T, threshold(w, T, beta)) in regret for T in Ts) and Ts:
                curves[w, beta] = (
                    Ts,
                    np.array([[regret[s, T, threshold(w, T, beta)] for T in Ts] for s in seeds]),
                )
    return curves


def judge_regret(outcomes: Sequence[Outcome]) -> Judgement:
    """Linear at constant eps; at most max(1 - beta, 1/2) for eps = T^-beta, up to the local slope of one log T."""

    def part(beta: float, Ts: list[int], Y: np.ndarray) -> Callable[[float], Judgement]:
        slack = 1 / math.log(math.sqrt(Ts[0] * Ts[-1]))
        sense: Any = "equal" if beta == 0 else "at_most"
        return lambda level: judge_rate(
            slope_loglog(Ts, Y, level=level), max(1 - beta, 0.5), slack, sense=sense
        )

    curves = regret_curves(outcomes)
    return conjunction({f"{w}, beta = {beta:g}": part(beta, *curve) for (w, beta), curve in curves.items()})


def draw_regret(outcomes: Sequence[Outcome], judgement: Judgement) -> Any:
    curves = regret_curves(outcomes)
    names = list(dict.fromkeys(w for w, _ in curves))
    shown = names[-1]  # the language model's tokens where they were run
    lines = [
        figures.Curve(LABELS[beta], Ts, Y, slope_loglog(Ts, Y))
        for (w, beta), (Ts, Y) in curves.items()
        if w == shown
    ]
    return figures.loglog(lines, x="episodes T", y="regret", title=f"world: {shown}", reference=0.5)


STREAM_EPS = [float(0.4 * 2.0**-k) for k in range(4)]


def query_runs(plan: Plan, names: Sequence[str] = (), seeds: int = 0, **broken: Any) -> list[Cell]:
    T = plan.pick(quick=4000, full=8000)
    return [
        cell("run", s, world=w, T=T, eps=EPS_0[w] * 2.0**-k, **broken)
        for w in names or rate_worlds(plan)
        for s in plan.seed_range(quick=seeds or 4, full=seeds or 6)
        for k in (0.0, 0.5, 1.0, 1.5)
    ]


def streams(plan: Plan, power: float = 1.0) -> list[Cell]:
    return [
        cell("stream", s, d=6, T=12_000, eps=STREAM_EPS, power=power)
        for s in plan.seed_range(quick=4, full=8)
    ]


def query_curves(outcomes: Sequence[Outcome]) -> dict[str, tuple[list[float], np.ndarray]]:
    """World -> thresholds (n,), queries (seeds, n)."""
    curves = {}
    isotropic = [o for o in outcomes if "d" in o.cell.parameters]
    if isotropic:
        curves["isotropic"] = (STREAM_EPS, np.array([o["queries"] for o in isotropic], dtype=float))
    for (w,), group in by((o for o in outcomes if o not in isotropic), "world").items():
        columns = {eps: [o["queries"][0] for o in g] for (eps,), g in by(group, "eps").items()}
        curves[w] = (list(columns), np.array(list(columns.values()), dtype=float).T)
    return curves


def judge_queries(outcomes: Sequence[Outcome]) -> Judgement:
    """-2 on isotropic differences, where every direction keeps coming; in a world, not steeper than -2.

    In a world the exponent is flatter at lab size: the policies settle, so that the differences that would be asked
    about at a small eps stop coming. It is reported beside the bound."""

    def part(w: str, eps: list[float], Q: np.ndarray) -> Callable[[float], Judgement]:
        sense: Any = "equal" if w == "isotropic" else "at_least"
        return lambda level: judge_rate(slope_loglog(eps, Q, level=level), -2.0, 0.15, sense=sense)

    return conjunction({w: part(w, *curve) for w, curve in query_curves(outcomes).items()})


def draw_queries(outcomes: Sequence[Outcome], judgement: Judgement) -> Any:
    curves = [
        figures.Curve(w, eps, Q, slope_loglog(eps, Q)) for w, (eps, Q) in query_curves(outcomes).items()
    ]
    return figures.loglog(curves, x=r"threshold $\varepsilon$", y="queries", reference=-2.0)


# ---- active against passive ------------------------------------------------------------------------------------------


def matches(plan: Plan, names: Sequence[str] = (), **broken: Any) -> list[Cell]:
    T = plan.pick(quick=2000, full=3000)
    return [
        cell("matched", s, world=w, T=T, eps=factor * threshold(w, T, 0.5), **broken)
        for w in names or rate_worlds(plan)
        for factor in (2.0, 1.0, 0.5)
        for s in plan.seed_range(quick=12, full=12)
    ]


def judge_matches(outcomes: Sequence[Outcome]) -> Judgement:
    """Regret saved by choosing the queries, averaged over the three thresholds of a seed."""

    def part(group: list[Outcome]) -> Callable[[float], Judgement]:
        saved = [np.mean([o["passive"] - o["active"] for o in g]) for g in by_seed(group).values()]
        return lambda level: judge_ordering(saved, level=level)

    return conjunction({w: part(group) for (w,), group in by(outcomes, "world").items()})


def by_seed(outcomes: Iterable[Outcome]) -> Mapping[int, list[Outcome]]:
    groups: dict[int, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(outcome.seed, []).append(outcome)
    return groups


def draw_front(outcomes: Sequence[Outcome], judgement: Judgement) -> Any:
    shown = list(by(outcomes, "world"))[-1]
    columns = list(by(by(outcomes, "world")[shown], "eps").values())
    fronts = [
        figures.Front(
            f"{label} ({shown[0]})",
            np.array([[o["labels"] for o in c] for c in columns], dtype=float).T,
            np.array([[o[side] for o in c] for c in columns]).T,
        )
        for side, label in (("active", "asks by the rule"), ("passive", "asks at random, as often"))
    ]
    return figures.front(fronts, x="labels", y="regret")


# ---- the claims ------------------------------------------------------------------------------------------------------

LINEAR = r"the reward is linear in $\phi$ with $\|\phi\| \leq 1$ (checked on the instance)"
BT = "answers follow the Bradley-Terry law"

CLAIMS = (
    Claim(
        name="pr_lsvi.query_rule",
        kind="identity",
        title="The query rule in closed form is its expectation",
        statement=r"$\mathbb{E}\,|\langle \Delta, \theta_0 - \theta_1 \rangle| = "
        r"\frac{2}{\sqrt{\pi}}\, \sigma_r\, \|\Delta\|_{\Sigma_r^{-1}}$ for independent "
        r"$\theta_i \sim \mathcal{N}(\hat\theta_r, \sigma_r^2 \Sigma_r^{-1})$.",
        source=f"{PAPER}, algorithm 1, line 12",
        cells=rules,
        judge=judge_rule,
        controls=(
            Control("sigma_squared", "sigma_r enters squared", lambda plan: rules(plan, "sigma_squared")),
            Control(
                "one_draw",
                "one draw against the mean in place of two draws",
                lambda plan: rules(plan, "one_draw"),
            ),
        ),
    ),
    Claim(
        name="pr_lsvi.equal_trajectories",
        kind="event",
        title="Equal trajectories are never asked about",
        statement=r"$\phi(\tau_t^0) = \phi(\tau_t^1)$ implies $Z_t = 0$.",
        source=f"{PAPER}, algorithm 1, line 12",
        assumptions=(r"$\varepsilon > 0$",),
        cells=short_runs,
        judge=judge_equal,
        controls=(
            Control(
                "asks_by_coin",
                "queries by coin, whatever the trajectories",
                lambda plan: short_runs(plan, ["tabular"], changes={"query_rate": 0.5}),
            ),
            Control(
                "norm_of_one",
                "the rule looks at the new trajectory alone",
                lambda plan: short_runs(plan, ["tabular"], fault="norm_of_one"),
            ),
        ),
    ),
    Claim(
        name="pr_lsvi.invariance",
        kind="identity",
        title="A constant added to the reward changes nothing that is learnt or charged",
        statement=r"Queries, answers, $\log\det\Sigma_r$ and regret are those of the reward $r + b$ for every $b$.",
        assumptions=("one-hot features", BT),
        source=f"{PAPER}: all that is learnt depends on differences of returns",
        cells=twins,
        judge=judge_invariance,
        controls=(
            Control(
                "scaled", "the reward is multiplied, not shifted", lambda plan: twins(plan, labels="scaled")
            ),
            Control(
                "rates",
                "the annotator rates the first trajectory and ignores the second",
                lambda plan: twins(plan, labels="rates"),
            ),
        ),
    ),
    Claim(
        name="pr_lsvi.regret_identity",
        kind="identity",
        title="Both policies are charged, and the comparator is the last policy",
        statement=r"$\mathrm{Regret}_T = 2 \sum_{t<T} (V^* - V^{\pi_t}) + (V^* - V^{\pi_T}) + (V^* - V^{\pi_0})$.",
        source=f"{PAPER}, algorithm 1, line 10",
        cells=short_runs,
        judge=judge_regret_identity,
        controls=(
            Control(
                "same_policy",
                "the comparator is the new policy itself",
                lambda plan: short_runs(plan, ["random_linear"], fault="same_policy"),
            ),
        ),
    ),
    Claim(
        name="pr_lsvi.transition_regression",
        kind="identity",
        title="With one-hot features the regression is a ratio of visit counts",
        statement=r"$\hat\theta_{P,h}[s,a] = \sum_{s'} N_h(s,a,s')\, \bar V_{h+1}(s') / (N_h(s,a) + \lambda)$, "
        r"and $\bar V_1$ follows from it.",
        assumptions=("one-hot features",),
        source=f"{PAPER}, algorithm 1, lines 5-9 and 14",
        cells=regressions,
        judge=judge_regression,
        controls=(
            Control(
                "shared_covariance",
                "one covariance serves every step",
                lambda plan: regressions(plan, "shared_covariance"),
            ),
            Control(
                "reward_in_target",
                "the reward is added to the regression target",
                lambda plan: regressions(plan, "reward_in_target"),
            ),
        ),
    ),
    Claim(
        name="pr_lsvi.elliptical_potential",
        kind="inequality",
        title="Every query grows the determinant, and the determinant grows slowly",
        statement=r"$q \log(1 + c) \leq \log\det(\Sigma_r/\lambda) \leq d \log(1 + q L^2 / (d \lambda))$ with "
        r"$c = \pi \varepsilon^2 / (4 \sigma_r^2)$, after every episode, and "
        r"$\Sigma_r = \lambda I + \sum_{s: Z_s = 1} \Delta_s \Delta_s^\top$.",
        source=f"{PAPER}, theorem 4.2 (query count)",
        cells=short_runs,
        judge=judge_potential,
        controls=(
            Control(
                "counts_unqueried",
                "Sigma_r grows on unqueried episodes too",
                lambda plan: short_runs(plan, ["hypercube"], 0.0, fault="counts_unqueried"),
            ),
            Control(
                "asks_by_coin",
                "queries by coin add less than log(1 + c) each",
                lambda plan: short_runs(plan, ["hypercube"], 0.0, changes={"query_rate": 0.5}),
            ),
        ),
    ),
    Claim(
        name="pr_lsvi.coverage",
        kind="probability",
        title="The MLE's ellipsoid covers the true reward at every count of queries",
        statement=r"With probability at least $1 - \delta = 0.9$, for all $q$: the score is within its "
        r"self-normalised bound and $\|\hat\theta_q - \theta^*\|_{\Sigma_q} \leq \frac{\kappa}{2} "
        r"\sqrt{2\log(1/\delta) + \log\det(\Sigma_q/\lambda)} + 2\sqrt{\lambda} B$.",
        assumptions=(LINEAR, r"$\|\theta^*\| \leq B$", BT),
        source="self-normalised bound with explicit constants (see algorithms.estimation.confidence_radius)",
        cells=coverages,
        judge=judge_coverage,
        controls=(
            Control(
                "flipped_labels",
                "the annotator prefers the worse trajectory",
                lambda plan: coverages(plan, ["hypercube"], labels="flipped"),
            ),
        ),
        figure=draw_coverage,
    ),
    Claim(
        name="pr_lsvi.optimism",
        kind="probability",
        title="At theory settings the perturbed value is optimistic often enough",
        statement=r"$\Pr(\bar V_1(s_1) \geq V^*_1(s_1)) \geq \Phi(-1) \approx 0.159$ in every episode.",
        assumptions=(LINEAR, "theory settings, hidden constants 1"),
        source=f"{PAPER}, proof of theorem 4.2",
        cells=optimisms,
        judge=judge_optimism,
        controls=(
            Control(
                "no_perturbation",
                "sigma_r = sigma_P = 0 and no optimistic default",
                lambda plan: optimisms(
                    plan,
                    ["tabular"],
                    changes={"sigma_r": 0.0, "sigma_P": 0.0, "alpha_L": 1e6, "alpha_U": 1e7},
                ),
            ),
        ),
        figure=draw_optimism,
    ),
    Claim(
        name="pr_lsvi.regret_exponent",
        kind="rate",
        title="Regret grows like T to the power max(1 - beta, 1/2)",
        statement=r"With $\varepsilon \propto T^{-\beta}$: $\mathrm{Regret}_T = \tilde O(T^{\max(1-\beta,\, 1/2)})$; "
        r"at constant $\varepsilon$ it is linear.",
        assumptions=(
            LINEAR,
            BT,
            "scaled settings",
            "language model: transitions known",
            "at constant epsilon, episodes and regret are counted after a burn-in of 1,000 episodes; at decreasing "
            "epsilon the window begins at T = 2,000 (500 in the quick plan), since the first octaves are steeper",
            r"slack: the local exponent $1/\log T$ of one factor $\log T$ in the middle of the window",
        ),
        source=f"{PAPER}, theorem 4.2",
        cells=regret_runs,
        judge=judge_regret,
        controls=(
            Control(
                "no_randomisation",
                "sigma_r so small that the policies stop disagreeing",
                lambda plan: regret_runs(plan, ["tabular"], (0.5,), changes={"sigma_r": 0.02}),
            ),
            Control(
                "same_policy",
                "both trajectories come from the same policy, so that nothing differs",
                lambda plan: regret_runs(plan, ["language"], (0.5,), 4, fault="same_policy"),
            ),
            Control(
                "flipped_labels",
                "the annotator prefers the worse trajectory",
                lambda plan: regret_runs(plan, ["tabular"], (0.5,), labels="flipped"),
            ),
        ),
        figure=draw_regret,
    ),
    Claim(
        name="pr_lsvi.query_exponent",
        kind="rate",
        title="The number of queries grows at most like one over epsilon squared",
        statement=r"$\mathrm{Queries}_T = \tilde O(\varepsilon^{-2})$, and $\Theta(\varepsilon^{-2})$ on isotropic "
        r"differences, where $T$ does not saturate it.",
        assumptions=(LINEAR, BT, "scaled settings"),
        source=f"{PAPER}, theorem 4.2",
        cells=lambda plan: [*streams(plan), *query_runs(plan)],
        judge=judge_queries,
        controls=(
            Control(
                "threshold_on_square",
                "epsilon is held against the square of the disagreement",
                lambda plan: streams(plan, power=2.0),
            ),
            Control(
                "threshold_on_root",
                "epsilon is held against the root of the disagreement",
                lambda plan: query_runs(plan, ["tabular"], 4, fault="threshold_on_root"),
            ),
        ),
        figure=draw_queries,
    ),
    Claim(
        name="pr_lsvi.active_beats_passive",
        kind="ordering",
        title="Chosen queries beat as many queries at random",
        statement=r"At an equal number of labels, regret with the query rule is lower than with queries at random.",
        assumptions=(
            LINEAR,
            BT,
            "scaled settings",
            r"$\varepsilon = \varepsilon_0 (T/T_0)^{-1/2} \times \{2, 1, 1/2\}$",
        ),
        source=f"{PAPER}, the purpose of line 12; no theorem",
        cells=matches,
        judge=judge_matches,
        controls=(
            Control(
                "asks_the_known",
                "asks where the draws agree, and not where they disagree",
                lambda plan: matches(plan, ["tabular"], fault="asks_the_known"),
            ),
            Control(
                "flipped_labels",
                "the chosen queries are answered with the worse trajectory",
                lambda plan: matches(plan, ["tabular"], labels="flipped"),
            ),
        ),
        figure=draw_front,
    ),
)
