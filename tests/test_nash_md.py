"""Nash-MD, INPO and SPPO against the definitions of their steps, their fixed points and each other."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from preflab.algorithms.inpo import INPO
from preflab.algorithms.ipo import ipo
from preflab.algorithms.nash_md import NashMD
from preflab.algorithms.planning import best_response, exploitability, regularised_nash
from preflab.algorithms.planning.games import kl
from preflab.algorithms.self_play import SelfPlay, constant, decreasing, mixture
from preflab.algorithms.sppo import SPPO, hedge_step
from preflab.envs import bradley_terry_game, cyclic_game, random_game, three_type_game
from scipy.optimize import minimize

seeds, sizes = st.integers(0, 10**6), st.integers(2, 7)
temperatures = st.floats(0.05, 2)
shares = st.floats(0.05, 1).filter(lambda s: abs(s - 0.5) > 0.05)  # swapped weights are invisible at 1/2


def drawn(n, seed):
    rng = np.random.default_rng(seed)
    mu, start = rng.dirichlet(np.ones(n), size=2) * 0.98 + 0.02 / n
    return random_game(n, rng, reference=mu), start


@given(sizes, seeds, temperatures, shares)
def test_one_step_of_each_in_the_papers_words(n, seed, tau, share):
    game, start = drawn(n, seed)
    eta, P, mu = share / tau, game.P, game.reference
    mixed = start ** (1 - share) * mu**share
    mixed /= mixed.sum()
    steps = {
        NashMD(game, tau, eta, start): mixed * np.exp(eta * (P @ mixed)),
        INPO(game, tau, eta, start): mixed * np.exp(eta * (P @ start)),
        SPPO(game, eta, start): start * np.exp(eta * (P @ start)),
    }
    for run, expected in steps.items():
        run.advance(1)
        np.testing.assert_allclose(run.policy, expected / expected.sum(), rtol=1e-10)
        np.testing.assert_allclose(np.exp(run.log_policy), run.policy, rtol=1e-12)
        np.testing.assert_allclose(run.average, start, atol=1e-15)
        assert run.t == 1


@pytest.mark.parametrize("seed", range(4))
def test_the_step_maximises_what_the_paper_says(seed):
    """argmax of eta P(pi > mixture) - KL(pi, mixture), by a general-purpose optimiser."""
    game, start = drawn(4, seed)
    tau, eta = 0.4, 0.75
    _, log_mixture = mixture(np.log(start), game.log_reference, eta * tau)
    wins = game.P @ np.exp(log_mixture)

    def loss(u):
        log_pi = u - np.logaddexp.reduce(u)
        return kl(log_pi, log_mixture) - eta * float(np.exp(log_pi) @ wins)

    best = minimize(loss, np.zeros(4), method="BFGS", options={"gtol": 1e-10}).x
    best = np.exp(best - np.logaddexp.reduce(best))
    np.testing.assert_allclose(NashMD(game, tau, eta, start).advance(1).policy, best, atol=1e-6)


@given(sizes, seeds, temperatures)
def test_the_decreasing_steps_forget_the_start(n, seed, tau):
    game, start = drawn(n, seed)
    a, b = (NashMD(game, tau, start=s).advance(1).policy for s in (None, start))
    np.testing.assert_allclose(a, b, atol=1e-12)
    np.testing.assert_allclose(a, best_response(game, game.reference, tau), atol=1e-12)
    assert decreasing(tau)(0) * tau == pytest.approx(1)


@given(sizes, seeds, temperatures)
def test_without_temperature_or_opponent_all_are_one(n, seed, tau):
    """R1: at eta tau = 1 INPO is IPO on the pairs' law. R2: at tau = 0 every step is SPPO's."""
    game, start = drawn(n, seed)
    np.testing.assert_allclose(
        INPO(game, tau, 1 / tau, start).advance(1).policy, ipo(game, start, tau), atol=1e-12
    )
    tiny = 1e-13
    sppo = SPPO(game, 0.7, start).advance(1).policy
    for kind in (NashMD, INPO):
        np.testing.assert_allclose(kind(game, tiny, 0.7, start).advance(1).policy, sppo, atol=1e-11)


@pytest.mark.parametrize("tau", [0.1, 0.5, 2.0])
@pytest.mark.parametrize("seed", range(3))
def test_where_they_go(tau, seed):
    """INPO to the equilibrium for any constant step, Nash-MD to the best response to its own mixture."""
    game, start = drawn(6, seed)
    star = regularised_nash(game, tau)
    eta = min(0.4, 0.9 / tau)
    steps = int(40 / (eta * tau))
    inpo = INPO(game, tau, eta, start).advance(steps)
    assert kl(star.log_policy, inpo.log_policy) <= 1e-14
    md = NashMD(game, tau, eta, start).advance(steps)
    own, _ = mixture(md.log_policy, game.log_reference, eta * tau)
    np.testing.assert_allclose(best_response(game, own, tau), md.policy, atol=1e-9)
    assert kl(star.log_policy, md.log_policy) > 1e-8
    decreasing_steps = NashMD(game, tau, start=start).advance(2000)
    assert kl(star.log_policy, decreasing_steps.log_policy) <= 8 / (tau**2 * 2001)
    assert exploitability(game, decreasing_steps.policy, tau) <= 1e-3 / tau


@pytest.mark.parametrize(
    "make", [lambda g: NashMD(g, 0.3), lambda g: INPO(g, 0.3, 0.5), lambda g: SPPO(g, decreasing(1.0))]
)
def test_a_run_in_two_parts_is_the_run(make):
    game, _ = drawn(6, 0)
    whole, parts = make(game).advance(50), make(game).advance(17).advance(0).advance(33)
    np.testing.assert_array_equal(whole.log_policy, parts.log_policy)
    np.testing.assert_array_equal(whole.average, parts.average)
    assert whole.average.sum() == pytest.approx(1)


def test_before_the_first_step():
    run = NashMD(cyclic_game(), 0.1)
    np.testing.assert_array_equal(run.average, run.policy)
    np.testing.assert_allclose(run.policy, 1 / 3)


@pytest.mark.parametrize("T", [100, 1000])
def test_the_average_of_sppo_keeps_its_promise_and_the_last_policy_does_not(T):
    game = cyclic_game()
    run = SPPO(game, hedge_step(3, T)).advance(T)
    assert exploitability(game, run.average) <= math.sqrt(math.log(3) / (2 * T))
    assert exploitability(game, run.average) * math.sqrt(T) == pytest.approx(0.0407, abs=1e-3)
    assert exploitability(game, run.policy) > 0.03


def test_nothing_is_lost_to_underflow():
    game = bradley_terry_game([0.0, 40.0, 80.0])
    run = SPPO(game, 50.0).advance(100)
    assert run.policy[0] == 0.0
    assert np.isfinite(run.log_policy).all()
    assert run.log_policy[0] < -2000


def test_bad_input_is_refused():
    game = three_type_game(0.1)
    with pytest.raises(ValueError, match=r"eta tau = 1.2 at t = 0; it must be at most 1: take eta <= 2$"):
        NashMD(game, 0.5, 2.4).advance(1)
    with pytest.raises(ValueError, match=r"eta tau = 1.5 at t = 3"):
        INPO(game, 0.5, lambda t: float(t)).advance(9)
    with pytest.raises(ValueError, match=r"start\[2\] is 0; mirror ascent cannot bring a response back"):
        SPPO(game, 0.1, [0.5, 0.5, 0.0])
    with pytest.raises(ValueError, match=r"start has shape \(2,\)"):
        SPPO(game, 0.1, [0.5, 0.5])
    for kind in (NashMD, INPO):
        with pytest.raises(ValueError, match="tau is 0"):
            kind(game, 0)
    for eta in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="must be positive and finite"):
            constant(eta)
    with pytest.raises(NotImplementedError):
        SelfPlay(game, 0.1, constant(0.1)).advance(1)
