r"""Correlated proxies: what a proxy reward is worth away from the reference policy, in occupancy measures.

C. Laidlaw, S. Singhal, A. Dragan, "Correlated Proxies: A New Definition and Improved Mitigation for Reward Hacking",
ICLR 2025 (arXiv 2403.03185; their ORPO is occupancy-regularised policy optimisation, not the odds-ratio loss).

  mu_pi(s,a)   = (1 - gamma) sum_t gamma^t Pr(s_t = s, a_t = a), a law           `occupancy`
  J(pi, R)     = <mu_pi, R>                                                      normalised return
  r            = correlation of the proxy P and the true reward R under mu_ref   `Proxy`, r > 0
  chi2         = sum mu_ref (mu_pi / mu_ref - 1)^2                               `chi_square`
  B, X         = (J(pi, P) - J(ref, P)) / sigma_P,  chi2(mu_pi || mu_ref)

  (J(pi, R) - J(ref, R)) / sigma_R  >=  (B - sqrt((1 - r^2) X)) / r              the paper's bound      `gain_bound`
                                    >=  ... with r B - sqrt((1 - r^2)(X - B^2))  sharp, in between      `sharp_bound`

The sharp bound is attained for every (r, B, X); the paper's is its tangent where both are 0, so that both promise an
improvement for the same policies, those with B >= sqrt((1 - r^2) X). (The sharp form is derived here: standardise,
a = r b + sqrt(1 - r^2) e with e uncorrelated with b; Cauchy-Schwarz for the part of mu_pi / mu_ref - 1 that is.)

  d*           = log mu_pi / mu_ref minimises E_ref log(1 + e^d) + E_pi log(1 + e^-d)   `discriminator`
  penalised    P - lambda d (KL), P - lambda (e^d - 1) (chi2), P - lambda (e^d - 1) / sqrt(chi2)   `penalised_reward`
  safest       argmax J(pi, P) - lambda sqrt(chi2), lambda = sigma_P sqrt(1 - r^2)      `lower_bound_policy`

The authors train d and the policy in turns, and trim exp(d); here both are exact. MDPs are tabular: P (S, A, S),
initial (S,), 0 <= gamma < 1, policies (S, A), rewards (S, A). The reference needs mass wherever the policy has (else
chi2 is infinite).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import minimize

from ..envs.kernels import Array
from .kl_bayes import check_distribution

# ---- correlation and the bounds --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Proxy:
    """Under mu_ref: correlation r, and the standard deviations of the true reward and of the proxy."""

    r: float
    sigma_true: float
    sigma_proxy: float

    @classmethod
    def under(cls, reference: ArrayLike, true: ArrayLike, proxy: ArrayLike) -> Proxy:
        mu = np.asarray(reference, dtype=np.float64)
        mu = check_distribution(mu, "reference", mu.shape)
        a, b = np.asarray(true, dtype=np.float64), np.asarray(proxy, dtype=np.float64)
        if a.shape != mu.shape or b.shape != mu.shape:
            raise ValueError(f"rewards have shapes {a.shape} and {b.shape}; the reference has {mu.shape}")
        a, b = a - (mu * a).sum(), b - (mu * b).sum()
        sigma_a, sigma_b = (math.sqrt(float((mu * x * x).sum())) for x in (a, b))
        if min(sigma_a, sigma_b) == 0:
            raise ValueError("a reward is constant under the reference: it has no correlation with anything")
        r = float((mu * a * b).sum()) / (sigma_a * sigma_b)
        return cls(min(max(r, -1.0), 1.0), sigma_a, sigma_b)


def chi_square(p: ArrayLike, q: ArrayLike) -> float:
    """chi2(p || q) = sum (p - q)^2 / q; inf where q lacks mass that p has."""
    a, b = np.asarray(p, dtype=np.float64), np.asarray(q, dtype=np.float64)
    if ((b == 0) & (a > 0)).any():
        return math.inf
    held = b > 0
    return float(((a[held] - b[held]) ** 2 / b[held]).sum())


def _check_correlation(proxy: Proxy) -> float:
    if not 0 < proxy.r <= 1:
        raise ValueError(
            f"r is {proxy.r}; the bound needs a proxy that is positively correlated under the reference"
        )
    return proxy.r


def gain_bound(proxy: Proxy, proxy_gain: float, chi2: float) -> float:
    """The paper's lower bound of J(pi, R) - J(ref, R), for proxy_gain = J(pi, P) - J(ref, P)."""
    r = _check_correlation(proxy)
    return proxy.sigma_true * (proxy_gain / proxy.sigma_proxy - math.sqrt((1 - r * r) * chi2)) / r


def sharp_bound(proxy: Proxy, proxy_gain: float, chi2: float) -> float:
    """The least J(pi, R) - J(ref, R) of all true rewards with this sigma_true and r; holds for every r."""
    B = proxy_gain / proxy.sigma_proxy
    rest = max(chi2 - B * B, 0.0)  # Cauchy-Schwarz: B^2 <= chi2
    return proxy.sigma_true * (proxy.r * B - math.sqrt(max(1 - proxy.r**2, 0.0) * rest))


# ---- discriminators and penalties ------------------------------------------------------------------------------------


def discriminator(policy: ArrayLike, reference: ArrayLike) -> Array:
    """d* = log mu_pi / mu_ref, the minimiser of `discriminator_loss`; both laws positive."""
    p, q = np.asarray(policy, dtype=np.float64), np.asarray(reference, dtype=np.float64)
    if not ((p > 0) & (q > 0)).all():
        raise ValueError(
            "a law has an entry of 0, for which the discriminator is infinite; leave such entries out"
        )
    return np.asarray(np.log(p) - np.log(q))


def discriminator_loss(d: ArrayLike, policy: ArrayLike, reference: ArrayLike) -> float:
    """E_{mu_ref} log(1 + e^d) + E_{mu_pi} log(1 + e^-d)."""
    d = np.asarray(d, dtype=np.float64)
    return float((reference * np.logaddexp(0, d)).sum() + (policy * np.logaddexp(0, -d)).sum())


def penalised_reward(
    proxy: ArrayLike,
    d: ArrayLike,
    penalty: float,
    kind: Literal["kl", "chi2", "sqrt_chi2"],
    chi2: float | None = None,
) -> Array:
    """The reward that one step of the policy climbs, for a discriminator d. sqrt_chi2 divides by sqrt(chi2), given.

    For chi2 and its root it is the gradient in mu_pi, where chi2 counts half.
    """
    reward, d = np.asarray(proxy, dtype=np.float64), np.asarray(d, dtype=np.float64)
    if kind == "kl":
        return reward - penalty * d
    if kind == "chi2":
        return reward - penalty * np.expm1(d)
    if kind != "sqrt_chi2":
        raise ValueError(f"kind is {kind!r}; expected kl, chi2 or sqrt_chi2")
    if chi2 is None or not chi2 > 0:
        raise ValueError(f"chi2 is {chi2}; the root's penalty divides by sqrt(chi2), which must be positive")
    return reward - penalty * np.expm1(d) / math.sqrt(chi2)


# ---- discounted MDPs -------------------------------------------------------------------------------------------------


def _check_mdp(P: ArrayLike, initial: ArrayLike, gamma: float) -> tuple[Array, Array]:
    kernel = np.asarray(P, dtype=np.float64)
    if kernel.ndim != 3 or kernel.shape[0] != kernel.shape[2]:
        raise ValueError(f"P has shape {kernel.shape}; expected (S, A, S)")
    if not (kernel >= 0).all() or not np.allclose(kernel.sum(axis=2), 1, atol=1e-9):
        s, a = (
            int(i) for i in np.argwhere((np.abs(kernel.sum(axis=2) - 1) > 1e-9) | (kernel < 0).any(axis=2))[0]
        )
        raise ValueError(f"P[s={s}, a={a}] is no law: entries >= 0 that sum to 1 are needed")
    if not 0 <= gamma < 1:
        raise ValueError(f"gamma is {gamma}; it must lie in [0, 1)")
    return kernel, check_distribution(initial, "initial", (len(kernel),))


def occupancy(P: ArrayLike, initial: ArrayLike, gamma: float, policy: ArrayLike) -> Array:
    """mu_pi (S, A), the solution of the flow equations sum_a mu(s,a) = (1-gamma) initial(s) + gamma sum mu P."""
    kernel, start = _check_mdp(P, initial, gamma)
    pi = np.asarray(policy, dtype=np.float64)
    step = np.einsum("sa,sat->st", pi, kernel)
    visits = np.linalg.solve(np.eye(len(start)) - gamma * step.T, (1 - gamma) * start)
    return np.asarray(visits[:, None] * pi)


def flow_residual(P: ArrayLike, initial: ArrayLike, gamma: float, mu: Array) -> float:
    """How far mu (S, A) is from the occupancy of a policy: the worst flow equation, or the most negative entry."""
    kernel, start = _check_mdp(P, initial, gamma)
    flow = mu.sum(axis=1) - (1 - gamma) * start - gamma * np.einsum("sa,sat->t", mu, kernel)
    return max(float(np.abs(flow).max()), -float(mu.min()))


def policy_of(mu: Array) -> Array:
    """The policy of an occupancy measure; uniform in states without mass."""
    mass = mu.sum(axis=1, keepdims=True)
    return np.where(mass > 0, mu / np.where(mass > 0, mass, 1.0), 1.0 / mu.shape[1])


def best_policy(P: ArrayLike, initial: ArrayLike, gamma: float, reward: ArrayLike) -> Array:
    """The deterministic policy (S, A) of maximal J(pi, reward), by policy iteration, exact."""
    kernel, _ = _check_mdp(P, initial, gamma)
    r, states = np.asarray(reward, dtype=np.float64), np.arange(len(kernel))
    action = r.argmax(axis=1)
    while True:
        value = np.linalg.solve(np.eye(len(states)) - gamma * kernel[states, action], r[states, action])
        q = r + gamma * kernel @ value
        better = q.max(axis=1) > q[states, action] + 1e-12 * max(1.0, float(np.abs(q).max()))
        if not better.any():
            return np.eye(r.shape[1])[action]
        action = np.where(better, q.argmax(axis=1), action)


@dataclass(frozen=True, eq=False)
class SafePolicy:
    """policy (S, A), mu (S, A), value = J(mu, proxy) - penalty sqrt(chi2); no policy is better by more than `gap`."""

    policy: Array
    mu: Array
    value: float
    chi2: float
    gap: float


def lower_bound_policy(
    P: ArrayLike, initial: ArrayLike, gamma: float, proxy: ArrayLike, reference: ArrayLike, penalty: float
) -> SafePolicy:
    """argmax over policies of J(pi, proxy) - penalty sqrt(chi2(mu_pi || mu_ref)), reference (S, A) a policy.

    Concave in mu over the flow polytope, with a kink at mu_ref. Which of the two it is has a closed form: mu_ref is the
    maximiser where the steepest direction out of it gains at most `penalty` for a unit of sqrt(chi2), that is where
    min over c of ||proxy - F^T c||_{mu_ref} <= penalty, F the flow equations. Else sequential quadratic programming.

    The certificate needs no trust in either: for every w with E_ref w^2 <= 1, sqrt(chi2(nu)) >= <nu - mu_ref, w>, so
    that max_nu <nu, proxy - penalty w> + penalty <mu_ref, w>, by policy iteration, bounds all values; w is taken at mu.
    About 1e-8 is reached. Small MDPs (some hundred pairs).
    """
    kernel, start = _check_mdp(P, initial, gamma)
    reward = np.asarray(proxy, dtype=np.float64)
    base = occupancy(P, initial, gamma, reference)
    if not (base > 0).all():
        s, a = (int(i) for i in np.argwhere(~(base > 0))[0])
        raise ValueError(
            f"mu_ref[s={s}, a={a}] is 0: chi2 is infinite for policies that go there; mix in some mass"
        )
    if not 0 <= penalty < math.inf:
        raise ValueError(f"penalty is {penalty}; it must be at least 0 and finite")
    (S, A), weight = base.shape, base.ravel()
    flow = (np.repeat(np.eye(S), A, axis=1) - gamma * kernel.reshape(S * A, S).T) * weight
    root = np.sqrt(weight)
    potential = np.linalg.lstsq((flow / root).T, root * reward.ravel(), rcond=None)[0]
    steepest = reward - (potential @ flow / weight).reshape(S, A)
    strength = math.sqrt(float((base * steepest**2).sum()))
    if strength <= penalty:
        mu, chi2, w = base, 0.0, steepest / max(penalty, 1e-300)
        policy = np.asarray(reference, dtype=np.float64)
    else:
        ratio = _ascend(
            reward.ravel(), weight, flow, (1 - gamma) * start, penalty, (steepest / strength).ravel()
        )
        policy = policy_of(np.maximum(ratio, 0).reshape(S, A) * base)
        mu = occupancy(P, initial, gamma, policy)  # feasible to the last digit
        chi2 = chi_square(mu, base)
        w = (mu / base - 1) / math.sqrt(chi2)
    value = float((mu * reward).sum()) - penalty * math.sqrt(chi2)
    tilted = reward - penalty * w
    top = occupancy(P, initial, gamma, best_policy(P, initial, gamma, tilted))
    upper = float((top * tilted).sum()) + penalty * float((base * w).sum())
    return SafePolicy(policy, mu, value, chi2, max(upper - value, 0.0))


def _ascend(
    reward: Array, weight: Array, flow: Array, inflow: Array, penalty: float, direction: Array
) -> Array:
    """mu / mu_ref that maximises E_ref[rho reward] - penalty sqrt(E_ref (rho - 1)^2), from a little out of mu_ref."""

    def loss(rho: Array) -> tuple[float, Array]:
        root = math.sqrt(float(weight @ (rho - 1) ** 2) + 1e-18)  # differentiable at mu_ref too
        slope = weight * (penalty * (rho - 1) / root - reward)
        return penalty * root - float(weight @ (rho * reward)), slope

    start = 1 + 0.5 * direction / max(1.0, float(np.abs(direction).max()))
    constraint = {"type": "eq", "fun": lambda rho: flow @ rho - inflow, "jac": lambda rho: flow}
    found = minimize(
        loss,
        start,
        jac=True,
        method="SLSQP",
        bounds=[(0, None)] * len(weight),
        constraints=[constraint],
        options={"ftol": 1e-16, "maxiter": 1000},
    )
    return np.asarray(found.x)
