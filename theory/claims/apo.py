"""Claims about APO (`algorithms/apo.py`): what momentum is worth, what it costs with few comparisons, and on a cycle.

Rounds are closed forms, or losses run to their minimum on comparisons of the policy. Rewards are those of random
bandits with 3 to 8 responses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.special import expit, logsumexp

from ...algorithms.apo import APO, apo_loss, coefficient, extrapolate, weights
from ...algorithms.dpo import dpo_loss, dpo_solution
from ...algorithms.ipo import ipo_loss
from ...algorithms.optimisation import Pairs, SoftmaxTable, fit, gather
from ...algorithms.planning.games import kl, nash, softmax
from ...envs.kernels import Array
from ...envs.preference_games import bradley_terry_game, cyclic_game
from ..cells import Cell
from ..claim import Claim, Control, Judgement, Outcome, Plan
from ..statistics import conjunction, judge_identity, judge_inequality, judge_ordering
from ._declare import cells_of
from ._loss_runs import bandit, drawn

if TYPE_CHECKING:
    from torch import Tensor

PAPER = "He, Yuan, Gu (arXiv 2410.06293)"
ALPHAS = (0.0, 0.2, 0.4, 0.6, 0.8)


cell = cells_of(__name__)


# ---- planted faults --------------------------------------------------------------------------------------------------


class MomentumOfPi(APO):
    """Extrapolates from pi_t in place of pi_hat_t."""

    def follow(self, log_proposal: Array) -> MomentumOfPi:
        before = self.log_policy
        self.proposal, self.log_proposal = softmax(log_proposal)
        self.policy, self.log_policy = extrapolate(self.log_proposal, before, self.alpha)
        self.t += 1
        return self


class AnchoredAtHat(APO):
    """The next round's reference is pi_hat, so that the extrapolated policy is used for nothing but pairs."""

    def advance(self, rounds: int) -> AnchoredAtHat:
        for _ in range(rounds):
            self.follow(self.log_proposal + self.direction(self.policy))
        return self


class FixedReference(APO):
    """Every round's reference is the first one."""

    def advance(self, rounds: int) -> FixedReference:
        if self.t == 0:
            self.log_first = self.log_policy
        for _ in range(rounds):
            self.follow(self.log_first + self.direction(self.policy))
        return self


KINDS: dict[str, type[APO]] = {
    "none": APO,
    "momentum_of_pi": MomentumOfPi,
    "anchored_at_hat": AnchoredAtHat,
    "fixed_reference": FixedReference,
}

# ---- the closed form -------------------------------------------------------------------------------------------------


def closed_form(*, seed: int, alpha: float, T: int = 12, fault: str = "none") -> dict[str, Any]:
    """log pi_hat_t minus log(ref exp(c_t r / beta) / Z), t = 1, ..., T; pi_hat_T minus one round of DPO at beta / c_T.

    The last by the minimiser of DPO's loss. At alpha = 0 also minus iterative DPO, round by round.
    """
    import torch

    rewards, game = bandit(seed)
    beta = float(np.random.default_rng([seed, 3]).uniform(0.5, 2))
    run = KINDS[fault].of_reward(rewards, game.log_reference, beta, alpha)
    iterated, errors = game.log_reference, []
    for t in range(1, T + 1):
        run.advance(1)
        closed = softmax(game.log_reference + coefficient(t, alpha) * rewards / beta)[1]
        errors.append(float(np.abs(run.log_proposal - closed).max()))
        if alpha == 0:
            iterated = dpo_solution(rewards, iterated, beta)[1]
            errors.append(float(np.abs(run.log_proposal - iterated).max()))
    pairs = Pairs.population(game)
    p, w = pairs.tensors()
    anchor = gather(torch.as_tensor(game.log_reference), pairs)
    temperature = beta / coefficient(T, alpha)

    def loss(log_pi: Tensor) -> Tensor:
        return dpo_loss(gather(log_pi, pairs), anchor, p, w, beta=temperature)

    found = fit(loss, SoftmaxTable(len(game)), game.log_reference, tolerance=1e-13)
    one_round = SoftmaxTable(len(game)).log_probabilities(found.theta).exp().numpy()
    return {"errors": [*errors, float(np.abs(run.proposal - one_round).max())]}


def closed_cells(plan: Plan, alphas: Sequence[float] = ALPHAS, fault: str = "none") -> list[Cell]:
    seeds = plan.seed_range(quick=5, full=25)
    return [cell("closed_form", s, alpha=a, fault=fault) for s in seeds for a in alphas]


def judge_errors(outcomes: Sequence[Outcome]) -> Judgement:
    return judge_identity([e for o in outcomes for e in o["errors"]])


# ---- rounds by their losses ------------------------------------------------------------------------------------------


def rounds(*, seed: int, flavour: str, T: int = 4, fault: str = "none") -> dict[str, Any]:
    """T rounds whose pi_hat minimises a loss, minus the closed form, in log pi_hat.

    flavour  dpo: `apo_loss` on the population of pairs of pi_t
             sampled: the same on 500 labelled pairs of the reference a round; the closed form is sum_k w_k r_k / beta,
             r_k the reward of largest likelihood on round k's pairs
             sppo: the squared loss on win rates with reference pi_t, tau = 1 / eta, on pairs of pi_t; any game
    Faults: fixed_reference: each loss has the first reference; equal_weights: every round counts 1 / (1 - alpha).
    """
    import torch

    alpha, rng = 0.5, np.random.default_rng([seed, 4])
    if flavour == "sppo":
        game, _, _ = drawn(seed)
        rewards, scale = np.zeros(len(game)), float(rng.uniform(0.1, 1))  # eta
        exact = APO.of_game(game, scale, alpha)
    else:
        rewards = rng.uniform(-0.5, 0.5, size=4)
        game = bradley_terry_game(rewards, reference=0.5 * rng.dirichlet(np.ones(4)) + 0.125)
        scale = float(rng.uniform(0.5, 2))  # beta
        exact = APO.of_reward(rewards, game.log_reference, scale, alpha)
    table, n = SoftmaxTable(len(game)), len(game)
    run, estimates, errors = APO.of_reward(rewards, game.log_reference, 1.0, alpha), [], []

    def minimiser(pairs: Pairs, previous: Array, of_reward: bool = False) -> Array:
        p, w = pairs.tensors()
        anchor = gather(torch.as_tensor(previous), pairs)

        def loss(log_pi: Tensor) -> Tensor:
            policy = gather(log_pi, pairs)
            if flavour == "sppo":
                return ipo_loss(policy, anchor, p, w, tau=1 / scale)
            return apo_loss(policy, anchor, p, w, beta=1.0 if of_reward else scale)

        found = fit(loss, table, previous, tolerance=1e-13)
        return table.log_probabilities(found.theta).numpy()

    for t in range(1, T + 1):
        if flavour == "sampled":
            pairs = Pairs.sampled(game, 500, rng)
            estimates.append(minimiser(pairs, np.full(n, -math.log(n)), of_reward=True))
        else:
            pairs = Pairs.population(game, run.policy)
        previous = game.log_reference if fault == "fixed_reference" else run.log_policy
        run.follow(minimiser(pairs, previous))
        if flavour == "sampled":
            w = np.full(t, 1 / (1 - alpha)) if fault == "equal_weights" else weights(t, alpha)
            closed = softmax(game.log_reference + w @ np.array(estimates) / scale)[1]
        else:
            closed = exact.advance(1).log_proposal
        errors.append(float(np.abs(run.log_proposal - closed).max()))
    return {"errors": errors}


FLAVOURS = ("dpo", "sampled", "sppo")


def round_cells(plan: Plan, flavours: Sequence[str] = FLAVOURS, fault: str = "none") -> list[Cell]:
    seeds = plan.seed_range(quick=4, full=25)
    return [cell("rounds", s, flavour=f, fault=fault) for s in seeds for f in flavours]


# ---- acceleration ----------------------------------------------------------------------------------------------------


def acceleration(*, seed: int, alpha: float, fault: str = "none") -> dict[str, Any]:
    """The slope of log(1 - pi_hat_t(y*)) over t = 100, ..., 120 against -gap / (beta (1 - alpha)), relative."""
    rng = np.random.default_rng([seed, 5])
    rewards = -np.cumsum([0.0, *rng.uniform(0.3, 0.6, size=4)])  # the best is response 0
    beta, log_reference = float(rng.uniform(0.5, 1)), np.log(0.5 * rng.dirichlet(np.ones(5)) + 0.1)
    run = KINDS[fault].of_reward(rewards, log_reference, beta, alpha)
    ends: list[float] = []
    for _ in range(2):
        run.advance(100 if not ends else 20)
        ends.append(float(logsumexp(run.log_proposal[1:])))
    expected = (rewards[1] - rewards[0]) / (beta * (1 - alpha))
    return {"error": (ends[1] - ends[0]) / 20 / expected - 1}


def acceleration_cells(plan: Plan, alphas: Sequence[float] = ALPHAS, fault: str = "none") -> list[Cell]:
    seeds = plan.seed_range(quick=10, full=60)
    return [cell("acceleration", s, alpha=a, fault=fault) for s in seeds for a in alphas]


def judge_acceleration(outcomes: Sequence[Outcome]) -> Judgement:
    """To 1e-6: what is left of alpha^t at t = 100, and of the third reward."""
    return judge_identity([o["error"] for o in outcomes], 1e-6)


# ---- what the reward falls short of ----------------------------------------------------------------------------------


def shortfall(*, seed: int, alpha: float, T: int = 60, fault: str = "none") -> dict[str, Any]:
    """beta log(1 / ref(y*)) / c_t minus max r - E r of pi_hat_t, relative, for t = 1, ..., T; the rewards' spread grows
    with the seed's, so that some policies have hardly moved and others are at the end.

    no_burn_in: t / (1 - alpha) in place of c_t. fixed_reference: as in KINDS.
    """
    rng = np.random.default_rng([seed, 6])
    n, beta = int(rng.integers(2, 7)), float(rng.uniform(0.2, 1))
    log_reference = np.log(0.99 * rng.dirichlet(np.full(n, 0.3)) + 0.01 / n)
    rewards = beta * rng.normal(size=n) * float(np.exp(rng.uniform(-1, 2)))
    run = KINDS[fault if fault in KINDS else "none"].of_reward(rewards, log_reference, beta, alpha)
    best = int(np.argmax(rewards))
    slack = []
    for t in range(1, T + 1):
        run.advance(1)
        rounds = t / (1 - alpha) if fault == "no_burn_in" else coefficient(t, alpha)
        bound = -beta * log_reference[best] / rounds
        slack.append(1 - float(run.proposal @ (rewards[best] - rewards)) / bound)
    return {"slack": min(slack)}


def shortfall_cells(plan: Plan, alphas: Sequence[float] = ALPHAS, fault: str = "none") -> list[Cell]:
    seeds = plan.seed_range(quick=20, full=150)
    return [cell("shortfall", s, alpha=a, fault=fault) for s in seeds for a in alphas]


def judge_shortfall(outcomes: Sequence[Outcome]) -> Judgement:
    return judge_inequality([o["slack"] for o in outcomes], 1e-12)


# ---- few comparisons -------------------------------------------------------------------------------------------------


def sampled_runs(
    rewards: Array,
    beta: float,
    alpha: float,
    pairs: int,
    T: int,
    runs: int,
    rng: np.random.Generator,
    on_policy: bool,
) -> Array:
    """max r - E r of pi_hat_t, (runs, T), from a uniform reference; a round's reward maximises the likelihood of its
    pairs' answers minus |r|^2 / 4 (some pairs are never drawn)."""
    n, ends = len(rewards), []
    hat, z = np.zeros((runs, n)), np.zeros((runs, n))
    for _ in range(T):
        law = np.exp(z - logsumexp(z, axis=1, keepdims=True)) if on_policy else np.full((runs, n), 1 / n)
        u = rng.random((runs, pairs, 2))
        y = (u[..., None] > law.cumsum(axis=1)[:, None, None, :]).sum(-1).clip(max=n - 1)
        won = rng.random((runs, pairs)) < expit(rewards[y[..., 0]] - rewards[y[..., 1]])
        wins = np.zeros((runs, n, n))
        winner, loser = (np.where(won == first, y[..., 0], y[..., 1]) for first in (True, False))
        np.add.at(wins, (np.arange(runs)[:, None], winner, loser), 1.0)
        new = z + map_rewards(wins) / beta
        z, hat = new + alpha * (new - hat), new
        proposal = np.exp(hat - logsumexp(hat, axis=1, keepdims=True))
        ends.append(rewards.max() - proposal @ rewards)
    return np.array(ends).T


def map_rewards(wins: Array, ridge: float = 0.5) -> Array:
    """argmax_r sum wins[i, j] log sigma(r_i - r_j) - ridge |r|^2 / 2, (runs, n), by Newton's method, halved steps."""
    n = wins.shape[-1]
    r, met = np.zeros(wins.shape[:-1]), wins + wins.swapaxes(-1, -2)

    def slope(r: Array) -> Array:
        lost = wins * expit(r[..., None, :] - r[..., :, None])
        return lost.sum(-1) - lost.sum(-2) - ridge * r

    for _ in range(12):
        spread = met * expit(r[..., None, :] - r[..., :, None]) * expit(r[..., :, None] - r[..., None, :])
        hessian = -spread
        hessian[..., range(n), range(n)] = ridge + spread.sum(-1) - spread[..., range(n), range(n)]
        r = r + np.linalg.solve(hessian, slope(r)[..., None])[..., 0]
    return r


def crossing(
    *, seed: int, pairs: int, alphas: Sequence[float] = (0.0, 0.8), on_policy: bool = True
) -> dict[str, Any]:
    """max r - E r after 4 and after 24 rounds, the mean of 20 runs, with and without momentum."""
    rewards = np.array([0.9, 0.6, 0.3, 0.0, -0.3])
    found = [
        sampled_runs(rewards, 1.0, alpha, pairs, 24, 20, np.random.default_rng([seed, 7, k]), on_policy)
        for k, alpha in enumerate(alphas)
    ]
    early, late = ([float(x[:, t].mean()) for x in found] for t in (3, 23))
    return {"early": early[1] - early[0], "late": late[1] - late[0], "means": [early, late]}


def crossing_cells(plan: Plan, **changed: Any) -> list[Cell]:
    return [cell("crossing", s, **({"pairs": 20} | changed)) for s in plan.seed_range(quick=16, full=40)]


def judge_crossing(outcomes: Sequence[Outcome]) -> Judgement:
    return conjunction(
        {
            "better after 4 rounds": lambda level: judge_ordering(
                [-o["early"] for o in outcomes], level=level
            ),
            "worse after 24 rounds": lambda level: judge_ordering([o["late"] for o in outcomes], level=level),
        }
    )


# ---- a cycle ---------------------------------------------------------------------------------------------------------


def spiral(
    *, seed: int, alphas: Sequence[float] = (0.0, 0.3), T: int = 400, optimistic: bool = False
) -> dict[str, Any]:
    """log KL from a cycle's equilibrium to pi_T and its growth over the second half, for each momentum; SPPO flavour at
    eta = 0.2.

    optimistic: in place of momentum, P(2 pi_t - pi_{t-1}) for P pi_t.
    """
    rng = np.random.default_rng([seed, 8])
    game = cyclic_game(rng.uniform(0.7, 0.95, 3), reference=0.3 * rng.dirichlet(np.ones(3)) + 0.7 / 3)  # type: ignore[arg-type]
    star, found, after = nash(game).log_policy, [], []
    for alpha in alphas:
        run = APO.of_game(game, 0.2, 0.0 if optimistic else alpha)
        if optimistic and alpha > 0:
            run.direction = Optimistic(game)
        run.advance(T // 2)
        half = kl(star, run.log_policy)
        found.append(math.log(kl(star, run.advance(T - T // 2).log_policy)))
        after.append(found[-1] - math.log(half))
    return {"log_kl": found, "growth": after}


class Optimistic:
    """eta P(. > 2 pi_t - pi_{t-1})."""

    def __init__(self, game: Any) -> None:
        self.game, self.before = game, game.reference

    def __call__(self, law: Array) -> Array:
        ahead, self.before = 2 * law - self.before, law
        return 0.2 * self.game.wins(ahead)


def spiral_cells(plan: Plan, **changed: Any) -> list[Cell]:
    return [cell("spiral", s, **changed) for s in plan.seed_range(quick=10, full=40)]


def judge_spiral(outcomes: Sequence[Outcome]) -> Judgement:
    def part(values: list[float]) -> Any:
        return lambda level: judge_ordering(values, level=level)

    return conjunction(
        {
            "without momentum it grows": part([o["growth"][0] for o in outcomes]),
            "with momentum it grows faster": part([o["growth"][1] - o["growth"][0] for o in outcomes]),
        }
    )


def spiral_rate(*, seed: int, alpha: float, fault: str = "none") -> dict[str, Any]:
    """Close to a cycle's equilibrium: the growth of log KL a round, relative to 2 log |lambda|, minus 1.

    lambda is the larger root of lambda^2 = (1 + i e)((1 + alpha) lambda - alpha), with e = eta omega and +-i omega the
    eigenvalues of (P - 1/2)(diag(pi*) - pi* pi*^T).

    Faults: no_momentum: 2 log |1 + i e|; rescaled: the same with the step eta / (1 - alpha).
    """
    rng = np.random.default_rng([seed, 9])
    wins, eta = rng.uniform(0.7, 0.95, 3), float(rng.uniform(0.1, 0.4))
    game = cyclic_game(wins)  # type: ignore[arg-type]
    star = nash(game).policy
    start = softmax(np.log(star) + 1e-6 * rng.normal(size=3))[0]
    run = APO.of_game(cyclic_game(wins, reference=start), eta, alpha)  # type: ignore[arg-type]
    omega = float(np.abs(np.linalg.eigvals((game.P - 0.5) @ (np.diag(star) - np.outer(star, star)))).max())
    e = eta * omega
    roots = np.roots([1, -(1 + 1j * e) * (1 + alpha), (1 + 1j * e) * alpha])
    rate = 2 * math.log(float(np.abs(roots).max()))
    if fault != "none":
        rate = math.log1p((e / (1 - alpha) if fault == "rescaled" else e) ** 2)
    ends = [math.log(kl(np.log(star), run.advance(rounds).log_policy)) for rounds in (100, 100)]
    small = (1 - alpha + 2 * alpha**2) / (1 - alpha) ** 3
    return {
        "error": (ends[1] - ends[0]) / 100 / rate - 1,
        "factor": rate / math.log1p(e**2),
        "small_steps": small,
    }


def spiral_rate_cells(
    plan: Plan, alphas: Sequence[float] = (0.0, 0.3, 0.6), fault: str = "none"
) -> list[Cell]:
    seeds = plan.seed_range(quick=5, full=40)
    return [cell("spiral_rate", s, alpha=a, fault=fault) for s in seeds for a in alphas]


def judge_spiral_rate(outcomes: Sequence[Outcome]) -> Judgement:
    """To 1e-3: what the distance, 1e-6 at first, leaves of the linear map."""
    return judge_identity([o["error"] for o in outcomes], 1e-3)


# ---- the claims ------------------------------------------------------------------------------------------------------

MOMENTUM = ALPHAS[1:]

CLAIMS = (
    Claim(
        name="apo.closed_form",
        kind="identity",
        title="Rounds with momentum are rounds of iterative DPO, more of them",
        statement=r"$\hat\pi_t \propto \pi_{\mathrm{ref}}\, e^{c_t r/\beta}$, $c_t = \sum_{k=1}^t "
        r"(1-\alpha^k)/(1-\alpha)$; it is one round of DPO at $\beta/c_t$, and at $\alpha = 0$ "
        r"iterative DPO, round by round.",
        assumptions=("exact rounds", "Bradley-Terry preferences"),
        source=f"{PAPER}, the method; the coefficient is derived in `algorithms/apo.py`",
        cells=closed_cells,
        judge=judge_errors,
        controls=(
            Control(
                "momentum_of_pi",
                "momentum from the extrapolated policy",
                lambda plan: closed_cells(plan, MOMENTUM, "momentum_of_pi"),
            ),
            Control(
                "anchored_at_hat",
                "the next reference is the policy before extrapolation",
                lambda plan: closed_cells(plan, MOMENTUM, "anchored_at_hat"),
            ),
            Control(
                "fixed_reference",
                "every round has the first reference",
                lambda plan: closed_cells(plan, fault="fixed_reference"),
            ),
        ),
    ),
    Claim(
        name="apo.rounds",
        kind="identity",
        title="Each round is the minimiser of its loss; a round's estimate enters with its momentum's weight",
        statement=r"With reference $\pi_t$ and pairs of $\pi_t$ the population losses of DPO and of win rates have the "
        r"closed-form rounds; with estimates $r_k$ from samples $\hat\pi_T \propto \pi_{\mathrm{ref}}\, e^{\sum_k w_k "
        r"r_k/\beta}$, $w_k = (1-\alpha^{T-k})/(1-\alpha)$: errors are amplified by up to $1/(1-\alpha)$.",
        assumptions=("samples: pairs of the reference in every round", r"$\alpha = 1/2$, four rounds"),
        source=f"{PAPER}, the method; the weights are derived in `algorithms/apo.py`",
        cells=round_cells,
        judge=judge_errors,
        controls=(
            Control(
                "fixed_reference",
                "every loss has the first reference",
                lambda plan: round_cells(plan, fault="fixed_reference"),
            ),
            Control(
                "equal_weights",
                "every estimate counts 1 / (1 - alpha)",
                lambda plan: round_cells(plan, ("sampled",), "equal_weights"),
            ),
        ),
    ),
    Claim(
        name="apo.acceleration",
        kind="identity",
        title="Momentum multiplies the rate by one over one minus alpha",
        statement=r"$\frac{1}{s}\log\frac{1 - \hat\pi_{t+s}(y^*)}{1 - \hat\pi_t(y^*)} \to -\Delta/(\beta(1-\alpha))$, "
        r"with $\Delta$ the gap between the best and the second reward.",
        assumptions=("exact rounds", r"$\Delta > 0$", r"at $t = 100$, to $10^{-6}$"),
        source=f"{PAPER}, its rate under a gap; the constant is derived",
        cells=acceleration_cells,
        judge=judge_acceleration,
        controls=(
            Control(
                "momentum_of_pi",
                "momentum from the extrapolated policy: a factor 1 + alpha",
                lambda plan: acceleration_cells(plan, MOMENTUM, "momentum_of_pi"),
            ),
            Control(
                "anchored_at_hat",
                "the next reference is the policy before extrapolation: no acceleration",
                lambda plan: acceleration_cells(plan, MOMENTUM, "anchored_at_hat"),
            ),
        ),
    ),
    Claim(
        name="apo.shortfall",
        kind="inequality",
        title="The reward falls short by at most beta log(1/ref) over the number of rounds that they are worth",
        statement=r"$\max r - \mathbb{E}_{\hat\pi_t} r \leq \beta\log(1/\pi_{\mathrm{ref}}(y^*)) / c_t$ for every $t$.",
        assumptions=("exact rounds",),
        source=f"{PAPER}, its rate without a gap is of this shape; the constant follows from optimality at beta / c_t",
        cells=shortfall_cells,
        judge=judge_shortfall,
        controls=(
            Control(
                "no_burn_in",
                "t / (1 - alpha) in place of c_t",
                lambda plan: shortfall_cells(plan, MOMENTUM, "no_burn_in"),
            ),
            Control(
                "fixed_reference",
                "every round has the first reference",
                lambda plan: shortfall_cells(plan, fault="fixed_reference"),
            ),
        ),
    ),
    Claim(
        name="apo.crossing",
        kind="ordering",
        title="With few comparisons a round momentum is ahead early and behind later",
        statement=r"With 20 labelled pairs of $\pi_t$ a round, $\alpha = 0.8$ against $\alpha = 0$: "
        r"$\max r - \mathbb{E}_{\hat\pi_t} r$ is smaller after 4 rounds and larger after 24.",
        assumptions=(
            "five responses with rewards 0.3 apart, beta = 1",
            "a ridge of 1/2 on each round's reward",
        ),
        source="measured: policies that concentrate early on a wrong response stop comparing it",
        cells=crossing_cells,
        judge=judge_crossing,
        controls=(
            Control("many_pairs", "500 pairs a round", lambda plan: crossing_cells(plan, pairs=500)),
            Control(
                "of_reference", "pairs of the reference", lambda plan: crossing_cells(plan, on_policy=False)
            ),
        ),
    ),
    Claim(
        name="apo.spiral",
        kind="ordering",
        title="On a cycle the last policy spirals outwards, with momentum faster",
        statement=r"SPPO flavour, $\eta = 0.2$: $\mathrm{KL}(\pi^*, \pi_t)$ grows from $t = 200$ to $400$ at "
        r"$\alpha = 0$, and by a larger factor at $\alpha = 0.3$.",
        assumptions=("cycles of three responses",),
        source="measured: momentum is not optimism",
        cells=spiral_cells,
        judge=judge_spiral,
        controls=(
            Control(
                "optimistic",
                "an optimistic step in place of momentum",
                lambda plan: spiral_cells(plan, optimistic=True),
            ),
            Control(
                "exchanged",
                "with and without momentum exchanged",
                lambda plan: spiral_cells(plan, alphas=(0.3, 0.0)),
            ),
        ),
    ),
    Claim(
        name="apo.spiral_rate",
        kind="identity",
        title="How fast it spirals: the larger root of a quadratic",
        statement=r"Near the equilibrium of a cycle $\log\mathrm{KL}(\pi^*, \pi_t)$ grows by $2\log|\lambda|$ a round, "
        r"$\lambda^2 = (1 + i\eta\omega)((1+\alpha)\lambda - \alpha)$; for small $\eta$ that is $(1 - \alpha + "
        r"2\alpha^2)/(1-\alpha)^3$ times the rate without momentum.",
        assumptions=(r"a start at $10^{-6}$ from the equilibrium; to a relative $10^{-3}$",),
        source="derived by linearising the step at the equilibrium",
        cells=spiral_rate_cells,
        judge=judge_spiral_rate,
        controls=(
            Control(
                "no_momentum",
                "the rate without momentum",
                lambda plan: spiral_rate_cells(plan, (0.3, 0.6), "no_momentum"),
            ),
            Control(
                "rescaled",
                "the rate of steps longer by 1 / (1 - alpha)",
                lambda plan: spiral_rate_cells(plan, (0.3, 0.6), "rescaled"),
            ),
        ),
    ),
)
