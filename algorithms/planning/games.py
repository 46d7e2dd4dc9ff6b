r"""Preference games solved: values, best responses, Nash equilibria, each with the gap that certifies it.

With KL to the game's reference mu at temperature tau >= 0 the payoff of pi against pi' is

    P_tau(pi > pi') = P(pi > pi') - tau KL(pi, mu) + tau KL(pi', mu),     P_tau(pi > pi') + P_tau(pi' > pi) = 1.

The best response to pi' is a soft-max, mu(y) exp(P(y > pi') / tau) / Z, for tau > 0, and
max_pi P_tau(pi > pi') - P_tau(pi > pi') = tau KL(pi, best response to pi'). The regularised equilibrium is the only
law that is its own best response: pi* = softmax(log mu + P pi* / tau), the logit quantal response equilibrium.

A game is asked for `wins(policy)` alone, P policy (`envs.preference_games.Game`), so that a `LowRankGame` of a million
responses is evaluated and solved without its matrix. Policies are laws (n,); `exploitability` of a policy is what a
best response wins beyond 1/2, at least 0, and 0 at the equilibria alone. KL(p, q) = sum p log(p / q), the first
argument's law is the one averaged over.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike
from scipy.linalg.lapack import dgesv

from ...envs.kernels import Array
from ...envs.preference_games import Game, PreferenceGame, check_law
from ...envs.structured_games import LowRankGame

_LARGE = 512  # responses from which on Newton's systems are solved by products first
_DIRECT = 0.008  # from here on upwards Newton's method needs no larger temperature first
_COOLING = 2.5  # from one temperature to the next
_NO_MASS = (
    1e-6  # times tau: responses with less change no entry of Newton's systems by more than half of 1e-6
)


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
    game: Game = field(repr=False)


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


def best_response(game: Game, opponent: ArrayLike, tau: float) -> Array:
    """argmax_pi P_tau(pi > opponent); at tau = 0 uniform over the responses that win most often, up to 1e-12."""
    q = check_law(opponent, len(game), "opponent")
    wins = game.wins(q)
    if tau == 0:
        best = wins >= wins.max() - 1e-12
        return best / best.sum()
    return softmax(game.log_reference + wins / check_tau(tau))[0]


def regularised_preference(game: Game, first: ArrayLike, second: ArrayLike, tau: float) -> float:
    """P_tau(first > second)."""
    value = game.probability(first, second)
    if tau == 0:
        return value
    p, q = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    cost = kl(logarithm(p), game.log_reference) - kl(logarithm(q), game.log_reference)
    return value - check_tau(tau) * cost


def best_response_value(game: Game, opponent: ArrayLike, tau: float = 0.0) -> float:
    """max_pi P_tau(pi > opponent); at tau > 0 it is tau log sum mu exp(P opponent / tau) + tau KL(opponent, mu)."""
    q = check_law(opponent, len(game), "opponent")
    wins = game.wins(q)
    if tau == 0:
        return float(wins.max())
    tau, top = check_tau(tau), wins.max()
    log_partition = math.log(float(game.reference @ np.exp((wins - top) / tau)))
    return float(top + tau * (log_partition + kl(logarithm(q), game.log_reference)))


def exploitability(game: Game, policy: ArrayLike, tau: float = 0.0) -> float:
    """max_pi P_tau(pi > policy) - 1/2. At tau > 0 it is tau KL(policy, its best response), without cancellation."""
    pi = check_law(policy, len(game))
    if tau == 0:
        return max(best_response_value(game, pi) - 0.5, 0.0)
    return _soft_exploitability(game, pi, logarithm(pi), check_tau(tau))


def _soft_exploitability(game: Game, pi: Array, log_pi: Array, tau: float) -> float:
    return tau * kl(log_pi, softmax(game.log_reference + game.wins(pi) / tau)[1])


def duality_gap(game: Game, first: ArrayLike, second: ArrayLike, tau: float = 0.0) -> float:
    """max_pi P_tau(pi > second) - min_pi P_tau(first > pi): the sum of both exploitabilities, by antisymmetry."""
    return exploitability(game, first, tau) + exploitability(game, second, tau)


# ---- equilibria --------------------------------------------------------------------------------------------------


def nash(game: PreferenceGame | LowRankGame) -> GameSolution:
    """A Nash equilibrium by linear programming (HiGHS), not unique in general.

    max sum x with P x <= 1, x >= 0: the value is 1/2, so that the optimum is 2 and pi = x / 2 has P pi <= 1/2.
    A `LowRankGame` is solved on a few responses, and the best response to what comes out is added until it wins no more
    than 1/2 (the double oracle); that ends, since a new response is a new row.
    """
    if isinstance(game, LowRankGame):
        return _double_oracle(game)
    pi, iterations = _linear_program(game)
    return GameSolution(pi, logarithm(pi), exploitability(game, pi), 0.0, iterations, game)


def _linear_program(game: PreferenceGame) -> tuple[Array, int]:
    from scipy.optimize import linprog

    n = len(game)
    # Without presolve, which finds nothing to remove in a full matrix.
    found = linprog(-np.ones(n), A_ub=game.P, b_ub=np.ones(n), method="highs", options={"presolve": False})
    if found.x is None:  # pragma: no cover  # every symmetric game has an equilibrium
        raise ArithmeticError(f"{game.name}: HiGHS says {found.message}")
    pi = np.maximum(found.x, 0.0)
    return pi / pi.sum(), int(found.nit)


def _double_oracle(game: LowRankGame) -> GameSolution:
    chosen, pi, iterations = [int(np.argmax(game.wins(game.reference)))], np.zeros(len(game)), 0
    while True:
        law, steps = _linear_program(game.block(chosen))
        pi[chosen] = law
        iterations += steps
        wins = game.wins(pi)
        best = int(np.argmax(wins))
        if wins[best] <= 0.5 + 1e-9 or best in chosen:
            return GameSolution(pi, logarithm(pi), max(wins[best] - 0.5, 0.0), 0.0, iterations, game)
        chosen.append(best)


def regularised_nash(
    game: PreferenceGame | LowRankGame,
    tau: float,
    *,
    start: ArrayLike | None = None,
    max_iterations: int = 200,
) -> GameSolution:
    r"""The unique equilibrium at temperature tau > 0, by Newton's method on G(u) = u - log mu - A softmax(u) / tau.

    With A = P - 1/2 the Jacobian is I - A S / tau, S = diag(pi) - pi pi^T. A is antisymmetric and S positive
    semidefinite, so the eigenvalues of A S are imaginary and the Jacobian is never singular: |G| has no minimum but the
    root, and damped steps (half as long until |G|_2 falls) reach it from everywhere, quadratically in the end. Small
    tau are approached from larger ones, each 2.5 times the next.

    For a `LowRankGame`, A = U C U^T, the same in k dimensions: z = U^T pi is the root of
    H(z) = z - U^T softmax(log mu + U C z / tau), whose Jacobian I - U^T S U C / tau is never singular either.

    start  a law with full support, None = mu. Stops at |G| <= 1e-11, or at the rounding of 1 / tau; ArithmeticError
    when max_iterations a temperature do not get there.
    """
    tau = check_tau(tau)
    log_u = game.log_reference if start is None else logarithm(check_law(start, len(game), "start"))
    if not np.isfinite(log_u).all():
        raise ValueError(f"start[{int(np.argmin(log_u))}] is 0; every response needs mass")
    temperatures = [tau]
    while start is None and temperatures[-1] < _DIRECT:
        temperatures.append(_COOLING * temperatures[-1])
    newton: Any = _newton_low_rank if isinstance(game, LowRankGame) else _newton
    total = 0
    for temperature in reversed(temperatures):
        # On the way a policy right up to a factor e, in the root mean square, is as good a start as any.
        wanted = 1e-11 if temperature == tau else 1.0
        log_u, iterations = newton(game, temperature, log_u, wanted, max_iterations)
        total += iterations
    policy, log_policy = softmax(log_u)
    gap = _soft_exploitability(game, policy, log_policy, tau)
    return GameSolution(policy, log_policy, gap, tau, total, game)


def _newton(
    game: PreferenceGame, tau: float, u: Array, wanted: float, max_iterations: int
) -> tuple[Array, int]:
    """The root of G and the number of steps."""
    n, log_mu = len(game), game.log_reference
    A = game.P - 0.5
    A /= tau
    floor = wanted * (1.0 if wanted < 1 else math.sqrt(n)) + 64 * np.finfo(np.float64).eps / tau

    def residual(u: Array) -> tuple[Array, Array, Array, float]:
        pi = softmax(u)[0]
        wins = A @ pi
        G = u - log_mu
        G -= wins
        return pi, wins, G, math.sqrt(G @ G)

    pi, wins, G, norm = residual(u)
    for iteration in range(max_iterations + 1):
        if norm <= floor:
            return u, iteration
        step = _krylov_step(A, pi, G) if n >= _LARGE else None
        if step is None:
            step = _direct_step(A, pi, wins, G, _NO_MASS * min(tau, 1.0))
        u, (pi, wins, G, norm) = _damped(u, step, norm, residual)
    raise _unfinished(game, tau, norm, max_iterations)


def _direct_step(A: Array, pi: Array, wins: Array, G: Array, least: float) -> Array:
    """(I - A S)^{-1} G, wins = A pi, by a factorisation over the responses with mass: the others' columns are 0."""
    massive = np.flatnonzero(pi > least)
    few = len(massive) < len(pi)
    if few:
        block, mass, right = A.take(massive, 0).take(massive, 1), pi[massive], G[massive]
        block += wins[massive]
    else:
        block, mass, right = A + wins, pi, G
    # The transposed Jacobian in C order is the Jacobian in Fortran's, which LAPACK overwrites.
    block *= mass[:, None]
    block.flat[:: len(block) + 1] += 1.0
    _, _, step, _ = dgesv(block.T, right, overwrite_a=1)
    if not few:
        return step
    moved = np.zeros(len(pi))
    moved[massive] = mass * (step - mass @ step)
    return G + A @ moved


State = TypeVar("State", bound=tuple[Any, ...])


def _damped(x: Array, step: Array, norm: float, residual: Callable[[Array], State]) -> tuple[Array, State]:
    """x minus the step, half as long until the residual's norm, its last entry, falls."""
    length = 1.0
    while True:
        trial = x - length * step
        new = residual(trial)
        if new[-1] <= (1 - 1e-4 * length) * norm or length < 1e-6:
            return trial, new
        length /= 2


def _unfinished(game: Game, tau: float, norm: float, steps: int) -> ArithmeticError:
    return ArithmeticError(f"{game.name}: residual {norm:.2g} after {steps} Newton steps at tau = {tau:g}")


def _newton_low_rank(
    game: LowRankGame, tau: float, u: Array, wanted: float, max_iterations: int
) -> tuple[Array, int]:
    """The logarithm of the law at the root of H, up to a constant, and the number of steps: O(n k^2) each."""
    U, C = game.U, game.C / tau
    # An error of z moves log pi by U C z / tau.
    floor = wanted / max(float(np.abs(C).max()), 1.0) + 64 * np.finfo(np.float64).eps

    def residual(z: Array) -> tuple[Array, Array, Array, Array, float]:
        u = U @ (C @ z)
        u += game.log_reference
        pi = softmax(u)[0]
        mean = pi @ U
        H = z - mean
        return u, pi, mean, H, math.sqrt(H @ H)

    z = softmax(u)[0] @ U
    u, pi, mean, H, norm = residual(z)
    for iteration in range(max_iterations + 1):
        if norm <= floor:
            return u, iteration
        spread = (U.T * pi) @ U - np.outer(mean, mean)  # U^T S U
        step = np.linalg.solve(np.eye(game.rank) - spread @ C, H)
        z, (u, pi, mean, H, norm) = _damped(z, step, norm, residual)
    raise _unfinished(game, tau, norm, max_iterations)


def _krylov_step(A: Array, pi: Array, G: Array) -> Array | None:
    """(I - A S)^{-1} G by GMRES, a product with A a step; None where it needs more than a factorisation would cost."""
    from scipy.sparse.linalg import LinearOperator, gmres

    def product(v: Array) -> Array:
        return v - A @ (pi * (v - pi @ v))

    J = LinearOperator(A.shape, matvec=product, dtype=np.float64)
    step, unfinished = gmres(J, G, rtol=1e-8, restart=80, maxiter=1)
    return None if unfinished else step


def mirror_prox(game: Game, tau: float = 0.0, *, iterations: int, step: float = 1.0) -> GameSolution:
    """`mirror_prox_step` from mu on: an independent check of the other solvers.

    tau > 0: the last iterate. tau = 0: the average of pi', exploitability of order log n / (s T). s = step < 2.
    """
    if not 0 < step < 2:
        raise ValueError(f"step is {step}; it lies in (0, 2)")
    if tau != 0:
        tau = check_tau(tau)
    pi, log_pi = game.reference, game.log_reference
    total = np.zeros(len(game))
    for _ in range(iterations):
        half, pi, log_pi = mirror_prox_step(game, pi, log_pi, tau, step)
        total += half
    if tau > 0:
        return GameSolution(pi, log_pi, _soft_exploitability(game, pi, log_pi, tau), tau, iterations, game)
    average = total / total.sum()
    return GameSolution(average, logarithm(average), exploitability(game, average), 0.0, iterations, game)


def mirror_prox_step(
    game: Game, pi: Array, log_pi: Array, tau: float, step: float
) -> tuple[Array, Array, Array]:
    """An extragradient step in KL geometry, with the penalty taken implicitly: pi', and the next pi and log pi.

    pi' ∝ (pi mu^{s tau} exp(s P pi))^{1/(1 + s tau)}, then the next pi from pi with P pi' in place of P pi. The steps
    s = step are at most 2, the inverse of the Lipschitz constant 1/2 of pi -> (P - 1/2) pi from l1 to l-infinity.
    Then, with pi* the regularised equilibrium, (1 + s tau) KL(pi*, next pi) <= KL(pi*, pi): the last iterate
    converges linearly, at the rate 1 / (1 + s tau).
    """
    shrink = 1 / (1 + step * tau)
    anchor = log_pi + (step * tau) * game.log_reference
    half, _ = softmax((anchor + step * game.wins(pi)) * shrink)
    return half, *softmax((anchor + step * game.wins(half)) * shrink)
