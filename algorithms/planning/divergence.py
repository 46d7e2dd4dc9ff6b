r"""Exact KL divergence between the trajectory laws of two policies on one model.

The law of the first state and the transitions are shared, so that the log-ratio of two trajectory laws is a
sum over steps, and with mu_h the state occupancy of pi

    KL(pi || ref) = sum_h sum_s mu_h(s) KL(pi_h(.|s) || ref_h(.|s)).

It is infinite exactly where pi reaches a state and takes an action there that ref never takes; what happens
in states that pi does not reach does not count. Units: nats.
"""

from __future__ import annotations

import numpy as np
from scipy.special import rel_entr

from ...envs import FiniteMDP
from ...envs.kernels import Array
from ...envs.mdp import Layered
from .dynamic import evaluate, state_occupancy
from .policies import check_policy, layer_probabilities


def state_kl(model: FiniteMDP, policy: Layered, reference: Layered) -> Layered:
    """KL(pi_h(.|s) || ref_h(.|s)) at every state, layered (S_h,); infinite where the support fails."""
    policy = check_policy(model, policy)
    reference = check_policy(model, reference, "reference")
    layers = []
    for pi, ref in zip(policy, reference, strict=True):
        if pi.ndim == ref.ndim == 1:
            layers.append(np.where(pi == ref, 0.0, np.inf))
        else:
            p, q = (layer_probabilities(x, model.n_actions) for x in (pi, ref))
            layers.append(np.maximum(rel_entr(p, q).sum(axis=1), 0.0))  # rounding must not make it negative
    return model.layered(layers)


def trajectory_kl(model: FiniteMDP, policy: Layered, reference: Layered) -> float:
    """KL(pi || ref) between the laws of trajectories; inf where the support fails."""
    local, mu = state_kl(model, policy, reference), state_occupancy(model, policy)
    return float(sum(_expectation(mu[h], local[h]) for h in range(model.horizon)))


def _expectation(mu: Array, x: Array) -> float:
    """<mu, x> with 0 * inf = 0."""
    reached = mu > 0
    return float(mu[reached] @ x[reached]) if np.isfinite(x[reached]).all() else np.inf


def regularised_value(
    model: FiniteMDP, policy: Layered, reference: Layered, beta: float, reward: Layered | None = None
) -> float:
    """J_beta(pi) = E_pi[r(tau)] - beta KL(pi || ref), beta >= 0; -inf where beta KL is infinite."""
    if not beta >= 0:
        raise ValueError(f"beta is {beta}; the temperature cannot be negative")
    earned = evaluate(model, policy, reward, q=False).value
    divergence = trajectory_kl(model, policy, reference) if beta > 0 else 0.0
    return earned - beta * divergence if divergence > 0 else earned  # inf * 0 is 0 here
