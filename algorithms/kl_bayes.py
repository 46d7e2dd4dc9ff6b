r"""KL-regularised reinforcement learning as Bayesian inference: the posterior, and two ways to approximate it.

T. Korbak, E. Perez, C. L. Buckley, "RL with KL penalties is better viewed as Bayesian inference", EMNLP Findings 2022
(arXiv 2205.11275); distributional policy gradients (DPG, GDC) by Parshakova et al. and Khalifa et al.; the rule for
beta by Ziegler et al. (arXiv 1909.08593). A response x has prior probability pi_0(x) and reward r(x), both (n,).

  pi*(x) = pi_0(x) exp(r(x)/beta) / Z                                       the posterior          `posterior`
  J(pi)  = E_pi r - beta KL(pi, pi_0) = beta log Z - beta KL(pi, pi*)       an evidence bound      `objective`
  E_pi[(r - beta log(pi/pi_0)) grad log pi] = -beta grad KL(pi, pi*)        KL-RL (reverse KL)     `policy_gradient`
  E_q[(pi*/q) grad log pi]                  = -grad KL(pi*, pi)             DPG (forward KL)       `dpg_gradient`
  mean_i pi_0(x_i) exp(r(x_i)/beta) / q(x_i), x_i ~ q                       an unbiased Z          `evidence_estimate`
  the maximiser of r among n samples of pi_0                                best of n              `best_of_n_policy`

The posterior is the modelling, the divergence that a policy minimises towards it the inference. The penalised reward
r - beta log(pi/pi_0) belongs to whole responses (a sum over tokens, not a mean) and depends on pi, but its own gradient
adds nothing, as E_pi grad log pi = 0. Without the penalty every law on argmax r is optimal: the entropy collapses.

A policy enters the gradients as its law (n,) and its scores d log pi(x) / d theta (n, d), so that any differentiable
family will do; `restricted` is the log-linear one. Expectations are sums over all responses unless they say "estimate".
Rewards are finite, beta is positive and finite, laws sum to 1. KL in nats, KL(p, q) averages over its first argument.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import logsumexp, rel_entr, xlogy

from ..envs.kernels import Array, Index
from .optimisation.losses import check_positive

# ---- the target ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Posterior:
    """law (n,) = pi*, log_law its logarithm (-inf without prior mass), log_evidence = log Z."""

    law: Array
    log_law: Array
    log_evidence: float


def check_distribution(law: ArrayLike, what: str, shape: tuple[int, ...] | None = None) -> Array:
    """A law: of the given shape (else any vector), entries >= 0, sum 1 up to 1e-9."""
    p = np.asarray(law, dtype=np.float64)
    if p.shape != shape if shape is not None else p.ndim != 1:
        expected = "a vector" if shape is None else str(shape)
        raise ValueError(f"{what} has shape {p.shape}; expected {expected}")
    if not (p >= 0).all():
        index = tuple(int(i) for i in np.argwhere(~(p >= 0))[0])
        raise ValueError(f"{what}{list(index)} is {p[index]}; probabilities are at least 0")
    if not abs(p.sum() - 1) <= 1e-9:
        raise ValueError(f"{what} sums to {p.sum():.12g}; divide it by its sum")
    return p


def _check_rewards(rewards: ArrayLike, n: int, what: str = "rewards") -> Array:
    r = np.asarray(rewards, dtype=np.float64)
    if r.shape != (n,):
        raise ValueError(f"{what} has shape {r.shape}; the prior has {n} responses: expected ({n},)")
    if not np.isfinite(r).all():
        i = int(np.flatnonzero(~np.isfinite(r))[0])
        raise ValueError(f"{what}[{i}] is {r[i]}; rewards must be finite")
    return r


def _log(p: Array) -> Array:
    with np.errstate(divide="ignore"):
        return np.log(p)


def posterior(prior: ArrayLike, rewards: ArrayLike, beta: float) -> Posterior:
    """pi* and log Z. Conditioning is associative: by r1 and then by r2 is by r1 + r2, evidences multiplied."""
    p = check_distribution(prior, "prior")
    log_weight = _log(p) + _check_rewards(rewards, len(p)) / check_positive(beta, "beta")
    log_evidence = float(logsumexp(log_weight))
    log_law = log_weight - log_evidence
    return Posterior(np.exp(log_law), log_law, log_evidence)


def divergence(p: ArrayLike, q: ArrayLike) -> float:
    """KL(p, q); inf where q lacks mass that p has."""
    return max(float(rel_entr(np.asarray(p, dtype=float), np.asarray(q, dtype=float)).sum()), 0.0)


def entropy(p: ArrayLike) -> float:
    p = np.asarray(p, dtype=np.float64)
    return float(-xlogy(p, p).sum()) + 0.0


def objective(policy: ArrayLike, prior: ArrayLike, rewards: ArrayLike, beta: float) -> float:
    """J(policy) = E r - beta KL(policy, prior): at most beta log Z, with equality at the posterior alone."""
    p0 = check_distribution(prior, "prior")
    pi, r = check_distribution(policy, "policy", p0.shape), _check_rewards(rewards, len(p0))
    return float(pi @ r) - check_positive(beta, "beta") * divergence(pi, p0)


# ---- inference: two gradients ----------------------------------------------------------------------------------------


def restricted(prior: ArrayLike, features: ArrayLike, theta: ArrayLike) -> tuple[Array, Array]:
    """The log-linear policy pi ∝ prior exp(<features, theta>), (n,); its scores, features - E_pi features, (n, d)."""
    p = check_distribution(prior, "prior")
    phi, theta = np.asarray(features, dtype=np.float64), np.asarray(theta, dtype=np.float64)
    if phi.shape != (len(p), *theta.shape) or theta.ndim != 1:
        raise ValueError(
            f"features has shape {phi.shape}; expected ({len(p)}, {theta.size}), theta ({theta.size},)"
        )
    log_weight = _log(p) + phi @ theta
    law = np.exp(log_weight - logsumexp(log_weight))
    return law, phi - law @ phi


def _check_scores(scores: ArrayLike, n: int) -> Array:
    s = np.asarray(scores, dtype=np.float64)
    if s.ndim != 2 or len(s) != n:
        raise ValueError(f"scores has shape {s.shape}; expected ({n}, d), one row a response")
    return s


def policy_gradient(
    policy: ArrayLike,
    scores: ArrayLike,
    prior: ArrayLike,
    rewards: ArrayLike,
    beta: float,
    baseline: float = 0.0,
) -> Array:
    """grad J = E_pi[(r - beta log(pi/pi_0) - baseline) grad log pi], (d,): REINFORCE on the penalised reward.

    The gradient is the same for every baseline; `objective` is the usual one. Responses of zero mass count nothing.
    """
    p0 = check_distribution(prior, "prior")
    pi, r = check_distribution(policy, "policy", p0.shape), _check_rewards(rewards, len(p0))
    s = _check_scores(scores, len(p0))
    penalty = check_positive(beta, "beta") * rel_entr(pi, p0)
    return (pi * (r - baseline) - penalty) @ s


def dpg_gradient(
    scores: ArrayLike, target: ArrayLike, proposal: ArrayLike, policy: ArrayLike | None = None
) -> Array:
    """E_q[(pi*/q - b pi/q) grad log pi], (d,): the same for every proposal q whose support holds the target's.

    With `policy` the control variate b = 1 is taken off (on-policy, q = pi: the advantage pi*/pi - 1).
    """
    star = check_distribution(target, "target")
    q, s = check_distribution(proposal, "proposal", star.shape), _check_scores(scores, len(star))
    ratio = _weights(star, q)
    if policy is not None:
        ratio = ratio - _weights(check_distribution(policy, "policy", star.shape), q)
    return (q * ratio) @ s


def _weights(numerator: Array, q: Array) -> Array:
    missed = (q == 0) & (numerator > 0)
    if missed.any():
        i = int(np.flatnonzero(missed)[0])
        raise ValueError(
            f"proposal[{i}] is 0 where {numerator[i]:.3g} is needed: it would never be drawn; mix in the prior"
        )
    return np.divide(numerator, q, out=np.zeros_like(numerator), where=q > 0)


# ---- estimates from samples ------------------------------------------------------------------------------------------


def evidence_estimate(
    samples: Index, prior: ArrayLike, rewards: ArrayLike, beta: float, proposal: ArrayLike
) -> Array:
    """mean over the last axis of pi_0(x) exp(r(x)/beta) / q(x), x = samples (..., m) drawn from q: E = Z.

    Unbiased for every m while q's support holds the prior's; else ValueError (Z would be too small).
    """
    p0 = check_distribution(prior, "prior")
    weight = p0 * np.exp(_check_rewards(rewards, len(p0)) / check_positive(beta, "beta"))
    return np.asarray(
        _weights(weight, check_distribution(proposal, "proposal", p0.shape))[samples].mean(axis=-1)
    )


def dpg_estimate(
    samples: Index,
    scores: ArrayLike,
    log_weight: ArrayLike,
    proposal: ArrayLike,
    evidence: float | None = None,
) -> Array:
    """The gradient of DPG from samples (..., m) of q: mean of (P(x)/(Z q(x))) grad log pi(x), (..., d).

    log_weight = log P (n,), P ∝ pi*. evidence = Z gives an unbiased gradient; None divides by the samples' own
    estimate of Z (self-normalised), which is biased by O(1/m).
    """
    log_p = np.asarray(log_weight, dtype=np.float64)
    s = _check_scores(scores, len(log_p))
    w = _weights(np.exp(log_p), check_distribution(proposal, "proposal", log_p.shape))[samples]
    z = w.mean(axis=-1) if evidence is None else np.asarray(check_positive(evidence, "evidence"))
    return np.asarray((w[..., None] * s[samples]).mean(axis=-2) / z[..., None])


# ---- decoding and control --------------------------------------------------------------------------------------------


def best_of_n_policy(prior: ArrayLike, rewards: ArrayLike, n: int) -> Array:
    """The law of the response of largest reward among n of the prior, ties broken at random among the samples.

    Its KL to the prior is at most log n - (n-1)/n, the value for continuous rewards; ties make it smaller.
    """
    p, m = check_distribution(prior, "prior"), int(n)
    r = _check_rewards(rewards, len(p))
    if m != n or m < 1:
        raise ValueError(f"n is {n}; it must be a whole number, at least 1")
    levels, level = np.unique(r, return_inverse=True)
    mass = np.bincount(level, weights=p, minlength=len(levels))
    below = np.concatenate([[0.0], np.cumsum(mass)])
    below /= below[-1]
    ratio = np.divide(np.diff(below**m), mass, out=np.zeros_like(mass), where=mass > 0)
    return np.asarray(p * ratio[level])


def best_of_n_limit(n: int) -> float:
    """log n - (n-1)/n: KL of best-of-n to the prior when no two rewards are equal and no response has mass."""
    return math.log(n) - (n - 1) / n


def adapted_beta(beta: float, kl: float, target: float, gain: float = 0.1, clip: float = 0.2) -> float:
    """Ziegler's rule: beta (1 + gain e), e = (kl - target) / target clipped to [-clip, clip].

    A policy further from the prior than wanted is penalised more. gain clip < 1, so that beta stays positive.
    """
    if not (0 <= kl < math.inf):
        raise ValueError(f"kl is {kl}; it must be at least 0 and finite")
    check_positive(target, "target")
    if not (gain > 0 and clip > 0 and gain * clip < 1):
        raise ValueError(f"gain is {gain} and clip {clip}; they must be positive with a product below 1")
    return check_positive(beta, "beta") * (1 + gain * float(np.clip((kl - target) / target, -clip, clip)))


# ---- a restricted family: product laws on two tokens -----------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Projection:
    """A product law first x second and its divergence from (or of) the target; no product law is closer by `gap`."""

    first: Array
    second: Array
    divergence: float
    gap: float
    law: Array = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "law", np.outer(self.first, self.second))


def forward_projection(target: ArrayLike) -> Projection:
    """argmin of KL(target, p x q) over product laws, target (k, m): the product of the marginals.

    KL(target, p x q) = KL(target, marginals) + KL(marginal, p) + KL(marginal, q), so that the gap is 0.
    """
    joint = _check_joint(target)
    first, second = joint.sum(axis=1), joint.sum(axis=0)
    return Projection(first, second, divergence(joint, np.outer(first, second)), 0.0)


def reverse_projection(target: ArrayLike, tolerance: float = 1e-10, max_pieces: int = 1 << 16) -> Projection:
    """argmin of KL(p x q, target) over product laws, target (2, m) and positive, by branch and bound.

    For a given first law (u, 1 - u) the best second one is q ∝ exp(u L_0 + (1 - u) L_1), L = log target, which leaves
    f(u) = -H(u) - logsumexp(u L_0 + (1-u) L_1), a difference of convex functions with several minima. On an interval
    the second is at most its chord, and -H minus a chord has its minimum in closed form: a lower bound. Intervals are
    halved, the lowest bound first, until none can hold a value that is smaller by `tolerance`.
    """
    joint = _check_joint(target)
    if len(joint) != 2 or not (joint > 0).all():
        raise ValueError(
            f"target has shape {joint.shape} and least entry {joint.min():.3g}; expected (2, m), positive"
        )
    L = np.log(joint)

    def evidence(u: float) -> float:
        return float(logsumexp(u * L[0] + (1 - u) * L[1]))

    def value(u: float) -> float:
        return -entropy([u, 1 - u]) - evidence(u)

    def bounded(a: float, ga: float, b: float, gb: float) -> tuple[float, float]:
        """The minimum of -H(u) - chord(u) on [a, b] and where it is."""
        slope = (gb - ga) / (b - a)
        u = min(max(0.5 * (1 + math.tanh(slope / 2)), a), b)
        return -entropy([u, 1 - u]) - (ga + slope * (u - a)), u

    best_u, best = min(((u, value(u)) for u in (0.0, 0.5, 1.0)), key=lambda pair: pair[1])
    ends = (0.0, evidence(0.0), 1.0, evidence(1.0))
    low, at = bounded(*ends)
    heap = [(low, at, ends)]
    for _ in range(max_pieces):
        low, at, (a, ga, b, gb) = heap[0]
        if best - low <= tolerance:
            break
        heapq.heappop(heap)
        middle = 0.5 * (a + b)
        for u in (at, middle):
            if (found := value(u)) < best:
                best_u, best = u, found
        gm = evidence(middle)
        for piece in ((a, ga, middle, gm), (middle, gm, b, gb)):
            low, at = bounded(*piece)
            if low < best - tolerance / 2:
                heapq.heappush(heap, (low, at, piece))
        if not heap:
            break
    lowest = min([best - tolerance / 2, *(entry[0] for entry in heap[:1])])
    first = np.array([best_u, 1 - best_u])
    log_second = best_u * L[0] + (1 - best_u) * L[1]
    return Projection(first, np.exp(log_second - logsumexp(log_second)), max(best, 0.0), best - lowest)


def _check_joint(target: ArrayLike) -> Array:
    joint = np.asarray(target, dtype=np.float64)
    if joint.ndim != 2:
        raise ValueError(
            f"target has shape {joint.shape}; expected a matrix over (first token, second token)"
        )
    return check_distribution(joint, "target", joint.shape)
