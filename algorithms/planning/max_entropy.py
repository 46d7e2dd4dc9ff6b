r"""Of all Nash equilibria of a game the one closest to the reference, min KL(pi, mu): the limit of tau -> 0.

The equilibria form a polytope, {pi : A pi <= 0} with A = P - 1/2. Two convex programs find the one of least KL.

1. Which responses carry mass in an equilibrium at all? There is x >= 0 with A x <= 0 and x - A x > 0 (Tucker, for
   antisymmetric A); scaled, x - A x >= 1, a linear program (`essential_responses`). x^T A x = 0 makes x_i (A x)_i = 0,
   so that either x_i >= 1 or the slack -(A x)_i >= 1: the first are the *essential* responses, and the polytope is

       {pi : pi = 0 elsewhere, (A pi)_i = 0 at the essential i, (A pi)_i <= 0 elsewhere},    x inside it.

2. In it pi = x + N t, N a basis of the directions that keep the equalities, and KL(pi, mu) - nu sum log slack is
   minimised over t by Newton's method, nu -> 1e-11. lambda = nu / slack are the multipliers of the inequalities; with
   kappa those of the equalities, from stationarity, weak duality certifies the answer: every equilibrium q has

       KL(q, mu) >= -log sum_essential mu exp(-A^T y),     y = (kappa, lambda), lambda >= 0.

Why it is the limit: for an equilibrium q, 1/2 <= P_tau(pi_tau > q) = P(pi_tau > q) - tau KL(pi_tau, mu) + tau KL(q, mu)
and P(pi_tau > q) <= 1/2, so KL(pi_tau, mu) <= KL(q, mu) at every tau, and every limit of pi_tau is an equilibrium.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.special import logsumexp

from ...envs.kernels import Array
from ...envs.preference_games import PreferenceGame
from .games import GameSolution, exploitability, kl, logarithm

_CENTRED = 1e-11  # the last weight of the barrier: less, and the slack it leaves is rounding
_STEPS = 60  # of Newton, at each weight


@dataclass(frozen=True, eq=False)
class MaxEntropyNash(GameSolution):
    """An equilibrium with the certificate that no other is closer to mu.

    essential    bool (n,), the responses that carry mass in some equilibrium
    dimension    of the polytope of equilibria; 0 = there is one
    divergence   KL(policy, mu)
    gap          divergence minus the dual value, which no equilibrium's divergence lies below: 0 at the solution
    multipliers  y (n,), of the rows A pi; at least 0 at the responses that are not essential
    """

    essential: Array
    dimension: int
    divergence: float
    gap: float
    multipliers: Array


def max_entropy_nash(game: PreferenceGame) -> MaxEntropyNash:
    """argmin KL(pi, mu) over the Nash equilibria pi: of maximal entropy when mu is uniform. There is exactly one.

    ArithmeticError when Newton's method does not converge.
    """
    A = game.P - 0.5
    essential, x = essential_responses(game)
    log_mu, tight, loose = (
        game.log_reference[essential],
        A[np.ix_(essential, essential)],
        A[:, essential][~essential],
    )
    pi, N = _affine(np.vstack([tight, np.ones(len(tight))]), x[essential] / x[essential].sum())
    iterations = 0
    multipliers = np.zeros(len(loose))
    if N.shape[1]:
        pi, multipliers, iterations = _barrier(pi, N, log_mu, loose, game.name)
    # stationarity: log(pi / mu) + lambda loose + kappa tight is constant on the essential responses
    log_pi = np.log(pi)
    force = log_mu - log_pi - multipliers @ loose
    kappa = np.linalg.lstsq(np.vstack([tight, np.ones(len(tight))]).T, force, rcond=None)[0][:-1]
    y, policy = np.zeros(len(game)), np.zeros(len(game))
    y[essential], y[~essential], policy[essential] = kappa, multipliers, pi
    log_policy = logarithm(policy)
    divergence = kl(log_policy, game.log_reference)
    gap = divergence + float(logsumexp(log_mu - y @ A[:, essential]))
    return MaxEntropyNash(
        policy,
        log_policy,
        exploitability(game, policy),
        0.0,
        iterations,
        game,
        essential,
        N.shape[1],
        divergence,
        gap,
        y,
    )


def essential_responses(game: PreferenceGame) -> tuple[Array, Array]:
    """Which responses carry mass in some equilibrium, bool (n,), and Tucker's x (n,), see the module.

    max sum t over 0 <= t <= 1, t <= x - A x, A x <= 0, x >= 0, which x = 0 satisfies; at the optimum t = 1. A is
    divided by its largest entry. ArithmeticError where HiGHS does not get there.
    """
    from scipy.optimize import linprog

    n, A = len(game), game.P - 0.5
    A /= max(float(np.abs(A).max()), 1e-300)
    zeros, one = np.zeros((n, n)), np.eye(n)
    found = linprog(
        np.repeat([0.0, -1.0], n),
        A_ub=np.block([[A, zeros], [A - one, one]]),
        b_ub=np.zeros(2 * n),
        bounds=[(0, None)] * n + [(0, 1)] * n,
        method="highs",
    )
    if found.x is None or found.x[n:].min() < 0.5:
        raise ArithmeticError(
            f"{game.name}: no strictly complementary equilibrium found; HiGHS says {found.message}"
        )
    x = np.maximum(found.x[:n], 0.0)
    return x > -(A @ x), x


def _affine(equalities: Array, point: Array) -> tuple[Array, Array]:
    """The point moved onto {E p = (0, ..., 0, 1)}, and an orthonormal basis (b, d) of the directions in it."""
    left, singular, right = np.linalg.svd(equalities)
    rank = int((singular > 1e-9 * singular[0]).sum())
    target = np.zeros(len(equalities))
    target[-1] = 1.0
    off = left.T @ (equalities @ point - target)
    return point - right[:rank].T @ (off[:rank] / singular[:rank]), right[rank:].T


def _barrier(pi: Array, N: Array, log_mu: Array, loose: Array, name: str) -> tuple[Array, Array, int]:
    """min KL(pi, mu) over pi + span N with loose @ pi <= 0, from a pi inside: pi, the multipliers, Newton's steps."""

    def value(pi: Array, nu: float) -> float:
        slack = -(loose @ pi)
        if (pi <= 0).any() or (slack <= 0).any():
            return math.inf
        return float(pi @ (np.log(pi) - log_mu) - nu * np.log(slack).sum())

    nu, steps = 1.0 if len(loose) else _CENTRED, 0
    while True:
        for _ in range(_STEPS):
            slack = -(loose @ pi)
            weights = nu / slack
            gradient = N.T @ (np.log(pi) - log_mu + weights @ loose)
            M = loose @ N
            curvature = (N.T / pi) @ N + (M.T * (weights / slack)) @ M
            step = np.linalg.solve(curvature, gradient)
            decrease, length, before = float(gradient @ step), 1.0, value(pi, nu)
            if decrease <= 1e-8 * nu:
                break
            while not value(pi - length * (N @ step), nu) <= before - 0.1 * length * decrease + 1e-15:
                length /= 2
            pi = pi - length * (N @ step)
            steps += 1
        else:
            raise ArithmeticError(
                f"{name}: Newton's decrement is {decrease:.2g} at the barrier's weight {nu:.2g}"
            )
        if nu <= _CENTRED:
            return (
                pi,
                weights * (1 - M @ step / slack),
                steps,
            )  # the multipliers after the step, to second order
        nu = max(nu / 10, _CENTRED)
