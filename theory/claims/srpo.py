"""Claims about SRPO (`algorithms/srpo.py`) on random games of 3 to 8 responses, a reference for every first answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ...algorithms.ipo import ipo
from ...algorithms.optimisation import Pairs, SoftmaxTable, gather, minimise
from ...algorithms.optimisation.losses import logistic_loss, margin
from ...algorithms.planning.games import divergences, kl, softmax
from ...algorithms.srpo import Solution, generative_loss, improvement_loss, objective, srpo, srpo_loss
from ...envs.kernels import Array
from ...envs.preference_games import PreferenceGame
from ..cells import Cell
from ..claim import Claim, Control, Judgement, Outcome, Plan
from ..statistics import all_of, judge_identity
from ._declare import cells_of
from ._game_runs import game as random_world
from ._loss_runs import bandit

if TYPE_CHECKING:
    from torch import Tensor

PAPER = "Choi et al. (arXiv 2406.01660)"


cell = cells_of(__name__)


def laws(n: int, m: int, rng: np.random.Generator) -> Array:
    """m positive laws over n responses."""
    return 0.9 * rng.dirichlet(np.ones(n), size=m) + 0.1 / n


def world(seed: int) -> tuple[PreferenceGame, Array, float, np.random.Generator]:
    """A random game, ref(y2|y1), beta."""
    game, rng = random_world(seed), np.random.default_rng([seed, 2])
    return game, laws(len(game), len(game), rng), float(rng.uniform(0.1, 1)), rng


# ---- the identities --------------------------------------------------------------------------------------------------


def identities(*, seed: int, fault: str = "none") -> dict[str, Any]:
    """I1 and I2 over all pairs. Faults: one: 1 in place of 1/2; no_reference: rho(y|x) = log pi'."""
    game, ref, beta, _ = world(seed)
    found = srpo(game, beta, ref)
    rho = found.log_policy - game.log_reference
    after = found.log_improvement - (0 if fault == "no_reference" else np.log(ref))  # row: y1
    first = game.P.T - (1.0 if fault == "one" else 0.5) - beta * (after - np.diag(after)[:, None])
    second = game.P.T - game.P - beta * (rho - rho[:, None] + after - after.T)
    return {"errors": [float(np.abs(first).max()), float(np.abs(second).max())]}


def identity_cells(plan: Plan, fault: str = "none") -> list[Cell]:
    return [cell("identities", s, fault=fault) for s in plan.seed_range(quick=40, full=200)]


def judge_errors(outcomes: Sequence[Outcome]) -> Judgement:
    return judge_identity([e for o in outcomes for e in o["errors"]])


def judge_identities(outcomes: Sequence[Outcome]) -> Judgement:
    return judge_identity([e for o in outcomes for e in o["errors"]], 1e-12)


# ---- the minimiser ---------------------------------------------------------------------------------------------------


def minimiser(
    game: PreferenceGame, ref: Array, beta: float, alpha: float, law: Array, fault: str
) -> tuple[Array, Array]:
    """log pi (n,) and log pi' (n, n) that minimise the population loss on pairs of `law`."""
    import torch

    n = len(game)
    pairs = Pairs.population(game, law)
    p, w = pairs.tensors()
    one, rows = SoftmaxTable(n), SoftmaxTable(n, n)
    i, j = pairs.index.T
    four = torch.as_tensor(np.column_stack([j * n + i, i * n + j, i * n + i, j * n + j]))
    anchor = gather(torch.as_tensor(game.log_reference), pairs)
    flat = np.zeros((n, n)) if fault == "no_reference" else np.log(ref)
    anchors = torch.as_tensor(flat).reshape(-1)[four]

    def loss(theta: Tensor) -> Tensor:
        policy = gather(one.log_probabilities(theta[:n]), pairs)
        improvement = rows.log_probabilities(theta[n:])[four]
        given = (policy, anchor, improvement, anchors)
        if fault == "logistic":
            rho = improvement - anchors
            h = margin(policy, anchor) + rho[..., 0] - rho[..., 1]
            return (1 - alpha) * (w * logistic_loss(beta * h, p)).sum() + alpha * improvement_loss(
                *given[2:], p, w, beta=beta
            )
        if fault == "target_one":  # (beta h / 2 - 1/2)^2 is (beta h - 1)^2 / 4
            improved = 4 * improvement_loss(*given[2:], p, w, beta=beta / 2)
            return (1 - alpha) * generative_loss(*given, p, w, beta=beta) + alpha * improved
        return srpo_loss(*given, p, w, beta=beta, alpha=alpha)

    start = torch.zeros(n + n * n, dtype=torch.float64)
    theta = minimise(loss, start, tolerance=1e-12).theta
    return one.log_probabilities(theta[:n]).numpy(), rows.log_probabilities(theta[n:]).numpy().reshape(n, n)


def minimisers(*, seed: int, fault: str = "none") -> dict[str, Any]:
    """The minimisers on pairs of two different laws, minus the solution; and minus each other, in pi.

    Faults: target_one: the target of L' is 1; no_reference: the self-improvement policy has none; logistic: a logistic
    loss in place of L's square; ipo: pi is the minimiser of IPO's loss, at tau = beta.
    """
    game, ref, beta, rng = world(seed)
    found, two = srpo(game, beta, ref), laws(len(game), 2, rng)
    errors: list[float] = []
    if fault == "ipo":
        both = [np.log(ipo(game, law, beta)) for law in two]
    else:
        both = []
        for law in two:
            log_pi, log_improvement = minimiser(game, ref, beta, float(rng.uniform(0.2, 0.8)), law, fault)
            both.append(log_pi)
            errors += [
                float(np.abs(log_pi - found.log_policy).max()),
                float(np.abs(log_improvement - found.log_improvement).max()),
            ]
    return {"errors": errors, "robust": float(np.abs(both[0] - both[1]).max())}


def minimiser_cells(plan: Plan, fault: str = "none") -> list[Cell]:
    seeds = plan.seed_range(quick=4, full=20 if fault == "none" else 8)
    return [cell("minimisers", s, fault=fault) for s in seeds]


def judge_minimisers(outcomes: Sequence[Outcome]) -> Judgement:
    return all_of(
        {
            "the solution": judge_errors(outcomes),
            "the same for both laws": judge_identity([o["robust"] for o in outcomes]),
        }
    )


def judge_robust(outcomes: Sequence[Outcome]) -> Judgement:
    return judge_identity([o["robust"] for o in outcomes])


# ---- the saddle point ------------------------------------------------------------------------------------------------


def saddle(*, seed: int, fault: str = "none") -> dict[str, Any]:
    """J(pi, pi'*) - J* - beta KL(pi, pi*) and J* - J(pi*, pi') - beta E_{pi*} KL(pi', pi'*) at random laws; and the two
    optimisations by a general optimiser, the inner one first.

    Faults: times_z: pi* ∝ ref Z, which leaves most to improve; uniform_reference: pi* ∝ 1 / Z; reversed: KL(pi*, pi).
    """
    import torch

    game, ref, beta, rng = world(seed)
    n, found = len(game), srpo(game, beta, ref)
    log_pi = found.log_policy
    if fault in ("times_z", "uniform_reference"):
        sign, mu = (1, game.log_reference) if fault == "times_z" else (-1, np.zeros(n))
        log_pi = softmax(mu + sign * found.values / beta)[1]
    best, log_best = np.exp(log_pi), found.log_improvement
    value, errors = objective(game, beta, best, found.improvement, ref), []
    for law in laws(n, 4, rng):
        away = kl(log_pi, np.log(law)) if fault == "reversed" else kl(np.log(law), log_pi)
        errors.append(objective(game, beta, law, found.improvement, ref) - value - beta * away)
    for _ in range(4):
        rows = laws(n, n, rng)
        away = float(best @ divergences(np.log(rows), log_best))
        errors.append(value - objective(game, beta, best, rows, ref) - beta * away)
    one, table = SoftmaxTable(n), SoftmaxTable(n, n)
    wins, anchors = torch.tensor(game.P.T.copy()), torch.as_tensor(np.log(ref))

    def inner(theta: Tensor) -> Tensor:
        replies = table.log_probabilities(theta).reshape(n, n)
        return -(replies.exp() * (wins - beta * (replies - anchors))).sum()

    log_rows = table.log_probabilities(minimise(inner, table.start(), tolerance=1e-11).theta).reshape(n, n)
    left = (log_rows.exp() * (wins - beta * (log_rows - anchors))).sum(1)
    anchor = torch.as_tensor(game.log_reference)

    def outer(theta: Tensor) -> Tensor:
        log_law = one.log_probabilities(theta)
        return (log_law.exp() * (left + beta * (log_law - anchor))).sum()

    generated = one.log_probabilities(minimise(outer, one.start(), tolerance=1e-11).theta).numpy()
    numeric = [np.exp(log_rows.numpy()) - found.improvement, np.exp(generated) - best]
    return {"errors": errors, "optimiser": [float(np.abs(x).max()) for x in numeric]}


def saddle_cells(plan: Plan, fault: str = "none") -> list[Cell]:
    return [cell("saddle", s, fault=fault) for s in plan.seed_range(quick=8, full=40)]


def judge_saddle(outcomes: Sequence[Outcome]) -> Judgement:
    return all_of(
        {
            "both gaps": judge_errors(outcomes),
            "a general optimiser": judge_identity([e for o in outcomes for e in o["optimiser"]]),
        }
    )


# ---- special preferences ---------------------------------------------------------------------------------------------


def special(*, seed: int, fault: str = "none") -> dict[str, Any]:
    """Indifference: pi and pi' minus their references. Rewards: the pairs whose order pi*/ref and the reward differ in.

    Faults: biased: one response wins with 0.6 against all others; own_references: a reference for every first answer.
    """
    game, ref, beta, _ = world(seed)
    n = len(game)
    P = np.full((n, n), 0.5)
    if fault == "biased":
        P[0, 1:], P[1:, 0] = 0.6, 0.4
    even = srpo(PreferenceGame(P, reference=game.reference), beta, ref)
    rewards, ranked = bandit(seed)
    own = (
        laws(len(ranked), len(ranked), np.random.default_rng([seed, 3]))
        if fault == "own_references"
        else None
    )
    solution: Solution = srpo(ranked, beta, own)
    score = solution.log_policy - ranked.log_reference
    inversions = np.sum(np.sign(score[:, None] - score) != np.sign(rewards[:, None] - rewards))
    return {
        "errors": [
            float(np.abs(even.policy - game.reference).max()),
            float(np.abs(even.improvement - ref).max()),
        ],
        "inversions": int(inversions),
    }


def special_cells(plan: Plan, fault: str = "none") -> list[Cell]:
    return [cell("special", s, fault=fault) for s in plan.seed_range(quick=30, full=200)]


def judge_special(outcomes: Sequence[Outcome]) -> Judgement:
    return all_of(
        {
            "indifference": judge_errors(outcomes),
            "pairs out of order": judge_identity([o["inversions"] for o in outcomes]),
        }
    )


# ---- the claims ------------------------------------------------------------------------------------------------------

CLAIMS = (
    Claim(
        name="srpo.identities",
        kind="identity",
        title="The solution turns preferences into differences of log-ratios",
        statement=r"$p(y_2 \succ y_1) - \frac12 = \beta[\rho(y_2|y_1) - \rho(y_1|y_1)]$ and "
        r"$p(y_2 \succ y_1) - p(y_1 \succ y_2) = \beta[\rho(y_2) - \rho(y_1) + \rho(y_2|y_1) - \rho(y_1|y_2)]$, with "
        r"$\rho$ the log-ratios to the references.",
        assumptions=("any preferences", r"to $10^{-12}$"),
        source=f"{PAPER}, the derivation of its losses",
        cells=identity_cells,
        judge=judge_identities,
        controls=(
            Control("one", "1 in place of 1/2", lambda plan: identity_cells(plan, "one")),
            Control(
                "no_reference",
                "the self-improvement policy without its reference",
                lambda plan: identity_cells(plan, "no_reference"),
            ),
        ),
    ),
    Claim(
        name="srpo.population_minimiser",
        kind="identity",
        title="The losses on who won are least at the solution, whatever the law of the pairs",
        statement=r"$\arg\min_{\pi,\pi'} (1-\alpha) L + \alpha L' = (\pi^*, \pi'^*)$ for pairs iid from any law "
        r"with full support.",
        assumptions=(r"$\alpha$ in 0.2 to 0.8",),
        source=f"{PAPER}, its offline losses",
        cells=minimiser_cells,
        judge=judge_minimisers,
        controls=(
            Control("target_one", "the target of L' is 1", lambda plan: minimiser_cells(plan, "target_one")),
            Control(
                "no_reference",
                "the self-improvement policy without its reference",
                lambda plan: minimiser_cells(plan, "no_reference"),
            ),
            Control(
                "logistic", "a logistic loss in place of L", lambda plan: minimiser_cells(plan, "logistic")
            ),
        ),
    ),
    Claim(
        name="srpo.robust",
        kind="identity",
        title="The policy does not depend on where the comparisons come from",
        statement=r"The minimisers on pairs of two different laws $\mu$ have the same $\pi$.",
        assumptions=("all pairs have mass", "the whole population"),
        source=f"{PAPER}, robustness",
        cells=minimiser_cells,
        judge=judge_robust,
        controls=(
            Control("ipo", "IPO on the same two laws", lambda plan: minimiser_cells(plan, "ipo")),
            Control(
                "logistic", "a logistic loss in place of L", lambda plan: minimiser_cells(plan, "logistic")
            ),
        ),
    ),
    Claim(
        name="srpo.saddle",
        kind="identity",
        title="The solution is a saddle point, and divergences measure the distance to it",
        statement=r"$J(\pi, \pi'^*) - J^* = \beta\,\mathrm{KL}(\pi, \pi^*)$ and $J^* - J(\pi^*, \pi') = \beta\,"
        r"\mathbb{E}_{\pi^*}\mathrm{KL}(\pi', \pi'^*)$ for all laws; a general optimiser finds both policies.",
        source=f"{PAPER}, the objective; the gaps are derived",
        cells=saddle_cells,
        judge=judge_saddle,
        controls=(
            Control("times_z", "ref times Z in place of ref / Z", lambda plan: saddle_cells(plan, "times_z")),
            Control(
                "uniform_reference",
                "the generative policy without its reference",
                lambda plan: saddle_cells(plan, "uniform_reference"),
            ),
            Control("reversed", "the direction of KL", lambda plan: saddle_cells(plan, "reversed")),
        ),
    ),
    Claim(
        name="srpo.special_preferences",
        kind="identity",
        title="Indifference leaves the references; rewards are kept in order",
        statement=r"At $p = 1/2$: $\pi^* = \pi_{\mathrm{ref}}$, $\pi'^* = \mathrm{ref}(\cdot|y_1)$. If $p$ is "
        r"Bradley-Terry and $\mathrm{ref}(\cdot|y_1)$ the same for all $y_1$, $\pi^*/\pi_{\mathrm{ref}}$ is ordered as "
        r"the reward.",
        source=f"{PAPER}; derived from the closed form",
        cells=special_cells,
        judge=judge_special,
        controls=(
            Control(
                "biased",
                "one response wins with 0.6 against all",
                lambda plan: special_cells(plan, "biased"),
            ),
            Control(
                "own_references",
                "a reference for every first answer",
                lambda plan: special_cells(plan, "own_references"),
            ),
        ),
    ),
)
