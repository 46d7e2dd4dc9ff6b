"""What the claims about optimistic mirror descent measure: losses of known noise and drift, planted faults, cells.

The losses: F_t(x) = (x - c_t)^T H (x - c_t) / 2 on the unit ball of R^5, H diagonal, c_t = c + s e_t v with signs e_t
that do not depend on the learner; f_t = F_t + sigma <xi_t, x> with xi_t uniform on the sphere. So sigma_t = sigma and
Sigma_t = |H (c_t - c_{t-1})| exactly, and the best fixed point is the mean of the c_t, which lies in the ball.

The exp-concave losses: -log of the Bradley-Terry probability of a sampled label on a sampled pair, parameter in the
unit ball. The law of both is known, so is F_t, and the best fixed parameter is a maximum likelihood (`expected_best`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ...algorithms.estimation import fit_preferences
from ...algorithms.estimation.preferences import ball_maximum
from ...algorithms.oomd_sea import (
    Ball,
    Geometry,
    NewtonBall,
    OptimisticMWU,
    OptimisticOMD,
    Simplex,
    StepRule,
    adaptive,
    fixed,
    online_newton,
    strongly_convex,
    tracking,
)
from ...algorithms.planning.games import exploitability, softmax
from ...algorithms.self_play import SelfPlay
from ...algorithms.sppo import SPPO
from ...envs.kernels import Array
from ...envs.links import LOGISTIC
from ._declare import cells_of
from ._game_runs import game

DIMENSION = 5
CURVATURES = {"convex": (1.0, 0.7, 0.4, 0.1, 0.0), "strongly_convex": (2.0, 1.7, 1.4, 1.1, 1.0)}


cell = cells_of(__name__)


# ---- planted faults --------------------------------------------------------------------------------------------------


class FromThePlayed(OptimisticOMD):
    """xhat_{t+1} is a step from x_t in place of xhat_t."""

    def _base(self, gradient: Array) -> Array:
        return self.geometry.move(self._state, gradient, self.eta)


class FrozenMetric(NewtonBall):
    """A_t stays A_1."""

    def after(self, gradient: Array) -> NewtonBall:
        return self


def newton(kind: str, dimension: int, scale: float) -> NewtonBall:
    """The geometry for Bradley-Terry losses with |phi| = scale on the unit ball, or a faulty one."""
    right = online_newton(dimension, scale, math.exp(-scale))
    if kind == "frozen":
        return FrozenMetric(right.radius, right.beta, right.factor)
    if kind == "short_steps":
        return replace(right, beta=3000 * right.beta)
    return replace(right, beta=1.0) if kind == "beta_one" else right


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


# ---- exp-concave losses ----------------------------------------------------------------------------------------------


def rows(rng: np.random.Generator, n: int, dimension: int, length: float) -> Array:
    """(n, dimension), all of one length."""
    x = rng.standard_normal((n, dimension))
    return x * (length / np.linalg.norm(x, axis=1, keepdims=True))


def expected_best(phi: Array, probability: Array, rounds: int) -> Array:
    """The x of the unit ball where the sum over rounds of E log(1 + e^{-<phi, x>}) is least, pairs drawn uniformly.

    probability (K,): the mean over rounds of P(first preferred). A maximum likelihood with fractional wins.
    """
    wins = probability * rounds
    fit = fit_preferences(phi, wins, counts=np.full(len(phi), float(rounds)), radius=1.0)
    assert fit.converged
    return fit.theta


def annotator(
    *,
    seed: int,
    dimension: int,
    T: int,
    checkpoints: Sequence[int],
    drift: float,
    sampled: bool = True,
    scale: float = 4.0,
    kind: str = "newton",
) -> dict[str, Any]:
    """Reward learning online: regret against F_t and the best fixed parameter of the first t rounds, at checkpoints.

    A pair of K = 4 dimension is drawn, with |phi| = scale; then its label, by a Bradley-Terry annotator whose parameter
    jumps between two of length at most 1/2 + drift, with signs that do not depend on the learner. sampled=False: the
    gradients are those of F_t. kind: "newton", a fault of `newton`, or "convex_steps", those of `adaptive`.
    """
    rng = np.random.default_rng([seed, 9, dimension])
    K = 4 * dimension
    phi = rows(rng, K, dimension, scale)
    taste, way = rows(rng, 2, dimension, 1.0)
    moods = LOGISTIC.value((0.5 * taste + np.array([[-drift], [drift]]) * way) @ phi.T)
    mood = rng.integers(2, size=T)
    pair, coin = rng.integers(K, size=T), rng.random(T)
    p = moods[mood]
    first = coin < p[np.arange(T), pair]
    if kind == "convex_steps":
        run = OptimisticOMD(Ball(dimension), adaptive(2.0, scale))
    else:
        run = OptimisticOMD(newton(kind, dimension, scale), fixed(1.0))
    played = np.zeros((T, dimension))
    for t in range(T):
        x = played[t] = run.x
        if sampled:
            f = phi[pair[t]]
            run.observe((1 / (1 + math.exp(-float(f @ x))) - first[t]) * f)
        else:
            run.observe((LOGISTIC.value(phi @ x) - p[t]) @ phi / K)

    def losses(z: Array, p: Array) -> Array:
        return (-LOGISTIC.log(-z) - p * z).mean(axis=-1)

    paid = losses(played @ phi.T, p).cumsum()
    regret = []
    for t in checkpoints:
        mean = p[:t].mean(axis=0)
        regret.append(float(paid[t - 1] - t * losses(phi @ expected_best(phi, mean, t), mean)))
    return {"regret": regret}


def newton_inequality(*, seed: int, labels: str, T: int, kind: str = "newton") -> dict[str, Any]:
    """The bound minus the left side against the worst u, at three times: with the gradients, and with the losses.

    The worst u for the gradients maximises a concave quadratic over the ball; for the losses it is taken to be the
    maximum likelihood in the ball. labels: "annotator", at random; "periods", one pair whose label changes every so
    often; "turn", the label changes once.
    """
    rng = np.random.default_rng([seed, 10])
    d, scale = 3, float(rng.uniform(2, 4))
    phi = rows(rng, T, d, scale)
    if labels != "annotator":
        phi[:] = phi[0]
    rounds = np.arange(T)
    first = {
        "annotator": rng.random(T) < LOGISTIC.value(phi @ rows(rng, 1, d, 1.0)[0]),
        "periods": rounds // int(rng.integers(1, 60)) % 2 == 0,
        "turn": rounds < rng.integers(1, T),
    }[labels]
    right = newton("newton", d, scale)
    beta, first_metric = right.beta, right.metric
    run = OptimisticOMD(newton(kind, d, scale), fixed(1.0))
    g, x = np.zeros((T, d)), np.zeros((T, d))
    surprise, moved = np.zeros(T), np.zeros(T)
    for t in range(T):
        x[t], metric = run.x, run.geometry
        assert isinstance(metric, NewtonBall)
        g[t] = (LOGISTIC.value(phi[t] @ x[t]) - first[t]) * phi[t]
        surprise[t] = metric.dual_norm(g[t] - run.hint) ** 2
        away = x[t] - run._hat
        moved[t] = away @ metric.metric @ away
        run.observe(g[t])
    paid, sign = (g * x).sum(axis=1), np.where(first, 1.0, -1.0)
    slack, scales = [], []
    for n in (T // 4, T // 2, T):
        G, at = g[:n], paid[:n]
        A = first_metric + beta * G.T @ G
        b = beta * G.T @ at - G.sum(axis=0)
        u = ball_maximum(A, np.ones(d), b, 1.0)[0]
        gap = at - G @ u
        linear = float((gap - beta / 2 * gap**2).sum() - u @ first_metric @ u / 2)
        v = fit_preferences(phi[:n], first[:n].astype(float), radius=1.0).theta
        losses = [-float(LOGISTIC.log(sign[:n] * (phi[:n] * each).sum(axis=1)).sum()) for each in (x[:n], v)]
        bound = 1.5 * float(surprise[:n].sum()) - float(moved[:n].sum()) / 2
        slack += [bound - linear, bound - (losses[0] - losses[1] - float(v @ first_metric @ v) / 2)]
        scales.append(abs(bound) + abs(linear))
    return {"slack": min(slack), "scale": max(scales)}


# ---- against a path --------------------------------------------------------------------------------------------------


def path_inequality(*, seed: int, path: str, T: int, kind: str = "optimistic") -> dict[str, Any]:
    """The bound minus the regret against the minimisers of F_t, after every round, at a random fixed step.

    path: "circle" at a random speed, or "jumps" at random times to random places. kind="unpaid": the path's length is
    left out of the bound.
    """
    rng = np.random.default_rng([seed, 11])
    H, eta = np.array(CURVATURES["convex"]), float(10 ** rng.uniform(-2, 0.5))
    if path == "circle":
        angle = np.arange(T) * 10 ** rng.uniform(-2, 0.3)
        centres = np.zeros((T, DIMENSION))
        centres[:, :2] = np.column_stack([np.cos(angle), np.sin(angle)]) * rng.uniform(0.3, 1)
    else:
        centres = rows(rng, T, DIMENSION, 1.0)[(rng.random(T) < rng.uniform(0.01, 0.5)).cumsum() % T]
    noise = rng.choice([0.0, 1.0]) * rng.standard_normal((T, DIMENSION))
    shape = Ball(DIMENSION)
    run = learner(kind, shape, fixed(eta))
    x, g, surprise = np.zeros((T, DIMENSION)), np.zeros((T, DIMENSION)), np.zeros(T)
    for t in range(T):
        x[t] = run.x
        g[t] = H * (x[t] - centres[t]) + noise[t]
        surprise[t] = shape.dual_norm(g[t] - run.hint)
        run.observe(g[t])
    regret = (g * (x - centres)).sum(axis=1).cumsum()
    length = np.concatenate([[0.0], np.linalg.norm(np.diff(centres, axis=0), axis=1).cumsum()])
    moved = np.concatenate([[0.0], (np.diff(x, axis=0) ** 2).sum(axis=1).cumsum()])
    start = centres[0] @ centres[0] / 2
    bound = (start + shape.size * length * (kind != "unpaid")) / eta
    bound += eta * np.cumsum(surprise**2) - moved / (4 * eta)
    return {"slack": float((bound - regret).min()), "scale": float(np.abs(bound).max())}


def dynamic(
    *,
    seed: int,
    Ts: Sequence[int],
    power: float,
    sigma: float,
    step: str = "tracking",
    comparator: str = "path",
) -> dict[str, Any]:
    """A run for every T against minimisers that jump T^power times, evenly, between two points at distance 1.2.

    comparator="fixed": regret against the best fixed point. step: "tracking" knows P_T, "static"
    takes it for 0. What is returned is regret against F_t.
    """
    rng = np.random.default_rng([seed, 12])
    H, shape, regret = np.array(CURVATURES["convex"]), Ball(DIMENSION), []
    for T in Ts:
        angle, jumps = rng.uniform(0, 2 * np.pi), round(T**power)
        v = np.zeros(DIMENSION)
        v[:2] = math.cos(angle), math.sin(angle)
        block = np.arange(T) * (jumps + 1) // T
        centres = 0.6 * (-1.0) ** block[:, None] * v
        noise = rows(rng, T, DIMENSION, sigma)
        run = OptimisticOMD(
            shape, tracking(shape.size, 2 + sigma, 1.2 * jumps if step == "tracking" else 0.0)
        )
        paid = 0.0
        for c, xi in zip(centres, noise, strict=True):
            away = run.x - c
            paid += 0.5 * float(H @ away**2)
            run.observe(H * away + xi)
        best = centres.mean(axis=0) if comparator == "fixed" else centres
        regret.append(paid - 0.5 * float(((best - centres) ** 2 @ H).sum()))
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
