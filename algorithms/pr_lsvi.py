r"""PR-LSVI: preference-based and randomized least-squares value iteration.

R. Wu and W. Sun, "Making RL with Preference-based Feedback Efficient via Randomization", ICLR 2024
(arXiv 2310.14554), Algorithm 1. Episode t of T on a linear MDP whose reward is never observed:

  line 3   theta_hat_r = argmax_{||theta|| <= B} of the likelihood of the queried comparisons     `PreferenceMLE`
  line 4   theta_bar_r ~ N(theta_hat_r, sigma_r^2 Sigma_r^{-1}), one draw an episode              `_perturb`
  line 5-9 backward over h with V_bar_{H+1} = 0:                                                  `_plan`
             theta_hat_{P,h} = Sigma_{P,h}^{-1} sum_s phi(s_h,a_h) V_bar_{h+1}(s_{h+1})   (next values, no reward)
             theta_bar_{P,h} ~ N(theta_hat_{P,h}, sigma_P^2 Sigma_{P,h}^{-1})
             omega_h(s,a)    = the interpolation between <phi, theta_bar_{P,h}> and H-h (see `interpolate`)
             Q_bar_h = <phi, theta_bar_r> + omega_h,  V_bar_h = max_a Q_bar_h,  pi_h = argmax_a Q_bar_h
  line 10  pi_t^0 = pi_t,  pi_t^1 = pi_{t-1}^0 (the comparator is the previous episode's policy)  `_comparator`
  line 11  Delta_t = phi(tau_t^0) - phi(tau_t^1)                                                  `_play`
  line 12  Z_t = 1 iff E |<Delta_t, theta_0 - theta_1>| > eps, theta_i iid as in line 4           `_query`
             (closed form: (2/sqrt(pi)) sigma_r ||Delta_t||_{Sigma_r^{-1}} > eps)
  line 13  if Z_t: observe o_t, Sigma_r += Delta_t Delta_t^T                                      `_learn_reward`
  line 14  Sigma_{P,h} += phi(s_h,a_h) phi(s_h,a_h)^T, queried or not                             `_learn_transitions`

Regret_T = sum_t [2 V* - V^{pi_t^0} - V^{pi_t^1}]: both policies are charged. It is computed exactly, on the model;
the learner itself sees features, transitions and answers, never a reward.

Guarantee (Theorem 4.2, in orders): with the `theory` settings on a linear MDP, with high probability
Regret_T = O~(eps T sqrt(d) + sqrt(T) d^3 H^{5/2} gamma + ...) and Queries_T = O~(d^2 gamma^2 / eps^2),
gamma = sqrt(kappa + B^2). Constants and powers of d are not known exactly; only exponents of T and eps are claimed.

Departures, all declared:
  - the first state may be random (a prompt): both trajectories of an episode share it;
  - `transitions="known"` replaces lines 6-8 by omega_h = P_h V_bar_{h+1}, exact: for worlds whose transitions the
    learner knows, such as token MDPs (there sigma_P plays no role);
  - `mle_growth > 0` refits line 3 exactly whenever the comparisons have grown by that fraction, with one Newton step
    per comparison in between, so that a comparison costs O(d^2) amortised; `mle_growth = 0` refits every time;
  - `query_rate` replaces line 12 by a coin: the passive baseline, not the paper's algorithm.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numba import njit

from ..envs import FeatureMap, FiniteMDP, Trajectories
from ..envs.annotators import Annotator
from ..envs.kernels import Array, DenseKernel, Index, TreeKernel
from ..envs.linear_mdp import AssumptionWarning
from ..envs.links import LOGISTIC, Link
from ..envs.mdp import Layered
from .estimation.linear_algebra import cholesky_update, downdate_norms, solve_lower, solve_upper
from .estimation.online_preferences import OnlinePreferenceMLE
from .estimation.posterior import disagreement
from .planning import evaluate, value_iteration
from .spec import AlgorithmSpec

ALLOWED = {"transitions": ("learned", "known"), "transition_data": ("both", "new")}
FORMAT_VERSION = 1
NORM_REFRESH = 1024  # episodes between fresh computations of the feature norms, which drift by rounding only


@dataclass(frozen=True)
class Settings:
    """Hyper-parameters, in the paper's symbols; lengths are on the reward scale.

    sigma_r, sigma_P    standard deviations of the reward and the value perturbations
    eps                 query threshold on the expected disagreement (reward units, not probabilities)
    alpha_L, alpha_U    feature norms between which the value is interpolated, 0 <= alpha_L < alpha_U
    B                   bound on ||theta_r||_2
    lam                 ridge of Sigma_r and Sigma_{P,h}
    transitions         "learned" (lines 6-8) or "known" (departure)
    transition_data     "both" trajectories of an episode, or only the "new" policy's; the paper allows either
    mle_growth          0: exact MLE at every comparison; g > 0: exact whenever their number grew by a fraction g
    query_rate          None: line 12; p in [0, 1]: query by coin (passive baseline)
    """

    sigma_r: float
    sigma_P: float
    eps: float
    alpha_L: float
    alpha_U: float
    B: float
    lam: float = 1.0
    transitions: Literal["learned", "known"] = "learned"
    transition_data: Literal["both", "new"] = "both"
    mle_growth: float = 0.05
    query_rate: float | None = None

    def __post_init__(self) -> None:
        for name in ("sigma_r", "sigma_P", "eps", "alpha_L", "mle_growth"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 0")
        for name in ("B", "lam"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive")
        if not self.alpha_L < self.alpha_U:
            raise ValueError(f"alpha_L = {self.alpha_L} must be below alpha_U = {self.alpha_U}")
        for name, allowed in ALLOWED.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected one of {allowed}")
        if self.query_rate is not None and not 0 <= self.query_rate <= 1:
            raise ValueError(f"query_rate is {self.query_rate}; it is a probability, or None for line 12")

    @classmethod
    def theory(cls, model: FiniteMDP, eps: float, link: Link = LOGISTIC, **changes: Any) -> Settings:
        """The paper's orders with every hidden constant and logarithm set to 1.

        gamma = sqrt(kappa + B^2), sigma_r = sqrt(d_r) gamma, sigma_P = H^{3/2} d^2 gamma,
        alpha_U = 1 / (d^{5/2} H^{3/2} gamma), alpha_L = alpha_U / 2, lambda = 1; kappa over reward differences of
        at most H. At lab size alpha_U keeps every (s, a) unknown: use it to test optimism and coverage.
        """
        features, H = linear_features(model), model.horizon
        d = features.d
        if features.max_norm > 1 + 1e-9:
            broken = f"{model.name}: max ||phi|| is {features.max_norm:.4g}, but the theory assumes at most 1"
            warnings.warn(broken, AssumptionWarning, stacklevel=2)
        B = changes.pop("B", radius(model))
        gamma = math.sqrt(link.kappa(H) + B**2)
        alpha_U = 1.0 / (d**2.5 * H**1.5 * gamma)
        return cls(
            **{
                "sigma_r": math.sqrt(features.dim) * gamma,
                "sigma_P": H**1.5 * d**2 * gamma,
                "eps": eps,
                "alpha_L": alpha_U / 2,
                "alpha_U": alpha_U,
                "B": B,
                "mle_growth": 0.0,
            }
            | changes
        )

    @classmethod
    def scaled(
        cls,
        model: FiniteMDP,
        eps: float,
        c_r: float = 0.8,
        c_P: float = 0.1,
        c_U: float = 0.6,
        **changes: Any,
    ) -> Settings:
        """The same shapes at lab size: sigma_r = c_r sqrt(d_r), sigma_P = c_P H, alpha_U = c_U, alpha_L = c_U / 2.

        At c_r of about 0.4 and below the reward noise is under-dispersed: some runs lock on one policy and pay
        linear regret.
        """
        features = linear_features(model)
        return cls(
            **{
                "sigma_r": c_r * math.sqrt(features.dim),
                "sigma_P": c_P * model.horizon,
                "eps": eps,
                "alpha_L": c_U / 2,
                "alpha_U": c_U,
                "B": radius(model),
            }
            | changes
        )


def linear_features(model: FiniteMDP) -> FeatureMap:
    if model.features is None:
        raise ValueError(
            f"{model.name} has no features; PR-LSVI needs a linear model (see envs.tabular_linear_mdp)"
        )
    return model.features


def radius(model: FiniteMDP) -> float:
    """B: a bound on ||theta||_2 that uses no more than the range of a linear MDP's rewards, sqrt(d_r) - or the norm
    of the true parameter where that is larger (projected rewards of a language model)."""
    bound = math.sqrt(linear_features(model).dim)
    return bound if model.theta is None else max(bound, float(np.linalg.norm(model.theta)))


@njit(cache=True)
def interpolate(n: float, value: float, default: float, alpha_L: float, alpha_U: float) -> float:
    """Line 8, omega: `value` where the feature norm n <= alpha_L, `default` where n > alpha_U, linear in between."""
    if n <= alpha_L:
        return value
    if n > alpha_U:
        return default
    rho = (alpha_U - n) / (alpha_U - alpha_L)
    return rho * value + (1.0 - rho) * default


@njit(cache=True)
def _plan(phi, theta_r, legal, L, cross, squared_norms, z, sigma_P, alpha_L, alpha_U):  # type: ignore[no-untyped-def]
    """Lines 5-9. phi (H or 1, S*A, d), theta_r (H or 1, d), legal (H or 1, S, A), L (H, d, d) with
    Sigma_{P,h} = L L^T, cross (H, d, S) = sum phi e_{s'}^T, squared_norms (H, S*A) of phi in Sigma_{P,h}^{-1},
    z (H, d) standard normal -> V_bar (H+1, S), pi (H, S)."""
    H, (S, A) = L.shape[0], legal.shape[1:]
    V = np.zeros((H + 1, S))
    pi = np.empty((H, S), dtype=np.int16)
    theta = np.empty((phi.shape[2], 2))
    for h in range(H - 1, -1, -1):
        theta[:, 0] = theta_r[h % theta_r.shape[0]]
        theta[:, 1] = solve_upper(L[h], solve_lower(L[h], np.dot(cross[h], V[h + 1])) + sigma_P * z[h])
        linear = np.dot(phi[h % phi.shape[0]], theta)
        default = float(H - 1 - h)  # H - h in the paper's count from 1: the most that the later steps can pay
        for s in range(S):
            best = -np.inf
            for a in range(A):
                if legal[h % legal.shape[0], s, a]:
                    i = s * A + a
                    n = math.sqrt(squared_norms[h, i])
                    q = linear[i, 0] + interpolate(n, linear[i, 1], default, alpha_L, alpha_U)
                    if q > best:
                        best = q
                        pi[h, s] = a
            V[h, s] = best
    return V, pi


@njit(cache=True)
def _observe(phi, n_actions, states, actions, L, cross, squared_norms):  # type: ignore[no-untyped-def]
    """Line 14 and the sums of line 6, for trajectories (m, H); the norms follow by Sherman-Morrison."""
    H = L.shape[0]
    for j in range(states.shape[0]):
        for h in range(H):
            f = phi[h % phi.shape[0]]
            x = f[states[j, h] * n_actions + actions[j, h]]
            u = solve_upper(L[h], solve_lower(L[h], x))
            downdate_norms(squared_norms[h], f, u, np.dot(x, u))
            cholesky_update(L[h], x)
            if h + 1 < H:
                cross[h, :, states[j, h + 1]] += x


@njit(cache=True)
def _fresh_norms(phi, L, squared_norms):  # type: ignore[no-untyped-def]
    for h in range(L.shape[0]):
        f = phi[h % phi.shape[0]]
        for i in range(f.shape[0]):
            y = solve_lower(L[h], f[i])
            squared_norms[h, i] = np.dot(y, y)


@njit(cache=True)
def _play_dense(cdf, phi, concat, first, second, start, u):  # type: ignore[no-untyped-def]
    """Line 11 on a dense kernel, cdf (H, S, A, S), with uniforms u (2, H) -> states, actions (2, H), Delta (d_r,)."""
    H, A, d = cdf.shape[0], cdf.shape[2], phi.shape[2]
    states = np.empty((2, H), dtype=np.int64)
    actions = np.empty((2, H), dtype=np.int64)
    delta = np.zeros(H * d if concat else d)
    for j in range(2):
        s = start
        for h in range(H):
            a = np.int64(first[h, s] if j == 0 else second[h, s])
            states[j, h] = s
            actions[j, h] = a
            x, at = phi[h % phi.shape[0], s * A + a], h * d if concat else 0
            for k in range(d):
                delta[at + k] += x[k] if j == 0 else -x[k]
            s = np.searchsorted(cdf[h, s, a], u[j, h], side="right")
    return states, actions, delta


@njit(cache=True)
def _evaluate_dense(P, reward, pi):  # type: ignore[no-untyped-def]
    """V^pi at the first step, (S,), exactly."""
    H, S = pi.shape
    v = np.zeros(S)
    for h in range(H - 1, -1, -1):
        new = np.empty(S)
        for s in range(S):
            a = pi[h, s]
            new[s] = reward[h, s, a] + np.dot(P[h, s, a], v)
        v = new
    return v


RECORD = np.dtype(
    [
        ("policy", np.int64),  # index into `policies`: pi_t^0
        ("comparator", np.int64),  # index into `policies`: pi_t^1
        ("queried", np.bool_),
        ("label", np.int8),  # o_t: 1 first preferred, 0 second, -1 not asked
        ("regret", np.float64),  # 2 V* - V^{pi_t^0} - V^{pi_t^1}, exact
        ("length", np.float64),  # ||Delta_t||_2
        ("disagreement", np.float64),  # the left side of line 12
        ("log_det", np.float64),  # log det(Sigma_r) / det(lambda I), after the episode
        (
            "error",
            np.float64,
        ),  # ||theta_hat_r - theta*||_{Sigma_r}, before the episode; NaN if theta* is unknown
        ("optimism", np.float64),  # rho V_bar_1 - V*
    ]
)


class PRLSVI:
    """A run of PR-LSVI that can be continued: `advance(N)` then `advance(M)` equals `advance(N + M)` bit for bit,
    also through `save` and `load`.

    model       a FiniteMDP with features; its reward serves the exact regret only
    annotator   answers the queries
    seed        of the learner's and the world's randomness; the annotator has its own

    records     structured array, one row an episode (see `RECORD`)
    policies    the distinct policies played, each a layered int array; values[i] is the exact value of policies[i]
    """

    def __init__(self, model: FiniteMDP, annotator: Annotator, settings: Settings, seed: int = 0) -> None:
        self.model, self.annotator, self.settings, self.seed = model, annotator, settings, seed
        self.features = linear_features(model)
        self.rng = np.random.default_rng(seed)
        d_r, H, d = self.features.dim, model.horizon, self.features.d
        self.optimal_value = value_iteration(model).value
        self.mle = OnlinePreferenceMLE(
            d_r, radius=settings.B, link=annotator.link or LOGISTIC, growth=settings.mle_growth
        )
        self.L_r = math.sqrt(settings.lam) * np.eye(d_r)
        self._learning = settings.transitions == "learned"
        if model.uniform:
            self._phi = _stationary([p.reshape(-1, d) for p in self.features.phi])
        if self._learning:
            if not model.uniform:
                raise ValueError(
                    f"{model.name} has layers of different sizes; use transitions='known', or a uniform model"
                )
            mask = model.action_mask
            self._legal = (
                np.ones((1, *self.features.phi[0].shape[:2]), np.bool_) if mask is None else np.array(mask)
            )
            self.L_P = np.tile(math.sqrt(settings.lam) * np.eye(d), (H, 1, 1))
            self.cross = np.zeros((H, d, model.sizes[0]))
            self.squared_norms = np.empty((H, model.sizes[0] * model.n_actions))
            _fresh_norms(self._phi, self.L_P, self.squared_norms)
        self._dense = None
        if isinstance(model.kernel, DenseKernel) and model.uniform:
            P = np.ascontiguousarray(np.stack(list(model.kernel.P)))
            cdf = np.cumsum(P, axis=-1)
            self._dense = P, cdf / cdf[..., -1:], np.ascontiguousarray(model.reward)
        self._initial_cdf = np.cumsum(model.initial) / model.initial.sum()
        self.policies: list[Layered] = []
        self.values: list[float] = []
        self._policy_index: dict[bytes, int] = {}
        self._records = np.empty(0, RECORD)
        self._episodes = 0
        self._log_det = 0.0
        self._error = self._error_norm()
        self._previous = self._remember(self._first_policy())  # line 1

    # ---- the algorithm -------------------------------------------------------------------------------------------

    def advance(self, episodes: int) -> Self:
        """Run `episodes` more episodes. An exception (a spent budget, say) leaves the run at the last whole episode."""
        self._reserve(episodes)
        for _ in range(episodes):
            before = self.rng.bit_generator.state
            try:
                self._episode()
            except BaseException:
                self.rng.bit_generator.state = before
                raise
        return self

    def _episode(self) -> None:
        H, s = self.model.horizon, self.settings
        normal = self.rng.standard_normal(self.features.dim + (H * self.features.d if self._learning else 0))
        uniform = self.rng.random(2 + 2 * H)
        theta_bar = self._perturb(normal[: self.features.dim])
        optimistic_value, policy = self._plan(theta_bar, normal[self.features.dim :])
        new = self._remember(policy)
        old = self._comparator(new)
        start = int(np.searchsorted(self._initial_cdf, uniform[0], side="right"))
        pair, delta = self._play(self.policies[new], self.policies[old], start, uniform[2:].reshape(2, H))
        whitened = solve_lower(self.L_r, delta)
        gap = float(disagreement(math.sqrt(whitened @ whitened), s.sigma_r))
        label, error = -1, self._error
        if queried := self._query(gap, uniform[1]):
            label = int(self.annotator.compare(pair[:1], pair[1:])[0])
        # Nothing of the run has changed so far: a spent budget or an interruption above loses nothing.
        self._learn_reward(delta, label)
        if self._learning:
            self._learn_transitions(pair)
        regret = 2 * self.optimal_value - self.values[new] - self.values[old]
        optimism = optimistic_value - self.optimal_value
        self._records[self._episodes] = (
            new,
            old,
            queried,
            label,
            regret,
            math.sqrt(delta @ delta),
            gap,
            self._log_det,
            error,
            optimism,
        )
        self._previous = new
        self._episodes += 1

    def _perturb(self, z: Array) -> Array:
        """Line 4: theta_hat_r + sigma_r L^{-T} z has covariance sigma_r^2 Sigma_r^{-1}."""
        return self.mle.theta + self.settings.sigma_r * solve_upper(self.L_r, z)

    def _plan(self, theta_bar: Array, z: Array) -> tuple[float, Layered]:
        """Lines 5-9: the optimistic value rho V_bar_1 and the greedy policy."""
        if not self._learning:
            solution = value_iteration(self.model, self.features.rewards(theta_bar), q=False)
            return solution.value, self.model.layered([p.astype(np.int16) for p in solution.policy])
        s = self.settings
        V, pi = _plan(
            self._phi,
            theta_bar.reshape(-1, self.features.d),
            self._legal,
            self.L_P,
            self.cross,
            self.squared_norms,
            z.reshape(self.model.horizon, -1),
            s.sigma_P,
            s.alpha_L,
            s.alpha_U,
        )
        return float(self.model.initial @ V[0]), pi

    def _comparator(self, new: int) -> int:
        """Line 10: the previous episode's policy."""
        return self._previous

    def _play(self, first: Layered, second: Layered, start: int, u: Array) -> tuple[Trajectories, Array]:
        """Line 11: one trajectory of each policy from the same first state, and Delta = phi(tau^0) - phi(tau^1)."""
        if self._dense is not None:
            concat = self.features.mode == "concat"
            states, actions, delta = _play_dense(self._dense[1], self._phi, concat, first, second, start, u)
            return Trajectories(states, actions), delta
        states = np.empty((2, self.model.horizon), dtype=np.int64)
        actions = np.empty_like(states)
        s = np.array([start, start])
        for h in range(self.model.horizon):
            a = np.array([first[h][s[0]], second[h][s[1]]], dtype=np.int64)
            states[:, h], actions[:, h] = s, a
            s = self.model.kernel.sample(h, s, a, u[:, h])
        pair = Trajectories(states, actions)
        phi = self.features.of(pair)
        return pair, phi[0] - phi[1]

    def _query(self, gap: float, coin: float) -> bool:
        """Line 12; the coin is for the passive baseline alone."""
        if self.settings.query_rate is not None:
            return coin < self.settings.query_rate
        return gap > self.settings.eps

    def _learn_reward(self, delta: Array, label: int) -> None:
        """Lines 13 and 3: Sigma_r and the MLE change on queried episodes only."""
        if label >= 0:
            self._count(delta)
            self.mle.add(delta, label)
            self._error = self._error_norm()

    def _count(self, delta: Array) -> None:
        """Sigma_r += Delta Delta^T."""
        cholesky_update(self.L_r, delta)
        self._log_det = float(2 * np.log(np.diag(self.L_r)).sum() - len(delta) * math.log(self.settings.lam))

    def _learn_transitions(self, pair: Trajectories) -> None:
        """Line 14."""
        m = 2 if self.settings.transition_data == "both" else 1
        self._observe(pair.states[:m], pair.actions[:m], self.cross)
        if (self._episodes + 1) % NORM_REFRESH == 0:
            _fresh_norms(self._phi, self.L_P, self.squared_norms)

    def _observe(self, states: Index, actions: Index, cross: Array) -> None:
        _observe(self._phi, self.model.n_actions, states, actions, self.L_P, cross, self.squared_norms)

    # ---- bookkeeping ---------------------------------------------------------------------------------------------

    def _first_policy(self) -> Layered:
        """pi_0, arbitrary: the first legal action everywhere."""
        mask = self.model.action_mask
        layers = [
            (np.zeros(n) if mask is None else np.argmax(mask[h], axis=1)).astype(np.int16)
            for h, n in enumerate(self.model.sizes[:-1])
        ]
        return self.model.layered(layers)

    def _remember(self, policy: Layered) -> int:
        """The index of a policy; each distinct policy is stored and evaluated once."""
        key = _key(policy)
        if key not in self._policy_index:
            if self._dense is not None:
                value = float(self.model.initial @ _evaluate_dense(self._dense[0], self._dense[2], policy))
            elif isinstance(self.model.kernel, TreeKernel):
                value = _follow(self.model, policy)
            else:
                value = evaluate(self.model, policy).value
            self._policy_index[key] = len(self.policies)
            self.policies.append(policy)
            self.values.append(value)
        return self._policy_index[key]

    def _error_norm(self) -> float:
        if self.model.theta is None:
            return math.nan
        return float(np.linalg.norm(self.L_r.T @ (self.mle.theta - self.model.theta)))

    def _reserve(self, episodes: int) -> None:
        if episodes < 0:
            raise ValueError(f"episodes is {episodes}; it must be at least 0")
        missing = self._episodes + episodes - len(self._records)
        if missing > 0:
            grown = np.zeros(len(self._records) + max(missing, len(self._records)), RECORD)
            grown[: self._episodes] = self._records[: self._episodes]
            self._records = grown

    @property
    def records(self) -> np.ndarray:
        return self._records[: self._episodes]

    @property
    def theta_hat(self) -> Array:
        """The MLE of line 3."""
        return self.mle.theta

    # ---- save and load -------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the whole state as one .npz without pickles; the file appears by rename."""
        arrays: dict[str, Any] = {"records": self.records, "values": np.array(self.values), "L_r": self.L_r}
        arrays |= {f"mle_{name}": value for name, value in self.mle.arrays().items()}
        if self._learning:
            arrays |= {"L_P": self.L_P, "cross": self.cross, "squared_norms": self.squared_norms}
        for h in range(self.model.horizon):
            arrays[f"policies_{h}"] = np.stack([p[h] for p in self.policies])
        meta = {
            "format": FORMAT_VERSION,
            "algorithm": "pr_lsvi",
            "model": self.model.name,
            "settings": asdict(self.settings),
            "seed": self.seed,
            "previous": self._previous,
            "log_det": self._log_det,
            "rng": self.rng.bit_generator.state,
            "annotator": self.annotator.checkpoint(),
        }
        arrays["meta"] = np.frombuffer(json.dumps(meta).encode(), dtype=np.uint8)
        target = Path(path)
        temporary = target.with_name(f".{target.name}.{os.getpid()}.part")
        try:
            with temporary.open("wb") as file:
                np.savez(file, **arrays)
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: FiniteMDP, annotator: Annotator) -> PRLSVI:
        """Continue a saved run on the same model; the annotator is brought to where it stood."""
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        if "meta" not in arrays:
            raise ValueError(f"{path} is not a saved run of PR-LSVI")
        meta = json.loads(arrays["meta"].tobytes())
        if meta["format"] > FORMAT_VERSION:
            raise ValueError(
                f"{path} has format {meta['format']}, newer than {FORMAT_VERSION}: update preflab"
            )
        if meta["model"] != model.name:
            raise ValueError(f"{path} is a run on {meta['model']!r}, not on {model.name!r}")
        known = {f.name for f in fields(Settings)}
        run = cls(
            model,
            annotator,
            Settings(**{k: v for k, v in meta["settings"].items() if k in known}),
            meta["seed"],
        )
        run.rng.bit_generator.state = meta["rng"]
        annotator.restore(meta["annotator"])
        run.mle = OnlinePreferenceMLE.from_arrays(
            {name[4:]: value for name, value in arrays.items() if name.startswith("mle_")}
        )
        run.L_r = arrays["L_r"]
        if run._learning:
            run.L_P, run.cross, run.squared_norms = (arrays[k] for k in ("L_P", "cross", "squared_norms"))
        run.policies, run.values, run._policy_index = [], [], {}
        for i, value in enumerate(arrays["values"]):
            layers = [arrays[f"policies_{h}"][i] for h in range(model.horizon)]
            run.policies.append(model.layered(layers))
            run._policy_index[_key(run.policies[-1])] = i
            run.values.append(float(value))
        run._records = arrays["records"].astype(RECORD)
        run._episodes = len(run._records)
        run._previous, run._log_det = meta["previous"], meta["log_det"]
        run._error = run._error_norm()
        return run


def _follow(model: FiniteMDP, policy: Layered) -> float:
    """The exact value of a deterministic policy on a deterministic kernel: one path for each first state."""
    start = np.flatnonzero(model.initial)
    s, total = start, np.zeros(len(start))
    for h in range(model.horizon):
        a = policy[h][s].astype(np.int64)
        total += model.reward[h][s, a]
        s = model.kernel.sample(h, s, a, np.zeros(len(s)))
    return float(model.initial[start] @ total)


def _key(policy: Layered) -> bytes:
    return policy.tobytes() if isinstance(policy, np.ndarray) else b"".join(p.tobytes() for p in policy)


def _stationary(layers: list[Array]) -> Array:
    """(1, ...) where all layers are one and the same array, else (H, ...)."""
    same = all(x is layers[0] or np.array_equal(x, layers[0]) for x in layers[1:])
    return np.ascontiguousarray(layers[:1] if same else layers)


ALGORITHM = AlgorithmSpec(
    name="pr_lsvi",
    title="PR-LSVI: preference-based and randomized least-squares value iteration",
    paper="Wu and Sun, ICLR 2024, arXiv 2310.14554",
    settings=Settings,
    start=PRLSVI,
    load=PRLSVI.load,
    presets={"scaled": Settings.scaled, "theory": Settings.theory},
)
