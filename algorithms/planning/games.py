r"""Preference games solved: values, best responses, Nash equilibria, each with the gap that certifies it.

With KL to the game's reference mu at temperature tau >= 0 the payoff of pi against pi' is

    P_tau(pi > pi') = P(pi > pi') - tau KL(pi, mu) + tau KL(pi', mu),     P_tau(pi > pi') + P_tau(pi' > pi) = 1.

The best response to pi' is a soft-max, mu(y) exp(P(y > pi') / tau) / Z, for tau > 0, and
max_pi P_tau(pi > pi') - P_tau(pi > pi') = tau KL(pi, best response to pi'). The regularised equilibrium is the only
law that is its own best response: pi* = softmax(log mu + P pi* / tau), the logit quantal response equilibrium.

Policies are laws (n,); `exploitability` of a policy is what a best response wins beyond 1/2, at least 0, and 0 at the
equilibria alone. KL(p, q) = sum p log(p / q), the first argument's law is the one averaged over.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike
from scipy.linalg.lapack import dgesv

from ...envs.kernels import Array
from ...envs.preference_games import PreferenceGame, check_law

_LARGE = 512  # responses from which on Newton's systems are solved by products first
_DIRECT = 0.008  # from here on upwards Newton's method needs no larger temperature first


@dataclass(frozen=True, eq=False)
class GameSolution:
    """An equilibrium up to its certificate.

    policy          (n,); log_policy its logarithm, exact where the policy underflows (-inf where it is 0)
    exploitability  of the policy, at the temperature tau: 0 at the equilibrium
    iterations      of the solver
    """

    policy: Array
    log_policy: Array
    exploitability: float
    tau: float
    iterations: int
    game: PreferenceGame = field(repr=False)


# ---- the soft-max engine -----------------------------------------------------------------------------------------


def softmax(log_weights: Array) -> tuple[Array, Array]:
    """The law in proportion to exp(log_weights), and its logarithm; nothing overflows. (n,) -> (n,), (n,)."""
    log_weights = log_weights - log_weights.max()
    weights = np.exp(log_weights)
    total = weights.sum()
    weights /= total
    log_weights -= math.log(total)
    return weights, log_weights


def divergences(log_p: Array, log_q: Array) -> Array:
    """KL(p, q) along the last axis, from logarithms (-inf = no mass), as a sum of terms >= 0: accurate also where p and
    q almost agree; inf where q lacks mass that p has."""
    p = np.exp(log_p)
    with np.errstate(invalid="ignore"):
        ratio = log_q - log_p
        near = np.abs(ratio) < 1
        small = np.where(near, ratio, 0.0)
        # sum p log(p/q) = sum [q - p - p log(q/p)], since both sum to 1
        far = np.exp(log_q) - p - np.where(p > 0, p * ratio, 0.0)
        return np.where(near, p * (np.expm1(small) - small), far).sum(axis=-1)


def kl(log_p: Array, log_q: Array) -> float:
    """KL(p, q) of two laws given by their logarithms, (n,) each; see `divergences`."""
    return float(divergences(log_p, log_q))


def logarithm(policy: Array) -> Array:
    with np.errstate(divide="ignore"):
        return np.log(policy)


def check_tau(tau: float, what: str = "tau") -> float:
    if not 0 < tau < math.inf:
        raise ValueError(f"{what} is {tau}; it must be positive and finite (`nash` is the limit of tau at 0)")
    return float(tau)


# ---- values ------------------------------------------------------------------------------------------------------


def best_response(game: PreferenceGame, opponent: ArrayLike, tau: float) -> Array:
    """argmax_pi P_tau(pi > opponent); at tau = 0 uniform over the responses that win most often, up to 1e-12."""
    q = check_law(opponent, len(game), "opponent")
    wins = game.P @ q
    if tau == 0:
        best = wins >= wins.max() - 1e-12
        return best / best.sum()
    return softmax(game.log_reference + wins / check_tau(tau))[0]


def regularised_preference(game: PreferenceGame, first: ArrayLike, second: ArrayLike, tau: float) -> float:
    """P_tau(first > second)."""
    value = game.probability(first, second)
    if tau == 0:
        return value
    p, q = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    cost = kl(logarithm(p), game.log_reference) - kl(logarithm(q), game.log_reference)
    return value - check_tau(tau) * cost


def best_response_value(game: PreferenceGame, opponent: ArrayLike, tau: float = 0.0) -> float:
    """max_pi P_tau(pi > opponent); at tau > 0 it is tau log sum mu exp(P opponent / tau) + tau KL(opponent, mu)."""
    q = check_law(opponent, len(game), "opponent")
    wins = game.P @ q
    if tau == 0:
        return float(wins.max())
    tau, top = check_tau(tau), wins.max()
    log_partition = math.log(float(game.reference @ np.exp((wins - top) / tau)))
    return float(top + tau * (log_partition + kl(logarithm(q), game.log_reference)))


def exploitability(game: PreferenceGame, policy: ArrayLike, tau: float = 0.0) -> float:
    """max_pi P_tau(pi > policy) - 1/2. At tau > 0 it is tau KL(policy, its best response), without cancellation."""
    pi = check_law(policy, len(game))
    if tau == 0:
        return max(best_response_value(game, pi) - 0.5, 0.0)
    return _soft_exploitability(game, pi, logarithm(pi), check_tau(tau))


def _soft_exploitability(game: PreferenceGame, pi: Array, log_pi: Array, tau: float) -> float:
    return tau * kl(log_pi, softmax(game.log_reference + (game.P @ pi) / tau)[1])


def duality_gap(game: PreferenceGame, first: ArrayLike, second: ArrayLike, tau: float = 0.0) -> float:
    """max_pi P_tau(pi > second) - min_pi P_tau(first > pi): the sum of both exploitabilities, by antisymmetry."""
    return exploitability(game, first, tau) + exploitability(game, second, tau)


# ---- equilibria --------------------------------------------------------------------------------------------------


def nash(game: PreferenceGame) -> GameSolution:
    """A Nash equilibrium by linear programming (HiGHS), not unique in general.

    max sum x with P x <= 1, x >= 0: the value is 1/2, so that the optimum is 2 and pi = x / 2 has P pi <= 1/2.
    """
    from scipy.optimize import linprog

    n = len(game)
    # Without presolve, which finds nothing to remove in a full matrix.
    found = linprog(-np.ones(n), A_ub=game.P, b_ub=np.ones(n), method="highs", options={"presolve": False})
    if found.x is None:  # pragma: no cover  # every symmetric game has an equilibrium
        raise ArithmeticError(f"{game.name}: HiGHS says {found.message}")
    pi = np.maximum(found.x, 0.0)
    pi /= pi.sum()
    return GameSolution(pi, logarithm(pi), exploitability(game, pi), 0.0, int(found.nit), game)


def regularised_nash(
    game: PreferenceGame, tau: float, *, start: ArrayLike | None = None, max_iterations: int = 200
) -> GameSolution:
    r"""The unique equilibrium at temperature tau > 0, by Newton's method on G(u) = u - log mu - A softmax(u) / tau.

    With A = P - 1/2 the Jacobian is I - A S / tau, S = diag(pi) - pi pi^T. A is antisymmetric and S positive
    semidefinite, so the eigenvalues of A S are imaginary and the Jacobian is never singular: |G| has no minimum but the
    root, and damped steps (half as long until |G|_2 falls) reach it from everywhere, quadratically in the end. Small
    tau are approached from larger ones, each a quarter of the last.

    start  a law with full support, None = mu. Stops at |G| <= 1e-11, or at the rounding of 1 / tau; ArithmeticError
    when max_iterations a temperature do not get there.
    """
    tau = check_tau(tau)
    log_u = game.log_reference if start is None else logarithm(check_law(start, len(game), "start"))
    if not np.isfinite(log_u).all():
        raise ValueError(f"start[{int(np.argmin(log_u))}] is 0; every response needs mass")
    temperatures = [tau]
    while start is None and temperatures[-1] < _DIRECT:
        temperatures.append(4 * temperatures[-1])
    total = 0
    for temperature in reversed(temperatures):
        log_u, iterations = _newton(game, temperature, log_u, max_iterations)
        total += iterations
    policy, log_policy = softmax(log_u)
    gap = _soft_exploitability(game, policy, log_policy, tau)
    return GameSolution(policy, log_policy, gap, tau, total, game)


def _newton(game: PreferenceGame, tau: float, u: Array, max_iterations: int) -> tuple[Array, int]:
    """The root of G and the number of steps."""
    n, log_mu = len(game), game.log_reference
    A = (game.P - 0.5) / tau
    floor = 1e-11 + 64 * np.finfo(np.float64).eps / tau

    def residual(u: Array) -> tuple[Array, Array, Array, float]:
        pi = softmax(u)[0]
        wins = A @ pi
        G = u - log_mu - wins
        return pi, wins, G, math.sqrt(G @ G)

    pi, wins, G, norm = residual(u)
    for iteration in range(max_iterations + 1):
        if norm <= floor:
            return u, iteration
        step = _krylov_step(A, pi, G) if n >= _LARGE else None
        if step is None:
            # The transposed Jacobian in C order is the Jacobian in Fortran's, which LAPACK overwrites.
            J = A + wins
            J *= pi[:, None]
            J.flat[:: n + 1] += 1.0
            _, _, step, _ = dgesv(J.T, G, overwrite_a=1)
        length = 1.0
        while True:
            trial = u - length * step
            new = residual(trial)
            if new[3] <= (1 - 1e-4 * length) * norm or length < 1e-6:
                break
            length /= 2
        u, (pi, wins, G, norm) = trial, new
    raise ArithmeticError(
        f"{game.name}: residual {norm:.2g} after {max_iterations} Newton steps at tau = {tau:g}"
    )


def _krylov_step(A: Array, pi: Array, G: Array) -> Array | None:
    """(I - A S)^{-1} G by GMRES, a product with A a step; None where it needs more than a factorisation would cost."""
    from scipy.sparse.linalg import LinearOperator, gmres

    def product(v: Array) -> Array:
        return v - A @ (pi * (v - pi @ v))

    J = LinearOperator(A.shape, matvec=product, dtype=np.float64)
    step, unfinished = gmres(J, G, rtol=1e-8, restart=80, maxiter=1)
    return None if unfinished else step


def mirror_prox(
    game: PreferenceGame, tau: float = 0.0, *, iterations: int, step: float = 1.0
) -> GameSolution:
    """Extragradient steps in KL geometry, with the penalty taken implicitly: an independent check of the others.

    pi' ∝ (pi mu^{s tau} exp(s P pi))^{1/(1 + s tau)}, then pi again from pi with P pi' in place of P pi; s = step < 2,
    the inverse of the Lipschitz constant 1/2 of pi -> (P - 1/2) pi from l1 to l-infinity.
    tau > 0: the last iterate, linear rate 1 / (1 + s tau). tau = 0: the average of pi', exploitability of order
    log n / (s T).
    """
    if not 0 < step < 2:
        raise ValueError(f"step is {step}; it lies in (0, 2)")
    if tau != 0:
        tau = check_tau(tau)
    pull, shrink = step * tau * game.log_reference, 1 / (1 + step * tau)
    pi, log_pi = game.reference, game.log_reference
    total = np.zeros(len(game))
    for _ in range(iterations):
        half, _ = softmax((log_pi + pull + step * (game.P @ pi)) * shrink)
        pi, log_pi = softmax((log_pi + pull + step * (game.P @ half)) * shrink)
        total += half
    if tau > 0:
        return GameSolution(pi, log_pi, _soft_exploitability(game, pi, log_pi, tau), tau, iterations, game)
    average = total / total.sum()
    return GameSolution(average, logarithm(average), exploitability(game, average), 0.0, iterations, game)
