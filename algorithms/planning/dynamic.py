r"""Exact dynamic programming: optimal values, values of a policy, occupancy measures.

The model is layered with layers h = 0, ..., H-1 and V_H = 0. With (P_h v)(s,a) = sum_s' P_h(s'|s,a) v(s'):

    value_iteration   Q_h = r_h + P_h V_{h+1},   V_h(s) = max_a Q_h(s,a)                    (backward)
    evaluate          the same with V_h(s) = sum_a pi_h(a|s) Q_h(s,a)                       (backward)
    occupancy         d_h(s,a) = pi_h(a|s) mu_h(s),  mu_0 = rho,  mu_{h+1} = P_h^T d_h      (forward)

Unavailable actions have Q = -inf and are never chosen; ties go to the lowest action. Only `kernel.expect` and
`kernel.push` are used, so that every representation of a model gives the same answer; for large sparse models
and trees the maximum is fused with the expectation (`_fused`), which changes the speed and nothing else.

Layered results are single arrays (H, ...) where all layers have one size, else tuples. V has H+1 layers.

Certificates: `residual` (the Bellman residual, recomputed through `kernel.expect` when asked for; a value
function with residual e is within H e of the exact one) and `identity_gap` (|<d^pi, r> - value|).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from ...envs import CSRKernel, FiniteMDP, Kernel, TreeKernel
from ...envs.kernels import Array
from ...envs.mdp import Layered
from .policies import check_policy, check_reward, layer_mask, layer_probabilities

# Below this many state-action pairs (all layers together) the compiled kernels cannot pay for loading numba; where it
# is loaded already, they pay from LOADED_PAIRS on. Both ways give the same bits.
FUSED_PAIRS = 1_000_000
LOADED_PAIRS = 2_000

Backup = Callable[[int, Array, "np.ndarray | None", Array, Array, np.ndarray, "Array | None"], None]


@dataclass(frozen=True, eq=False)
class Solution:
    """The optimum: V[h] (S_h,), h = 0..H; Q[h] (S_h, A) or None; policy[h] (S_h,); value = <rho, V_0>."""

    V: Layered
    Q: Layered | None
    policy: Layered
    value: float
    model: FiniteMDP = field(repr=False)
    reward: Layered = field(repr=False)

    @cached_property
    def residual(self) -> float:
        """max_{h,s} |V_h(s) - max_a (r_h + P_h V_{h+1})(s,a)|; 0 up to rounding."""
        return bellman_residual(self.model, self.V, self.reward)

    @cached_property
    def identity_gap(self) -> float:
        """|<d^pi, r> - value| of the greedy policy: its occupancy, computed forward, earns the value."""
        return _identity_gap(self.model, self.policy, self.reward, self.value)


@dataclass(frozen=True, eq=False)
class Evaluation:
    """A policy's worth: V[h] (S_h,), h = 0..H; Q[h] (S_h, A) or None; value = <rho, V_0> = E_pi[r(tau)]."""

    V: Layered
    Q: Layered | None
    value: float
    model: FiniteMDP = field(repr=False)
    policy: Layered = field(repr=False)
    reward: Layered = field(repr=False)

    @cached_property
    def residual(self) -> float:
        """max_{h,s} |V_h(s) - sum_a pi_h(a|s) (r_h + P_h V_{h+1})(s,a)|; 0 up to rounding."""
        return bellman_residual(self.model, self.V, self.reward, self.policy)

    @cached_property
    def identity_gap(self) -> float:
        """|<d^pi, r> - value|."""
        return _identity_gap(self.model, self.policy, self.reward, self.value)


def allocate(model: FiniteMDP, layers: int, tail: tuple[int, ...] = (), dtype: Any = np.float64) -> Layered:
    """Uninitialised x[h]: (S_h, *tail) for h < layers: one array where the model is uniform, else a tuple."""
    if model.uniform:
        return np.empty((layers, model.sizes[0], *tail), dtype=dtype)
    return tuple(np.empty((n, *tail), dtype=dtype) for n in model.sizes[:layers])


# ---- optimal values ----


def _generic_backup(kernel: Kernel) -> Backup:
    def backup(
        h: int,
        reward: Array,
        mask: np.ndarray | None,
        v: Array,
        out_v: Array,
        out_pi: np.ndarray,
        out_q: Array | None,
    ) -> None:
        q = np.add(reward, kernel.expect(h, v), out=out_q)
        if mask is not None:
            q[~mask] = -np.inf
        np.argmax(q, axis=1, out=out_pi)
        out_v[:] = np.take_along_axis(q, out_pi[:, None], axis=1)[:, 0]

    return backup


def _backup(kernel: Kernel) -> Backup:
    pairs = kernel.n_actions * sum(kernel.sizes[:-1])
    enough = LOADED_PAIRS if "numba" in sys.modules else FUSED_PAIRS
    if pairs >= min(enough, FUSED_PAIRS) and isinstance(kernel, CSRKernel | TreeKernel):
        from . import _fused  # numba is loaded where it pays

        return _fused.csr_backup(kernel) if isinstance(kernel, CSRKernel) else _fused.tree_backup(kernel)
    return _generic_backup(kernel)


def value_iteration(model: FiniteMDP, reward: Layered | None = None, *, q: bool = True) -> Solution:
    """The optimal values and the greedy policy (ties to the lowest action) by one backward pass.

    reward    layered (S_h, A), in place of the model's own
    q         False does not keep Q (H S A doubles), which large models cannot afford
    """
    rewards = check_reward(model, reward)
    horizon, n_actions = model.horizon, model.n_actions
    V = allocate(model, horizon + 1)
    policy = allocate(model, horizon, dtype=np.int64)
    Q = allocate(model, horizon, (n_actions,)) if q else None
    backup = _backup(model.kernel)
    V[horizon][:] = 0.0
    for h in reversed(range(horizon)):
        backup(h, rewards[h], layer_mask(model, h), V[h + 1], V[h], policy[h], None if Q is None else Q[h])
    return Solution(V, Q, policy, float(model.initial @ V[0]), model, rewards)


def bellman_residual(
    model: FiniteMDP, V: Layered, reward: Layered | None = None, policy: Layered | None = None
) -> float:
    """max_{h,s} |V_h(s) - (B_h V_{h+1})(s)|; B is the optimality operator, or that of `policy` if given.

    V[H] must be 0 and counts as a residual where it is not.
    """
    rewards = check_reward(model, reward)
    worst = float(np.abs(V[model.horizon]).max())
    for h in range(model.horizon):
        backed = rewards[h] + model.kernel.expect(h, V[h + 1])
        mask = layer_mask(model, h)
        if policy is not None:
            target = _average(backed, policy[h])
        else:
            target = (backed if mask is None else np.where(mask, backed, -np.inf)).max(axis=1)
        worst = max(worst, float(np.abs(V[h] - target).max()))
    return worst


# ---- a given policy ----


def _average(q: Array, pi: np.ndarray) -> Array:
    """sum_a pi(a|s) q(s, a), for q finite."""
    return np.take_along_axis(q, pi[:, None], axis=1)[:, 0] if pi.ndim == 1 else np.einsum("sa,sa->s", pi, q)


def evaluate(
    model: FiniteMDP, policy: Layered, reward: Layered | None = None, *, q: bool = True
) -> Evaluation:
    """The values of a deterministic or stochastic policy by one backward pass; arguments as above."""
    policy, rewards = check_policy(model, policy), check_reward(model, reward)
    horizon, n_actions = model.horizon, model.n_actions
    V = allocate(model, horizon + 1)
    Q = allocate(model, horizon, (n_actions,)) if q else None
    V[horizon][:] = 0.0
    for h in reversed(range(horizon)):
        values = np.add(rewards[h], model.kernel.expect(h, V[h + 1]), out=None if Q is None else Q[h])
        V[h][:] = _average(values, policy[h])
        mask = layer_mask(model, h)
        if Q is not None and mask is not None:
            values[~mask] = -np.inf
    return Evaluation(V, Q, float(model.initial @ V[0]), model, policy, rewards)


def state_occupancy(model: FiniteMDP, policy: Layered) -> Layered:
    """P_pi(s_h = s), layered (S_h,) for h = 0..H (the last layer is where the trajectories end)."""
    policy = check_policy(model, policy)
    mu = allocate(model, model.horizon + 1)
    mu[0][:] = model.initial
    for h in range(model.horizon):
        mu[h + 1][:] = model.kernel.push(h, mu[h][:, None] * layer_probabilities(policy[h], model.n_actions))
    return mu


def occupancy(model: FiniteMDP, policy: Layered) -> Layered:
    """d_h(s, a) = P_pi(s_h = s, a_h = a), layered (S_h, A); each layer sums to 1."""
    policy = check_policy(model, policy)
    d = allocate(model, model.horizon, (model.n_actions,))
    mu = model.initial
    for h in range(model.horizon):
        np.multiply(mu[:, None], layer_probabilities(policy[h], model.n_actions), out=d[h])
        mu = model.kernel.push(h, d[h])
    return d


def expected_reward(model: FiniteMDP, d: Layered, reward: Layered | None = None) -> float:
    """<d, r> = sum_h sum_{s,a} d_h(s,a) r_h(s,a) for an occupancy measure d."""
    rewards = check_reward(model, reward)
    return float(sum(np.vdot(d[h], rewards[h]) for h in range(model.horizon)))


def _identity_gap(model: FiniteMDP, policy: Layered, reward: Layered, value: float) -> float:
    return abs(expected_reward(model, occupancy(model, policy), reward) - value)
