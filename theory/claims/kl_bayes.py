"""Claims about KL-regularised RL as inference (`algorithms/kl_bayes.py`), on random token trees and random laws.

The trees have 3 tokens and 3 steps (40 responses, of different lengths). What the file computes over responses is
measured against the solvers over tokens (`planning.soft`, `planning.divergence`), against derivatives by complex steps,
and against the enumeration of all samples.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ...algorithms.kl_bayes import (
    Posterior,
    adapted_beta,
    best_of_n_limit,
    best_of_n_policy,
    divergence,
    dpg_estimate,
    dpg_gradient,
    entropy,
    evidence_estimate,
    forward_projection,
    objective,
    policy_gradient,
    posterior,
    restricted,
    reverse_projection,
)
from ...algorithms.planning.divergence import regularised_value, trajectory_kl
from ...algorithms.planning.dynamic import value_iteration
from ...algorithms.planning.returns import ReturnLaw, best_of_n_kl
from ...algorithms.planning.sequences import leaf_blocks, leaf_returns, sequence_law, tree_of
from ...algorithms.planning.soft import soft_value_iteration
from ...envs.kernels import Array
from ...envs.mdp import Layered
from ...envs.token_mdp import TokenMDP, random_token_mdp
from ..cells import Cell
from ..claim import Claim, Control, Judgement, Outcome, Plan
from ..statistics import all_of, judge_identity, judge_inequality
from ._declare import cells_of, controls

PAPER = "Korbak et al., Findings of EMNLP 2022 (arXiv 2205.11275)"


cell = cells_of(__name__)


def world(seed: int) -> tuple[TokenMDP, np.random.Generator]:
    return random_token_mdp(3, 3, seed=seed), np.random.default_rng([seed, 1])


def lengths(model: TokenMDP) -> Array:
    """Tokens of each response of a prompt, the end action counted: 1, ..., H."""
    blocks = leaf_blocks(tree_of(model))
    length = np.concatenate([np.full(b.stop - b.start, h + 1.0) for h, b in enumerate(blocks)])
    return np.minimum(length, model.horizon)


def random_policy(model: TokenMDP, rng: np.random.Generator) -> Layered:
    rows = [0.9 * rng.dirichlet(np.ones(model.n_actions), size=n) for n in model.sizes[:-1]]
    policy = [r + 0.1 / model.n_actions for r in rows]
    for layer in policy:
        layer[0] = np.eye(model.n_actions)[-1]
    return tuple(policy)


def reference_of(model: TokenMDP) -> Layered:
    assert model.reference is not None
    return model.reference


# ---- the evidence bound ----------------------------------------------------------------------------------------------


def bound(*, seed: int, fault: str = "none") -> dict[str, Any]:
    """J of random token policies, forward through the tree, against beta log Z - beta KL(pi, pi*) over responses."""
    model, rng = world(seed)
    beta, ref = float(rng.uniform(0.05, 1)), reference_of(model)
    prior, rewards = sequence_law(model, ref)[0], leaf_returns(model)[0]
    scale = (
        beta * lengths(model) if fault == "beta_by_length" else beta
    )  # a mean over tokens in place of the sum
    star = posterior(prior, rewards * beta / scale, beta)
    errors = [soft_value_iteration(model, ref, beta).value - beta * star.log_evidence]
    for _ in range(4):
        policy = random_policy(model, rng)
        law = sequence_law(model, policy)[0]
        away = divergence(star.law, law) if fault == "reversed_kl" else divergence(law, star.law)
        attained = regularised_value(model, policy, ref, beta)
        errors += [
            attained - beta * (star.log_evidence - away),
            attained - objective(law, prior, rewards, beta),
        ]
    return {"errors": errors}


def bounds(plan: Plan, **broken: Any) -> list[Cell]:
    return [cell("bound", s, **broken) for s in plan.seed_range(quick=10, full=60)]


def judge_errors(outcomes: Sequence[Outcome]) -> Judgement:
    return judge_identity([e for o in outcomes for e in o["errors"]])


# ---- composition -----------------------------------------------------------------------------------------------------


def composition(*, seed: int, fault: str = "none") -> dict[str, Any]:
    """Conditioning by r1 and then by r2 against r1 + r2: laws and evidences, over tokens and over responses."""
    model, rng = world(seed)
    beta, ref = float(rng.uniform(0.1, 1)), reference_of(model)
    second = rng.normal(size=model.n_leaves)
    other = model.with_response_reward(second)
    prior, first = sequence_law(model, ref)[0], leaf_returns(model)[0]
    joint = posterior(prior, first + second, beta)
    once = posterior(prior, first, beta)
    twice = posterior(
        prior if fault == "same_prior" else once.law, second, 2 * beta if fault == "hotter" else beta
    )
    by_tokens = soft_value_iteration(other, soft_value_iteration(model, ref, beta).policy, beta)
    evidence = once.log_evidence + twice.log_evidence - joint.log_evidence
    return {
        "errors": [
            *(twice.law - joint.law),
            evidence,
            *(sequence_law(other, by_tokens.policy)[0] - twice.law),
        ]
    }


def compositions(plan: Plan, **broken: Any) -> list[Cell]:
    return [cell("composition", s, **broken) for s in plan.seed_range(quick=10, full=60)]


# ---- gradients -------------------------------------------------------------------------------------------------------


def complex_gradient(f: Any, theta: Array, step: float = 1e-30) -> Array:
    """df/dtheta, (d,), by complex steps: no cancellation, so exact up to rounding, and it knows nothing of scores."""
    return np.array([f(theta + 1j * step * e).imag / step for e in np.eye(len(theta))])


def log_linear(prior: Array, features: Array, theta: Array) -> tuple[Array, Array]:
    """`restricted`'s law and its logarithm, for complex theta."""
    log_weight = np.log(prior) + features @ theta
    log_law = log_weight - np.log(np.exp(log_weight).sum())
    return np.exp(log_law), log_law


def gradients(*, seed: int, fault: str = "none") -> dict[str, Any]:
    """Score-function gradients against derivatives of the divergences, in a log-linear family of 4 parameters.

    Faults: the penalty's gradient added to a reward that holds the penalty already; a clipped penalised reward; beta
    times the length; the gradients of the two divergences exchanged; DPG without its weights.
    """
    model, rng = world(seed)
    prior, rewards = sequence_law(model, reference_of(model))[0], leaf_returns(model)[0]
    features, theta = rng.normal(size=(len(prior), 4)), rng.normal(size=4)
    beta = float(rng.uniform(0.1, 1))
    star = posterior(prior, rewards, beta)
    policy, scores = restricted(prior, features, theta)

    def reverse(t: Array) -> Any:
        p, log_p = log_linear(prior, features, t)
        return (p * (log_p - star.log_law)).sum()

    def forward(t: Array) -> Any:
        return (star.law * (star.log_law - log_linear(prior, features, t)[1])).sum()

    value = objective(policy, prior, rewards, beta)
    ratio = np.log(policy / prior)
    kl_rl = [policy_gradient(policy, scores, prior, rewards, beta, b) for b in (0.0, value)]
    if fault == "penalty_twice":
        kl_rl = [policy_gradient(policy, scores, prior, rewards - beta * ratio, beta)]
    elif fault == "clipped":
        kl_rl = [(policy * np.clip(rewards - beta * ratio, 0.0, 0.5)) @ scores]
    elif fault == "beta_by_length":
        kl_rl = [(policy * (rewards - beta * lengths(model) * ratio)) @ scores]
    proposals = [policy, prior, rng.dirichlet(np.ones(len(prior)))]
    dpg = [dpg_gradient(scores, star.law, q, p) for q in proposals for p in (None, policy)]
    if fault == "unweighted":
        dpg = [(q * star.law) @ scores for q in proposals]
    wanted = [-beta * complex_gradient(reverse, theta), -complex_gradient(forward, theta)]
    if fault == "exchanged":
        wanted = [beta * wanted[1], wanted[0] / beta]
    return {"errors": [g - w for group, w in zip((kl_rl, dpg), wanted, strict=True) for g in group]}


def gradient_cells(plan: Plan, **broken: Any) -> list[Cell]:
    return [cell("gradients", s, **broken) for s in plan.seed_range(quick=10, full=60)]


def judge_gradients(outcomes: Sequence[Outcome]) -> Judgement:
    return judge_identity([x for o in outcomes for row in o["errors"] for x in row])


# ---- samples, all of them --------------------------------------------------------------------------------------------


def all_samples(*, seed: int, m: int, fault: str = "none") -> dict[str, Any]:
    """The expectation of the estimates over all 5^m samples of a proposal q over 5 responses, minus what they estimate.

    Faults: a proposal that never draws one response; the samples of q weighted as if drawn from the prior; the
    self-normalised gradient taken for unbiased.
    """
    rng = np.random.default_rng([seed, 2])
    n, beta = 5, float(rng.uniform(0.2, 1))
    prior, q = 0.9 * rng.dirichlet(np.ones(n), size=2) + 0.1 / n
    rewards = rng.random(n)
    star = posterior(prior, rewards, beta)
    _, scores = restricted(prior, rng.normal(size=(n, 3)), rng.normal(size=3))
    drawn = np.where(np.arange(n) == 0, 0.0, q) / (1 - q[0]) if fault == "collapsed" else q
    samples = np.array(list(itertools.product(range(n), repeat=m)))
    probability = drawn[samples].prod(axis=1)
    weighted = prior if fault == "weights_of_prior" else q
    z = evidence_estimate(samples, prior, rewards, beta, weighted)
    log_p = np.log(prior) + rewards / beta
    evidence = None if fault == "self_normalised" else math.exp(star.log_evidence)
    gradient = dpg_estimate(samples, scores, log_p, q, evidence)
    wanted = star.law @ scores
    return {"errors": [probability @ z / math.exp(star.log_evidence) - 1, *(probability @ gradient - wanted)]}


def sample_cells(plan: Plan, **broken: Any) -> list[Cell]:
    return [
        cell("all_samples", s, m=m, **broken) for s in plan.seed_range(quick=4, full=30) for m in (1, 2, 4)
    ]


# ---- mode seeking and covering ---------------------------------------------------------------------------------------


def modes(*, seed: int, exchanged: bool = False) -> dict[str, Any]:
    """Both projections of a two-mode law over two binary tokens, and the mass that they put where.

    The modes are (0,0) with a (1 - e) and (1,1) with (1-a)(1 - e); each other pair has e/2. exchanged: KL's direction.
    """
    rng = np.random.default_rng([seed, 3])
    a, e = float(rng.uniform(0.25, 0.75)), float(np.exp(rng.uniform(np.log(1e-3), np.log(0.05))))
    target = np.array([[a * (1 - e), e / 2], [e / 2, (1 - a) * (1 - e)]])
    reverse, forward = reverse_projection(target), forward_projection(target)
    if exchanged:
        reverse, forward = forward, reverse
    better = max(a, 1 - a) * (1 - e)
    off, cover = float(reverse.law[0, 1] + reverse.law[1, 0]), float(np.diag(forward.law).min())
    outside = float(forward.law[0, 1] + forward.law[1, 0])
    binary = divergence([off, 1 - off], [e, 1 - e])
    return {
        "gap": reverse.gap + forward.gap,
        "seeking": [-math.log(better) - binary, off**2 / (2 * (1 - off)) - float(np.diag(reverse.law).min())],
        "covering": [cover - (min(a, 1 - a) * (1 - e)) ** 2, outside - 2 * a * (1 - a) * (1 - e) ** 2],
        "off": off,
        "outside": outside,
        "minor": float(np.diag(reverse.law).min()),
    }


def mode_cells(plan: Plan, **broken: Any) -> list[Cell]:
    return [cell("modes", s, **broken) for s in plan.seed_range(quick=20, full=200)]


def judge_modes(outcomes: Sequence[Outcome]) -> Judgement:
    return all_of(
        {
            "certificates": judge_inequality([1e-9 - o["gap"] for o in outcomes]),
            "reverse KL seeks a mode": judge_inequality([x for o in outcomes for x in o["seeking"]], 1e-12),
            "forward KL covers both": judge_inequality([x for o in outcomes for x in o["covering"]], 1e-12),
        }
    )


# ---- the limits of beta ----------------------------------------------------------------------------------------------


def limits(*, seed: int, fault: str = "none") -> dict[str, Any]:
    """Collapse without the penalty and as beta -> 0; the prior as beta -> infinity.

    inverted: 1 / beta in place of beta. penalised: the posterior in place of the argmax policy.
    """
    model, _ = world(seed)
    prior, rewards = sequence_law(model, reference_of(model))[0], leaf_returns(model)[0]
    spread, (second, top) = float(np.ptp(rewards)), np.sort(rewards)[-2:]
    best = int(np.argmax(rewards))

    def at(beta: float) -> Posterior:
        return posterior(prior, rewards, 1 / beta if fault == "inverted" else beta)

    cold = [at(b) for b in (0.003, 0.01, 0.03)]
    concentration = [
        math.exp(-(top - second) / b) / prior[best] - (1 - c.law[best])
        for b, c in zip((0.003, 0.01, 0.03), cold, strict=True)
    ]
    hot = [(spread / b) ** 2 / 8 - divergence(at(b).law, prior) for b in (1.0, 3.0, 10.0)]
    greedy = sequence_law(model, value_iteration(model).policy)[0]
    if fault == "penalised":
        greedy = at(0.3).law
    # pi* is at most prior exp((max r - beta log Z) / beta) everywhere, so that its entropy cannot vanish
    warm = at(0.3)
    floor = -math.log(float(prior.max())) - (top / 0.3 - posterior(prior, rewards, 0.3).log_evidence)
    return {
        "concentration": concentration,
        "hot": hot,
        "greedy": [entropy(greedy), float(greedy @ rewards) - top],
        "entropy": entropy(warm.law) - floor,
        "H": entropy(warm.law),
        "floor": floor,
    }


def limit_cells(plan: Plan, **broken: Any) -> list[Cell]:
    return [cell("limits", s, **broken) for s in plan.seed_range(quick=20, full=100)]


def judge_limits(outcomes: Sequence[Outcome]) -> Judgement:
    return all_of(
        {
            "no penalty: entropy 0": judge_identity([x for o in outcomes for x in o["greedy"]]),
            "beta to 0: the best response": judge_inequality(
                [x for o in outcomes for x in o["concentration"]], 1e-12
            ),
            "beta to infinity: the prior": judge_inequality([x for o in outcomes for x in o["hot"]]),
            "entropy of the posterior": judge_inequality([o["entropy"] for o in outcomes], 1e-12),
        }
    )


# ---- best of n -------------------------------------------------------------------------------------------------------


def best_of(*, seed: int, n: int, ties: bool, fault: str = "none") -> dict[str, Any]:
    """Best-of-n by enumeration of all 4^n samples of 4 responses; and on 20,000 equally likely rewards.

    Faults: ties all given to the first response; the value without ties taken for the KL whatever the ties.
    """
    rng = np.random.default_rng([seed, 4])
    prior = 0.9 * rng.dirichlet(np.ones(4)) + 0.025
    rewards = rng.integers(0, 2, size=4).astype(float) if ties else rng.random(4)
    policy = np.zeros(4)
    for sample in itertools.product(range(4), repeat=n):
        drawn = np.array(sample)
        winners = drawn[rewards[drawn] == rewards[drawn].max()]
        if fault == "first_of_ties":
            winners = winners.min(keepdims=True)
        np.add.at(policy, winners, prior[drawn].prod() / len(winners))
    levels, index = np.unique(rewards, return_inverse=True)
    by_return = best_of_n_kl(ReturnLaw(levels, np.bincount(index, weights=prior)), n)
    kl = best_of_n_limit(n) if fault == "no_ties" else divergence(policy, prior)
    many = 20000
    fine = best_of_n_kl(ReturnLaw(np.arange(many, dtype=float), np.full(many, 1 / many)), n)
    return {
        "errors": [*(policy - best_of_n_policy(prior, rewards, n)), kl - by_return],
        "slack": [best_of_n_limit(n) - kl, best_of_n_limit(n) - fine],
        "fine": fine - best_of_n_limit(n),
    }


def best_of_cells(plan: Plan, **broken: Any) -> list[Cell]:
    return [
        cell("best_of", s, n=n, ties=ties, **broken)
        for s in plan.seed_range(quick=3, full=20)
        for n in (2, 4)
        for ties in (False, True)
    ]


def judge_best_of(outcomes: Sequence[Outcome]) -> Judgement:
    return all_of(
        {
            "the law, by enumeration": judge_identity([e for o in outcomes for e in o["errors"]]),
            "at most log n - (n-1)/n": judge_inequality([s for o in outcomes for s in o["slack"]], 1e-12),
            "attained by ever finer rewards": judge_identity([o["fine"] for o in outcomes], 1e-6),
        }
    )


# ---- the adaptive beta -----------------------------------------------------------------------------------------------


def adaptive(*, seed: int, fault: str = "none") -> dict[str, Any]:
    """Ziegler's rule with the posterior in every round: KL to the prior after 600 rounds, against its target.

    reversed: (target - kl) / target. by_length: the KL a token (divided by the mean length), with the same target.
    """
    model, rng = world(seed)
    prior, rewards = sequence_law(model, reference_of(model))[0], leaf_returns(model)[0]
    target, beta = float(rng.uniform(0.05, 0.5)), float(rng.uniform(0.05, 1))
    for _ in range(600):
        law = posterior(prior, rewards, beta).law
        kl = divergence(law, prior)
        if fault == "by_length":
            kl /= float(law @ lengths(model))
        if fault == "reversed":
            kl = max(2 * target - kl, 0.0)
        beta = min(max(adapted_beta(beta, kl, target), 1e-3), 1e3)
    soft = soft_value_iteration(model, reference_of(model), beta)
    return {"errors": [trajectory_kl(model, soft.policy, reference_of(model)) - target], "beta": beta}


def adaptive_cells(plan: Plan, **broken: Any) -> list[Cell]:
    return [cell("adaptive", s, **broken) for s in plan.seed_range(quick=4, full=12)]


# ---- the claims ------------------------------------------------------------------------------------------------------


CLAIMS = (
    Claim(
        name="kl_bayes.evidence_bound",
        kind="identity",
        title="The KL-regularised objective is an evidence bound, and the posterior closes it",
        statement=r"$E_\pi r - \beta\, \mathrm{KL}(\pi, \pi_0) = \beta \log Z - \beta\, \mathrm{KL}(\pi, \pi^*)$ with "
        r"$\pi^* = \pi_0 \exp(r/\beta) / Z$, for every policy over tokens; the optimum over tokens is $\beta \log Z$.",
        source=f"{PAPER}, section 3",
        cells=bounds,
        judge=judge_errors,
        controls=controls(
            bounds, reversed_kl="KL from the posterior to the policy", beta_by_length="beta times the length"
        ),
    ),
    Claim(
        name="kl_bayes.composition",
        kind="identity",
        title="Conditioning by two rewards, one after the other, is conditioning by their sum",
        statement=r"The posterior of $r_2$ with prior $\pi_0 e^{r_1/\beta}/Z_1$ is $\pi_0 e^{(r_1+r_2)/\beta}/Z$, "
        r"$\log Z = \log Z_1 + \log Z_{2|1}$; over responses and over tokens.",
        source=f"{PAPER}, section 4 (Bayes' rule twice)",
        cells=compositions,
        judge=judge_errors,
        controls=controls(
            compositions,
            same_prior="the second prior is the first",
            hotter="the second at twice the temperature",
        ),
    ),
    Claim(
        name="kl_bayes.gradients",
        kind="identity",
        title="KL-RL follows the reverse, DPG the forward divergence from the same posterior",
        statement=r"$E_\pi[(r - \beta\log\frac{\pi}{\pi_0} - b)\nabla\log\pi] = -\beta\nabla\mathrm{KL}(\pi, \pi^*)$ "
        r"for every $b$, and $E_q[\frac{\pi^* - b\pi}{q}\nabla\log\pi] = -\nabla\mathrm{KL}(\pi^*, \pi)$ for every $q$ "
        r"and $b$.",
        assumptions=("q has mass wherever the posterior has",),
        source=f"{PAPER}, sections 3 and 5",
        cells=gradient_cells,
        judge=judge_gradients,
        controls=controls(
            gradient_cells,
            penalty_twice="the log-ratio's gradient added to a reward that holds it already",
            clipped="the reward clipped after the penalty was subtracted",
            beta_by_length="beta times the length",
            exchanged="the two divergences exchanged",
            unweighted="DPG without importance weights",
        ),
    ),
    Claim(
        name="kl_bayes.estimates",
        kind="identity",
        title="Importance sampling estimates the evidence and DPG's gradient without bias",
        statement=r"Over all samples of size $m$: $E[\frac1m\sum_i \pi_0(x_i)e^{r(x_i)/\beta}/q(x_i)] = Z$, and with "
        r"$Z$ known $E[\frac1m\sum_i \frac{P(x_i)}{Z q(x_i)}\nabla\log\pi(x_i)] = E_{\pi^*}\nabla\log\pi$.",
        assumptions=("q has mass wherever the prior has",),
        source=f"{PAPER}, section 5; importance sampling",
        cells=sample_cells,
        judge=judge_errors,
        controls=controls(
            sample_cells,
            collapsed="a proposal that never draws one of the responses",
            weights_of_prior="weights of the prior for samples of q",
            self_normalised="the self-normalised gradient, taken for unbiased",
        ),
    ),
    Claim(
        name="kl_bayes.modes",
        kind="inequality",
        title="In a restricted family reverse KL seeks a mode and forward KL covers both",
        statement=r"For product laws and a target with modes of mass $a(1-e)$, $(1-a)(1-e)$: the best in reverse KL "
        r"has off-mode mass $c$ with $\mathrm{kl}(c, e) \leq -\log(\max(a,1-a)(1-e))$ and at most $c^2/(2(1-c))$ on "
        r"one of the modes; the best in forward KL has at least $\min(a,1-a)^2(1-e)^2$ on each mode, and at least "
        r"$2a(1-a)(1-e)^2$ off them.",
        assumptions=("both optima are global up to 1e-9 (branch and bound; a closed form)",),
        source=f"{PAPER}, section 5 (the bounds: from the optimality of each)",
        cells=mode_cells,
        judge=judge_modes,
        controls=(
            Control(
                "exchanged", "the two divergences exchanged", lambda plan: mode_cells(plan, exchanged=True)
            ),
        ),
    ),
    Claim(
        name="kl_bayes.limits",
        kind="inequality",
        title="Without the penalty the policy collapses; the posterior lies between that and the prior",
        statement=r"The argmax policy has entropy 0. $1 - \pi^*(\arg\max r) \leq e^{-\Delta/\beta} / "
        r"\pi_0(\arg\max r)$ ($\Delta$ the gap to the second reward), "
        r"$\mathrm{KL}(\pi^*, \pi_0) \leq (\max r - \min r)^2 / (8\beta^2)$, "
        r"and $H(\pi^*) \geq -\log\max\pi_0 - \max r/\beta + \log Z$.",
        source=f"{PAPER}, section 2 (distribution collapse); the bounds: Hoeffding's lemma and elementary",
        cells=limit_cells,
        judge=judge_limits,
        controls=controls(
            limit_cells,
            inverted="1 / beta in place of beta",
            penalised="the posterior in place of the argmax policy",
        ),
    ),
    Claim(
        name="kl_bayes.best_of_n",
        kind="identity",
        title="Best-of-n has KL at most log n - (n-1)/n, and that only without ties",
        statement=r"The law of the best of $n$ samples, ties broken at random, by enumeration of all samples; its KL "
        r"to the prior is at most $\log n - (n-1)/n$, which equally likely rewards, ever finer, attain.",
        source=f"{PAPER}, section 5 (decoding); the closed form is folklore",
        cells=best_of_cells,
        judge=judge_best_of,
        controls=controls(
            best_of_cells,
            first_of_ties="ties go to the response of the lowest number",
            no_ties="log n - (n-1)/n taken for the KL whatever the ties",
        ),
    ),
    Claim(
        name="kl_bayes.adaptive_beta",
        kind="identity",
        title="Ziegler's rule finds the beta whose posterior has the wanted KL",
        statement=r"$\beta \leftarrow \beta(1 + K\,\mathrm{clip}((\mathrm{KL}(\pi^*_\beta, \pi_0) - t)/t, \pm 0.2))$, "
        r"$K = 0.1$, converges to a $\beta$ with $\mathrm{KL}(\pi^*_\beta, \pi_0) = t$.",
        assumptions=("the policy is the posterior in every round", r"$t$ in 0.05 to 0.5"),
        source="Ziegler et al., arXiv 1909.08593, section 2.2",
        cells=adaptive_cells,
        judge=judge_errors,
        controls=controls(
            adaptive_cells,
            reversed="the sign of the error",
            by_length="the KL divided by the number of tokens",
        ),
    ),
)
