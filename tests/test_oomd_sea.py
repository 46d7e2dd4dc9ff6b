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
    OptimisticMWU,
    OptimisticOMD,
    Simplex,
    adaptive,
    fixed,
    strongly_convex,
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
