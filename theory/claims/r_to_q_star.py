"""Claims about DPO as inverse soft Q-learning (`algorithms/r_to_q_star.py`), on random token trees, on small MDPs with
certain and with random transitions, and on the shipped world of a language model.

Backward passes over tokens (`planning.soft`) are measured against laws over whole responses by enumeration
(`planning.sequences`), and fits of the loss against both.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from ...algorithms.dpo import dpo_loss
from ...algorithms.optimisation import Pairs, PrefixTree, fit, gather
from ...algorithms.planning.divergence import trajectory_kl
from ...algorithms.planning.sequences import leaf_returns, sequence_gibbs, sequence_law, tree_of
from ...algorithms.planning.soft import SoftSolution, soft_maximum, soft_value_iteration
from ...algorithms.r_to_q_star import (
    beam_search,
    inverse_soft_q,
    q_function,
    shaped,
    token_dpo_loss,
    token_rewards,
)
from ...envs.kernels import Array
from ...envs.language_world import load_language_world
from ...envs.links import LOGISTIC
from ...envs.mdp import FiniteMDP, Layered
from ...envs.token_mdp import TokenMDP, random_token_mdp
from ..cells import Cell
from ..claim import Claim, Control, Judgement, Outcome, Plan
from ..statistics import all_of, judge_identity, judge_inequality
from ._declare import cells_of, controls
from ._loss_runs import connected
from .cpl import episodes

if TYPE_CHECKING:
    from torch import Tensor

PAPER = "Rafailov et al., COLM 2024 (arXiv 2404.12358)"


cell = cells_of(__name__)


def judge_errors(outcomes: Sequence[Outcome]) -> Judgement:
    return judge_identity([e for o in outcomes for e in o["errors"]])


# ---- worlds ----------------------------------------------------------------------------------------------------------


def tree(seed: int, prompts: int = 2) -> tuple[TokenMDP, Layered, float, np.random.Generator]:
    """A token tree (three tokens, three steps, 40 responses a prompt), its reference, beta and a generator. The rewards
    are normal, one a prefix and token."""
    rng = np.random.default_rng([seed, 1])
    model = random_token_mdp(3, 3, prompts=prompts, seed=seed)
    reward = [rng.normal(size=r.shape) / 2 for r in model.reward]
    for r in reward:
        r[0] = 0.0
    model = model.replace(reward=reward, theta=None)
    assert model.reference is not None
    return model, model.reference, float(rng.uniform(0.2, 1.5)), rng


def dense(seed: int, certain: bool) -> tuple[FiniteMDP, Array, float, np.random.Generator]:
    """Three steps, three states, two actions, one start; transitions certain or Dirichlet."""
    rng, H, S, A = np.random.default_rng([seed, 2]), 3, 3, 2
    kernel = (
        np.eye(S)[rng.integers(S, size=(H, S, A))] if certain else rng.dirichlet(np.ones(S), size=(H, S, A))
    )
    reference = 0.8 * rng.dirichlet(np.ones(A), size=(H, S)) + 0.2 / A
    return FiniteMDP.dense(kernel, rng.normal(size=(H, S, A))), reference, float(rng.uniform(0.2, 1.5)), rng


def solve(model: FiniteMDP, reference: Layered, beta: float, reward: Layered | None = None) -> SoftSolution:
    return soft_value_iteration(model, reference, beta, reward)


def advantage(soft: SoftSolution) -> list[Array]:
    """Q - V of a solution, 0 on actions that are not available."""
    assert soft.Q is not None
    return [
        np.where(np.isfinite(q), q - v[:, None], 0.0)
        for q, v in zip(soft.Q, list(soft.V)[: len(soft.Q)], strict=True)
    ]


def gaps(first: Layered, second: Layered) -> list[float]:
    """max |x - y| of every layer."""
    return [float(np.abs(np.asarray(x) - np.asarray(y)).max()) for x, y in zip(first, second, strict=True)]


def random_policy(model: FiniteMDP, reference: Layered, rng: np.random.Generator) -> list[Array]:
    """Any policy with the reference's support."""
    layers = [np.where(ref > 0, np.exp(rng.normal(size=ref.shape)), 0.0) for ref in reference]
    return [x / x.sum(axis=1, keepdims=True) for x in layers]


def random_values(model: FiniteMDP, rng: np.random.Generator) -> list[Array]:
    """Values (S_h,), 0 after the last step and, on a token MDP, in the ended state."""
    V = [rng.normal(size=n) for n in model.sizes]
    V[-1][:] = 0.0
    if isinstance(model, TokenMDP):
        for v in V:
            v[0] = 0.0
    return V


# ---- tokens and responses --------------------------------------------------------------------------------------------


def backward(
    model: TokenMDP, reference: Layered, beta: float, discount: float, after_end: float
) -> tuple[list[Array], Array]:
    """A soft pass written out here, so that it can be broken: the policy, and V of the prompts."""
    V = np.full(model.sizes[-1], 0.0)
    policy = []
    for h in reversed(range(model.horizon)):
        V = V.copy()
        V[0] = after_end
        Q = model.reward[h] + discount * model.kernel.expect(h, V)
        V, pi = soft_maximum(Q, reference[h], beta)
        policy.append(pi)
    return policy[::-1], V[1:]


def posterior(*, seed: int, fault: str = "none") -> dict[str, Any]:
    """Soft Bellman over tokens against ref exp(R / beta) / Z over responses: laws, V = beta log Z, and telescoping.

    fault  discounted: gamma = 0.95; open_end: V of the ended state is 0.1; raw: pi = softmax(Q / beta), without ref
    """
    model, reference, beta, _ = tree(seed)
    gibbs, returns = sequence_gibbs(model, reference, beta), leaf_returns(model)
    policy, V = backward(
        model, reference, beta, 0.95 if fault == "discounted" else 1.0, 0.1 if fault == "open_end" else 0.0
    )
    soft = solve(model, reference, beta)
    if fault == "raw":
        assert soft.Q is not None
        weights = [np.exp(q / beta) for q in soft.Q]
        policy = [w / w.sum(axis=1, keepdims=True) for w in weights]
    laws = [sequence_law(model, p) for p in (policy, soft.policy)]
    summed = model.along(token_rewards(policy, reference, beta)).reshape(returns.shape)
    errors = [np.log(law / gibbs.law) for law in laws]
    errors += [summed - (returns - V[:, None]), V - gibbs.values, soft.V[0][1:] - gibbs.values]
    return {"errors": [float(np.abs(e).max()) for e in errors]}


def posteriors(plan: Plan, **broken: Any) -> list[Cell]:
    return [cell("posterior", s, **broken) for s in plan.seed_range(quick=10, full=60)]


def inverse(*, seed: int, world: str, fault: str = "none") -> dict[str, Any]:
    """Any policy and any values, turned into a reward and solved for: do they come back? And any logits as Q?

    world  tree; certain or random: a dense MDP with such transitions
    fault  no_successor: r = beta log pi/ref + V, without - P V; raw: Q = beta logits, the reference left in; open_end:
           values that do not end with 0
    """
    model, reference, beta, rng = tree(seed) if world == "tree" else dense(seed, world == "certain")
    policy, V = random_policy(model, reference, rng), random_values(model, rng)
    if fault == "open_end":
        V[-1] = rng.normal(size=V[-1].shape)
        reward = [
            x + v[:, None] - model.kernel.expect(h, V[h + 1])
            for h, (x, v) in enumerate(zip(token_rewards(policy, reference, beta), V, strict=False))
        ]
    elif fault == "no_successor":
        reward = [x + v[:, None] for x, v in zip(token_rewards(policy, reference, beta), V, strict=False)]
    else:
        reward = inverse_soft_q(model, policy, reference, beta, V)
    if isinstance(model, TokenMDP):
        for r in reward:  # nothing is paid after the end
            r[0] = 0.0
    soft = solve(model, reference, beta, reward)
    errors = gaps(soft.policy, policy) + gaps(soft.V, V)
    with np.errstate(divide="ignore"):
        logits = [np.where(ref > 0, np.log(ref) + rng.normal(size=ref.shape), -np.inf) for ref in reference]
        if isinstance(model, TokenMDP):
            for x in logits:
                x[0] = np.where(np.isfinite(x[0]), 0.0, -np.inf)  # V of the ended state is 0
        Q, V = q_function(logits, reference, beta)
        if fault == "raw":
            Q = [beta * x for x in logits]
    after = [*V[1:], np.zeros(model.sizes[-1])]
    reward = [
        np.where(np.isfinite(q), q, 0.0) - model.kernel.expect(h, v)
        for h, (q, v) in enumerate(zip(Q, after, strict=True))
    ]
    soft = solve(model, reference, beta, reward)
    laws = [np.exp(x - np.logaddexp.reduce(x, axis=1)[:, None]) for x in logits]
    return {"errors": errors + gaps(soft.policy, laws) + gaps(list(soft.V)[:-1], V)}


def inverses(plan: Plan, **broken: Any) -> list[Cell]:
    seeds = plan.seed_range(quick=5, full=30)
    return [cell("inverse", s, world=w, **broken) for s in seeds for w in ("tree", "certain", "random")]


def shaping(*, seed: int, world: str, fault: str = "none") -> dict[str, Any]:
    """The optimum with and without a potential, its values, and the potential that leads to beta log pi*/ref itself.

    fault  terminal: Phi is not 0 after the end; discounted: 0.95 Phi(s') - Phi(s)
    """
    model, reference, beta, rng = tree(seed) if world == "tree" else dense(seed, False)
    Phi = random_values(model, rng)
    plain = solve(model, reference, beta)
    if fault == "terminal":
        last = rng.normal(size=model.sizes[-1])
        reward = shaped(model, Phi)
        reward[-1] = reward[-1] + model.kernel.expect(model.horizon - 1, last)
    elif fault == "discounted":
        reward = [
            r + 0.95 * model.kernel.expect(h, Phi[h + 1]) - Phi[h][:, None]
            for h, r in enumerate(model.reward)
        ]
    else:
        reward = shaped(model, Phi)
    if isinstance(model, TokenMDP):
        reward[-1][0] = 0.0  # where it must be constant
    soft = solve(model, reference, beta, reward)
    own = token_rewards(plain.policy, reference, beta)
    errors = gaps(soft.policy, plain.policy)
    errors += gaps(soft.V, [v - p for v, p in zip(plain.V, Phi, strict=True)])
    available = [ref > 0 for ref in reference]
    by_values = shaped(model, plain.V)  # r + P V - V
    errors += [
        float(np.abs(np.where(a, x - y, 0.0)).max())
        for a, x, y in zip(available, own, by_values, strict=True)
    ]
    return {"errors": errors}


def shapings(plan: Plan, **broken: Any) -> list[Cell]:
    seeds = plan.seed_range(quick=5, full=30)
    return [cell("shaping", s, world=w, **broken) for s in seeds for w in ("tree", "dense")]


# ---- telescoping -----------------------------------------------------------------------------------------------------


def telescoping(*, seed: int, certain: bool, fault: str = "none") -> dict[str, Any]:
    """R - V_0 - sum beta log pi*/ref of all trajectories: 0, or what the transitions were lucky, V(s') - E V(s').

    With random transitions also its mean, given the actions' law, of a random policy. fault: lucky, the luck left out.
    """
    model, reference, beta, rng = dense(seed, certain)
    soft = solve(model, reference, beta)
    kernel = np.stack([model.kernel.expect(h, np.eye(3).T[s]) for h in range(3) for s in range(3)])
    P = kernel.reshape(3, 3, 3, 2).transpose(0, 2, 3, 1)  # [h, s, a, s']
    runs = episodes(P, 0, model.horizon)
    h, s, a = np.arange(model.horizon), runs.states, runs.actions
    reward, ratio = np.asarray(model.reward), np.asarray(token_rewards(soft.policy, reference, beta))
    residual = (reward[h, s, a] - ratio[h, s, a]).sum(axis=1) - soft.V[0][0]
    # the state after the last action has V = 0 whatever it is
    expected = np.stack([model.kernel.expect(t, soft.V[t + 1]) for t in range(3)])[h, s, a]
    came = np.column_stack([np.asarray(soft.V)[t + 1][s[:, t + 1]] for t in range(2)] + [np.zeros(len(s))])
    luck = (came - expected).sum(axis=1)
    policy = np.stack(random_policy(model, reference, rng))
    chance = policy[h, s, a].prod(axis=1) * np.prod(
        [P[t, s[:, t], a[:, t], s[:, t + 1]] for t in range(2)], axis=0
    )
    explained = np.zeros(len(s)) if fault == "lucky" else luck
    return {
        "errors": [*(residual - explained), chance @ residual, chance.sum() - 1],
        "luck": np.abs(luck).max(),
    }


def telescopings(plan: Plan, **broken: Any) -> list[Cell]:
    """With certain transitions the sum telescopes: `lucky` is no fault there."""
    seeds = plan.seed_range(quick=8, full=40)
    if broken:
        return [cell("telescoping", s, certain=False, **broken) for s in seeds]
    return [cell("telescoping", s, certain=True, fault="lucky") for s in seeds] + [
        cell("telescoping", s, certain=False) for s in seeds
    ]


# ---- DPO on whole responses ------------------------------------------------------------------------------------------


def sequence_dpo(*, seed: int, fault: str = "none") -> dict[str, Any]:
    """The minimiser of the population loss over token policies against the soft optimum of every prefix; and the token
    rewards against Q* - V*.

    fault  beta_twice; no_reference; mean_tokens: means over a response's tokens; apart: responses that begin with the
           first token are compared only with each other
    """
    import torch

    model, reference, beta, rng = tree(seed, prompts=1)
    table, r, n = PrefixTree(tree_of(model)), model.leaf_rewards, model.n_leaves
    y = connected(n, 2 * n, rng)
    if fault == "apart":
        group = model.trajectories(np.arange(n)).actions[:, 0] == 0
        y = np.concatenate(
            [np.flatnonzero(part)[connected(int(part.sum()), 2 * n, rng)] for part in (group, ~group)]
        )
    pairs = Pairs(y, LOGISTIC.value(r[y[:, 0]] - r[y[:, 1]]), rng.random(len(y)) + 0.1)
    p, w = pairs.tensors()
    log_reference = torch.as_tensor(model.leaf_log_probabilities())
    share = torch.as_tensor(1.0 / table.lengths if fault == "mean_tokens" else np.ones(n))
    anchor = torch.zeros(n).double() if fault == "no_reference" else log_reference

    def loss(log_pi: Tensor) -> Tensor:
        policy, reference = (gather(share * x, pairs) for x in (log_pi, anchor))
        return dpo_loss(policy, reference, p, w, beta=beta**2 if fault == "beta_twice" else beta)

    found = fit(loss, table, log_reference.numpy(), tolerance=1e-8 if fault == "mean_tokens" else 1e-14)
    # the same function of token log-probabilities, and its gradient in the tokens' logits, is 0 there
    theta = found.theta.requires_grad_(True)
    mask = torch.as_tensor(np.arange(model.horizon) < table.lengths[:, None])[pairs.index]
    tokens, base = (
        table.token_log_probabilities(x)[pairs.index] for x in (theta, table.start(log_reference.numpy()))
    )
    (gradient,) = torch.autograd.grad(token_dpo_loss(tokens, base, p, w, mask, beta=beta), theta)
    soft, policy = solve(model, reference, beta), table.policy(theta)
    star = advantage(soft)
    return {
        "errors": [
            float(gradient.abs().max()),
            *gaps(policy, soft.policy),
            *gaps(token_rewards(policy, reference, beta), star),
        ]
    }


def sequence_dpos(plan: Plan, **broken: Any) -> list[Cell]:
    return [cell("sequence_dpo", s, **broken) for s in plan.seed_range(quick=6, full=30)]


@lru_cache(maxsize=1)
def language_world() -> TokenMDP:
    return load_language_world()


def language(*, seed: int, fault: str = "none") -> dict[str, Any]:
    """DPO on the shipped language world, 8 prompts of 1,365 responses, against the optimum of every prefix.

    The pairs are four random cycles through all responses of each prompt, labelled Bradley-Terry. fault: beta_twice;
    no_reference.
    """
    import torch

    model, rng = language_world(), np.random.default_rng([seed, 3])
    beta, L = float(rng.uniform(0.2, 1)), model.n_leaves // model.roots
    assert model.reference is not None
    orders = [x * L + rng.permutation(L) for x in range(model.roots) for _ in range(4)]
    y = np.concatenate([np.column_stack([o, np.roll(o, 1)]) for o in orders])
    r, table = model.leaf_rewards, PrefixTree(tree_of(model))
    pairs = Pairs(y, LOGISTIC.value(r[y[:, 0]] - r[y[:, 1]]), np.ones(len(y)))
    p, w = pairs.tensors()
    log_reference = torch.as_tensor(model.leaf_log_probabilities())
    anchor = gather(0 * log_reference if fault == "no_reference" else log_reference, pairs)
    used = beta**2 if fault == "beta_twice" else beta
    found = fit(
        lambda lp: dpo_loss(gather(lp, pairs), anchor, p, w, beta=used),
        table,
        log_reference.numpy(),
        tolerance=1e-13,
    )
    law = table.log_probabilities(found.theta).numpy()
    soft, policy = solve(model, model.reference, beta), table.policy(found.theta)
    gibbs = sequence_gibbs(model, model.reference, beta)
    return {
        "errors": [
            float(np.abs(law - np.log(gibbs.law).ravel()).max()),
            *gaps(policy, soft.policy),
            *gaps(token_rewards(policy, model.reference, beta), advantage(soft)),
        ]
    }


def languages(plan: Plan, **broken: Any) -> list[Cell]:
    return [cell("language", s, **broken) for s in plan.seed_range(quick=1, full=3)]


def judge_languages(outcomes: Sequence[Outcome]) -> Judgement:
    return judge_identity([e for o in outcomes for e in o["errors"]], 1e-8)


# ---- the implicit reward of the chosen -------------------------------------------------------------------------------


def chosen(*, seed: int, N: int = 200, winners: bool = False) -> dict[str, Any]:
    """E[beta log pi/ref] of responses of the reference, for a policy that DPO trained on N of their comparisons, for
    the optimum, and for random policies; and -beta KL(ref, pi) token by token.

    winners  the mean over what was preferred, while the reference is the law of all responses; beta is 2 to 4 there as
             here (for small beta the winners' implicit reward falls as well, since -V*(s_0) does)
    """
    import torch

    model, reference, _, rng = tree(seed, prompts=1)
    beta, r, law = float(rng.uniform(2, 4)), model.leaf_rewards, model.leaf_probabilities()
    P = LOGISTIC.value(r[:, None] - r[None])
    y = rng.choice(len(law), size=(N, 2), p=law)
    pairs = Pairs.counted(y, rng.random(N) < P[y[:, 0], y[:, 1]])
    p, w = pairs.tensors()
    log_reference = torch.as_tensor(model.leaf_log_probabilities())
    anchor, table = gather(log_reference, pairs), PrefixTree(tree_of(model))
    # certain comparisons have no minimiser: the labels are smoothed
    found = fit(
        lambda lp: dpo_loss(gather(lp, pairs), anchor, p, w, beta=beta, label_smoothing=0.1),
        table,
        log_reference.numpy(),
        tolerance=1e-9,
    )
    mean_law = 2 * law * (P @ law) if winners else law
    policies = [table.policy(found.theta), solve(model, reference, beta).policy]
    policies += [random_policy(model, reference, rng) for _ in range(3)]
    implicit = [
        float(mean_law @ model.along(token_rewards(policy, reference, beta)))
        for policy in (policies[:2] if winners else policies)
    ]
    divergences = [beta * trajectory_kl(model, reference, policy) for policy in policies]
    return {
        "implicit": implicit,
        "errors": [a + b for a, b in zip(implicit, divergences, strict=False)],
    }


def chosens(plan: Plan, **broken: Any) -> list[Cell]:
    return [cell("chosen", s, **broken) for s in plan.seed_range(quick=8, full=40)]


def judge_chosen(outcomes: Sequence[Outcome]) -> Judgement:
    return all_of(
        {
            "below 0": judge_inequality([-x for o in outcomes for x in o["implicit"]]),
            "by the divergence": judge_errors(outcomes),
        }
    )


# ---- search ----------------------------------------------------------------------------------------------------------


def search(*, seed: int, widths: Sequence[int] = (1, 2, 5), fault: str = "none") -> dict[str, Any]:
    """Beams by beta log pi*/ref against beams by rewards so far plus V*, step by step; by beta log pi* against the same
    for r + beta log ref; and what the beam that holds everything finds, against the best response.

    fault  no_values: rewards so far alone; likelihood: log pi* against rewards plus V*, without the reference; narrow:
           a beam of 1 is to find the best response
    """
    model, reference, beta, _ = tree(seed)
    soft, returns = solve(model, reference, beta), leaf_returns(model)
    ratio = token_rewards(soft.policy, reference, beta)
    with np.errstate(divide="ignore"):
        log_pi, log_ref = ([beta * np.log(x) for x in layers] for layers in (soft.policy, reference))
    with_reference = [r + x for r, x in zip(model.reward, log_ref, strict=True)]
    values = None if fault == "no_values" else soft.V
    errors: list[float] = []
    for prompt in range(model.roots):
        start = float(soft.V[0][1 + prompt])
        for width in widths:
            by_ratio = beam_search(model, log_pi if fault == "likelihood" else ratio, width, None, prompt)
            by_value = beam_search(model, model.reward, width, values, prompt)
            by_likelihood = beam_search(model, log_pi, width, None, prompt)
            by_both = beam_search(model, with_reference, width, values, prompt)
            for ours, theirs in ((by_ratio, by_value), (by_likelihood, by_both)):
                errors += [float(ours.trace != theirs.trace)]
                errors += list(np.abs(ours.totals - (theirs.totals - start)))
        everything = 1 if fault == "narrow" else returns.shape[1]
        best = beam_search(model, ratio, everything, None, prompt).leaves[0]
        errors.append(float(returns[prompt].max() - returns[prompt, best]))
    return {"errors": errors}


def searches(plan: Plan, **broken: Any) -> list[Cell]:
    return [cell("search", s, **broken) for s in plan.seed_range(quick=10, full=60)]


CLAIMS = (
    Claim(
        name="r_to_q_star.token_posterior",
        kind="identity",
        title="Soft Bellman over tokens is the posterior over responses",
        statement=r"$\prod_t\pi^*(a_t|s_t) = \pi_{\mathrm{ref}}(y)\,e^{R(y)/\beta}/Z$, $V^*(s_0) = \beta\log Z$, and "
        r"$\sum_t\beta\log\frac{\pi^*}{\pi_{\mathrm{ref}}} = R(y) - V^*(s_0)$.",
        source=f"{PAPER}: the token MDP and its optimum",
        cells=posteriors,
        judge=judge_errors,
        controls=controls(
            posteriors,
            discounted="gamma = 0.95",
            open_end="V is 0.1 after the end",
            raw="the reference is left out of the policy",
        ),
    ),
    Claim(
        name="r_to_q_star.inverse",
        kind="identity",
        title="Every policy is optimal for a reward, and its logits are a Q",
        statement=r"$\pi$ is optimal with values $V$ for $r = \beta\log\frac{\pi}{\pi_{\mathrm{ref}}} + V(s) - P V$, "
        r"any $V$ with $V = 0$ after the end; so it is with $Q = \beta(\ell - \log\pi_{\mathrm{ref}})$ and "
        r"$V = \beta\log\sum e^\ell$ for $r = Q - P V$.",
        source=f"{PAPER}: policies and rewards up to potentials; logits as Q",
        cells=inverses,
        judge=judge_errors,
        controls=controls(
            inverses,
            no_successor="the next state's value is left out",
            raw="the logits without the reference taken out",
            open_end="values that do not end with 0",
        ),
    ),
    Claim(
        name="r_to_q_star.shaping",
        kind="identity",
        title="A potential that ends with 0 changes the values and not the optimum",
        statement=r"With $r + P\Phi - \Phi$, $\Phi = 0$ after the end, $\pi^*$ is the same, with values "
        r"$V^* - \Phi$; $\Phi = V^*$ leaves $\beta\log\frac{\pi^*}{\pi_{\mathrm{ref}}}$.",
        source=f"{PAPER}: rewards up to potentials; Ng, Harada, Russell, ICML 1999",
        cells=shapings,
        judge=judge_errors,
        controls=controls(shapings, terminal="a potential after the end", discounted="0.95 Phi(s') - Phi(s)"),
    ),
    Claim(
        name="r_to_q_star.telescoping",
        kind="identity",
        title="Token rewards telescope where transitions are certain, elsewhere on average",
        statement=r"$R - V^*(s_0) - \sum_t\beta\log\frac{\pi^*}{\pi_{\mathrm{ref}}}$ is 0 with certain transitions, "
        r"else $\sum_t (V^*(s_{t+1}) - E V^*)$, whose mean is 0 under every policy.",
        source=f"{PAPER}: the derivation of DPO, which needs certain transitions",
        cells=telescopings,
        judge=judge_errors,
        controls=controls(telescopings, lucky="no account of where the transitions led, and they are random"),
    ),
    Claim(
        name="r_to_q_star.sequence_dpo",
        kind="identity",
        title="DPO on whole responses finds the optimal conditionals of every prefix",
        statement=r"The population minimiser on a token tree has $\pi(\cdot|s) = \pi^*(\cdot|s)$ and "
        r"$\beta\log\frac{\pi}{\pi_{\mathrm{ref}}} = Q^* - V^*$ at every prefix.",
        assumptions=("Bradley-Terry labels", "the pairs connect all responses", "certain transitions"),
        source=f"{PAPER}: DPO as inverse soft Q-learning",
        cells=sequence_dpos,
        judge=judge_errors,
        controls=controls(
            sequence_dpos,
            beta_twice="beta multiplies the margin twice",
            no_reference="log pi without the reference",
            mean_tokens="means over a response's tokens",
            apart="a prefix's responses are compared only with each other",
        ),
    ),
    Claim(
        name="r_to_q_star.language_world",
        kind="identity",
        title="On a real language model's tree DPO finds the soft optimum",
        statement=r"On 8 prompts of 1,365 responses the population minimiser is the KL-regularised optimum to "
        r"$10^{-8}$, as a law of responses, in the conditionals of every prefix, and as $Q^* - V^*$.",
        assumptions=("Bradley-Terry labels on four random cycles a prompt",),
        source=f"{PAPER}: DPO as inverse soft Q-learning",
        cells=languages,
        judge=judge_languages,
        controls=controls(
            languages,
            beta_twice="beta multiplies the margin twice",
            no_reference="log pi without the reference",
        ),
    ),
    Claim(
        name="r_to_q_star.implicit_reward_falls",
        kind="inequality",
        title="The implicit reward of what the reference was trained on falls, whatever is learnt",
        statement=r"$E_{\pi_{\mathrm{ref}}}[\beta\log\frac{\pi}{\pi_{\mathrm{ref}}}] = "
        r"-\beta\,\mathrm{KL}(\pi_{\mathrm{ref}}, \pi) \le 0$ for every $\pi$.",
        assumptions=("the chosen responses follow the reference",),
        source=f"{PAPER}: why implicit rewards decline",
        cells=chosens,
        judge=judge_chosen,
        controls=(
            Control(
                "winners",
                "the mean over what was preferred, of which the reference knows nothing",
                lambda plan: chosens(plan, winners=True),
            ),
        ),
    ),
    Claim(
        name="r_to_q_star.search",
        kind="identity",
        title="A beam by likelihood ratio is a beam by reward and value",
        statement=r"At every step and width the beams by $\sum\beta\log\frac{\pi^*}{\pi_{\mathrm{ref}}}$ and by "
        r"$\sum r + V^*(s)$ hold the same prefixes, their totals differing by $V^*(s_0)$; so do those by "
        r"$\beta\log\pi^*$ and $\sum (r + \beta\log\pi_{\mathrm{ref}}) + V^*$. A beam that holds all prefixes ends "
        r"with the best response.",
        source=f"{PAPER}: likelihood search and value search",
        cells=searches,
        judge=judge_errors,
        controls=controls(
            searches,
            no_values="rewards so far, without the value of the prefix",
            likelihood="the likelihood of pi* against r + V*, without the reference",
            narrow="a beam of one is to find the best response",
        ),
    ),
)
