"""What the claims of `pr_lsvi` measure: worlds, planted faults and cells. See `pr_lsvi` for the claims themselves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from ...algorithms.estimation import confidence_radius, disagreement, fit_preferences
from ...algorithms.estimation.linear_algebra import cholesky_update, solve_lower
from ...algorithms.planning import occupancy, value_iteration
from ...algorithms.pr_lsvi import PRLSVI, Settings, interpolate
from ...envs import FiniteMDP, Trajectories
from ...envs.annotators import Annotator, BradleyTerry
from ...envs.kernels import Array
from ...envs.language_world import load_language_world
from ...envs.linear_mdp import hypercube_mdp, random_linear_mdp, tabular_linear_mdp
from ...envs.links import LOGISTIC
from ...envs.mdp import Layered

# ---- worlds: fixed instances; the seeds of a claim vary the run, not the world ---------------------------------------


@lru_cache(maxsize=8)
def world(name: str) -> FiniteMDP:
    """A named instance, with the assumptions of the theory checked on it."""
    if name == "tabular":
        # the laboratory instance of the spec: one-hot features of 3 states, 2 actions, 3 steps
        rng = np.random.default_rng(0)
        P, r = rng.dirichlet(np.full(3, 0.5), size=(3, 3, 2)), rng.random((3, 2))
        model: FiniteMDP = tabular_linear_mdp(FiniteMDP.dense(P, np.broadcast_to(r, (3, 3, 2))))
    elif name == "random_linear":
        model = random_linear_mdp(10, 4, 6, 4, seed=0)
    elif name == "hypercube":
        model = hypercube_mdp()
    elif name == "language":
        model = load_language_world()
    else:
        raise ValueError(f"world {name!r} is not one of tabular, random_linear, hypercube, language")
    check_assumptions(model)
    return model


def known(model: FiniteMDP) -> bool:
    """A token world's transitions are known to the learner: appending a token."""
    return not model.uniform


def check_assumptions(model: FiniteMDP) -> None:
    """||phi|| <= 1 and a linear reward; for learned transitions also rewards in [0, 1] (the default value H - h)."""
    assert model.features is not None
    if model.features.max_norm > 1 + 1e-9:
        raise ValueError(f"{model.name}: max ||phi|| = {model.features.max_norm:.4g} exceeds 1")
    if model.theta is None:
        raise ValueError(f"{model.name}: the reward is not linear")
    if not known(model) and not all(((r >= -1e-9) & (r <= 1 + 1e-9)).all() for r in model.reward):
        raise ValueError(f"{model.name}: rewards leave [0, 1]")


def settings(model: FiniteMDP, eps: float, preset: str = "scaled", **changes: Any) -> Settings:
    make: Any = {"scaled": Settings.scaled, "theory": Settings.theory}[preset]
    return make(model, eps, transitions="known" if known(model) else "learned", **changes)


# ---- planted faults: each breaks one line of the algorithm, and some claim must notice -------------------------------


class SamePolicy(PRLSVI):
    """Line 10 broken: the comparator is the new policy itself."""

    def _comparator(self, new: int) -> int:
        return new


class CountsUnqueried(PRLSVI):
    """Line 13 broken: Sigma_r grows on every episode, asked or not."""

    def _learn_reward(self, delta: Array, label: int) -> None:
        if label < 0:
            self._count(delta)
        super()._learn_reward(delta, label)


class SharedCovariance(PRLSVI):
    """Line 14 broken: one covariance, fed by all steps, serves every h."""

    def _learn_transitions(self, pair: Trajectories) -> None:
        H = self.model.horizon
        for h in range(H):  # every step's factor also sees the features of the H - 1 other steps
            states, actions = (np.roll(x, h, axis=1) for x in (pair.states, pair.actions))
            cross = self.cross if h == 0 else np.zeros_like(self.cross)
            self._observe(states, actions, cross)


class RewardInTarget(PRLSVI):
    """Line 6 broken: the regression target is r + V_bar_{h+1} in place of V_bar_{h+1}."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._rewards_seen = np.zeros((self.model.horizon, self.features.d))

    def _learn_transitions(self, pair: Trajectories) -> None:
        super()._learn_transitions(pair)
        for h, (phi, r) in enumerate(zip(self.features.phi, self.model.reward, strict=True)):
            s, a = pair.states[:, h], pair.actions[:, h]
            self._rewards_seen[h] += r[s, a] @ phi[s, a]

    def _plan(self, theta_bar: Array, z: Array) -> tuple[float, Layered]:
        # theta_bar_P = L^{-T} (L^{-1} b + sigma_P z): adding L^{-1} c / sigma_P to z adds Sigma^{-1} c.
        extra = [solve_lower(L, c) for L, c in zip(self.L_P, self._rewards_seen, strict=True)]
        return super()._plan(theta_bar, z + np.concatenate(extra) / self.settings.sigma_P)


class ThresholdOnSquare(PRLSVI):
    """Line 12 broken: eps is held against the square of the disagreement."""

    def _query(self, gap: float, coin: float) -> bool:
        return super()._query(gap**2, coin)


class ThresholdOnRoot(PRLSVI):
    """Line 12 broken: eps is held against the root of the disagreement, so that eps^-4 queries are asked."""

    def _query(self, gap: float, coin: float) -> bool:
        return super()._query(math.sqrt(gap), coin)


class AsksTheKnown(PRLSVI):
    """Line 12 broken: asks where the draws agree, and not where they disagree."""

    def _query(self, gap: float, coin: float) -> bool:
        return not super()._query(gap, coin)


class NormOfOne(PRLSVI):
    """Line 11 broken: Delta is the feature of the new trajectory, not the difference."""

    def _play(self, first: Layered, second: Layered, start: int, u: Array) -> tuple[Trajectories, Array]:
        pair, _ = super()._play(first, second, start, u)
        return pair, self.features.of(pair)[0]


class Scheduled(PRLSVI):
    """The passive baseline at exactly q labels: they are asked on q episodes drawn at random beforehand."""

    schedule: np.ndarray

    def _query(self, gap: float, coin: float) -> bool:
        return bool(self.schedule[self._episodes])


class Watched(PRLSVI):
    """Keeps what a claim looks at: theta_bar and the past pairs, and the optimistic value of each plan."""

    def __init__(self, *args: Any) -> None:
        self.theta_bar: Array = np.empty(0)
        self.value_bar = math.nan
        self.pairs: list[Trajectories] = []
        super().__init__(*args)

    def _plan(self, theta_bar: Array, z: Array) -> tuple[float, Layered]:
        self.theta_bar = theta_bar
        self.value_bar, policy = super()._plan(theta_bar, z)
        return self.value_bar, policy

    def _learn_transitions(self, pair: Trajectories) -> None:
        self.pairs.append(pair)
        super()._learn_transitions(pair)


class WatchedShared(Watched, SharedCovariance):
    pass


class WatchedReward(Watched, RewardInTarget):
    pass


FAULTS: dict[str, type[PRLSVI]] = {
    "none": PRLSVI,
    "same_policy": SamePolicy,
    "counts_unqueried": CountsUnqueried,
    "shared_covariance": SharedCovariance,
    "reward_in_target": RewardInTarget,
    "threshold_on_square": ThresholdOnSquare,
    "threshold_on_root": ThresholdOnRoot,
    "asks_the_known": AsksTheKnown,
    "norm_of_one": NormOfOne,
}


class Rates(BradleyTerry):
    """A broken annotator: it rates the first trajectory alone, sigma(r(first) - 1), and ignores the second."""

    def _probability(self, pairs: np.ndarray) -> Array:
        n = len(pairs)
        return LOGISTIC.value(self.model.returns(Trajectories(pairs[:n, 0, 0], pairs[:n, 0, 1])) - 1.0)


def annotator(model: FiniteMDP, seed: int, kind: str = "bradley_terry") -> Annotator:
    """Answers from their own stream; `flipped` prefers the worse one."""
    stream = np.random.SeedSequence([seed, 1])
    if kind == "rates":
        return Rates(model, stream, keep_log=False)
    reward = [-r for r in model.reward] if kind == "flipped" else None
    return BradleyTerry(model, stream, reward=reward)


# ---- cells -----------------------------------------------------------------------------------------------------------


def rule(*, seed: int, formula: str = "paper") -> dict[str, Any]:
    """Line 12 on a random ellipsoid: the closed form, a Monte-Carlo mean with its error, and a quadrature."""
    rng = np.random.default_rng(seed)
    d = int(rng.integers(1, 9))
    A = rng.standard_normal((d, d))
    Sigma, Delta, sigma_r = A @ A.T + np.eye(d), rng.standard_normal(d), float(rng.uniform(0.1, 3))
    norm = float(np.sqrt(Delta @ np.linalg.solve(Sigma, Delta)))
    closed = {
        "paper": lambda: disagreement(norm, sigma_r),
        "sigma_squared": lambda: disagreement(norm, sigma_r**2),
        "one_draw": lambda: disagreement(norm, sigma_r) / math.sqrt(2),
    }[formula]()
    draws = sigma_r * np.linalg.solve(np.linalg.cholesky(Sigma).T, rng.standard_normal((d, 200_000)))
    gaps = np.abs(Delta @ (draws[:, ::2] - draws[:, 1::2]))
    # E|X - Y| for X, Y ~ N(0, s^2) is the integral of 2 F (1 - F), F the law of X: no formula for |N| is used.
    s = sigma_r * norm
    x = np.linspace(-12 * s, 12 * s, 4001)
    F = np.asarray([0.5 * math.erfc(-t / (s * math.sqrt(2))) for t in x])
    return {
        "closed": float(closed),
        "sampled": float(gaps.mean()),
        "standard_error": float(gaps.std() / math.sqrt(len(gaps))),
        "quadrature": float(np.trapezoid(2 * F * (1 - F), x)),
    }


def run(
    *,
    seed: int,
    world: str,
    T: int,
    eps: float,
    checkpoints: Sequence[int] | None = None,
    fault: str = "none",
    labels: str = "bradley_terry",
    preset: str = "scaled",
    changes: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """One run: regret and queries at the checkpoints, and the deterministic events of every episode."""
    model = _world(world)
    run = FAULTS[fault](
        model, annotator(model, seed, labels), settings(model, eps, preset, **(changes or {})), seed
    )
    records = run.advance(T).records
    at = np.asarray(checkpoints or [T]) - 1
    regret, queries = np.cumsum(records["regret"]), np.cumsum(records["queried"])
    d_r, s = run.features.dim, run.settings
    c = math.pi * eps**2 / (4 * s.sigma_r**2) if s.sigma_r > 0 else math.inf
    longest = float(records["length"][records["queried"]].max(initial=0.0))
    upper = d_r * np.log1p(queries * longest**2 / (d_r * s.lam))
    log_det = records["log_det"]
    begun = queries > 0
    D = run.mle.differences
    queried_alone = np.linalg.slogdet(s.lam * np.eye(d_r) + D.T @ D)[1] - d_r * math.log(s.lam)
    equal = records["length"] == 0.0
    gaps = model_gaps(run)
    boundary = gaps[records["policy"][-1]] + gaps[0]
    return {
        "regret": regret[at],
        "queries": queries[at],
        "log_det_above": float((log_det - queries * math.log1p(c))[begun].min(initial=math.inf)),
        "log_det_below": float((upper - log_det)[begun].min(initial=math.inf)),
        "log_det_error": float(abs(log_det[-1] - queried_alone)),
        "equal": int(equal.sum()),
        "equal_and_asked": int((equal & records["queried"]).sum()),
        "regret_identity": float(abs(regret[-1] - 2 * gaps[records["policy"][:-1]].sum() - boundary)),
    }


def model_gaps(run: PRLSVI) -> Array:
    """V* - V^pi for every policy of a run, by a second route: <occupancy, reward> in place of backward evaluation."""
    best = value_iteration(run.model).value
    gaps = np.empty(len(run.policies))
    for i, policy in enumerate(run.policies):
        mu = occupancy(run.model, policy)
        gaps[i] = best - sum(float((m * r).sum()) for m, r in zip(mu, run.model.reward, strict=True))
    return gaps


def twin(*, seed: int, T: int, eps: float, shift: float, labels: str = "bradley_terry") -> dict[str, Any]:
    """Two runs with the same seeds, on the tabular world and on the same world with `shift` added to every reward."""
    model = _world("tabular")
    reward = np.asarray(model.reward)
    shifted = FiniteMDP(
        kernel=model.kernel,
        reward=reward * (1 + shift) if labels == "scaled" else reward + shift,
        initial=model.initial,
        features=model.features,
    )
    kind = "rates" if labels == "rates" else "bradley_terry"
    a, b = (
        PRLSVI(m, annotator(m, seed, kind), settings(model, eps), seed).advance(T).records
        for m in (model, shifted)
    )
    columns = ("queried", "label", "disagreement", "log_det", "regret")
    return {name: float(np.abs(a[name].astype(float) - b[name].astype(float)).max()) for name in columns}


def coverage(
    *, seed: int, world: str, T: int, eps: float, delta: float, labels: str = "bradley_terry"
) -> dict[str, Any]:
    """At theory settings: theta* in the ellipsoid, and the score within its self-normalised bound, at every count."""
    model = _world(world)
    s = settings(model, eps, "theory", mle_growth=0.05)
    run = PRLSVI(model, annotator(model, seed, labels), s, seed).advance(T)
    D, o = run.mle.differences, run.mle.wins
    theta, d_r = model.theta, run.features.dim
    assert theta is not None
    worst_score = worst_ellipsoid = 0.0
    for q in np.unique(np.geomspace(1, len(o), 25).astype(int)):
        fit = fit_preferences(D[:q], o[:q], radius=s.B, tolerance=1e-8)
        L = np.linalg.cholesky(s.lam * np.eye(d_r) + D[:q].T @ D[:q])
        log_det = 2 * np.log(np.diag(L)).sum() - d_r * math.log(s.lam)
        score = D[:q].T @ (o[:q] - LOGISTIC.value(D[:q] @ theta))
        bound = 0.5 * math.sqrt(2 * math.log(1 / delta) + log_det)
        worst_score = max(worst_score, float(np.linalg.norm(solve_lower(L, score))) / bound)
        # kappa on the segment between estimate and truth is all that the proof needs
        kappa = LOGISTIC.kappa(float(np.abs(D[:q] @ np.stack([fit.theta, theta]).T).max()))
        radius = confidence_radius(log_det, delta=delta, kappa=kappa, regularisation=s.lam, radius=s.B)
        worst_ellipsoid = max(worst_ellipsoid, float(np.linalg.norm(L.T @ (fit.theta - theta))) / radius)
    return {"score": worst_score, "ellipsoid": worst_ellipsoid, "queries": len(o)}


def optimism(
    *,
    seed: int,
    world: str,
    T: int,
    eps: float,
    preset: str = "theory",
    changes: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """V_bar_1 - V* at the last episode, and the same relative to the comparator: V_bar_1 - <phi(pi_{t-1}), theta_bar>
    against V* - V^{pi_{t-1}}, which is what a comparison can show (a constant in the reward cannot be learnt)."""
    model = _world(world)
    run = Watched(model, annotator(model, seed), settings(model, eps, preset, **(changes or {})), seed)
    run.advance(T)
    last = run.records[-1]
    mu = occupancy(model, run.policies[last["comparator"]])
    bar = run.features.rewards(run.theta_bar)
    value_bar, value = (
        sum(float((m * r).sum()) for m, r in zip(mu, reward, strict=True)) for reward in (bar, model.reward)
    )
    best = value_iteration(model).value
    return {"absolute": run.value_bar - best, "relative": (run.value_bar - value_bar) - (best - value)}


def regression(*, seed: int, T: int, eps: float, fault: str = "none") -> dict[str, Any]:
    """V_bar_1 of a tabular run against the same lines written with visit counts (one-hot ridge regression)."""
    model = _world("tabular")
    kind: type[Watched] = {
        "none": Watched,
        "shared_covariance": WatchedShared,
        "reward_in_target": WatchedReward,
    }[fault]
    # sigma_P so small that the value noise is below the tolerance, yet a fault may divide by it
    s = settings(model, eps, sigma_P=1e-12)
    run = kind(model, annotator(model, seed), s, seed).advance(T)
    H, S, A = model.horizon, model.sizes[0], model.n_actions
    N = np.zeros((H, S, A, S))
    visits = np.zeros((H, S, A))
    for pair in run.pairs:
        np.add.at(visits, (np.arange(H), pair.states, pair.actions), 1)
        np.add.at(N, (np.arange(H - 1), pair.states[:, :-1], pair.actions[:, :-1], pair.states[:, 1:]), 1)
    run.advance(1)
    theta = run.theta_bar.reshape(H, S, A)
    V = np.zeros(S)
    for h in reversed(range(H)):
        n = 1 / np.sqrt(visits[h] + s.lam)
        target = (N[h] @ V) / (visits[h] + s.lam)
        omega = [
            interpolate(float(x), float(y), float(H - 1 - h), s.alpha_L, s.alpha_U)
            for x, y in zip(n.ravel(), target.ravel(), strict=True)
        ]
        V = (theta[h] + np.reshape(omega, (S, A))).max(axis=1)
    return {"error": float(abs(run.value_bar - model.initial @ V))}


def stream(*, seed: int, d: int, T: int, eps: Sequence[float], power: float = 1.0) -> dict[str, Any]:
    """Line 12 on T isotropic unit differences in R^d, sigma_r = lambda = 1: the queries at each threshold.

    power: eps is held against disagreement ** power (1 in the paper)."""
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((T, d))
    X /= np.linalg.norm(X, axis=1, keepdims=True)
    queries = []
    for e in eps:
        L, q = np.eye(d), 0
        for x in X:
            y = solve_lower(L, x)
            if disagreement(math.sqrt(y @ y), 1.0) ** power > e:
                cholesky_update(L, x)
                q += 1
        queries.append(q)
    return {"queries": queries}


def matched(
    *, seed: int, world: str, T: int, eps: float, fault: str = "none", labels: str = "bradley_terry"
) -> dict[str, Any]:
    """Chosen queries (with a fault, or answered otherwise) and as many at random, same seeds: regret of each."""
    model = _world(world)
    s = settings(model, eps)
    chosen = FAULTS[fault](model, annotator(model, seed, labels), s, seed).advance(T).records
    used = int(chosen["queried"].sum())
    random = Scheduled(model, annotator(model, seed), s, seed)
    random.schedule = np.zeros(T, bool)
    random.schedule[np.random.default_rng([seed, 2]).choice(T, size=used, replace=False)] = True
    passive = random.advance(T).records
    return {
        "active": float(chosen["regret"].sum()),
        "passive": float(passive["regret"].sum()),
        "labels": used,
    }


_world = world
