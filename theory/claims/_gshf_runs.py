"""What the claims about GSHF measure: linear bandits, planted faults, cells. See `gshf`."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.special import expit

from ...algorithms.estimation import fit_preferences
from ...algorithms.gshf import (
    GSHF,
    covariance,
    enhancer,
    main_policy,
    pessimistic_policy,
    pessimistic_value,
)
from ...algorithms.incentives import policy_of
from ...algorithms.planning.games import kl, logarithm
from ...envs.kernels import Array
from ._declare import cells_of
from ._optimism_runs import BETA, hidden

BALL, RIDGE = 3.0, 1.0


cell = cells_of(__name__)


def linear(seed: int) -> tuple[Array, Array, Array, float, np.random.Generator]:
    """theta* (d,), features (n, d), log ref (n,), beta: 3 to 6 responses, 2 to 4 features."""
    rng = np.random.default_rng([seed, 1])
    n, d = int(rng.integers(3, 7)), int(rng.integers(2, 5))
    features, theta = rng.normal(size=(n, d)) / np.sqrt(d), rng.normal(size=d)
    log_ref = np.log(0.9 * rng.dirichlet(np.ones(n)) + 0.1 / n)
    return (
        theta * min(1.0, 2 / float(np.linalg.norm(theta))),
        features,
        log_ref,
        float(rng.uniform(0.1, 1)),
        rng,
    )


def compared(theta: Array, features: Array, m: int, rng: np.random.Generator) -> tuple[Array, Array]:
    """The MLE of m comparisons of random responses, and their covariance."""
    n = len(features)
    y = rng.integers(n, size=(m, 2))
    D = features[y[:, 0]] - features[y[:, 1]]
    won = rng.random(m) < expit(D @ theta)
    counts = np.zeros((n, n))
    np.add.at(counts, (y[:, 0], y[:, 1]), 1.0)
    return fit_preferences(D, won, radius=BALL).theta, covariance(features, counts, RIDGE)


def norm(x: Array, sigma: Array) -> float:
    """||x||_{Sigma^-1}."""
    return float(np.sqrt(x @ np.linalg.solve(sigma, x)))


# ---- the enhancer ----------------------------------------------------------------------------------------------------


def furthest(*, seed: int, fault: str = "none") -> dict[str, Any]:
    """The enhancer against 20,000 laws, most of them near faces and vertices of the simplex, all those in Pi_t.

    slack: of its constraint; beats: its norm over the largest found, less 1. fault  main: the main policy itself;
    uncapped: the furthest response, whatever its divergence; identity: norms with Sigma = I
    """
    theta, features, log_ref, beta, rng = linear(seed)
    estimate, sigma = compared(theta, features, int(rng.integers(2, 40)), rng)
    radius = float(rng.uniform(0.1, 1.5))
    main, log_main = main_policy(estimate, features, log_ref, beta)
    found = enhancer(log_main, features, np.eye(len(theta)) if fault == "identity" else sigma, beta, radius)
    law, log_law = found.policy, found.log_policy
    if fault == "main":
        law, log_law = main, log_main
    if fault == "uncapped":
        law = np.eye(len(main))[np.argmax([norm(phi - main @ features, sigma) for phi in features])]
        log_law = logarithm(law)
    mine = norm((law - main) @ features, sigma)
    n = len(main)
    cloud = np.concatenate([rng.dirichlet(np.full(n, a), size=5000) for a in (0.05, 0.3, 1.0)] + [np.eye(n)])
    cloud = np.concatenate([cloud, main + rng.random((5000, 1)) * (cloud[:5000] - main)])
    moved = (cloud - main) @ features
    norms = np.sqrt(np.maximum(np.einsum("kd,kd->k", moved, np.linalg.solve(sigma, moved.T).T), 0.0))
    with np.errstate(divide="ignore", invalid="ignore"):
        divergence = np.where(cloud > 0, cloud * (np.log(cloud) - log_main), 0.0).sum(1)
    allowed = beta * divergence <= radius * norms
    best = float(norms[allowed].max(initial=0.0))
    return {"slack": radius * mine - beta * kl(log_law, log_main), "beats": mine - best, "best": best}


def optimum_inside(*, seed: int, fault: str = "none") -> dict[str, Any]:
    """radius ||E_{pi*} phi - E_{pi^1} phi|| - beta KL(pi*, pi^1) at the radius ||theta_hat - theta*||_Sigma, which
    covers.

    fault  uncovered: a twentieth of it; foreign: pi* of the opposite reward
    """
    theta, features, log_ref, beta, rng = linear(seed)
    estimate, sigma = compared(theta, features, int(rng.integers(2, 200)), rng)
    error = theta - estimate
    radius = float(np.sqrt(error @ sigma @ error)) * (0.05 if fault == "uncovered" else 1.0)
    main, log_main = main_policy(estimate, features, log_ref, beta)
    best, log_best = main_policy(-theta if fault == "foreign" else theta, features, log_ref, beta)
    return {"slack": radius * norm((best - main) @ features, sigma) - beta * kl(log_best, log_main)}


# ---- pessimism -------------------------------------------------------------------------------------------------------


def pessimism(*, seed: int, form: str, fault: str = "none") -> dict[str, Any]:
    """At the radius ||theta_hat - theta*||_Sigma, for the offline policy, pi* and random laws pi:

    lower  J(pi) - E_ref-free constant >= the pessimistic value of pi;
    loss   2 radius ||E_pi phi - nu|| - beta KL(pi, pi_hat) (option II; E_pi ||phi - nu||: option I) less J(pi) -
    J(pi_hat) fault  greedy: radius 0; optimistic: the penalty added; small: a tenth of the radius
    """
    theta, features, log_ref, beta, rng = linear(seed)
    estimate, sigma = compared(theta, features, int(rng.integers(2, 60)), rng)
    error = theta - estimate
    radius = float(np.sqrt(error @ sigma @ error))
    used = radius * {"greedy": 0.0, "small": 0.1}.get(fault, 1.0)
    nu = np.exp(log_ref) @ features
    which: Any = form

    def pessimistic(log_pi: Array) -> float:
        value = pessimistic_value(log_pi, estimate, features, nu, sigma, used, log_ref, beta, which)
        if fault != "optimistic":
            return value
        return 2 * pessimistic_value(log_pi, estimate, features, nu, sigma, 0.0, log_ref, beta, which) - value

    def true(log_pi: Array) -> float:
        return float(np.exp(log_pi) @ (features - nu) @ theta) - beta * kl(log_pi, log_ref)

    if fault == "optimistic":
        bonus = used * np.array([norm(phi - nu, sigma) for phi in features])
        hat = policy_of((features - nu) @ estimate + bonus, log_ref, beta)[1]
        gap = 0.0
    else:
        found = pessimistic_policy(estimate, features, nu, sigma, used, log_ref, beta, which)
        hat, gap = found.log_policy, found.gap
    laws = np.log(0.98 * rng.dirichlet(np.ones(len(hat)), size=20) + 0.02 / len(hat))
    lower, loss = [], []
    for log_pi in (main_policy(theta, features, log_ref, beta)[1], hat, *laws):
        pi = np.exp(log_pi)
        lower.append(true(log_pi) - pessimistic(log_pi))
        width = norm(pi @ features - nu, sigma)
        if form == "pointwise":
            width = float(pi @ [norm(phi - nu, sigma) for phi in features])
        loss.append(2 * used * width - beta * kl(log_pi, hat) - (true(log_pi) - true(hat)))
    return {"lower": min(lower), "loss": min(loss), "gap": gap}


# ---- rounds online ---------------------------------------------------------------------------------------------------


def online(
    *, seed: int, iterations: int, radius: float, batch: int = 8, world: str = "best", given: str = "none"
) -> dict[str, Any]:
    """Cumulative regret of the main policy, a unit a comparison, after each iteration, on the bandits of `hidden`.

    radius  0 is iterative DPO (both responses from the main policy). given  none; covering: 64 comparisons of the rare
    response with the others, half each; common: 64 of the other two
    """
    rewards, log_ref = hidden(seed, world)
    theta = rewards - rewards.mean()
    wins = np.zeros((3, 3))
    if given != "none":
        rng = np.random.default_rng([seed, 7])
        for i, j in ((0, 1), (0, 2)) if given == "covering" else ((1, 2), (1, 2)):
            won = rng.binomial(32, expit(theta[i] - theta[j]))
            wins[i, j] += won
            wins[j, i] += 32 - won
    run = GSHF(
        theta,
        np.eye(3),
        log_ref,
        BETA,
        radius=radius,
        batch=batch,
        ball=2.0,
        ridge=RIDGE,
        seed=seed,
        given=wins,
    ).advance(iterations)
    return {"regret": np.cumsum(run.regret) * batch}
