r"""Soft (KL-regularised) value iteration against a reference policy.

The objective is J_beta(pi) = E_pi[r(tau)] - beta KL(pi || ref), with beta > 0 in units of reward. With V_H
= 0,

    Q_h = r_h + P_h V_{h+1}
    V_h(s) = beta log sum_a ref_h(a|s) exp(Q_h(s,a) / beta)
    pi_h(a|s) = ref_h(a|s) exp((Q_h(s,a) - V_h(s)) / beta)

is its unique maximiser among the policies that matter (those absolutely continuous w.r.t. ref), J_beta(pi)
= <rho, V_0>, and for every policy J_beta(pi*) - J_beta(pi) = beta KL(pi || pi*). The gradient of the value
in r_h(s,a) is the occupancy measure of pi*, its derivative in beta is -KL(pi* || ref). As beta -> 0 the
value tends to the optimum over the reference's support (ties shared in proportion to ref); beta = inf
returns the reference itself.

Actions without reference mass get none. In a deterministic tree pi* is the sequence-level Gibbs law
(`sequences`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from ...envs import FiniteMDP
from ...envs.kernels import Array
from ...envs.mdp import Layered
from .divergence import regularised_value
from .dynamic import allocate
from .policies import check_policy, check_reward, layer_mask, layer_probabilities

_ROWS = 1 << 15  # states a block: the temporaries of one block stay in the cache


@dataclass(frozen=True, eq=False)
class SoftSolution:
    """The regularised optimum: V[h] (S_h,), h = 0..H; Q[h] (S_h, A) or None; policy[h] (S_h, A).

    value = <rho, V_0> = J_beta(policy).
    """

    V: Layered
    Q: Layered | None
    policy: Layered
    value: float
    beta: float
    model: FiniteMDP = field(repr=False)
    reference: Layered = field(repr=False)
    reward: Layered = field(repr=False)

    @cached_property
    def residual(self) -> float:
        """max_{h,s} |V_h(s) - beta log sum_a ref exp((r_h + P_h V_{h+1}) / beta)|; 0 up to rounding."""
        worst = float(np.abs(self.V[self.model.horizon]).max())
        for h in range(self.model.horizon):
            q = self.reward[h] + self.model.kernel.expect(h, self.V[h + 1])
            ref = layer_probabilities(self.reference[h], self.model.n_actions)
            worst = max(worst, float(np.abs(soft_maximum(q, ref, self.beta)[0] - self.V[h]).max()))
        return worst

    @cached_property
    def identity_gap(self) -> float:
        """|J_beta(policy) - value|, with J_beta computed forward from the occupancies."""
        beta = (
            self.beta if np.isfinite(self.beta) else 0.0
        )  # at beta = inf the policy is the reference, KL = 0
        attained = regularised_value(self.model, self.policy, self.reference, beta, self.reward)
        return abs(attained - self.value)


def check_temperature(beta: float) -> float:
    if not beta > 0:
        raise ValueError(
            f"beta is {beta}; the temperature must be positive (value_iteration is the limit at 0)"
        )
    return float(beta)


def soft_maximum(q: Array, ref: Array, beta: float) -> tuple[Array, Array]:
    """beta log sum_a ref(a) exp(q(a) / beta), (n,), and the Gibbs law in ref(a) exp(q(a) / beta), (n, A).

    q and ref are (n, A); the rows of ref are laws (rounding errors in their sums are divided out); q is
    finite where ref > 0. Exact for any beta in (0, inf]: the maximum over the support is taken out, so that
    nothing overflows, and log1p of a sum of expm1 is used where the partition function is close to 1, so
    that a large beta loses nothing.
    """
    ref = ref / ref.sum(axis=1, keepdims=True)
    support = ref > 0
    top = np.where(support, q, -np.inf).max(axis=1, keepdims=True)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        gap = np.where(support, q - top, 0.0)  # <= 0
        if beta == np.inf:
            return top[:, 0] + (ref * gap).sum(axis=1), ref
        exponent = gap / beta
        weight = ref * np.exp(exponent)
        partition = weight.sum(axis=1)
        excess = (ref * np.expm1(exponent)).sum(axis=1)  # partition - 1, without the cancellation
    log_partition = np.where(excess > -0.5, np.log1p(np.maximum(excess, -0.5)), np.log(partition))
    return top[:, 0] + beta * log_partition, weight / partition[:, None]


def soft_value_iteration(
    model: FiniteMDP, reference: Layered, beta: float, reward: Layered | None = None, *, q: bool = True
) -> SoftSolution:
    """The maximiser of J_beta by one backward pass (see the module docstring).

    reference  a policy, layered; its mass must lie on available actions
    beta       temperature in (0, inf]
    reward     layered (S_h, A), in place of the model's own
    q          False does not keep Q
    """
    beta = check_temperature(beta)
    reference, rewards = check_policy(model, reference, "reference"), check_reward(model, reward)
    horizon, n_actions = model.horizon, model.n_actions
    V = allocate(model, horizon + 1)
    policy = allocate(model, horizon, (n_actions,))
    Q = allocate(model, horizon, (n_actions,)) if q else None
    V[horizon][:] = 0.0
    for h in reversed(range(horizon)):
        values = np.add(rewards[h], model.kernel.expect(h, V[h + 1]), out=None if Q is None else Q[h])
        for first in range(0, len(values), _ROWS):
            block = slice(first, first + _ROWS)
            ref = layer_probabilities(reference[h][block], n_actions)
            V[h][block], policy[h][block] = soft_maximum(values[block], ref, beta)
        mask = layer_mask(model, h)
        if Q is not None and mask is not None:
            values[~mask] = -np.inf
    return SoftSolution(V, Q, policy, float(model.initial @ V[0]), beta, model, reference, rewards)
