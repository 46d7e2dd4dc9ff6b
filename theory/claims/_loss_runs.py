"""What the claims about losses on exact tables measure: worlds, faults, cells. See `dpo`, `ipo`, `inpo`, `sppo`."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ...algorithms.dpo import dpo_loss, dpo_solution, plackett_luce_loss
from ...algorithms.inpo import INPO, inpo_loss
from ...algorithms.ipo import ipo, ipo_loss, product_loss, square_loss
from ...algorithms.optimisation import Pairs, PrefixTree, SoftmaxTable, Table, fit, fit_pairs, gather
from ...algorithms.optimisation.losses import logistic_loss, margin
from ...algorithms.planning.games import kl, regularised_nash, softmax
from ...algorithms.sppo import SPPO, sppo_loss
from ...envs.kernels import Array
from ...envs.links import LOGISTIC
from ...envs.preference_games import PreferenceGame, bradley_terry_game
from ...envs.token_mdp import random_token_mdp
from ._declare import cells_of
from ._game_runs import game

if TYPE_CHECKING:
    from torch import Tensor


cell = cells_of(__name__)


def bandit(seed: int) -> tuple[Array, PreferenceGame]:
    """Rewards (n,) and their Bradley-Terry game, 3 to 8 responses, the reference positive everywhere."""
    rng = np.random.default_rng([seed, 1])
    n = int(rng.integers(3, 9))
    rewards = rng.normal(size=n)
    return rewards, bradley_terry_game(rewards, reference=0.8 * rng.dirichlet(np.ones(n)) + 0.2 / n)


def connected(n: int, extra: int, rng: np.random.Generator) -> np.ndarray:
    """Pairs (m, 2), each once: a random path through all n responses, and up to `extra` pairs more."""
    order = rng.permutation(n)
    pairs = np.concatenate([np.column_stack([order[:-1], order[1:]]), rng.integers(n, size=(extra, 2))])
    return np.unique(np.sort(pairs[pairs[:, 0] != pairs[:, 1]], axis=1), axis=0)


def law_of(table: Table, minimum: Any) -> Array:
    """log pi of every response."""
    return table.log_probabilities(minimum.theta).numpy()


# ---- DPO -------------------------------------------------------------------------------------------------------------


def dpo_minimiser(*, seed: int, world: str = "table", fault: str = "none") -> dict[str, Any]:
    """The minimiser of the population loss against ref exp(r / beta) / Z, on pairs that connect all responses.

    world  "table": a bandit; "tree": the 40 responses of a token tree with three tokens and three steps
    fault  beta_twice: the margin is multiplied by beta^2; mean_tokens: log-probabilities are averaged over the
           response's tokens; no_reference: log pi alone; exchanged: the label of the other response
    """
    import torch

    rng = np.random.default_rng([seed, 3])
    beta = float(rng.uniform(0.3, 2))
    table: Table
    if world == "table":
        rewards, g = bandit(seed)
        table, log_reference, lengths = SoftmaxTable(len(g)), g.log_reference, np.ones(len(g))
    else:
        mdp = random_token_mdp(3, 3, seed=seed)
        table, log_reference, rewards = (
            PrefixTree(mdp.kernel),
            mdp.leaf_log_probabilities(),
            3 * mdp.leaf_rewards,
        )
        lengths = table.lengths.astype(float)
    n = table.responses
    y = connected(n, 2 * n, rng)
    pairs = Pairs(y, LOGISTIC.value(rewards[y[:, 0]] - rewards[y[:, 1]]), rng.random(len(y)) + 0.1)
    p, w = pairs.tensors()
    share = torch.as_tensor(1 / lengths if fault == "mean_tokens" else np.ones(n))
    reference = torch.zeros(n).double() if fault == "no_reference" else torch.as_tensor(log_reference)

    def loss(log_pi: Tensor) -> Tensor:
        policy, anchor = gather(share * log_pi, pairs), gather(share * reference, pairs)
        label = 1 - p if fault == "exchanged" else p
        return dpo_loss(policy, anchor, label, w, beta=beta**2 if fault == "beta_twice" else beta)

    found = fit(loss, table, log_reference, tolerance=1e-8 if fault == "mean_tokens" else 1e-13)
    closed = dpo_solution(rewards, log_reference, beta)[1]
    return {"error": float(np.abs(law_of(table, found) - closed).max()), "gradient": found.gradient}


def dpo_gap(*, seed: int, fault: str = "none") -> dict[str, Any]:
    """J(pi_r) - J(pi) - beta KL(pi, pi_r) at random policies. fault: reversed (KL(pi_r, pi)), beta_twice."""
    rewards, g = bandit(seed)
    rng = np.random.default_rng([seed, 3])
    beta = float(rng.uniform(0.2, 2))
    best, log_best = dpo_solution(rewards, g.log_reference, beta)

    def value(law: Array, log_law: Array) -> float:
        return float(law @ (rewards - beta * (log_law - g.log_reference)))

    errors = []
    for law in 0.99 * rng.dirichlet(np.ones(len(g)), size=8) + 0.01 / len(g):
        log_law = np.log(law)
        divergence = kl(log_best, log_law) if fault == "reversed" else kl(log_law, log_best)
        scale = beta**2 if fault == "beta_twice" else beta
        errors.append(value(best, log_best) - value(law, log_law) - scale * divergence)
    return {"errors": errors}


def dpo_components(*, seed: int, joined: bool = False) -> dict[str, Any]:
    """Pairs that fall into two components: how far the loss moves when mass does, and the laws within the components.

    moved: the loss's change when all logits of one component rise by 1, 3, 10. within: the laws conditional on either
    component, fitted from two starts, against the closed form's. joined: one pair connects the components.
    """
    import torch

    rewards, g = bandit(seed)
    rng, n = np.random.default_rng([seed, 3]), len(g)
    beta, cut = float(rng.uniform(0.3, 2)), n // 2 + 1
    y = np.concatenate(
        [connected(cut, n, rng), cut + connected(n - cut, n, rng)]
        if n - cut > 1
        else [connected(cut, n, rng)]
    )
    if joined:
        y = np.concatenate([y, [[0, n - 1]]])
    pairs = Pairs(y, g.P[y[:, 0], y[:, 1]], np.ones(len(y)))
    p, w = pairs.tensors()
    anchor = gather(torch.as_tensor(g.log_reference), pairs)

    def loss(log_pi: Tensor) -> Tensor:
        return dpo_loss(gather(log_pi, pairs), anchor, p, w, beta=beta)

    table = SoftmaxTable(n)
    group = np.arange(n) < cut
    closed = dpo_solution(rewards, g.log_reference, beta)[1]
    moved, within, shares = [], [], []
    for shift in (0.0, 4.0):
        start = softmax(g.log_reference + shift * group)[1]
        found = law_of(table, fit(loss, table, start, tolerance=1e-13))
        shares.append(float(np.exp(found[group]).sum()))
        for part in (group, ~group):
            ours, theirs = (softmax(x[part])[1] for x in (found, closed))
            within.append(float(np.abs(ours - theirs).max()))
        at = loss(torch.as_tensor(found)).item()
        for up in (1.0, 3.0, 10.0):
            moved.append(loss(table.log_probabilities(torch.as_tensor(found + up * group))).item() - at)
    return {"moved": moved, "within": within, "shares": shares}


def ranking_minimiser(*, seed: int, fault: str = "none") -> dict[str, Any]:
    """The minimiser of the Plackett-Luce loss over all ordered triples of responses, against ref exp(r / beta) / Z.

    Every three responses are ranked by P(order) = prod_k exp(r(y_k)) / sum_{j >= k} exp(r(y_j)), multiplied out here.
    fault  reversed: worst first; uniform: all orders equally likely; beta_twice
    """
    import torch

    rewards, g = bandit(seed)
    beta, n = float(np.random.default_rng([seed, 3]).uniform(0.3, 2)), len(g)
    orders = np.array(list(itertools.permutations(range(n), 3)))
    e = np.exp(rewards[orders])
    law = e[:, 0] / e.sum(axis=1) * e[:, 1] / (e[:, 1] + e[:, 2])
    if fault == "uniform":
        law = np.ones(len(orders))
    shown = torch.as_tensor(orders[:, ::-1].copy() if fault == "reversed" else orders)
    weight = torch.as_tensor(law / law.sum())
    reference = torch.as_tensor(g.log_reference)[shown]
    strength = beta**2 if fault == "beta_twice" else beta

    def loss(log_pi: Tensor) -> Tensor:
        return plackett_luce_loss(log_pi[shown], reference, weight, beta=strength)

    table = SoftmaxTable(n)
    found = law_of(table, fit(loss, table, g.log_reference, tolerance=1e-13))
    return {"error": float(np.abs(found - dpo_solution(rewards, g.log_reference, beta)[1]).max())}


def noisy_minimiser(*, seed: int, fault: str = "none") -> dict[str, Any]:
    """Two responses: the log-odds at the minimum of cDPO's population loss against logit((1 - 2 eps) p + eps) / beta.

    fault  unsmoothed: the loss knows nothing of eps; additive: the odds of p + eps in closed form
    """
    rng = np.random.default_rng([seed, 3])
    beta, p, eps = (float(rng.uniform(*ends)) for ends in ((0.1, 2), (0.05, 0.95), (0.05, 0.45)))
    pairs, flat = Pairs(np.array([[0, 1]]), np.array([p]), np.ones(1)), np.log([0.5, 0.5])
    noise = 0.0 if fault == "unsmoothed" else eps
    log_pi, _ = fit_pairs(dpo_loss, pairs, flat, tolerance=1e-13, beta=beta, label_smoothing=noise)
    seen = min(p + eps, 0.999) if fault == "additive" else (1 - 2 * eps) * p + eps
    return {"error": float(log_pi[0] - log_pi[1] - np.log(seen / (1 - seen)) / beta)}


def certain_slope(*, seed: int, kind: str = "dpo") -> dict[str, Any]:
    """-dL/dh at growing margins h of a pair whose first response always wins. kind: dpo, smoothed (eps = 0.1), ipo."""
    import torch

    beta = float(np.random.default_rng(seed).uniform(0.05, 2))
    slopes = []
    for h in np.array([0.0, 1.0, 10.0, 100.0, 600.0]) / beta:
        policy = torch.tensor([[h, 0.0]], dtype=torch.float64, requires_grad=True)
        flat, one = torch.zeros(1, 2).double(), torch.ones(1).double()
        if kind == "ipo":
            loss = ipo_loss(policy, flat, one, tau=beta)
        else:
            loss = dpo_loss(policy, flat, one, beta=beta, label_smoothing=0.1 if kind == "smoothed" else 0.0)
        (gradient,) = torch.autograd.grad(loss, policy)
        slopes.append(-float(gradient[0, 0]))
    return {"slopes": slopes}


def dpo_samples(*, seed: int, Ns: Sequence[int], fault: str = "none") -> dict[str, Any]:
    """J(pi*) - J(pi_hat) after N labelled comparisons, for N in Ns, of four responses; each N on fresh comparisons.

    fault  noise: one label in ten is flipped and nobody knows; disconnected: only 0-1 and 2-3 are ever compared
    """
    rng = np.random.default_rng([seed, 1])
    rewards, beta = rng.normal(size=4) / 2, 0.5
    g = bradley_terry_game(rewards)
    P = 0.9 * g.P + 0.1 * g.P.T if fault == "noise" else g.P
    log_star = dpo_solution(rewards, g.log_reference, beta)[1]
    gaps = []
    for N in Ns:
        if fault == "disconnected":
            first = 2 * rng.integers(2, size=N)
            y = np.column_stack([first, first + 1])
        else:
            y = connected_draws(N, rng)
        pairs = Pairs.counted(y, rng.random(N) < P[y[:, 0], y[:, 1]])
        log_pi, _ = fit_pairs(dpo_loss, pairs, g.log_reference, unidentified=True, beta=beta)
        gaps.append(beta * kl(log_pi, log_star))
    return {"gaps": gaps}


def connected_draws(N: int, rng: np.random.Generator) -> np.ndarray:
    """N pairs of different responses among four, all six pairs equally likely."""
    first = rng.integers(4, size=N)
    return np.column_stack([first, (first + rng.integers(1, 4, size=N)) % 4])


# ---- IPO, INPO, SPPO -------------------------------------------------------------------------------------------------


def drawn(seed: int) -> tuple[PreferenceGame, Array, float]:
    """A random game without a reward behind it, a law with full support and a temperature."""
    g, rng = game(seed), np.random.default_rng([seed, 2])
    tau = float(rng.uniform(0.1, 1))
    return g, 0.9 * rng.dirichlet(np.ones(len(g))) + 0.1 / len(g), tau


def ipo_minimiser(*, seed: int, fault: str = "none") -> dict[str, Any]:
    """The minimiser of IPO's population loss on pairs of a random law, listed and in product form, against `ipo`.

    fault  target: the margin is to be 1 / tau; pairs_of_reference: pairs are of another law; logistic: DPO's loss in
           place of the square, at beta = tau
    """
    import torch

    g, law, tau = drawn(seed)
    table = SoftmaxTable(len(g))
    pairs = Pairs.population(g, g.reference if fault == "pairs_of_reference" else law)
    p, w = pairs.tensors()
    log_reference = torch.as_tensor(g.log_reference)
    anchor = gather(log_reference, pairs)

    def loss(log_pi: Tensor) -> Tensor:
        policy = gather(log_pi, pairs)
        if fault == "logistic":
            return (w * logistic_loss(tau * margin(policy, anchor), p)).sum()
        if fault == "target":
            return square_loss(margin(policy, anchor), p, 1 / tau, w)
        return ipo_loss(policy, anchor, p, w, tau=tau)

    mu, wins = torch.as_tensor(law), torch.as_tensor(g.wins(law))
    listed, product = (
        law_of(table, fit(f, table, g.log_reference, tolerance=1e-12))
        for f in (loss, lambda lp: product_loss(lp - log_reference, mu, wins, 1 / (2 * tau)))
    )
    closed = np.log(ipo(g, law, tau))
    return {"errors": [float(np.abs(x - closed).max()) for x in (listed, product)]}


def ipo_online(*, seed: int, fault: str = "none") -> dict[str, Any]:
    """The largest entry of the gradient of IPO's loss at the regularised equilibrium, on pairs of the equilibrium.

    fault  pairs_of_reference; unregularised: at the reference in place of the equilibrium
    """
    import torch

    g, _, tau = drawn(seed)
    star = regularised_nash(g, tau)
    pairs = Pairs.population(g, g.reference if fault == "pairs_of_reference" else star.policy)
    p, w = pairs.tensors()
    table = SoftmaxTable(len(g))
    at = g.log_reference if fault == "unregularised" else star.log_policy
    theta = table.start(at).requires_grad_(True)
    policy = gather(table.log_probabilities(theta), pairs)
    loss = ipo_loss(policy, gather(torch.as_tensor(g.log_reference), pairs), p, w, tau=tau)
    (gradient,) = torch.autograd.grad(loss, theta)
    return {"gradient": float(gradient.abs().max())}


def inpo_minimiser(*, seed: int, share: float, fault: str = "none") -> dict[str, Any]:
    """The minimiser of INPO's population loss against the closed-form step; eta tau = share, at 1 against `ipo`."""
    import torch

    g, law, tau = drawn(seed)
    eta, n = share / tau, len(g)
    pairs = Pairs.population(g, g.reference if fault == "pairs_of_reference" else law)
    p, w = pairs.tensors()
    reference, previous = (gather(torch.as_tensor(x), pairs) for x in (g.log_reference, np.log(law)))

    def loss(log_pi: Tensor) -> Tensor:
        policy = gather(log_pi, pairs)
        if fault == "no_policy_term":  # IPO's anchor
            return square_loss(margin(policy, reference), p, eta / 2, w)
        if fault == "inverse_step":
            anchor = share * reference + (1 - share) * previous
            return square_loss(margin(policy, anchor), p, 1 / (2 * eta), w)
        return inpo_loss(policy, reference, previous, p, w, tau=tau, eta=eta)

    table = SoftmaxTable(n)
    found = np.exp(law_of(table, fit(loss, table, g.log_reference, tolerance=1e-12)))
    step = INPO(g, tau, eta, law).advance(1).policy
    closed = ipo(g, law, tau) if share == 1 else step
    return {"error": float(np.abs(found - closed).max()), "step": float(np.abs(step - closed).max())}


def sppo_minimiser(*, seed: int, etas: Sequence[float], fault: str = "none") -> dict[str, Any]:
    """max |log pi - log step| of the minimiser of SPPO's population loss, at each eta.

    fault  no_half: the target is eta P(y > pi_t); losing: the target's sign
    """
    import torch

    g, law, _ = drawn(seed)
    wins = g.wins(law)
    if fault == "no_half":
        wins = wins + 0.5
    if fault == "losing":
        wins = 1 - wins
    seen, previous, w = torch.as_tensor(wins), torch.as_tensor(np.log(law)), torch.as_tensor(law)
    table = SoftmaxTable(len(g))
    distances = []
    for eta in etas:
        loss = functools.partial(sppo_loss, previous=previous, wins=seen, weight=w, eta=eta)
        found = fit(loss, table, np.log(law), tolerance=1e-14)
        step = SPPO(g, eta, law).advance(1).log_policy
        distances.append(float(np.abs(law_of(table, found) - step).max()))
    return {"distances": distances}
