"""Claims about KL-regularised policy gradients (`algorithms/kl_policy_gradient.py`), on random tables and token trees.

Gradients are measured against the derivative of the enumerated objective, of the divergence to the posterior, and
against `kl_bayes`, which computes over responses; natural gradients against the Fisher matrix, written out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ...algorithms import kl_bayes
from ...algorithms.kl_policy_gradient import (
    gap_bound,
    natural_step,
    objective,
    on_policy,
    policy_gradient_loss,
    reward_to_go_loss,
    solve,
    token_natural_step,
)
from ...algorithms.optimisation import PrefixTree, SoftmaxTable, Table, fit
from ...envs.kernels import Array
from ...envs.token_mdp import random_token_mdp
from ..cells import Cell
from ..claim import Claim, Control, Judgement, Outcome, Plan
from ..statistics import all_of, judge_identity, judge_inequality
from ._declare import cells_of

if TYPE_CHECKING:
    from torch import Tensor

PAPER = "Ziegler et al. (arXiv 1909.08593)"
WORLDS = ("table", "tree")


cell = cells_of(__name__)


def world(seed: int, kind: str) -> tuple[Table, Array, Array, float, np.random.Generator]:
    """A table of one prompt (3 to 8 responses), or a tree of two prompts with 13 responses each (3 tokens, 2 steps):
    the table, rewards and the reference's logarithm, (prompts * responses,) each, and beta."""
    rng = np.random.default_rng([seed, 1])
    beta = float(rng.uniform(0.2, 1))
    if kind == "tree":
        model = random_token_mdp(3, 2, prompts=2, seed=seed)
        table = PrefixTree(model.kernel)
        return table, model.leaf_rewards, model.leaf_log_probabilities(), beta, rng
    n = int(rng.integers(3, 9))
    return SoftmaxTable(n), rng.normal(size=n), np.log(0.8 * rng.dirichlet(np.ones(n)) + 0.2 / n), beta, rng


def posteriors(table: Table, rewards: Array, log_reference: Array, beta: float) -> tuple[Array, float]:
    """log pi* of all responses and the mean of beta log Z over prompts, by `kl_bayes`."""
    rows = [x.reshape(table.prompts, -1) for x in (log_reference, rewards)]
    found = [
        kl_bayes.posterior(np.exp(ref) / np.exp(ref).sum(), r, beta) for ref, r in zip(*rows, strict=True)
    ]
    value = beta * float(np.mean([p.log_evidence for p in found]))
    return np.concatenate([p.log_law for p in found]), value


# ---- the gradient ----------------------------------------------------------------------------------------------------


def gradients(*, seed: int, kind: str, fault: str = "none") -> dict[str, Any]:
    """Gradients of the surrogates at random parameters, relative to max |grad J|, minus the gradients of J and of
    -beta KL(pi, pi*), and minus `kl_bayes.policy_gradient`'s.

    Faults: live_penalty: the log-ratio is not held constant; penalty_twice: the penalty's own surrogate is added to a
    reward that holds it; by_length: a mean over tokens; of_reference: responses drawn from the reference; own_token: a
    token pays for its own log-ratio alone.
    """
    import torch

    table, rewards, log_reference, beta, rng = world(seed, kind)
    reward, ref = torch.as_tensor(rewards), torch.as_tensor(log_reference)
    theta = torch.tensor(rng.normal(size=table.size), requires_grad=True)
    log_pi, prompts = table.log_probabilities(theta), table.prompts
    weight = on_policy(ref, prompts) if fault == "of_reference" else on_policy(log_pi, prompts)

    def slope(loss: Tensor) -> Array:
        (gradient,) = torch.autograd.grad(loss, theta, retain_graph=True)
        return gradient.numpy()

    anchor = ref
    if fault == "by_length":
        assert isinstance(table, PrefixTree)
        anchor = log_pi.detach() - (log_pi.detach() - ref) / torch.as_tensor(table.lengths)
    losses = [policy_gradient_loss(log_pi, anchor, reward, weight, beta=beta, baseline=b) for b in (0.0, 1.7)]
    if fault == "live_penalty":
        losses = [-(weight * (reward - beta * (log_pi - ref)) * log_pi).sum()]
    if fault == "penalty_twice":
        losses = [losses[0] + beta * (weight * (log_pi - ref) ** 2).sum() / 2]
    if isinstance(table, PrefixTree):
        tokens = table.token_log_probabilities(theta)
        of_ref = table.token_log_probabilities(table.start(log_reference))
        if fault == "own_token":
            ratio = (tokens - of_ref).detach()
            losses = [-(weight[:, None] * (reward[:, None] - beta * ratio) * tokens).sum()]
        elif fault == "none":
            losses.append(reward_to_go_loss(tokens, of_ref, reward, weight, beta=beta))
    log_star = torch.as_tensor(posteriors(table, rewards, log_reference, beta)[0])
    wanted = [
        slope(objective(log_pi, ref, reward, beta=beta, prompts=prompts)),
        slope(-beta * (log_pi.exp() * (log_pi - log_star)).sum() / prompts),
    ]
    if prompts == 1:
        scores = torch.autograd.functional.jacobian(table.log_probabilities, theta.detach()).numpy()
        law = log_pi.detach().exp().numpy()
        wanted.append(kl_bayes.policy_gradient(law / law.sum(), scores, np.exp(log_reference), rewards, beta))
    scale = float(np.abs(wanted[0]).max())
    return {"errors": [float(np.abs(-slope(loss) - w).max()) / scale for loss in losses for w in wanted]}


def gradient_cells(plan: Plan, worlds: Sequence[str] = WORLDS, fault: str = "none") -> list[Cell]:
    seeds = plan.seed_range(quick=10, full=60)
    return [cell("gradients", s, kind=kind, fault=fault) for s in seeds for kind in worlds]


def judge_errors(outcomes: Sequence[Outcome]) -> Judgement:
    return judge_identity([e for o in outcomes for e in o["errors"]])


# ---- the optimum -----------------------------------------------------------------------------------------------------


def optimum(*, seed: int, kind: str, fault: str = "none") -> dict[str, Any]:
    """Where exact gradients end, from the reference and from a random law: the law minus pi*, J minus beta log Z.

    Faults: by_length: the penalty is a mean over tokens; no_reference: an entropy bonus; forward: KL(ref, pi).
    """
    import torch

    table, rewards, log_reference, beta, rng = world(seed, kind)
    log_star, value = posteriors(table, rewards, log_reference, beta)
    starts = (None, table.log_probabilities(torch.tensor(rng.normal(size=table.size))).numpy())
    reward, ref = torch.as_tensor(rewards), torch.as_tensor(log_reference)
    lengths = table.lengths if isinstance(table, PrefixTree) else np.ones(len(rewards))
    share = torch.as_tensor(1 / lengths)

    def broken(log_pi: Tensor) -> Tensor:
        law = log_pi.exp()
        if fault == "by_length":
            return -(law * (reward - beta * share * (log_pi - ref))).sum() / table.prompts
        if fault == "no_reference":
            return -(law * (reward - beta * log_pi)).sum() / table.prompts
        return -((law * reward).sum() + beta * (ref.exp() * log_pi).sum()) / table.prompts

    errors, certificates = [], []
    for start in starts:
        if fault == "none":
            found = solve(table, rewards, log_reference, beta, start=start, tolerance=1e-11)
        else:
            found = fit(broken, table, log_reference if start is None else start, tolerance=1e-9)
        log_pi = table.log_probabilities(found.theta).numpy()
        errors += [float(np.abs(np.exp(log_pi) - np.exp(log_star)).max()), -found.value - value]
        certificates.append(gap_bound(log_pi, log_reference, rewards, beta, table.prompts))
    return {"errors": errors, "certificates": certificates}


def optimum_cells(plan: Plan, worlds: Sequence[str] = WORLDS, fault: str = "none") -> list[Cell]:
    seeds = plan.seed_range(quick=6, full=30)
    return [cell("optimum", s, kind=kind, fault=fault) for s in seeds for kind in worlds]


def judge_optimum(outcomes: Sequence[Outcome]) -> Judgement:
    return all_of(
        {
            "the law and the value": judge_errors(outcomes),
            "the certificate": judge_identity([c for o in outcomes for c in o["certificates"]]),
        }
    )


# ---- the certificate -------------------------------------------------------------------------------------------------


def dominated(*, seed: int, scale: float, fault: str = "none") -> dict[str, Any]:
    """Two bounds on J(pi*) - J(pi), minus it and relative to it, at pi = pi* exp(noise) / Z on a table of 2 to 6.

    One from the advantages, one from grad J. Faults: sixteenth: half the first's constant; first_power: min pi in place
    of its square in the second.
    """
    import torch

    rng = np.random.default_rng([seed, 2])
    n, beta = int(rng.integers(2, 7)), float(rng.uniform(0.2, 1))
    rewards = rng.normal(size=n) / 4
    log_reference = np.log(0.3 * rng.dirichlet(np.ones(n)) + 0.7 / n)
    table, (log_star, value) = SoftmaxTable(n), posteriors(SoftmaxTable(n), rewards, log_reference, beta)
    theta = torch.tensor(log_star + scale * rng.normal(size=n), requires_grad=True)
    log_pi = table.log_probabilities(theta)
    ref, reward = torch.as_tensor(log_reference), torch.as_tensor(rewards)
    J = objective(log_pi, ref, reward, beta=beta)
    (g,) = torch.autograd.grad(J, theta)
    log_law = log_pi.detach().numpy()
    gap = value - J.item()
    least = float(np.exp(log_law.min()))
    bound = gap_bound(log_law, log_reference, rewards, beta) / (2 if fault == "sixteenth" else 1)
    steep = float(g @ g) / (4 * beta * least ** (1 if fault == "first_power" else 2))
    return {"slack": [bound / gap - 1, steep / gap - 1]}


def dominated_cells(plan: Plan, fault: str = "none") -> list[Cell]:
    seeds = plan.seed_range(quick=40, full=300)
    return [cell("dominated", s, scale=scale, fault=fault) for s in seeds for scale in (0.1, 1.0)]


def judge_dominated(outcomes: Sequence[Outcome]) -> Judgement:
    return judge_inequality([s for o in outcomes for s in o["slack"]], 1e-9)


# ---- natural steps ---------------------------------------------------------------------------------------------------


def natural(*, seed: int, kind: str, fault: str = "none") -> dict[str, Any]:
    """The closed-form steps against theta + eta F^+ grad J, F the Fisher matrix; and how far from pi* they lead.

    step         log pi^+ minus the log-probabilities of theta + eta F^+ grad J
    contraction  table: log pi_3/pi* minus (1 - eta beta)^3 log pi_0/pi*, up to a constant; tree: log pi_H - log pi* at
                 eta = 1 / beta
    Faults: plain: the gradient in place of the natural one; fisher_of_reference; whole_response: the table's step on
    the tree.
    """
    import torch

    table, rewards, log_reference, beta, rng = world(seed, kind)
    eta = float(rng.uniform(0.2, 0.8)) / beta
    theta = torch.tensor(rng.normal(size=table.size), requires_grad=True)
    log_pi = table.log_probabilities(theta)
    J = objective(
        log_pi, torch.as_tensor(log_reference), torch.as_tensor(rewards), beta=beta, prompts=table.prompts
    )
    (g,) = torch.autograd.grad(J, theta)
    scores = torch.autograd.functional.jacobian(table.log_probabilities, theta.detach())
    law = torch.as_tensor(log_reference if fault == "fisher_of_reference" else log_pi.detach()).exp()
    fisher = (scores.T * (law / table.prompts)) @ scores
    direction = g if fault == "plain" else torch.linalg.lstsq(fisher, g, rcond=1e-12, driver="gelsd").solution
    by_fisher = table.log_probabilities(theta.detach() + eta * direction).numpy()
    log_star, _ = posteriors(table, rewards, log_reference, beta)
    start = log_pi.detach().numpy()

    def step(at: Array, eta: float) -> Array:
        if isinstance(table, PrefixTree) and fault != "whole_response":
            moved = token_natural_step(table, table.start(at), log_reference, rewards, beta, eta)
            return table.log_probabilities(moved).numpy()
        return natural_step(at, log_reference, rewards, beta, eta, table.prompts)

    errors = [float(np.abs(step(start, eta) - by_fisher).max())]
    if isinstance(table, PrefixTree):
        at = start
        for _ in range(table.tree.horizon):
            at = step(at, 1 / beta)
        away = at - log_star
    else:
        at = start
        for _ in range(3):
            at = step(at, eta)
        away = (at - log_star) - (1 - eta * beta) ** 3 * (start - log_star)
        away = away - away.mean()
    return {"errors": errors, "contraction": float(np.abs(away).max())}


def natural_cells(plan: Plan, worlds: Sequence[str] = WORLDS, fault: str = "none") -> list[Cell]:
    seeds = plan.seed_range(quick=6, full=40)
    return [cell("natural", s, kind=kind, fault=fault) for s in seeds for kind in worlds]


def judge_natural(outcomes: Sequence[Outcome]) -> Judgement:
    """To 1e-8: F's least eigenvalue is the least probability of a prefix times that of its tokens."""
    return all_of(
        {
            "the step": judge_identity([e for o in outcomes for e in o["errors"]], 1e-8),
            "the way to the optimum": judge_identity([o["contraction"] for o in outcomes]),
        }
    )


CLAIMS = (
    Claim(
        name="kl_policy_gradient.gradient",
        kind="identity",
        title="The penalty belongs to the reward: one gradient, by four routes",
        statement=r"$\mathbb{E}_\pi[\mathrm{sg}[r - \beta\log(\pi/\pi_{\mathrm{ref}}) - b]\, \nabla\log\pi] = "
        r"\nabla J = -\beta\nabla\mathrm{KL}(\pi, \pi^*)$ for every $b$; and with the later tokens' penalties only.",
        assumptions=("responses are drawn from the policy",),
        source=f"{PAPER}; Korbak et al. (arXiv 2205.11275)",
        cells=gradient_cells,
        judge=judge_errors,
        controls=(
            Control(
                "live_penalty",
                "the log-ratio is differentiated as well",
                lambda plan: gradient_cells(plan, fault="live_penalty"),
            ),
            Control(
                "penalty_twice",
                "the penalty in the reward and as a loss",
                lambda plan: gradient_cells(plan, fault="penalty_twice"),
            ),
            Control(
                "of_reference",
                "responses of the reference",
                lambda plan: gradient_cells(plan, fault="of_reference"),
            ),
            Control(
                "by_length",
                "the penalty is a mean over tokens",
                lambda plan: gradient_cells(plan, ("tree",), "by_length"),
            ),
            Control(
                "own_token",
                "a token pays for its own log-ratio alone",
                lambda plan: gradient_cells(plan, ("tree",), "own_token"),
            ),
        ),
    ),
    Claim(
        name="kl_policy_gradient.optimum",
        kind="identity",
        title="Exact gradients end at the posterior, on tables and on trees, from wherever they start",
        statement=r"$\nabla J(\pi_\theta) = 0$ only at $\pi^* = \pi_{\mathrm{ref}} e^{r/\beta}/Z$, with "
        r"$J(\pi^*) = \beta\log Z$.",
        assumptions=("a start with full support",),
        source=f"{PAPER}; the stationary points of a softmax table and of a token tree",
        cells=optimum_cells,
        judge=judge_optimum,
        controls=(
            Control(
                "by_length",
                "the penalty is a mean over tokens",
                lambda plan: optimum_cells(plan, ("tree",), "by_length"),
            ),
            Control(
                "no_reference",
                "an entropy bonus in place of KL",
                lambda plan: optimum_cells(plan, fault="no_reference"),
            ),
            Control(
                "forward",
                "KL from the reference to the policy",
                lambda plan: optimum_cells(plan, fault="forward"),
            ),
        ),
    ),
    Claim(
        name="kl_policy_gradient.certificate",
        kind="inequality",
        title="The advantages, and the gradient, bound what the policy falls short of",
        statement=r"$J(\pi^*) - J(\pi) \leq (\max a - \min a)^2/(8\beta)$ with "
        r"$a = r - \beta\log(\pi/\pi_{\mathrm{ref}})$, and $\leq |\nabla J|^2/(4\beta\min\pi^2)$ on a softmax table.",
        source="Hoeffding's lemma; cf. Mei et al., ICML 2020 (arXiv 2005.06392)",
        cells=dominated_cells,
        judge=judge_dominated,
        controls=(
            Control("sixteenth", "half the constant", lambda plan: dominated_cells(plan, "sixteenth")),
            Control(
                "first_power",
                "the least probability without its square",
                lambda plan: dominated_cells(plan, "first_power"),
            ),
        ),
    ),
    Claim(
        name="kl_policy_gradient.natural_step",
        kind="identity",
        title="The natural gradient is a mirror step on responses and a policy iteration on tokens",
        statement=r"$\theta + \eta F^{+}\nabla J$ has the law $\propto \pi^{1-\eta\beta}\pi_{\mathrm{ref}}^{\eta\beta}"
        r"e^{\eta r}$ on a table, where $\log(\pi/\pi^*)$ shrinks by $1-\eta\beta$; on a tree the token law "
        r"$\propto \pi_h^{1-\eta\beta}\pi_{\mathrm{ref},h}^{\eta\beta}e^{\eta Q_h}$, at $\pi^*$ after $H$ steps of "
        r"$\eta = 1/\beta$.",
        assumptions=(r"$\eta\beta \leq 1$",),
        source="Cen et al., Operations Research 2022 (arXiv 2007.06558), the update of regularised NPG",
        cells=natural_cells,
        judge=judge_natural,
        controls=(
            Control("plain", "the plain gradient", lambda plan: natural_cells(plan, fault="plain")),
            Control(
                "fisher_of_reference",
                "the reference's Fisher matrix",
                lambda plan: natural_cells(plan, fault="fisher_of_reference"),
            ),
            Control(
                "whole_response",
                "the step of the table of responses on the tree",
                lambda plan: natural_cells(plan, ("tree",), "whole_response"),
            ),
        ),
    ),
)
