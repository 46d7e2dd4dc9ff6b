"""Claims about correlated proxies (`algorithms/correlated_proxies_orpo.py`) on random discounted MDPs.

4 states, 3 actions; the true reward is either random or the worst for the policy at hand: of all rewards with the given
correlation and scale the one whose error is aligned with the policy's departure from the reference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from typing import Any

import numpy as np
from scipy.special import expit

from ...algorithms.correlated_proxies_orpo import (
    Proxy,
    best_policy,
    chi_square,
    discriminator,
    discriminator_loss,
    flow_residual,
    gain_bound,
    lower_bound_policy,
    occupancy,
    penalised_reward,
    sharp_bound,
)
from ...algorithms.kl_bayes import divergence
from ...algorithms.planning.divergence import trajectory_kl
from ...algorithms.planning.sequences import sequence_law
from ...algorithms.planning.soft import soft_value_iteration
from ...envs.kernels import Array
from ...envs.token_mdp import random_token_mdp
from ..cells import Cell
from ..claim import Claim, Judgement, Outcome, Plan
from ..statistics import all_of, judge_identity, judge_inequality
from ._declare import cells_of, controls

PAPER = "Laidlaw, Singhal and Dragan, ICLR 2025 (arXiv 2403.03185)"
GAMMA = 0.9
REWARDS = ("random", "worst", "tangent")


cell = cells_of(__name__)


def world(seed: int) -> tuple[Array, Array, Array, Array, np.random.Generator]:
    """P (4, 3, 4), initial (4,), a reference policy with all actions, a proxy; and the seed's generator."""
    rng = np.random.default_rng([seed, 1])
    P, initial = rng.dirichlet(np.full(4, 0.5), size=(4, 3)), rng.dirichlet(np.ones(4))
    reference = 0.8 * rng.dirichlet(np.ones(3), size=4) + 0.2 / 3
    return P, initial, reference, rng.normal(size=(4, 3)), rng


def truth(base: Array, proxy: Array, r: float, scale: float, error: Array) -> Array:
    """The reward of correlation r with the proxy and standard deviation `scale` under base, its error along `error`."""

    def standard(x: Array) -> Array:
        x = x - (base * x).sum()
        return x / math.sqrt(float((base * x * x).sum()))

    b = standard(proxy)
    e = error - (base * error).sum()
    e = standard(e - (base * e * b).sum() * b)
    return np.asarray(scale * (r * b + math.sqrt(1 - r * r) * e))


# ---- the bound -------------------------------------------------------------------------------------------------------


def bounds(*, seed: int, reward: str, fault: str = "none") -> dict[str, Any]:
    """The gain in true reward of four policies minus both bounds, and where the sharp one is attained.

    reward: "random"; "worst" for each policy; or "tangent", the worst with the r at which the paper's bound is 0.
    Faults: chi2 of the reference to the policy; r and sqrt(1 - r^2) exchanged; the correlation under the policy; chi2
    between action laws, averaged over the policy's states, in place of occupancies.
    """
    P, initial, reference, proxy, rng = world(seed)
    base, r, scale = (
        occupancy(P, initial, GAMMA, reference),
        float(rng.uniform(0.1, 0.99)),
        float(rng.uniform(0.5, 2)),
    )
    policies = [*rng.dirichlet(np.ones(3), size=(3, 4)), best_policy(P, initial, GAMMA, proxy)]
    paper, sharp, attained = [], [], []
    for policy in policies:
        mu = occupancy(P, initial, GAMMA, policy)
        chi2, proxy_gain = chi_square(mu, base), float(((mu - base) * proxy).sum())
        if reward == "tangent":
            variance = float((base * (proxy - (base * proxy).sum()) ** 2).sum())
            proxy, proxy_gain = proxy * np.sign(proxy_gain), abs(proxy_gain)
            r = min(max(math.sqrt(1 - proxy_gain**2 / (variance * chi2)), 0.01), 0.999)
        true = truth(
            base, proxy, r, scale, rng.normal(size=(4, 3)) if reward == "random" else -(mu / base - 1)
        )
        found = Proxy.under(base, true, proxy)
        if fault == "reversed_chi2":
            chi2 = min(chi_square(base, mu), 1e9)
        elif fault == "exchanged":
            found = Proxy(math.sqrt(1 - found.r**2), found.sigma_true, found.sigma_proxy)
        elif fault == "policy_correlation":
            elsewhere = Proxy.under(mu, true, proxy)
            found = Proxy(max(elsewhere.r, 0.05), found.sigma_true, found.sigma_proxy)
        elif fault == "action_laws":
            by_state = ((policy - reference) ** 2 / reference).sum(axis=1)
            chi2 = float(mu.sum(axis=1) @ by_state)
        gain = float(((mu - base) * true).sum())
        below, least = gain_bound(found, proxy_gain, chi2), sharp_bound(found, proxy_gain, chi2)
        B, r_ = proxy_gain / found.sigma_proxy, found.r
        turn = math.acos(min(max(B / math.sqrt(chi2), -1), 1)) + math.acos(r_)
        apart = found.sigma_true * math.sqrt((1 - r_**2) * chi2) / r_ * (1 - math.sin(turn))
        paper.append(gain - below)
        sharp.append(gain - least)
        attained += [gain - least, least - below - apart] if reward != "random" else [least - below - apart]
    return {"paper": paper, "sharp": sharp, "attained": attained}


def bound_cells(plan: Plan, **broken: Any) -> list[Cell]:
    seeds = plan.seed_range(quick=20, full=300)
    return [cell("bounds", s, reward=reward, **broken) for s in seeds for reward in REWARDS]


def judge_paper(outcomes: Sequence[Outcome]) -> Judgement:
    return judge_inequality([x for o in outcomes for x in o["paper"]], 1e-10)


def judge_sharp(outcomes: Sequence[Outcome]) -> Judgement:
    return all_of(
        {
            "a lower bound": judge_inequality([x for o in outcomes for x in o["sharp"]], 1e-10),
            "attained; the paper's is its tangent": judge_identity(
                [x for o in outcomes for x in o["attained"]], 1e-7
            ),
        }
    )


# ---- discriminators --------------------------------------------------------------------------------------------------


def discriminators(*, seed: int, fault: str = "none") -> dict[str, Any]:
    """d* by Newton's method on the population loss, against its closed form; and what its moments are.

    Also the penalised rewards against derivatives in mu_pi, by complex steps. exchanged: the two laws exchanged in the
    loss. reversed_chi2: chi2 of the reference to the policy.
    """
    P, initial, reference, proxy, rng = world(seed)
    base = occupancy(P, initial, GAMMA, reference)
    mu = occupancy(P, initial, GAMMA, 0.9 * rng.dirichlet(np.ones(3), size=4) + 0.1 / 3)
    first, second = (base, mu) if fault == "exchanged" else (mu, base)
    d = np.zeros(mu.shape)
    for _ in range(60):
        p = expit(d)
        d = d - np.clip((second * p - first * (1 - p)) / ((first + second) * p * (1 - p)), -1, 1)
    star = discriminator(mu, base)
    chi2 = chi_square(base, mu) if fault == "reversed_chi2" else chi_square(mu, base)
    errors = [*(d - star).ravel(), (mu * np.expm1(d)).sum() - chi2]
    errors.append((mu * d).sum() - divergence(mu.ravel(), base.ravel()))

    def slope(f: Any) -> Array:
        steps = np.eye(mu.size).reshape(-1, *mu.shape)
        return np.array([f(mu + 1e-30j * e).imag / 1e-30 for e in steps]).reshape(mu.shape)

    by_chi2 = slope(lambda x: ((x - base) ** 2 / base).sum())
    by_root = slope(lambda x: np.sqrt(((x - base) ** 2 / base).sum()))
    by_kl = slope(lambda x: (x * np.log(x / base)).sum())
    errors += [*(proxy - penalised_reward(proxy, d, 1.0, "chi2") - by_chi2 / 2).ravel()]
    errors += [*(proxy - penalised_reward(proxy, d, 1.0, "sqrt_chi2", chi2) - by_root).ravel()]
    errors += [*(proxy - penalised_reward(proxy, d, 1.0, "kl") - (by_kl - 1)).ravel()]
    least = discriminator_loss(star, mu, base)
    worse = [discriminator_loss(star + 0.1 * rng.normal(size=mu.shape), mu, base) - least for _ in range(5)]
    return {"errors": errors, "worse": worse}


def discriminator_cells(plan: Plan, **broken: Any) -> list[Cell]:
    return [cell("discriminators", s, **broken) for s in plan.seed_range(quick=10, full=60)]


def judge_discriminators(outcomes: Sequence[Outcome]) -> Judgement:
    return all_of(
        {
            "closed forms": judge_identity([e for o in outcomes for e in o["errors"]]),
            "no other is better": judge_inequality([x for o in outcomes for x in o["worse"]]),
        }
    )


# ---- sequences -------------------------------------------------------------------------------------------------------


def sequences(*, seed: int, fault: str = "none") -> dict[str, Any]:
    """One response as one action: chi2 + 1 of independent tokens multiplies; KL adds, for dependent tokens too.

    Faults: the sum of the tokens' chi2; the product over marginals of tokens that are not independent.
    """
    rng = np.random.default_rng([seed, 2])
    tokens = [0.9 * rng.dirichlet(np.ones(3), size=2) + 0.1 / 3 for _ in range(3)]
    p, q = (reduce(np.multiply.outer, [pair[i] for pair in tokens]).ravel() for i in (0, 1))
    if fault == "dependent":
        p = 0.5 * p + 0.5 * rng.dirichlet(np.ones(27))
        marginals = [p.reshape(3, 3, 3).sum(axis=tuple({0, 1, 2} - {t})) for t in range(3)]
        tokens = [np.stack([m, pair[1]]) for m, pair in zip(marginals, tokens, strict=True)]
    each = np.array([chi_square(*pair) for pair in tokens])
    total = each.sum() if fault == "sum" else np.prod(1 + each) - 1
    rho = rng.dirichlet(np.ones(2))  # two prompts: occupancy = rho x pi
    pi, ref = np.stack([p, q]), np.stack([q, q])
    bandit = chi_square(rho[:, None] * pi, rho[:, None] * ref) - rho[0] * chi_square(p, q)
    model = random_token_mdp(3, 3, seed=seed)
    assert model.reference is not None
    policy = soft_value_iteration(model, model.reference, 0.3).policy
    laws = [sequence_law(model, x)[0] for x in (policy, model.reference)]
    chain = divergence(*laws) - trajectory_kl(model, policy, model.reference)
    return {"errors": [chi_square(p, q) - total, bandit, chain]}


def sequence_cells(plan: Plan, **broken: Any) -> list[Cell]:
    return [cell("sequences", s, **broken) for s in plan.seed_range(quick=10, full=60)]


def judge_errors(outcomes: Sequence[Outcome]) -> Judgement:
    return judge_identity([e for o in outcomes for e in o["errors"]])


# ---- occupancy measures ----------------------------------------------------------------------------------------------


def occupancies(*, seed: int, fault: str = "none") -> dict[str, Any]:
    """Flow equations, total mass, the series, and J by Bellman's equation. unnormalised: without 1 - gamma."""
    P, initial, reference, reward, _ = world(seed)
    mu = occupancy(P, initial, GAMMA, reference) / (1 - GAMMA if fault == "unnormalised" else 1)
    step, law, series = np.einsum("sa,sat->st", reference, P), initial, np.zeros((4, 3))
    for t in range(400):
        series += (1 - GAMMA) * GAMMA**t * law[:, None] * reference
        law = law @ step
    value = np.linalg.solve(np.eye(4) - GAMMA * step, (reference * reward).sum(axis=1))
    return {
        "errors": [
            flow_residual(P, initial, GAMMA, mu),
            mu.sum() - 1,
            *(mu - series).ravel(),
            (mu * reward).sum() - (1 - GAMMA) * float(initial @ value),
        ]
    }


def occupancy_cells(plan: Plan, **broken: Any) -> list[Cell]:
    return [cell("occupancies", s, **broken) for s in plan.seed_range(quick=10, full=60)]


# ---- the maximiser of the lower bound --------------------------------------------------------------------------------


def safe(*, seed: int, fault: str = "none") -> dict[str, Any]:
    """The policy of the largest lower bound, and its gain under the true reward that is worst for it.

    Faults: no penalty (the proxy's optimum); the penalty of the chi2 between action laws, with the same lambda.
    """
    P, initial, reference, proxy, rng = world(seed)
    base, r = occupancy(P, initial, GAMMA, reference), float(rng.uniform(0.6, 0.98))
    given = Proxy.under(base, truth(base, proxy, r, 1.0, rng.normal(size=(4, 3))), proxy)
    penalty = given.sigma_proxy * math.sqrt(1 - given.r**2)
    found = lower_bound_policy(P, initial, GAMMA, proxy, reference, 0.0 if fault == "no_penalty" else penalty)
    if fault == "action_laws":  # each state's action by itself, as if states stayed those of the reference
        tilt = reference * np.exp(np.clip(proxy / penalty, -3, 3))
        mu = occupancy(P, initial, GAMMA, tilt / tilt.sum(axis=1, keepdims=True))
    else:
        mu = found.mu
    left = float(np.abs(mu - base).max()) > 1e-9
    true = truth(base, proxy, r, 1.0, -(mu / base - 1) if left else rng.normal(size=(4, 3)))
    gain = float(((mu - base) * true).sum())
    promised = found.value - float((base * proxy).sum())
    return {"gap": found.gap, "gain": gain, "promised": promised, "left": left}


def safe_cells(plan: Plan, **broken: Any) -> list[Cell]:
    return [cell("safe", s, **broken) for s in plan.seed_range(quick=20, full=150)]


def judge_safe(outcomes: Sequence[Outcome]) -> Judgement:
    left = sum(bool(o["left"]) for o in outcomes)
    return all_of(
        {
            "certificates": judge_inequality([1e-7 - o["gap"] for o in outcomes]),
            "the bound is at least 0": judge_inequality([o["promised"] for o in outcomes], 1e-9),
            "so is the true gain": judge_inequality([o["gain"] for o in outcomes], 1e-9),
            "a third leaves the reference": judge_inequality([left - len(outcomes) / 3]),
        }
    )


# ---- the claims ------------------------------------------------------------------------------------------------------


CLAIMS = (
    Claim(
        name="correlated_proxies_orpo.bound",
        kind="inequality",
        title="A correlated proxy bounds the true return by itself and the chi-square of the occupancies",
        statement=r"$\frac{J(\pi,R) - J(\mathrm{ref},R)}{\sigma_R} \geq \frac1r\Big[\frac{J(\pi,\tilde R) - "
        r"J(\mathrm{ref},\tilde R)}{\sigma_{\tilde R}} - \sqrt{(1-r^2)\,\chi^2(\mu_\pi \| \mu_{\mathrm{ref}})}\Big]$, "
        r"for random rewards and for the worst ones.",
        assumptions=(r"$r > 0$ under $\mu_{\mathrm{ref}}$", r"$\mu_{\mathrm{ref}}$ positive"),
        source=f"{PAPER}, the theorem on correlated proxies",
        cells=bound_cells,
        judge=judge_paper,
        controls=controls(
            bound_cells,
            reversed_chi2="chi-square of the reference to the policy",
            exchanged="r and sqrt(1 - r^2) exchanged",
            policy_correlation="the correlation under the policy",
            action_laws="chi-square of action laws in place of occupancies",
        ),
    ),
    Claim(
        name="correlated_proxies_orpo.sharp",
        kind="identity",
        title="A sharper bound is attained by aligned errors; the paper's is tangent to it where both vanish",
        statement=r"With $B$ the standardised proxy gain and $X = \chi^2$: the gain is at least "
        r"$rB - \sqrt{(1-r^2)(X - B^2)} = \sqrt X\cos(\theta + \varphi)$, $\cos\theta = B/\sqrt X$, "
        r"$\cos\varphi = r$, with equality for an error aligned with $\mu_\pi/\mu_{\mathrm{ref}} - 1$; the paper's "
        r"bound is lower by $\frac{\sqrt{(1-r^2)X}}{r}(1 - \sin(\theta + \varphi))$.",
        assumptions=(
            r"$r > 0$ under $\mu_{\mathrm{ref}}$",
            r"$\mu_{\mathrm{ref}}$ positive",
            "tolerance 1e-7",
        ),
        source=f"a refinement of {PAPER}, derived here",
        cells=bound_cells,
        judge=judge_sharp,
        controls=controls(
            bound_cells,
            reversed_chi2="chi-square of the reference to the policy",
            exchanged="r and sqrt(1 - r^2) exchanged",
        ),
    ),
    Claim(
        name="correlated_proxies_orpo.discriminator",
        kind="identity",
        title="The population discriminator is the log-ratio of occupancies, and its moments the divergences",
        statement=r"$d^* = \log\mu_\pi/\mu_{\mathrm{ref}}$, $E_{\mu_\pi}[e^{d^*} - 1] = \chi^2$, "
        r"$E_{\mu_\pi} d^* = \mathrm{KL}$; the penalties are derivatives of KL, $\chi^2/2$ and $\sqrt{\chi^2}$ in "
        r"$\mu_\pi$.",
        source=f"{PAPER}, section on occupancy-regularised policy optimisation, and its code",
        cells=discriminator_cells,
        judge=judge_discriminators,
        controls=controls(
            discriminator_cells,
            exchanged="the two laws exchanged in the loss",
            reversed_chi2="chi-square of the reference to the policy",
        ),
    ),
    Claim(
        name="correlated_proxies_orpo.sequences",
        kind="identity",
        title="Over responses chi-square plus one multiplies along independent tokens, and KL adds along all",
        statement=r"$1 + \chi^2(\otimes p_t \| \otimes q_t) = \prod_t (1 + \chi^2(p_t \| q_t))$; one response as one "
        r"action: $\chi^2(\rho\pi \| \rho\,\mathrm{ref}) = E_\rho\chi^2(\pi \| \mathrm{ref})$; "
        r"$\mathrm{KL}(\pi \| \mathrm{ref}) = E\sum_t \mathrm{KL}_t$.",
        assumptions=("the product: independent tokens",),
        source=f"{PAPER}, language models as contextual bandits",
        cells=sequence_cells,
        judge=judge_errors,
        controls=controls(
            sequence_cells,
            sum="the sum of the tokens' chi-squares",
            dependent="tokens that depend on each other",
        ),
    ),
    Claim(
        name="correlated_proxies_orpo.occupancy",
        kind="identity",
        title="Occupancy measures are laws that satisfy the flow equations",
        statement=r"$\mu_\pi = (1-\gamma)\sum_t \gamma^t \Pr(s_t, a_t)$ sums to 1, satisfies the flow equations, and "
        r"$\langle\mu_\pi, R\rangle = (1-\gamma) V^\pi$.",
        source=f"{PAPER}, preliminaries",
        cells=occupancy_cells,
        judge=judge_errors,
        controls=controls(occupancy_cells, unnormalised="without the factor 1 - gamma"),
    ),
    Claim(
        name="correlated_proxies_orpo.safe",
        kind="inequality",
        title="The policy of the largest lower bound does not hack: even the worst true reward gains",
        statement=r"$\pi = \arg\max J(\pi,\tilde R) - \sigma_{\tilde R}\sqrt{(1-r^2)\chi^2}$ has "
        r"$J(\pi,R) \geq J(\mathrm{ref},R)$ for the true reward that is worst for it; in a third of the instances or "
        r"more it is not the reference.",
        assumptions=(r"$r \in [0.6, 0.98]$", "optimal up to 1e-7 (certified by policy iteration)"),
        source=f"{PAPER}, the corollary to the theorem",
        cells=safe_cells,
        judge=judge_safe,
        controls=controls(
            safe_cells,
            no_penalty="the proxy's optimum",
            action_laws="a KL penalty on each state's action law, with the same temperature",
        ),
    ),
)
