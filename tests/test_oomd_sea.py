"""Optimistic mirror descent against its definition, a convex solver's regret, and what it promises in games."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from preflab.algorithms.nash_md import NashMD
from preflab.algorithms.oomd_sea import (
    Ball,
    NewtonBall,
    OptimisticMWU,
    OptimisticOMD,
    Simplex,
    adaptive,
    exp_concave_rate,
    fixed,
    online_newton,
    strongly_convex,
    tracking,
)
from preflab.algorithms.planning import exploitability
from preflab.algorithms.self_play import decreasing
from preflab.algorithms.sppo import SPPO
from preflab.envs import cyclic_game, random_game
from preflab.envs.preference_games import cyclic_nash
from preflab.theory.claims import _oomd_sea_runs as runs
from scipy.optimize import minimize

seeds = st.integers(0, 10**6)


def played(run, gradients):
    """x_1, ..., x_T."""
    x = []
    for g in gradients:
        x.append(run.x.copy())
        run.observe(g)
    return np.array(x)


@given(seeds, st.floats(0.05, 2), st.booleans())
def test_the_ball_in_the_papers_words(seed, eta, optimistic):
    """Both argmins, by projection."""
    g = np.random.default_rng(seed).standard_normal((6, 3))

    def project(x):
        return x / max(1, np.linalg.norm(x) / 0.7)

    hat, hint, expected = np.zeros(3), np.zeros(3), []
    for each in g:
        expected.append(project(hat - eta * hint))
        hat = project(hat - eta * each)
        hint = each if optimistic else 0 * each
    run = OptimisticOMD(Ball(3, 0.7), fixed(eta), optimistic=optimistic)
    np.testing.assert_allclose(played(run, g), expected, atol=1e-12)
    assert run.t == 7
    assert np.linalg.norm(run.x) <= 0.7 + 1e-12


@given(seeds, st.floats(0.05, 2), st.booleans())
def test_the_simplex_in_the_papers_words(seed, eta, optimistic):
    g = np.random.default_rng(seed).standard_normal((6, 4))
    hat, hint, expected = np.full(4, 0.25), np.zeros(4), []
    for each in g:
        x = hat * np.exp(-eta * hint)
        expected.append(x / x.sum())
        hat = hat * np.exp(-eta * each)
        hat /= hat.sum()
        hint = each if optimistic else 0 * each
    run = OptimisticOMD(Simplex(4), fixed(eta), optimistic=optimistic)
    np.testing.assert_allclose(played(run, g), expected, atol=1e-12)
    assert run.x.sum() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_the_choice_is_the_argmin(seed):
    """argmin eta <M, x> + D(x, xhat) over the ball, by a general-purpose solver."""
    g = np.random.default_rng(seed).standard_normal((4, 3))
    run = OptimisticOMD(Ball(3), fixed(0.6))
    played(run, g[:-1])
    hat = run._hat
    found = minimize(
        lambda x: 0.6 * run.hint @ x + 0.5 * (x - hat) @ (x - hat),
        np.zeros(3),
        constraints={"type": "ineq", "fun": lambda x: 1 - x @ x},
        options={"ftol": 1e-14},
    )
    np.testing.assert_allclose(run.x, found.x, atol=1e-5)
    np.testing.assert_array_equal(run.hint, g[-2])


def not_optimal(A, x, hat, gradient, radius):
    """How far x is from argmin <gradient, x> + |x - hat|_A^2 / 2 over the ball: A (x - hat) + gradient + nu x = 0 with
    nu >= 0, and nu = 0 inside."""
    assert np.linalg.norm(x) <= radius * (1 + 1e-12)
    left = A @ (x - hat) + gradient
    nu = max(0.0, -float(left @ x) / radius**2) if np.linalg.norm(x) > radius * (1 - 1e-12) else 0.0
    return np.linalg.norm(left + nu * x)


@given(seeds, st.floats(0.2, 20), st.booleans())
def test_the_newton_ball_in_the_papers_words(seed, size, optimistic):
    """Both argmins by their optimality conditions, in the metric written out; large gradients leave the ball."""
    rng = np.random.default_rng(seed)
    d, radius, alpha = 3, 0.7, 0.5
    g = rng.standard_normal((8, d))
    g *= size / np.linalg.norm(g, axis=1, keepdims=True)
    beta = min(1 / (4 * size * 2 * radius), alpha) / 2
    run = OptimisticOMD(online_newton(d, size, alpha, radius), fixed(1.0), optimistic=optimistic)
    A, hint = (1 + beta / 2 * size**2) * np.eye(d), np.zeros(d)
    for each in g:
        np.testing.assert_allclose(run.geometry.metric, A, rtol=1e-12, atol=1e-12)
        hat, x = run._hat, run.x
        surprise = (each - hint) @ np.linalg.solve(A, each - hint)
        V = run.V
        assert not_optimal(A, x, hat, hint, radius) <= 1e-9 * (1 + size)
        run.observe(each)
        assert not_optimal(A, run._hat, hat, each, radius) <= 1e-9 * (1 + size)
        assert pytest.approx(surprise, rel=1e-9, abs=1e-9) == run.V - V
        A = A + beta / 2 * np.outer(each, each)
        hint = each if optimistic else 0 * each


def test_the_newton_step_is_the_argmin():
    """Against a general-purpose solver, at a metric far from round and at a step of 0.6."""
    rng = np.random.default_rng(4)
    factor = np.tril(rng.standard_normal((3, 3))) + 2 * np.eye(3)
    shape = NewtonBall(1.0, 0.1, factor)
    for scale in (0.1, 30.0):  # inside the ball; out of it
        hat, g = 0.5 * rng.uniform(-1, 1, 3), scale * rng.standard_normal(3)
        x = shape.move(hat, g, 0.6)

        def value(u, hat=hat, g=g):
            return 0.6 * g @ u + 0.5 * (u - hat) @ shape.metric @ (u - hat)

        ball = {"type": "ineq", "fun": lambda u: 1 - u @ u}
        found = minimize(value, np.zeros(3), constraints=ball, options={"ftol": 1e-14})
        np.testing.assert_allclose(x, found.x, atol=1e-5)
        assert (np.linalg.norm(x) < 1 - 1e-6) == (scale < 1)
    u = rng.standard_normal((500, 3))
    u /= np.linalg.norm(u, axis=1, keepdims=True)
    longest = np.sqrt(np.einsum("ni,ij,nj->n", u, shape.metric, u)).max()
    assert 0.98 * shape.size <= longest <= shape.size


@given(seeds, st.floats(0.1, 6), st.floats(0.2, 2))
def test_bradley_terry_losses_have_the_curvature_that_is_counted_on(seed, G, radius):
    rng = np.random.default_rng(seed)
    phi, x, u = (v / np.linalg.norm(v) for v in rng.standard_normal((3, 4)))
    phi, x, u = G * phi, rng.uniform(0, radius) * x, rng.uniform(0, radius) * u
    beta = online_newton(4, G, math.exp(-G * radius), radius).beta
    assert beta == exp_concave_rate(2 * radius, G, math.exp(-G * radius))
    along = -phi @ (x - u) / (1 + math.exp(phi @ x))  # <grad f(x), x - u>
    gain = np.logaddexp(0, -phi @ x) - np.logaddexp(0, -phi @ u)
    assert gain <= along - beta / 2 * along**2 + 1e-12


def test_the_rate_of_exp_concave_losses_is_the_papers():
    assert exp_concave_rate(2.0, 3.0, 0.5) == pytest.approx(1 / 48)  # 1 / (4 G D) is smaller
    assert exp_concave_rate(2.0, 3.0, 0.01) == 0.005
    first = online_newton(2, 3.0, 0.5)
    np.testing.assert_allclose(first.metric, (1 + 9 / 96) * np.eye(2))
    assert first.after(np.array([1.0, 0.0])) is not first  # a round's geometry does not change
    np.testing.assert_allclose(first.metric, (1 + 9 / 96) * np.eye(2))


def test_steps_for_a_path():
    D, G, P = 2.0, 3.0, 7.0
    assert tracking(D, G, P)(3, 5.0) == pytest.approx(math.sqrt(D**2 + 2 * D * P) / math.sqrt(1 + 36 + 5))
    assert tracking(D, G, 0.0)(3, 5.0) == adaptive(D, G)(3, 5.0)


def test_steps_are_the_papers_and_use_the_past_alone():
    D, G, delta = 2.0, 3.0, 0.5
    run, rng, V = OptimisticOMD(Ball(2), adaptive(D, G, delta)), np.random.default_rng(0), 0.0
    last = np.zeros(2)
    for _ in range(5):
        assert run.eta == pytest.approx(D / math.sqrt(delta + 4 * G**2 + V))
        g = rng.standard_normal(2)
        run.observe(g)
        V += (g - last) @ (g - last)
        last = g
    assert pytest.approx(V) == run.V
    assert strongly_convex(0.5)(8, 99.0) == 0.5
    assert fixed(0.3)(8, 99.0) == 0.3
    assert Ball(2, 1.5).size == 3
    # D^2 / 2 bounds the divergence from the start
    assert Simplex(7).size ** 2 / 2 == pytest.approx(math.log(7))
    assert Simplex(3).dual_norm(np.array([1.0, -3.0, 2.0])) == 3


def test_a_right_hint_costs_nothing_and_the_order_of_equal_losses_does_not_matter():
    g = np.ones((50, 2))
    run = OptimisticOMD(Ball(2), fixed(0.5))
    played(run, g)
    assert pytest.approx(2) == run.V  # the first round's surprise alone
    same = np.repeat(np.random.default_rng(0).standard_normal((1, 2)), 20, axis=0)
    a, b = (played(OptimisticOMD(Ball(2), fixed(0.5)), s) for s in (same, same[::-1]))
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("curvature", ["convex", "strongly_convex"])
def test_the_regret_that_cells_report_is_that_of_a_convex_solver(curvature, monkeypatch):
    """The comparator by SLSQP over the ball, the losses from the cell's own stream."""
    losses = []
    observe = OptimisticOMD.observe

    def record(self, gradient):
        losses.append((self.x.copy(), np.array(gradient)))
        observe(self, gradient)

    monkeypatch.setattr(OptimisticOMD, "observe", record)
    found = runs.sea(seed=3, T=60, checkpoints=[60], drift=0.4, curvature=curvature)
    H = np.array(runs.CURVATURES[curvature])
    # without noise the gradient is H (x - c): where H is 0 the centre does not matter
    x, g = (np.array(each) for each in zip(*losses, strict=True))
    h = np.where(H > 0, H, 1.0)
    centres = x - g / h

    def total(u):
        return 0.5 * float((H * (u - centres) ** 2).sum())

    best = minimize(
        total,
        np.zeros(5),
        constraints={"type": "ineq", "fun": lambda u: 1 - u @ u},
        options={"ftol": 1e-14},
    )
    paid = 0.5 * float((H * (x - centres) ** 2).sum())
    assert found["regret"][0] == pytest.approx(paid - best.fun, abs=1e-8)
    assert found["noise"] == 0
    assert found["variation"] == pytest.approx(float(((np.diff(centres, axis=0) * H) ** 2).sum()))


def recorded(monkeypatch):
    """The rounds of every learner from here on: what was played, the gradient, the hint, xhat."""
    rounds, observe = [], OptimisticOMD.observe

    def record(self, gradient):
        rounds.append((self.x.copy(), np.array(gradient), self.hint.copy(), self._hat.copy()))
        observe(self, gradient)

    monkeypatch.setattr(OptimisticOMD, "observe", record)
    return rounds


def stream(seed, dimension, T):
    """The pairs of the cell `annotator` and P(first preferred) for every round and pair, from its seed."""
    rng = np.random.default_rng([seed, 9, dimension])
    phi = runs.rows(rng, 4 * dimension, dimension, 4.0)
    taste, way = runs.rows(rng, 2, dimension, 1.0)
    theta = 0.5 * taste + 0.3 * (2 * rng.integers(2, size=T)[:, None] - 1) * way
    return phi, 1 / (1 + np.exp(-theta @ phi.T))


@pytest.mark.parametrize("dimension", [1, 3])
def test_the_annotators_regret_is_that_of_a_convex_solver(dimension, monkeypatch):
    """The losses are written out, their slopes are those that were observed, and the comparator is SLSQP's."""
    rounds, T = recorded(monkeypatch), 80
    found = runs.annotator(
        seed=5, dimension=dimension, T=T, checkpoints=[T // 2, T], drift=0.3, sampled=False
    )
    x, g = (np.array([r[k] for r in rounds]) for k in (0, 1))
    phi, p = stream(5, dimension, T)

    def total(u, n):  # sum over rounds of the mean over pairs of the cross entropy
        z = np.broadcast_to(u, (n, dimension)) @ phi.T
        return (p[:n] * np.logaddexp(0, -z) + (1 - p[:n]) * np.logaddexp(0, z)).mean(axis=1).sum()

    step = 1e-6  # what was observed are the gradients of these losses
    for t in (0, 1, T - 1):
        for axis in np.eye(dimension) * step:
            slope = (total(x[: t + 1] + axis, t + 1) - total(x[: t + 1] - axis, t + 1)) / (2 * step)
            assert slope == pytest.approx((g[: t + 1] @ axis).sum() / step, abs=1e-6)
    for n, regret in zip((T // 2, T), found["regret"], strict=True):
        ball = {"type": "ineq", "fun": lambda u: 1 - u @ u}
        best = minimize(total, np.zeros(dimension), args=(n,), constraints=ball, options={"ftol": 1e-14})
        assert regret == pytest.approx(total(x[:n], n) - best.fun, abs=1e-7)


def test_without_drift_the_best_parameter_is_the_annotators():
    rng = np.random.default_rng(0)
    phi, theta = runs.rows(rng, 12, 3, 4.0), np.array([0.1, -0.4, 0.5])
    found = runs.expected_best(phi, 1 / (1 + np.exp(-phi @ theta)), 100)
    np.testing.assert_allclose(found, theta, atol=1e-8)
    np.testing.assert_allclose(np.linalg.norm(phi, axis=1), 4)


def test_sampled_gradients_have_the_gradients_of_f_for_their_mean(monkeypatch):
    """Their differences are a martingale of steps at most 2 |phi| = 8: its sum is of the order of the root of T."""
    rounds, T = recorded(monkeypatch), 3000
    runs.annotator(seed=6, dimension=2, T=T, checkpoints=[T], drift=0.3)
    x, g = (np.array([r[k] for r in rounds]) for k in (0, 1))
    phi, p = stream(6, 2, T)
    exact = (1 / (1 + np.exp(-x @ phi.T)) - p) @ phi / 8
    assert np.linalg.norm((g - exact).sum(axis=0)) <= 8 * 2 * math.sqrt(T)
    assert 0.5 * math.sqrt(T) <= np.linalg.norm(g - exact) <= 8 * math.sqrt(T)


@given(seeds, st.sampled_from(["annotator", "periods", "turn"]))
def test_the_inequality_for_exp_concave_losses(seed, labels):
    found = runs.newton_inequality(seed=seed, labels=labels, T=40)
    assert found["slack"] >= -1e-12 * found["scale"]


@pytest.mark.parametrize("labels", ["annotator", "turn"])
def test_the_worst_parameter_is_the_worst(labels, monkeypatch):
    """The cell's slack is at most that of any u of the ball, with the bound written out."""
    rounds, T = recorded(monkeypatch), 60
    found = runs.newton_inequality(seed=2, labels=labels, T=T)
    x, g, hint, hat = (np.array(each) for each in zip(*rounds, strict=True))
    scale = float(np.random.default_rng([2, 10]).uniform(2, 4))
    beta = min(1 / (8 * scale), math.exp(-scale)) / 2
    start = 1 + beta / 2 * scale**2
    A, right = start * np.eye(3), 0.0
    for t in range(T):
        right += 1.5 * (g[t] - hint[t]) @ np.linalg.solve(A, g[t] - hint[t])
        right -= 0.5 * (x[t] - hat[t]) @ A @ (x[t] - hat[t])
        A = A + beta / 2 * np.outer(g[t], g[t])
    rng = np.random.default_rng(0)
    for _ in range(300):
        u = runs.rows(rng, 1, 3, rng.uniform(0, 1))[0]
        gap = (g * (x - u)).sum(axis=1)
        assert right + start * u @ u / 2 - (gap - beta / 2 * gap**2).sum() >= found["slack"] - 1e-9


@given(seeds, st.sampled_from(["circle", "jumps"]))
def test_the_inequality_for_paths(seed, path):
    found = runs.path_inequality(seed=seed, path=path, T=40)
    assert found["slack"] >= -1e-12 * found["scale"]


@pytest.mark.parametrize("seed", range(4))
def test_any_path_is_paid_for(seed):
    """Not only that of the minimisers: random gradients, random walks in the ball, and the worst corner each round."""
    rng = np.random.default_rng(seed)
    T, eta = 60, float(10 ** rng.uniform(-1.5, 0.3))
    g = rng.standard_normal((T, 3))
    run = OptimisticOMD(Ball(3), fixed(eta))
    x = played(run, g)
    moved = (np.diff(x, axis=0) ** 2).sum()
    for u in (runs.rows(rng, T, 3, 1.0), -g / np.linalg.norm(g, axis=1, keepdims=True)):
        P = np.linalg.norm(np.diff(u, axis=0), axis=1).sum()
        right = (u[0] @ u[0] / 2 + 2 * P) / eta + eta * run.V - moved / (4 * eta)
        assert (g * (x - u)).sum() <= right + 1e-12


@pytest.mark.parametrize("comparator", ["path", "fixed"])
def test_regret_against_the_minimisers(comparator, monkeypatch):
    """From the recorded rounds: without noise the gradient is H (x - c). The steps know the path's length."""
    rounds, T = recorded(monkeypatch), 100
    found = runs.dynamic(seed=1, Ts=[T], power=0.5, sigma=0.0, comparator=comparator)["regret"][0]
    H = np.array(runs.CURVATURES["convex"])
    x, g = (np.array([r[k] for r in rounds]) for k in (0, 1))
    loss = 0.5 * (g**2 / np.where(H > 0, H, 1)).sum()
    centres = np.where(H > 0, x - g / np.where(H > 0, H, 1), 0.0)
    assert np.linalg.norm(np.diff(centres, axis=0), axis=1).sum() == pytest.approx(1.2 * 10)
    if comparator == "fixed":
        loss -= 0.5 * (H * (centres - centres.mean(axis=0)) ** 2).sum()
    assert found == pytest.approx(loss, abs=1e-9)


@given(seeds, st.sampled_from(["ball", "simplex"]), st.sampled_from(["noise", "drift", "alternating"]))
def test_the_regret_inequality(seed, geometry, losses):
    found = runs.regret_inequality(seed=seed, geometry=geometry, losses=losses, T=40)
    assert found["slack"] >= -1e-12 * found["scale"]


def test_the_worst_comparator_is_the_worst():
    """What the cell says about every u, against random ones."""
    rng = np.random.default_rng(0)
    g, eta = rng.standard_normal((30, runs.DIMENSION)), 0.3
    for shape in (Ball(runs.DIMENSION), Simplex(runs.DIMENSION)):
        x = played(OptimisticOMD(shape, fixed(eta)), g)
        hints = np.vstack([np.zeros(runs.DIMENSION), g[:-1]])
        surprise = sum(shape.dual_norm(a - b) ** 2 for a, b in zip(g, hints, strict=True))
        steps = np.diff(x, axis=0)
        ball = isinstance(shape, Ball)
        path = sum((np.linalg.norm(s) if ball else np.abs(s).sum()) ** 2 for s in steps)
        for _ in range(200):
            u = rng.dirichlet(np.ones(runs.DIMENSION))
            if ball:
                u = rng.standard_normal(runs.DIMENSION)
                u /= max(1.0, np.linalg.norm(u))
            divergence = u @ u / 2 if ball else float(u @ np.log(u * runs.DIMENSION))
            left = float((g * (x - u)).sum())
            assert left <= divergence / eta + eta * surprise - path / (4 * eta) + 1e-12


def test_self_play_in_its_own_words():
    game = random_game(5, 0)
    run = OptimisticMWU(game, 0.4)
    hat, wins = game.reference, np.zeros(5)
    for t in range(6):
        pi = hat * np.exp(0.4 * wins)
        pi /= pi.sum()
        np.testing.assert_allclose(run.policy, pi, atol=1e-13)
        wins = game.P @ pi
        hat = hat * np.exp(0.4 * wins)
        assert run.advance(1).t == t + 1
    # steps that change: the second sequence takes eta_t, the next policy eta_{t+1}
    run = OptimisticMWU(game, decreasing(1.0)).advance(1)
    wins = game.P @ game.reference
    pi = game.reference * np.exp((1 + 2 / 3) * wins)
    np.testing.assert_allclose(run.policy, pi / pi.sum(), atol=1e-13)


def test_self_play_in_two_parts_is_the_run():
    game = random_game(6, 1)
    whole, parts = (
        OptimisticMWU(game, 0.4).advance(50),
        OptimisticMWU(game, 0.4).advance(17).advance(33),
    )
    np.testing.assert_array_equal(whole.log_policy, parts.log_policy)
    np.testing.assert_array_equal(whole.average, parts.average)


def test_the_last_policy_converges_on_a_cycle_where_sppo_s_does_not():
    game = cyclic_game()
    found = OptimisticMWU(game, 0.3).advance(12_000)
    np.testing.assert_allclose(found.policy, cyclic_nash(), atol=1e-5)
    assert exploitability(game, SPPO(game, 0.3).advance(12_000).policy) > 0.1


def test_bad_input_is_refused():
    for bad in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"D is {bad}; it must be positive and finite"):
            adaptive(bad, 1.0)
        with pytest.raises(ValueError, match="delta is"):
            adaptive(1.0, 1.0, bad)
        with pytest.raises(ValueError, match="modulus is"):
            strongly_convex(bad)
        with pytest.raises(ValueError, match="the step is"):
            fixed(bad)
        with pytest.raises(ValueError, match="D is"):
            tracking(bad, 1.0, 1.0)
        with pytest.raises(ValueError, match="G is"):
            exp_concave_rate(1.0, bad, 1.0)
        with pytest.raises(ValueError, match="alpha is"):
            online_newton(2, 1.0, bad)
        with pytest.raises(ValueError, match="radius is"):
            online_newton(2, 1.0, 1.0, bad)
    with pytest.raises(ValueError, match="dimension is 0; it must be at least 1"):
        online_newton(0, 1.0, 1.0)
    with pytest.raises(ValueError, match="path is -1; it must be finite and at least 0"):
        tracking(1.0, 1.0, -1)
    with pytest.raises(ValueError, match="G is -1"):
        adaptive(1.0, -1.0)
    run = OptimisticOMD(Ball(2), fixed(0.1))
    run.observe([1.0, 0.0])
    with pytest.raises(ValueError, match=r"the gradient of round 2 has shape \(3,\); expected finite \(2,\)"):
        run.observe([1.0, 0.0, 0.0])
    with pytest.raises(ValueError, match="expected finite"):
        run.observe([1.0, math.nan])
    with pytest.raises(ValueError, match=r"start\[0\] is 0"):
        OptimisticMWU(cyclic_game(), 0.1, [0.0, 0.5, 0.5])
    with pytest.raises(ValueError, match="tau is 0"):
        NashMD(cyclic_game(), 0.0)
