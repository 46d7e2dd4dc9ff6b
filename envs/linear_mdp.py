"""Linear MDPs with known phi, mu and theta: P_h(s'|s,a) = <phi(s,a), mu_h(s')> and r_h(s,a) = <phi(s,a), theta_h>.

The theory (Jin et al. 2020, Assumption A; "Making RL with Preference-based Feedback Efficient via Randomization",
Assumption 4.1) also wants ||phi|| <= 1, ||theta_h|| <= sqrt(d), ||mu_h(S)|| <= sqrt(d) and rewards in [0, 1].
A world that breaks one of those is built all the same, with an `AssumptionWarning` that names it.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

import numpy as np

from .exploration import Seed
from .features import FeatureMap, Mode
from .kernels import Array, DenseKernel, Kernel
from .mdp import FiniteMDP, Layered

ROUNDING = 1e-12


class AssumptionWarning(UserWarning):
    """A world breaks an assumption of the theory; bounds that rest on it are not promised there."""


@dataclass(frozen=True, eq=False, kw_only=True)
class LinearMDP(FiniteMDP):
    """A FiniteMDP that knows its factors; kernel, reward and features follow from them.

    phi      (S, A, d) features, one map for all steps
    mu       (H, d, S) signed measures: P_h = phi mu_h must be probabilities (checked, with the place named)
    theta    mode "sum": (d,), one reward parameter shared by all steps;
             mode "concat": (H, d), or flat (H d,), a parameter for each step
    mode     how a trajectory's features are put together, see `FeatureMap`: "sum" lives in R^d and can only express
             rewards that do not depend on h; "concat" lives in R^{dH}
    """

    phi: Array
    mu: Array
    theta: Array
    mode: Mode = "sum"
    kernel: Kernel = field(init=False)
    reward: Layered = field(init=False)
    features: FeatureMap = field(init=False)
    name: str = "LinearMDP"

    def __post_init__(self) -> None:
        phi, mu = (np.asarray(x, dtype=np.float64) for x in (self.phi, self.mu))
        if phi.ndim != 3 or 0 in phi.shape:
            raise ValueError(f"phi has shape {phi.shape}; expected (S, A, d), all at least 1")
        n_states, _, d = phi.shape
        if mu.ndim != 3 or mu.shape[1:] != (d, n_states):
            raise ValueError(f"mu has shape {mu.shape}; expected (H, d={d}, S={n_states})")
        P = phi @ mu[:, None]  # (H, S, A, S)
        P[(P < 0) & (P > -ROUNDING)] = 0.0  # signed factors cancel only to rounding
        features = FeatureMap(np.broadcast_to(phi, (len(mu), *phi.shape)), self.mode)
        theta = np.asarray(self.theta, dtype=np.float64)
        if theta.size != features.dim or not np.isfinite(theta).all():
            shape = (d,) if self.mode == "sum" else (len(mu), d)
            raise ValueError(
                f"theta has shape {theta.shape}; mode {self.mode!r} wants finite numbers of shape {shape}"
            )
        derived = {
            "phi": phi,
            "mu": mu,
            "kernel": DenseKernel(P),
            "features": features,
            "reward": features.rewards(theta),
        }
        for key, value in derived.items():
            object.__setattr__(self, key, value)
        super().__post_init__()
        for broken in self.broken_assumptions():
            warnings.warn(f"{self.name}: {broken}", AssumptionWarning, stacklevel=3)

    @property
    def d(self) -> int:
        return int(self.phi.shape[2])

    @property
    def thetas(self) -> Array:
        """theta_h for every step: (H, d)."""
        return self.features.per_step(self.theta)

    def broken_assumptions(self) -> list[str]:
        """The assumptions of the theory that this world breaks, in words with the numbers; empty = none."""
        root = np.sqrt(self.d)
        theta = float(np.linalg.norm(self.thetas, axis=1).max())
        mass = float(np.linalg.norm(np.abs(self.mu).sum(axis=2), axis=1).max())
        low, high = float(np.min(self.reward)), float(np.max(self.reward))
        checks = [
            (self.features.max_norm, 1.0, "max ||phi(s,a)|| = {:.6g} exceeds 1"),
            (theta, root, f"max ||theta_h|| = {{:.6g}} exceeds sqrt(d) = {root:.6g}"),
            (mass, root, f"max || |mu_h|(S) || = {{:.6g}} exceeds sqrt(d) = {root:.6g}"),
        ]
        broken = [text.format(value) for value, bound, text in checks if value > bound + 1e-9]
        if low < -1e-9 or high > 1 + 1e-9:
            broken.append(f"rewards lie in [{low:.6g}, {high:.6g}], not in [0, 1]")
        return broken


def random_linear_mdp(
    n_states: int,
    n_actions: int,
    d: int,
    horizon: int,
    seed: Seed,
    mode: Mode = "sum",
    *,
    feature_concentration: float = 0.5,
    successor_concentration: float = 0.2,
) -> LinearMDP:
    """A random linear MDP on simplex features; it keeps every assumption of the theory, for all sizes and seeds.

    phi(s,a) ~ Dirichlet on the d-simplex (so ||phi||_2 <= ||phi||_1 = 1), each mu_{h,i} ~ Dirichlet over the states
    (so rows of phi mu_h are probabilities, and ||mu_h(S)|| = sqrt(d)), theta uniform in [0, 1]^d (so rewards lie in
    [0, 1]): one for all steps in mode "sum", one a step in mode "concat". The first state is state 0. The smaller a
    concentration, the more the features (the successors) differ from each other.
    """
    for what, value in {"n_states": n_states, "n_actions": n_actions, "d": d, "horizon": horizon}.items():
        if value < 1:
            raise ValueError(f"{what} is {value}; it must be at least 1")
    rng = np.random.default_rng(seed)
    return LinearMDP(
        phi=rng.dirichlet(np.full(d, feature_concentration), size=(n_states, n_actions)),
        mu=rng.dirichlet(np.full(n_states, successor_concentration), size=(horizon, d)),
        theta=rng.random(d if mode == "sum" else (horizon, d)),
        mode=mode,
        initial=np.eye(n_states)[0],
        name=f"RandomLinearMDP(S={n_states}, A={n_actions}, d={d}, H={horizon})",
    )


def hypercube_actions(k: int) -> Array:
    """The 2^k actions {-1, 1}^k, row = action index: (2^k, k); the last one is (1, ..., 1)."""
    bits = (np.arange(2**k)[:, None] >> np.arange(k)) & 1
    return np.where(bits == 1, 1.0, -1.0)


def hypercube_mdp(k: int = 4, delta: float = 0.3, xi_norm: float = 0.2, fail: float = 0.001) -> LinearMDP:
    """The simulated linear MDP of "Robust Offline RL with Linearly Structured f-Divergence Regularization".

    H = 3, states x1..x5 (0..4), actions a in {-1, 1}^k, d = 4, xi = (xi_norm / k) (1, ..., 1), so ||xi||_1 = xi_norm.
    With p(a) = delta + <xi, a>, the probability of the good state x5:

        phi(x_i, a) = (1 - p(a)) e_i + p(a) e_4  for i = 1, 2, 3;   phi(x4) = e_3 (fail);   phi(x5) = e_4
        mu_1 = (1 - fail) x2 + fail x4,  mu_2 = (1 - fail) x3 + fail x4,  mu_3 = x4,  mu_4 = x5   (the nominal kernel)
        theta_1 = 0,  theta_2 = theta_3 = e_4

    phi is a probability vector, and so every row of phi mu, exactly when xi_norm <= min(delta, 1 - delta). No single
    theta gives a zero reward at the first step and p(a) later, hence mode "concat" (trajectory features in R^12).
    """
    if k < 1:
        raise ValueError(f"k is {k}; actions in {{-1, 1}}^k need at least one coordinate")
    if not 0 <= xi_norm <= min(delta, 1 - delta):
        raise ValueError(
            f"xi_norm is {xi_norm}; p(a) = delta + <xi, a> stays a probability only for "
            f"0 <= xi_norm <= min(delta, 1 - delta) = {min(delta, 1 - delta):.6g}"
        )
    if not 0 <= fail <= 1:
        raise ValueError(f"fail is {fail}; it is a probability")
    good = delta + hypercube_actions(k).mean(axis=1) * xi_norm
    good = np.clip(good, 0.0, 1.0)  # at the edge xi_norm = min(delta, 1 - delta) rounding may step outside
    e = np.eye(4)
    phi = np.empty((5, 2**k, 4))
    for i in range(3):
        phi[i] = np.outer(1 - good, e[i]) + np.outer(good, e[3])
    phi[3], phi[4] = e[2], e[3]
    mu = np.zeros((4, 5))
    mu[0, [1, 3]] = mu[1, [2, 3]] = 1 - fail, fail
    mu[2, 3] = mu[3, 4] = 1.0
    return LinearMDP(
        phi=phi,
        mu=np.broadcast_to(mu, (3, 4, 5)),
        theta=np.stack([0 * e[3], e[3], e[3]]),
        mode="concat",
        initial=np.eye(5)[0],
        name=f"HypercubeMDP(k={k}, delta={delta}, xi_norm={xi_norm})",
    )


def hypercube_optimum(delta: float = 0.3, xi_norm: float = 0.2, fail: float = 0.001) -> float:
    """V* of `hypercube_mdp`, attained by the action (1, ..., 1) throughout; p = delta + xi_norm.

    x5 pays 1 at each of the steps 2 and 3; x2 pays p and reaches x5 with p, x3 (which pays p) with (1-p)(1-fail).
    """
    p = delta + xi_norm
    stay = (1 - p) * (1 - fail)
    return 2 * p + stay * (2 * p + stay * p)


def tabular_linear_mdp(model: FiniteMDP, mode: Mode = "concat") -> LinearMDP:
    """Any FiniteMDP with layers of one size as a linear MDP on one-hot features, d = S A; index s A + a.

    mode "sum" is possible only where the reward does not depend on h.
    """
    if not model.uniform:
        raise ValueError(
            f"layers have the sizes {model.sizes}; one feature map for all steps needs equal sizes"
        )
    n_states, n_actions, d = model.sizes[0], model.n_actions, model.sizes[0] * model.n_actions
    theta = np.reshape(model.reward, (model.horizon, d))
    if mode == "sum":
        if (theta != theta[0]).any():
            raise ValueError("the reward depends on h; use mode='concat'")
        theta = theta[0]
    return LinearMDP(
        phi=np.eye(d).reshape(n_states, n_actions, d),
        mu=np.stack([model.kernel.dense(h).reshape(d, n_states) for h in range(model.horizon)]),
        theta=theta,
        mode=mode,
        initial=model.initial,
        action_mask=model.action_mask,
        name=f"Tabular({model.name})",
    )
