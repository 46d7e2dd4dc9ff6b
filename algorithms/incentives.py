r"""Rewards fitted with an incentive on the value they promise: what VPO, XPO and RPO share, and their rounds online.

Bandits with n responses, a reference ref with full support, a temperature beta > 0 and

  J(r, pi) = E_pi[r] - beta KL(pi, ref),   J*(r) = max_pi J(r, pi) = beta log E_ref exp(r / beta)      `best_value`
  pi_r     = ref exp(r / beta) / Z,        J*(r) - J(r, pi) = beta KL(pi, pi_r)                 `policy_of`, `shortfall`

Bradley-Terry comparisons fix a reward up to a constant, which a law q (calibration, baseline) takes out:

  minimise over r   ell(r) + incentive (J*(r) - E_q r),   ell(r) = -sum_ij wins_ij log sigma(r_i - r_j)    `fit_rewards`

incentive > 0 is pessimism (a convex problem), < 0 optimism, 0 maximum likelihood. Nothing in it sees a constant, so the
class of rewards is {r: max r - min r <= box}, searched as the cube |r_y| <= box / 2. Optimism needs the bound: a
response that was never compared would else be promised anything.

Rounds online are batched: arrays have the seeds' axis first, so that a round costs the same for one seed and for fifty.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import expit, log_expit

from ..envs.kernels import Array
from .optimisation.losses import check_positive
from .planning.games import divergences

_STEPS = 200
_CERTIFIED = 1e-8  # the largest residual of an answer
_RESIDUAL = 1e-11  # where the iterations stop


# ---- values ----------------------------------------------------------------------------------------------------------


def _log_partition(log_weights: Array) -> Array:
    """log sum exp along the last axis, which is kept; scipy's takes ten times as long on short rows."""
    peak = log_weights.max(-1, keepdims=True)
    return np.asarray(peak + np.log(np.exp(log_weights - peak).sum(-1, keepdims=True)))


def best_value(rewards: ArrayLike, log_reference: ArrayLike, beta: float) -> Array:
    """J*(r) = beta log E_ref exp(r / beta) along the last axis."""
    r = np.asarray(rewards, dtype=np.float64)
    return np.asarray(
        beta * _log_partition(np.asarray(log_reference) + r / check_positive(beta, "beta"))[..., 0]
    )


def policy_of(rewards: ArrayLike, log_reference: ArrayLike, beta: float) -> tuple[Array, Array]:
    """pi_r = ref exp(r / beta) / Z and its logarithm, along the last axis."""
    log_weights = np.asarray(log_reference) + np.asarray(rewards, dtype=np.float64) / check_positive(
        beta, "beta"
    )
    log_policy = log_weights - _log_partition(log_weights)
    return np.exp(log_policy), log_policy


def shortfall(log_policy: ArrayLike, rewards: ArrayLike, log_reference: ArrayLike, beta: float) -> Array:
    """J*(r) - J(r, pi) = beta KL(pi, pi_r) >= 0, along the last axis."""
    return np.asarray(beta * divergences(np.asarray(log_policy), policy_of(rewards, log_reference, beta)[1]))


def comparison_loss(wins: ArrayLike, rewards: ArrayLike) -> Array:
    """ell(r), a sum over all comparisons; wins (..., n, n), [i, j] = how often i beat j; rewards (..., n)."""
    r = np.asarray(rewards, dtype=np.float64)
    return np.asarray(-(np.asarray(wins) * log_expit(r[..., :, None] - r[..., None, :])).sum((-1, -2)))


# ---- the fit ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class RewardFit:
    """rewards (..., n) in the cube; value = the objective; residual = max |r - clip(r - gradient)| over the number of
    comparisons plus |incentive|: 0 at stationary points alone, which are the minimisers where incentive >= 0."""

    rewards: Array
    value: Array
    residual: Array


def fit_rewards(
    wins: ArrayLike,
    log_reference: ArrayLike,
    beta: float,
    *,
    incentive: ArrayLike = 0.0,
    law: ArrayLike | None = None,
    box: float,
    start: ArrayLike | None = None,
) -> RewardFit:
    """argmin of ell(r) + incentive (J*(r) - E_law r) over |r_y| <= box / 2, for a batch of data sets at once.

    wins       (..., n, n) >= 0, numbers of wins, or their probabilities for the population; the diagonal is ignored
    incentive  scalar or (...,), in units of `wins`: for the mean over N comparisons divide both by N
    law        q (..., n), None = the reference
    start      (..., n) rewards, None = 0. Without incentive, responses that nothing connects stay where it has them

    Newton's method on the free coordinates of the cube, with absolute eigenvalues where the objective is not convex,
    and backtracking. Optimism: from `start` and from each corner of the cube with one response at the top; the best of
    these n + 1 stationary points is kept (the problem is min over r and pi of ell - |incentive| (J(r, pi) - E_q r), and
    there each response has all the mass once). ArithmeticError where the residual stays above 1e-8.
    """
    W = np.array(wins, dtype=np.float64)
    if W.ndim < 2 or W.shape[-1] != W.shape[-2]:
        raise ValueError(f"wins has shape {W.shape}; expected (..., n, n), [i, j] = how often i beat j")
    n, batch = W.shape[-1], W.shape[:-2]
    if not (W >= 0).all():
        where = tuple(int(i) for i in np.argwhere(~(W >= 0))[0])
        raise ValueError(f"wins{list(where)} is {W[where]}; a number of wins is at least 0")
    beta, half = check_positive(beta, "beta"), check_positive(box, "box") / 2
    log_ref = np.broadcast_to(np.asarray(log_reference, dtype=np.float64), (*batch, n)).reshape(-1, n)
    q = (
        np.exp(log_ref)
        if law is None
        else np.broadcast_to(np.asarray(law, float), (*batch, n)).reshape(-1, n)
    )
    c = np.broadcast_to(np.asarray(incentive, dtype=np.float64), batch).reshape(-1)
    if not np.isfinite(c).all():
        raise ValueError(f"incentive is {c[~np.isfinite(c)][0]}; it must be finite")
    r = np.zeros((len(c), n)) if start is None else np.broadcast_to(start, (*batch, n)).reshape(-1, n)
    r = np.clip(r, -half, half)
    W = W.reshape(-1, n, n)
    W[:, np.arange(n), np.arange(n)] = 0.0
    starts = n + 1 if (c < 0).any() else 1
    if starts > 1:
        tops = np.full((len(c), n + 1, n), -half)
        tops[:, np.arange(n), np.arange(n)] = half
        tops[:, n] = r
        r = tops.reshape(-1, n)
    W, log_ref, pull, strength = (np.repeat(x, starts, axis=0) for x in (W, log_ref, c[:, None] * q, c))
    r, value, residual = _Problem(W, log_ref, pull, strength, beta, half).solve(r)
    rows = np.arange(len(c)) * starts + value.reshape(-1, starts).argmin(1)
    _certify(residual[rows])
    return RewardFit(r[rows].reshape(*batch, n), value[rows].reshape(batch), residual[rows].reshape(batch))


def _certify(residual: Array) -> None:
    worst = float(residual.max(initial=0.0))
    if not worst <= _CERTIFIED:
        raise ArithmeticError(f"the residual is {worst:.2g} after {_STEPS} Newton steps, above {_CERTIFIED}")


def worst_rewards(wins: ArrayLike, push: ArrayLike, box: float) -> RewardFit:
    """argmin of ell(r) + <push, r> over |r_y| <= box / 2, an adversary's reward; wins (n, n), push (n,)."""
    W = np.array(wins, dtype=np.float64)
    np.fill_diagonal(W, 0.0)
    push = np.asarray(push, dtype=np.float64)
    nothing = np.zeros((1, len(push)))
    problem = _Problem(W[None], nothing, -push[None], np.zeros(1), 1.0, check_positive(box, "box") / 2)
    r, value, residual = problem.solve(nothing)
    _certify(residual)
    return RewardFit(r[0], value[0], residual[0])


@dataclass(frozen=True, eq=False)
class _Problem:
    """k problems: minimise ell(r) + incentive J*(r) - <pull, r> over the cube of half width `half`; wins (k, n, n),
    log_reference and pull (k, n), incentive (k,)."""

    wins: Array
    log_reference: Array
    pull: Array
    incentive: Array
    beta: float
    half: float

    def rows(self, live: Array) -> _Problem:
        wins, log_ref, pull = self.wins[live], self.log_reference[live], self.pull[live]
        return _Problem(wins, log_ref, pull, self.incentive[live], self.beta, self.half)

    def value(self, r: Array) -> Array:
        promise = self.incentive * best_value(r, self.log_reference, self.beta)
        return comparison_loss(self.wins, r) + promise - (self.pull * r).sum(1)

    def derivatives(self, r: Array) -> tuple[Array, Array]:
        """Gradient (k, n) and Hessian (k, n, n)."""
        n = r.shape[1]
        lost = expit(r[:, None, :] - r[:, :, None])  # [i, j]: the probability that i loses to j
        surprise = self.wins * lost
        g = surprise.sum(1) - surprise.sum(2)
        curvature = (self.wins + self.wins.transpose(0, 2, 1)) * lost * (1 - lost)
        pi = policy_of(r, self.log_reference, self.beta)[0]
        g += self.incentive[:, None] * pi - self.pull
        scaled = (self.incentive / self.beta)[:, None] * pi
        H = -curvature - scaled[:, :, None] * pi[:, None, :]
        H[:, np.arange(n), np.arange(n)] += curvature.sum(2) + scaled
        return g, H

    def solve(self, r: Array) -> tuple[Array, Array, Array]:
        r, value = r.copy(), self.value(r)
        residual = np.full(len(r), np.inf)
        scale = self.wins.sum((1, 2)) + np.abs(self.pull).sum(1) + np.finfo(np.float64).tiny
        live = np.arange(len(r))
        for _ in range(_STEPS):
            part, x = self.rows(live), r[live]
            g, H = part.derivatives(x)
            residual[live] = np.abs(x - np.clip(x - g / scale[live, None], -self.half, self.half)).max(1)
            going = residual[live] > _RESIDUAL
            if not going.any():
                return r, value, residual
            live, x, g, H, part = live[going], x[going], g[going], H[going], part.rows(going)
            r[live], value[live], moved = part.step(x, value[live], g, H, np.minimum(residual[live], 1e-3))
            if not moved.any():  # rounding: the values can no longer tell
                break
        return r, value, residual

    def step(self, x: Array, value: Array, g: Array, H: Array, near: Array) -> tuple[Array, Array, Array]:
        """One damped projected step: the points, their values, and which of them moved.

        Coordinates within `near` (k,) of a face that the gradient points out of go there, and stay out of the Hessian:
        without that margin the projection can turn Newton's direction uphill.
        """
        half, near = self.half, near[:, None]
        held = ((x >= half - near) & (g < 0)) | ((x <= near - half) & (g > 0))
        faces = np.where(g < 0, half, -half) - x
        slope = g
        H = np.where(held[:, :, None] | held[:, None, :], 0.0, H)
        g = np.where(held, 0.0, g)
        eigenvalues, V = np.linalg.eigh(H)
        size = np.abs(eigenvalues)
        largest = size.max(1, keepdims=True) + np.finfo(np.float64).tiny
        # Without incentive flat directions are exact, and nothing moves along them; with one, only the constant is.
        flat = (np.abs(self.pull).sum(1) == 0)[:, None] & (size < 1e-9 * largest)
        size = np.where(flat, np.inf, np.maximum(size, 1e-12 * largest))
        direction = -(V @ ((V.transpose(0, 2, 1) @ g[:, :, None]) / size[:, :, None]))[:, :, 0]
        # Where the objective is nearly linear Newton's step leaves through wrong faces: no longer than the cube.
        direction /= np.maximum(np.abs(direction).max(1, keepdims=True) / (2 * half), 1.0)
        direction = np.where(held, faces, direction)
        length, done = np.ones(len(x)), np.zeros(len(x), dtype=bool)
        best, best_value = x.copy(), value.copy()
        for _ in range(40):
            trial = np.clip(x + length[:, None] * direction, -half, half)
            new = self.value(trial)
            descent = (slope * (trial - x)).sum(1)
            slack = 1e-15 * (np.abs(value) + 1)
            better = ~done & (new <= value + 1e-4 * np.minimum(descent, 0.0) + slack)
            best[better], best_value[better] = trial[better], new[better]
            done |= better
            if done.all():
                break
            length = np.where(done, length, length / 2)
        return best, best_value, done & (np.abs(best - x).max(1) > 0)


# ---- rounds online ---------------------------------------------------------------------------------------------------


class OnlinePreferences:
    """Rounds of comparisons with a policy that is fitted anew after each, for S bandits at once.

    In each round the reward fitted so far gives the policy pi; `batch` times (the papers: once) one response is drawn
    from pi and one from `_second()`, and Bradley-Terry with the true reward says who wins; `_incentive()` and all
    comparisons so far give the next reward. Without an incentive this is iterative DPO. Sufficient statistics are kept,
    the numbers of wins of each ordered pair, so that a round costs the same at the end as at the beginning. advance(N)
    then advance(M) equals advance(N + M), bit for bit.

    rewards        r* (S, n), with max - min <= box in each row
    log_reference  (n,) or (S, n)
    seeds          S numbers; bandit s draws from `default_rng(seeds[s])` alone, three numbers a comparison, so that
                   methods with the same seeds are paired and the other bandits do not matter
    regret         (S, rounds): J*(r*) - J(r*, pi) of each round so far, exact, for one of its comparisons
    t              comparisons so far, of each bandit
    wins           (S, n, n), [i, j] = how often i beat j; second_counts (S, n) of the second responses
    """

    def __init__(
        self,
        rewards: ArrayLike,
        log_reference: ArrayLike,
        beta: float,
        *,
        box: float,
        seeds: ArrayLike,
        batch: int = 1,
    ) -> None:
        self.true = np.atleast_2d(np.asarray(rewards, dtype=np.float64))
        S, n = self.true.shape
        self.box, self.beta = check_positive(box, "box"), check_positive(beta, "beta")
        spread = np.ptp(self.true, axis=1)
        if not (spread <= self.box).all():
            s = int(np.argmax(spread))
            raise ValueError(
                f"the rewards of bandit {s} differ by {spread[s]:.4g}; box is {box}, take it at least that"
            )
        self.log_reference = np.broadcast_to(np.asarray(log_reference, dtype=np.float64), (S, n))
        self.reference = np.exp(self.log_reference)
        if not np.allclose(self.reference.sum(1), 1, atol=1e-9, rtol=0):
            raise ValueError("log_reference is not the logarithm of a law: its exponentials do not sum to 1")
        numbers = np.asarray(seeds).reshape(-1)
        if len(numbers) != S:
            raise ValueError(f"there are {len(numbers)} seeds for {S} bandits")
        if batch < 1:
            raise ValueError(f"batch is {batch}; a round has at least 1 comparison")
        self.batch = int(batch)
        self._rngs = [np.random.default_rng(int(seed)) for seed in numbers]
        self.wins = np.zeros((S, n, n))
        self.second_counts = np.zeros((S, n))
        self.fitted = np.zeros((S, n))
        self.t = 0
        self._regret: list[Array] = []

    @property
    def regret(self) -> Array:
        return np.stack(self._regret, axis=1) if self._regret else np.zeros((len(self.true), 0))

    @property
    def log_policy(self) -> Array:
        """log pi_t (S, n)."""
        return policy_of(self.fitted, self.log_reference, self.beta)[1]

    def advance(self, rounds: int) -> Self:
        rows = np.arange(len(self.true))[:, None]
        drawn = [rng.random((rounds, self.batch, 3)) for rng in self._rngs]
        for u in np.stack(drawn, axis=1):
            log_policy = self.log_policy
            self._regret.append(shortfall(log_policy, self.true, self.log_reference, self.beta))
            policy = np.exp(log_policy)
            first, second = _draw(policy, u[..., 0]), _draw(self._second(policy), u[..., 1])
            first_wins = u[..., 2] < expit(self.true[rows, first] - self.true[rows, second])
            winner, loser = np.where(first_wins, first, second), np.where(first_wins, second, first)
            np.add.at(self.wins, (rows, winner, loser), 1.0)
            np.add.at(self.second_counts, (rows, second), 1.0)
            self.t += self.batch
            incentive, law = self._incentive()
            self.fitted = fit_rewards(
                self.wins,
                self.log_reference,
                self.beta,
                incentive=incentive,
                law=law,
                box=self.box,
                start=self.fitted,
            ).rewards
        return self

    def _second(self, policy: Array) -> Array:
        """The law (S, n) of the second response, given pi_t."""
        return policy

    def _incentive(self) -> tuple[float, Array]:
        """The incentive and the law (S, n) of the next fit; none: iterative DPO, which takes what pi_t happens to
        show."""
        return 0.0, self.reference


def _draw(laws: Array, u: Array) -> Array:
    """Responses (S, m) of the laws (S, n), by inversion of u (S, m)."""
    below = np.cumsum(laws, axis=1)
    drawn = (u[:, :, None] * below[:, None, -1:] >= below[:, None]).sum(2)
    return np.minimum(drawn, laws.shape[1] - 1)
