"""What the claims about optimistic mirror descent measure: losses of known noise and drift, planted faults, cells.

The losses: F_t(x) = (x - c_t)^T H (x - c_t) / 2 on the unit ball of R^5, H diagonal, c_t = c + s e_t v with signs e_t
that do not depend on the learner; f_t = F_t + sigma <xi_t, x> with xi_t uniform on the sphere. So sigma_t = sigma and
Sigma_t = |H (c_t - c_{t-1})| exactly, and the best fixed point is the mean of the c_t, which lies in the ball.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ...algorithms.oomd_sea import (
    Ball,
    Geometry,
    OptimisticMWU,
    OptimisticOMD,
    Simplex,
    StepRule,
    adaptive,
    fixed,
    strongly_convex,
)
from ...algorithms.planning.games import exploitability, softmax
from ...algorithms.self_play import SelfPlay
from ...algorithms.sppo import SPPO
from ...envs.kernels import Array
from ..cells import Cell
from ._game_runs import game

DIMENSION = 5
CURVATURES = {"convex": (1.0, 0.7, 0.4, 0.1, 0.0), "strongly_convex": (2.0, 1.7, 1.4, 1.1, 1.0)}


def cell(function: str, seed: int, **parameters: Any) -> Cell:
    """Seeds from 1,000 on: windows, thresholds and numbers of seeds were chosen on seeds under 100."""
    return Cell(f"claims._oomd_sea_runs:{function}", parameters, 1000 + seed)


# ---- planted faults --------------------------------------------------------------------------------------------------


class FromThePlayed(OptimisticOMD):
    """xhat_{t+1} is a step from x_t in place of xhat_t."""

    def _base(self, gradient: Array) -> Array:
        return self.geometry.move(self._state, gradient, self.eta)


def learner(kind: str, geometry: Geometry, step: StepRule) -> OptimisticOMD:
    made = FromThePlayed if kind == "from_the_played" else OptimisticOMD
    return made(geometry, step, optimistic=kind != "no_hint")


# ---- the inequality in every run -------------------------------------------------------------------------------------


def gradients(rng: np.random.Generator, kind: str, T: int, d: int) -> Array:
    """(T, d): noise, a slow drift, or signs that alternate."""
    t, v = np.arange(T)[:, None], rng.standard_normal(d)
    if kind == "noise":
        return rng.standard_normal((T, d))
    if kind == "drift":
        return v * np.sin(t * rng.uniform(0.01, 0.3)) + 0.1 * rng.standard_normal((T, d))
    return v * (-1.0) ** t


def regret_inequality(
    *, seed: int, geometry: str, losses: str, T: int, kind: str = "optimistic"
) -> dict[str, Any]:
    """The bound minus the regret against the worst u, after every round, at a random fixed step.

    sup_u -<g_1 + ... + g_t, u> - D_psi(u, start) / eta is known: the projection of -eta sum g, or a log-sum-exp.
    """
    rng = np.random.default_rng([seed, 4])
    eta = float(10 ** rng.uniform(-2, 0.5))
    shape: Geometry = Ball(DIMENSION) if geometry == "ball" else Simplex(DIMENSION)
    run = learner(kind, shape, fixed(eta))
    g = gradients(rng, losses, T, DIMENSION)
    played, surprise = np.zeros((T, DIMENSION)), np.zeros(T)
    for t in range(T):
        played[t], surprise[t] = run.x, shape.dual_norm(g[t] - run.hint)
        run.observe(g[t])
    G = g.cumsum(axis=0)
    moved = np.diff(played, axis=0)
    if geometry == "ball":
        u = -eta * G
        u /= np.maximum(np.linalg.norm(u, axis=1, keepdims=True), 1)
        worst = -(G * u).sum(axis=1) - (u**2).sum(axis=1) / (2 * eta)
        length = np.linalg.norm(moved, axis=1)
    else:
        top = -eta * G.min(axis=1)
        worst = (np.log(np.exp(-eta * G - top[:, None]).mean(axis=1)) + top) / eta
        length = np.abs(moved).sum(axis=1)
    path = np.concatenate([[0.0], np.cumsum(length**2)])
    bound = eta * np.cumsum(surprise**2) - path / (4 * eta)
    slack = bound - (g * played).sum(axis=1).cumsum() - worst
    return {"slack": float(slack.min()), "scale": float(np.abs(bound).max())}


# ---- regret ----------------------------------------------------------------------------------------------------------


def sea(
    *,
    seed: int,
    T: int,
    checkpoints: Sequence[int],
    sigma: float = 0.0,
    drift: float = 0.0,
    curvature: str = "convex",
    step: str = "adaptive",
    kind: str = "optimistic",
) -> dict[str, Any]:
    """A run: regret against F_t and the best fixed point of the first t rounds at the checkpoints, and what sigma and
    Sigma add up to. step: "adaptive" with the known G, "strongly_convex" with the known modulus, or "fixed", 0.1."""
    rng = np.random.default_rng([seed, 5])
    H = np.array(CURVATURES[curvature])
    c, v = unit(rng), unit(rng)
    signs = rng.choice([-1.0, 1.0], size=T)
    centres = (1 - drift) * 0.5 * c + drift * signs[:, None] * v
    noise = rng.standard_normal((T, DIMENSION))
    noise *= sigma / np.linalg.norm(noise, axis=1, keepdims=True)
    shape = Ball(DIMENSION)
    rules: dict[str, StepRule] = {
        "adaptive": adaptive(shape.size, float(H.max()) * 2 + sigma),
        "strongly_convex": strongly_convex(max(float(H.min()), 0.1)),
        "fixed": fixed(0.1),
    }
    run = learner(kind, shape, rules[step])
    played = np.zeros((T, DIMENSION))
    for t in range(T):
        played[t] = run.x
        run.observe(H * (played[t] - centres[t]) + noise[t])
    paid = 0.5 * ((played - centres) ** 2 @ H).cumsum()
    regret, jumps = [], np.diff(centres, axis=0) * H
    for t in checkpoints:
        best = centres[:t].mean(axis=0)
        regret.append(float(paid[t - 1] - 0.5 * ((best - centres[:t]) ** 2 @ H).sum()))
    return {"regret": regret, "noise": sigma**2 * T, "variation": float((jumps**2).sum())}


def unit(rng: np.random.Generator) -> Array:
    v = rng.standard_normal(DIMENSION)
    return v / np.linalg.norm(v)


def narrow_gap(*, seed: int, Ts: Sequence[int], kind: str = "optimistic") -> dict[str, Any]:
    """Neither noise nor drift: one loss on the simplex, a run for every T, the second best 1 / sqrt(T) above the best
    of five responses. Regret against the best response, exactly."""
    rng = np.random.default_rng([seed, 6])
    regret = []
    for T in Ts:
        loss = np.concatenate([[0.0, T**-0.5], rng.uniform(0.5, 1, 3)])
        run = learner(kind, Simplex(5), adaptive(Simplex(5).size, 1.0))
        paid = 0.0
        for _ in range(T):
            paid += float(loss @ run.x)
            run.observe(loss)
        regret.append(paid)
    return {"regret": regret}


# ---- self-play -------------------------------------------------------------------------------------------------------


class TwicePlayed(OptimisticMWU):
    """The hint is taken from the policy before: P(. > pi_{t-1}) twice, P(. > pi_t) never."""

    def _next(self, eta: float) -> tuple[Array, Array]:
        wins = self.game.wins(self.policy)
        old, self._old = getattr(self, "_old", wins), wins
        return softmax(self.log_policy + eta * old)


PLAYERS: dict[str, Any] = {"optimistic": OptimisticMWU, "plain": SPPO, "late": TwicePlayed}


def last_policy(*, seed: int, eta: float, Ts: Sequence[int], kind: str = "optimistic") -> dict[str, Any]:
    """Exploitability of the last policy on a random cycle, from a random start."""
    g = game(seed, "cyclic")
    rng = np.random.default_rng([seed, 7])
    run: SelfPlay = PLAYERS[kind](g, eta, 0.9 * rng.dirichlet(np.ones(3)) + 0.1 / 3)
    return {"exploitability": [exploitability(g, run.advance(T - run.t).policy) for T in Ts]}


def forms(*, seed: int, steps: int, fault: str = "none") -> dict[str, Any]:
    """Three ways to write a thing, largest differences over the steps.

    no_hint   the learner with M_t = 0 against projected gradient descent and multiplicative weights, written out
    learner   the learner on the losses -P(. > pi_t) against `OptimisticMWU`
    combined  log pi_{t+1} - log pi_t - eta (2 P(. > pi_t) - P(. > pi_{t-1})), up to a constant
    """
    g, rng = game(seed), np.random.default_rng([seed, 8])
    n, eta = len(g), float(rng.uniform(0.05, 1))
    ball, simplex = (
        learner("optimistic" if fault == "hint" else "no_hint", s, fixed(eta)) for s in (Ball(n), Simplex(n))
    )
    x, u = np.zeros(n), np.zeros(n)
    plain = 0.0
    for _ in range(steps):
        law = np.exp(u) / np.exp(u).sum()
        plain = max(plain, float(np.abs(ball.x - x).max()), float(np.abs(simplex.x - law).max()))
        loss = rng.uniform(-1, 1, n)
        ball.observe(loss)
        simplex.observe(loss)
        x = x - eta * loss
        x = x / max(1.0, float(np.linalg.norm(x)))
        u = u - eta * loss
    run = OptimisticMWU(g, eta, np.full(n, 1 / n))
    other = learner("no_hint" if fault == "no_hint" else "optimistic", Simplex(n), fixed(eta))
    same, combined, before = 0.0, 0.0, np.zeros(n)
    for _ in range(steps):
        same = max(same, float(np.abs(run.policy - other.x).max()))
        wins, log_policy = g.P @ run.policy, run.log_policy
        other.observe(-wins)
        target = wins if fault == "single_target" else 2 * wins - before
        combined = max(combined, float(np.ptp(run.advance(1).log_policy - log_policy - eta * target)))
        before = wins
    return {"errors": [plain, same, combined]}
