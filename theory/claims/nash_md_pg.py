"""Claims about Nash-MD-PG and Nash-EMA-PG (`algorithms/nash_md_pg.py`) on games of responses and of token sequences.

Expectations are sums over all pairs of responses; where a run ends is compared with the mirror-descent methods' limits
and with Newton's equilibrium. Token trees have 2 tokens and 2 or 3 steps (7 or 15 responses), preferences are random.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ...algorithms.kl_estimators import joint_form
from ...algorithms.nash_md import NashMD
from ...algorithms.nash_md_pg import (
    NashEMAPG,
    NashMDPG,
    ema,
    moments,
    nash_md_pg_loss,
    objective,
    sequence_mixture,
    token_mixture,
)
from ...algorithms.optimisation import PrefixTree, SoftmaxTable, Table
from ...algorithms.planning.games import best_response, kl, regularised_nash
from ...envs.kernels import Array
from ...envs.preference_games import PreferenceGame, random_game
from ...envs.token_mdp import random_token_mdp
from .. import figures
from ..cells import Cell
from ..claim import Claim, Control, Judgement, Outcome, Plan
from ..statistics import all_of, judge_identity, judge_inequality, judge_rate, slope_loglog
from ._declare import cells_of

if TYPE_CHECKING:
    from torch import Tensor

PAPER = "Munos et al., ICML 2024 (arXiv 2312.00886)"
OPPONENTS = ("sequence", "token", "ema")
SHARES = (0.02, 0.04, 0.08, 0.16)


cell = cells_of(__name__)


def tree_game(seed: int, horizon: int) -> tuple[PrefixTree, PreferenceGame, float, np.random.Generator]:
    """Random preferences over the responses of a token tree, the tree's reference, a temperature."""
    rng = np.random.default_rng([seed, 1])
    model = random_token_mdp(2, horizon, seed=seed, concentration=3.0)
    game = random_game(model.n_leaves, rng, reference=model.leaf_probabilities())
    return PrefixTree(model.kernel), game, float(rng.uniform(0.3, 1)), rng


def table_game(seed: int) -> tuple[SoftmaxTable, PreferenceGame, float, np.random.Generator]:
    rng = np.random.default_rng([seed, 2])
    n = int(rng.integers(3, 6))
    game = random_game(n, rng, reference=0.5 * rng.dirichlet(np.ones(n)) + 0.5 / n)
    return SoftmaxTable(n), game, float(rng.uniform(0.3, 1)), rng


# ---- the expected gradient -------------------------------------------------------------------------------------------


def gradients(*, seed: int, opponent: str, share: float = 0.25, fault: str = "none") -> dict[str, Any]:
    """The surrogate summed over all pairs (y, y'), minus the gradient of P(pi > sg[m]) - tau KL(pi, mu); relative.

    Also with other baselines, and, for the mixture over responses, grad KL(pi, sg[m]) minus share grad KL(pi, mu).

    Faults: live_opponent: the opponent is differentiated; own_opponent: y' from the policy; swapped_weights;
    joint_penalty: the sum over tokens of log-ratio times log-probability, both differentiated; no_penalty.
    """
    import torch

    tree, game, tau, rng = tree_game(seed, 3)
    theta = torch.tensor(rng.normal(size=tree.size), requires_grad=True)
    log_pi, mu = tree.log_probabilities(theta), torch.as_tensor(game.log_reference)
    at_mu = tree.start(game.log_reference)
    average = torch.tensor(rng.normal(size=tree.size))
    P, weight = torch.as_tensor(np.array(game.P)), log_pi.detach().exp()

    def log_opponent(share: float) -> Tensor:
        if opponent == "ema":
            return tree.log_probabilities(ema(average, theta, share))
        if opponent == "token":
            return token_mixture(tree, theta, at_mu, share)
        return sequence_mixture(log_pi, mu, share)

    def slope(value: Tensor) -> Array:
        (gradient,) = torch.autograd.grad(value, theta, retain_graph=True)
        return gradient.numpy()

    m = log_opponent(share).exp()
    wanted = slope(objective(log_pi, mu, P @ m, tau=tau))
    drawn = {
        "own_opponent": log_pi.exp(),
        "swapped_weights": log_opponent(1 - share).exp(),
    }.get(fault, m).detach()

    def listed(baseline: float) -> Tensor:
        """All pairs: a row a response y, a column an opponent's y'."""
        n = len(game)
        policy, reference = (x[:, None].expand(n, n) for x in (log_pi, mu))
        return nash_md_pg_loss(policy, reference, P, weight[:, None] * drawn, tau=tau, baseline=baseline)

    losses = [listed(b) for b in (0.5, 0.0, -3.0)]
    if fault == "live_opponent":
        losses = [-(log_pi.exp() @ (P @ m) - tau * (log_pi.exp() * (log_pi - mu)).sum())]
    if fault in ("joint_penalty", "no_penalty"):
        tokens, of_mu = tree.token_log_probabilities(theta), tree.token_log_probabilities(at_mu)
        penalty = joint_form(tokens, of_mu, weight) if fault == "joint_penalty" else 0 * log_pi.sum()
        losses = [tau * penalty - (weight * (P @ drawn - 0.5) * log_pi).sum()]
    size = float(np.abs(wanted).max())
    errors = [float(np.abs(-slope(loss) - wanted).max()) / size for loss in losses]
    if opponent == "sequence" and fault == "none":
        log_m = log_opponent(share).detach()
        towards = [slope((log_pi.exp() * (log_pi - x)).sum()) for x in (log_m, mu)]
        errors.append(float(np.abs(towards[0] - share * towards[1]).max()) / size)
    return {"errors": errors}


def gradient_cells(plan: Plan, opponents: Sequence[str] = OPPONENTS, **broken: Any) -> list[Cell]:
    seeds = plan.seed_range(quick=5, full=30)
    return [cell("gradients", s, opponent=o, **broken) for s in seeds for o in opponents]


def judge_errors(outcomes: Sequence[Outcome]) -> Judgement:
    return judge_identity([e for o in outcomes for e in o["errors"]])


def halves(plan: Plan, share: float = 0.5) -> list[Cell]:
    seeds, kinds = plan.seed_range(quick=5, full=30), OPPONENTS[:2]
    return [
        cell("gradients", s, opponent=o, share=share, fault="swapped_weights") for s in seeds for o in kinds
    ]


# ---- mixtures --------------------------------------------------------------------------------------------------------


def mixtures(*, seed: int, horizon: int, share: float) -> dict[str, Any]:
    """max |log m_token - log m_sequence|."""
    import torch

    tree, game, _, rng = tree_game(seed, horizon)
    theta, mu = torch.tensor(rng.normal(size=tree.size)), torch.as_tensor(game.log_reference)
    by_token = token_mixture(tree, theta, tree.start(game.log_reference), share)
    whole = sequence_mixture(tree.log_probabilities(theta), mu, share)
    return {"errors": [float((by_token - whole).abs().max())]}


def mixture_cells(plan: Plan) -> list[Cell]:
    seeds = plan.seed_range(quick=5, full=30)
    cases = ((1, 0.25), (1, 0.7), (3, 0.0), (3, 1.0))
    return [cell("mixtures", s, horizon=h, share=share) for s in seeds for h, share in cases]


def longer(plan: Plan) -> list[Cell]:
    return [cell("mixtures", s, horizon=3, share=0.25) for s in plan.seed_range(quick=5, full=30)]


# ---- the natural gradient --------------------------------------------------------------------------------------------


def natural(*, seed: int, fault: str = "none") -> dict[str, Any]:
    """log pi of theta + eta F^+ g with share = eta tau, minus Nash-MD's next policy; F the Fisher matrix, written out.

    Faults: plain: the gradient itself; swapped_weights; own_opponent.
    """
    import torch

    table, game, tau, rng = table_game(seed)
    share, start = float(rng.uniform(0.1, 0.4)), 0.9 * rng.dirichlet(np.ones(len(game))) + 0.1 / len(game)
    eta = share / tau
    run = NashMDPG(
        table,
        game,
        tau,
        eta=1.0,
        share={"swapped_weights": 1 - share, "own_opponent": 0.0}.get(fault, share),
        start=np.log(start),
    )
    theta = run.theta.clone()
    g = run.advance(1).theta - theta
    scores = torch.autograd.functional.jacobian(table.log_probabilities, theta)
    fisher = (scores.T * torch.as_tensor(start)) @ scores
    direction = g if fault == "plain" else torch.linalg.lstsq(fisher, g, rcond=1e-12, driver="gelsd").solution
    found = table.log_probabilities(theta + eta * direction).numpy()
    step = NashMD(game, tau, eta, start).advance(1).log_policy
    return {"errors": [float(np.abs(found - step).max())]}


def natural_cells(plan: Plan, fault: str = "none") -> list[Cell]:
    return [cell("natural", s, fault=fault) for s in plan.seed_range(quick=10, full=60)]


# ---- where they end --------------------------------------------------------------------------------------------------


def rest(*, seed: int, method: str, share: float = 0.25, expect: str = "own_mixture") -> dict[str, Any]:
    """The law where a run comes to rest, minus the law that it is said to be.

    method  table, sequence, token: Nash-MD-PG on a table of responses, and on a tree with either mixture; ema
    expect  own_mixture: the best response to the opponent at rest, and (but for "token") Nash-MD's limit with the
            constant step share / tau; equilibrium: the regularised equilibrium; reference: the best response to it
    """
    table: Table
    if method in ("table", "ema"):
        table, game, tau, _ = table_game(seed)
        eta = 2 / tau
    else:
        table, game, tau, _ = tree_game(seed, 2)
        eta = 1 / tau
    run: NashMDPG
    if method == "ema":
        run = NashEMAPG(table, game, tau, eta=eta, decay=0.8)
    else:
        kind = "token" if method == "token" else "sequence"
        run = NashMDPG(table, game, tau, eta=eta, share=share, mixture=kind)  # type: ignore[arg-type]
    law = np.exp(run.settle(tolerance=1e-13).log_policy)
    if expect == "equilibrium":
        return {"errors": [float(np.abs(law - regularised_nash(game, tau).policy).max())]}
    if expect == "reference":
        return {"errors": [float(np.abs(law - best_response(game, game.reference, tau)).max())]}
    errors = [float(np.abs(law - best_response(game, run.opponent(), tau)).max())]
    if method != "token":
        errors.append(float(np.abs(law - NashMD(game, tau, share / tau).advance(400).policy).max()))
    return {"errors": errors}


def rest_cells(
    plan: Plan, methods: Sequence[str] = ("table", "sequence", "token"), **changed: Any
) -> list[Cell]:
    seeds = plan.seed_range(quick=3, full=12)
    return [cell("rest", s, method=m, **changed) for s in seeds for m in methods]


def equilibria(plan: Plan) -> list[Cell]:
    own = rest_cells(plan, ("table", "sequence"), share=0.0, expect="equilibrium")
    return rest_cells(plan, ("ema",), expect="equilibrium") + own


def bias(*, seed: int, share_of_mu: bool = True) -> dict[str, Any]:
    """KL(pi*, law at rest) at every share; share_of_mu = False: of 1 - share."""
    table, game, tau, _ = table_game(seed)
    star, found = regularised_nash(game, tau), []
    for share in SHARES:
        run = NashMDPG(table, game, tau, eta=2 / tau, share=share if share_of_mu else 1 - share)
        found.append(kl(star.log_policy, run.settle(tolerance=1e-13).log_policy))
    return {"divergence": found}


def bias_cells(plan: Plan, **broken: Any) -> list[Cell]:
    return [cell("bias", s, **broken) for s in plan.seed_range(quick=8, full=40)]


def judge_bias(outcomes: Sequence[Outcome]) -> Judgement:
    return judge_rate(slope_loglog(SHARES, [o["divergence"] for o in outcomes]), 2.0)


def draw_bias(outcomes: Sequence[Outcome], judgement: Judgement) -> Any:
    Y = np.array([o["divergence"] for o in outcomes])
    line = figures.Curve("Nash-MD-PG", SHARES, Y, slope_loglog(SHARES, Y))
    return figures.loglog([line], x="mu's weight in the mixture", y=r"KL$(\pi^*, \pi_\infty)$", reference=2.0)


# ---- the variance ----------------------------------------------------------------------------------------------------


def variances(*, seed: int, fault: str = "none") -> dict[str, Any]:
    """The gradient of one pair with 1/2 and without: means, variances, and the best constant at the equilibrium.

    At the reference, half way, and at the regularised equilibrium, against the mixture of share 1/4.

    Faults: plus_half: +1/2 in place of -1/2; of_reference: the best constant at the reference is said to be that of the
    equilibrium; anywhere: policies with random logits in place of those between the reference and the equilibrium.
    """
    import torch

    tree, game, tau, rng = tree_game(seed, 2)
    star = regularised_nash(game, tau)
    mu, log_star = torch.as_tensor(game.log_reference), torch.as_tensor(star.log_policy)
    means, slack, parabola = [], [], []
    for way in (0.0, 0.5, 1.0):
        at = sequence_mixture(log_star, mu, 1 - way)
        if fault == "anywhere":
            at = tree.log_probabilities(torch.tensor(2 * rng.normal(size=tree.size)))
        theta = tree.start(at.numpy()).numpy()
        m = sequence_mixture(at, mu, 0.25).exp().numpy()
        half, none, best = (
            moments(tree, theta, game, m, tau, b) for b in (-0.5 if fault == "plus_half" else 0.5, 0.0, 0.0)
        )
        least, further = (moments(tree, theta, game, m, tau, best[2] + x)[1] for x in (0.0, 1.0))
        means.append(float(np.abs(half[0] - none[0]).max()))
        slack.append((none[1] - half[1]) / none[1])
        # the variance is a parabola in b with its least value at b*
        value = -0.5 if fault == "plus_half" else 0.5
        for b, variance in ((value, half[1]), (0.0, none[1])):
            parabola.append((variance - least - (further - least) * (b - best[2]) ** 2) / none[1])
    log_law = game.log_reference if fault == "of_reference" else star.log_policy
    b = moments(tree, tree.start(log_law).numpy(), game, np.exp(log_law), tau)[2]
    constant = b - (0.5 - tau * kl(star.log_policy, game.log_reference))
    return {"means": means, "slack": slack, "parabola": parabola, "constant": constant}


def variance_cells(plan: Plan, fault: str = "none") -> list[Cell]:
    return [cell("variances", s, fault=fault) for s in plan.seed_range(quick=20, full=150)]


def judge_variances(outcomes: Sequence[Outcome]) -> Judgement:
    return all_of(
        {
            "less variance": judge_inequality([s for o in outcomes for s in o["slack"]]),
            "the same mean": judge_identity([e for o in outcomes for e in o["means"]]),
            "a parabola": judge_identity([e for o in outcomes for e in o["parabola"]]),
            "the best constant at the equilibrium": judge_identity([o["constant"] for o in outcomes]),
        }
    )


# ---- the claims ------------------------------------------------------------------------------------------------------

CLAIMS = (
    Claim(
        name="nash_md_pg.expected_gradient",
        kind="identity",
        title="The expected gradient is that of the regularised win rate against a fixed opponent",
        statement=r"$\mathbb{E}_{y\sim\pi, y'\sim m}[(P(y \succ y') - b - \tau\log\frac{\pi}{\mu}(y)) \nabla\log\pi(y)]"
        r" = \nabla[P(\pi \succ \mathrm{sg}[m]) - \tau\,\mathrm{KL}(\pi, \mu)]$ for every $b$ and for mixtures of "
        r"responses, of tokens and moving averages; and $\nabla\mathrm{KL}(\pi, \mathrm{sg}[m]) = "
        r"\beta\nabla\mathrm{KL}(\pi, \mu)$ for the mixture over responses.",
        assumptions=("responses are drawn from the policy, opponents from $m$",),
        source=f"{PAPER}, the section on deep algorithms",
        cells=gradient_cells,
        judge=judge_errors,
        controls=(
            Control(
                "live_opponent",
                "the opponent is differentiated as well",
                lambda plan: gradient_cells(plan, fault="live_opponent"),
            ),
            Control(
                "own_opponent",
                "opponents drawn from the policy",
                lambda plan: gradient_cells(plan, fault="own_opponent"),
            ),
            Control(
                "swapped_weights",
                "the mixture's weights exchanged, at a weight of 1/4",
                lambda plan: gradient_cells(plan, ("sequence", "token"), fault="swapped_weights"),
            ),
            Control(
                "joint_penalty",
                "the penalty of an open trainer: a sum over tokens, its log-ratio differentiated",
                lambda plan: gradient_cells(plan, fault="joint_penalty"),
            ),
            Control(
                "no_penalty", "without the penalty", lambda plan: gradient_cells(plan, fault="no_penalty")
            ),
        ),
    ),
    Claim(
        name="nash_md_pg.weights_at_one_half",
        kind="identity",
        title="Exchanged weights of the mixture cannot be seen at one half",
        statement=r"With the weights $\beta$ and $1-\beta$ exchanged the expected gradient is the same at 1/2.",
        source="an observation about tests: defaults of 1/2 hide the fault",
        cells=halves,
        judge=judge_errors,
        controls=(Control("quarter", "at a weight of 1/4", lambda plan: halves(plan, 0.25)),),
    ),
    Claim(
        name="nash_md_pg.token_mixture",
        kind="identity",
        title="The mixture of tokens is the mixture of responses for one token, and at the ends",
        statement=r"$\prod_h \pi_h^{1-\beta}\mu_h^\beta/z_h = \pi^{1-\beta}\mu^\beta/Z$ for $H = 1$, and for "
        r"$\beta \in \{0, 1\}$.",
        source=f"{PAPER}, the section on deep algorithms: the mixture is sampled token by token",
        cells=mixture_cells,
        judge=judge_errors,
        controls=(Control("three_tokens", "three tokens, a weight of 1/4", longer),),
    ),
    Claim(
        name="nash_md_pg.natural_step",
        kind="identity",
        title="A natural gradient step is Nash-MD's mirror step",
        statement=r"On a table of responses, with mu's weight $\beta = \eta\tau$: $\theta + \eta F^{+} g$ has the law "
        r"$\propto m\, e^{\eta P(\cdot \succ m)}$.",
        assumptions=(r"$\eta\tau \leq 1$",),
        source="derived; the natural gradient of a softmax table is its advantage (Kakade, NIPS 2001)",
        cells=natural_cells,
        judge=judge_errors,
        controls=(
            Control("plain", "the plain gradient", lambda plan: natural_cells(plan, "plain")),
            Control(
                "swapped_weights",
                "the mixture's weights exchanged",
                lambda plan: natural_cells(plan, "swapped_weights"),
            ),
            Control("own_opponent", "self-play", lambda plan: natural_cells(plan, "own_opponent")),
        ),
    ),
    Claim(
        name="nash_md_pg.rest",
        kind="identity",
        title="Nash-MD-PG comes to rest at the best response to its own mixture",
        statement=r"$\pi_\infty \propto \mu\, e^{P(\cdot \succ m_\infty)/\tau}$, with $m_\infty$ the mixture of "
        r"$\pi_\infty$ and $\mu$, over responses or over tokens; over responses it is the limit of Nash-MD with "
        r"$\eta = \beta/\tau$.",
        assumptions=("small constant learning rates", r"$\beta = 1/4$, $\tau$ in 0.3 to 1"),
        source="measured; the stationary points of the expected gradient",
        cells=rest_cells,
        judge=judge_errors,
        controls=(
            Control(
                "equilibrium",
                "taken for the regularised equilibrium",
                lambda plan: rest_cells(plan, ("table",), expect="equilibrium"),
            ),
            Control(
                "reference",
                "taken for the best response to the reference",
                lambda plan: rest_cells(plan, ("table",), expect="reference"),
            ),
        ),
    ),
    Claim(
        name="nash_md_pg.equilibrium",
        kind="identity",
        title="Nash-EMA-PG and self-play come to rest at the regularised equilibrium",
        statement=r"$\pi_\infty = \pi^*_\tau$ where the opponent is the moving average of the parameters, and at "
        r"$\beta = 0$.",
        assumptions=("small constant learning rates", r"$\tau$ in 0.3 to 1"),
        source="measured; the stationary points of the expected gradient",
        cells=equilibria,
        judge=judge_errors,
        controls=(
            Control(
                "mixture",
                "the mixture with a weight of 1/4",
                lambda plan: rest_cells(plan, ("table",), expect="equilibrium"),
            ),
        ),
    ),
    Claim(
        name="nash_md_pg.mixture_bias",
        kind="rate",
        title="The distance of Nash-MD-PG's rest from the equilibrium is the square of mu's weight",
        statement=r"$\mathrm{KL}(\pi^*_\tau, \pi_\infty) = \Theta(\beta^2)$.",
        assumptions=(r"$\beta$ in 0.02 to 0.16, $\tau$ in 0.3 to 1", "a slack of 0.1 on the exponent"),
        source="a consequence of nash_md_pg.rest",
        cells=bias_cells,
        judge=judge_bias,
        controls=(
            Control(
                "swapped_weights",
                "the mixture's weights exchanged",
                lambda plan: bias_cells(plan, share_of_mu=False),
            ),
        ),
        figure=draw_bias,
    ),
    Claim(
        name="nash_md_pg.one_half",
        kind="inequality",
        title="Without the 1/2 the gradient has the same mean and a larger variance",
        statement=r"The variance of one pair's gradient is a parabola in the constant $b$; it is smaller at $1/2$ than "
        r"at $0$, with the same mean. At the equilibrium against itself the best constant is "
        r"$1/2 - \tau\,\mathrm{KL}(\pi^*, \mu)$.",
        assumptions=(
            "between the reference and the equilibrium, against the mixture of weight 1/4",
            "random preferences over the responses of random trees",
        ),
        source=f"{PAPER}: the 1/2 as a control variate; the best constant is derived",
        cells=variance_cells,
        judge=judge_variances,
        controls=(
            Control("plus_half", "1/2 is added", lambda plan: variance_cells(plan, "plus_half")),
            Control(
                "of_reference",
                "the best constant at the reference",
                lambda plan: variance_cells(plan, "of_reference"),
            ),
            Control(
                "anywhere",
                "policies far from both: there the 1/2 may cost variance",
                lambda plan: variance_cells(plan, "anywhere"),
            ),
        ),
    ),
)
