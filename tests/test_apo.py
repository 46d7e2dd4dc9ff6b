"""APO against its recursion worked by hand, iterative DPO and SPPO, and minimisers of losses."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from preflab.algorithms import apo
from preflab.algorithms.dpo import dpo_loss, dpo_solution
from preflab.algorithms.optimisation import Pairs, SoftmaxTable, fit, gather
from preflab.algorithms.sppo import SPPO, sppo_loss
from preflab.envs import bradley_terry_game, random_game

seeds = st.integers(0, 10**6)


def bandit(seed, n=4):
    rng = np.random.default_rng(seed)
    return rng.normal(size=n), np.log(0.8 * rng.dirichlet(np.ones(n)) + 0.2 / n)


def test_three_rounds_by_hand():
    """Two responses, uniform reference, one unit of log-odds a round: 1, 1 + 1.5, 2.5 + 1.75 at alpha = 1/2."""
    run = apo.APO.of_reward([1.0, 0.0], np.log([0.5, 0.5]), 1.0, 0.5)
    odds, ahead = [], []
    for _ in range(3):
        run.advance(1)
        odds.append(run.log_proposal[0] - run.log_proposal[1])
        ahead.append(run.log_policy[0] - run.log_policy[1])
    assert odds == pytest.approx([1, 2.5, 4.25], abs=1e-14)
    assert ahead == pytest.approx([1.5, 3.25, 5.125], abs=1e-14)
    assert [apo.coefficient(t, 0.5) for t in (1, 2, 3)] == pytest.approx([1, 2.5, 4.25], abs=1e-15)
    assert apo.coefficient(0, 0.5) == 0


@given(st.integers(1, 40), st.floats(0, 0.95))
def test_the_coefficient_is_a_sum(t, alpha):
    by_hand = sum(sum(alpha**j for j in range(k)) for k in range(1, t + 1))
    assert apo.coefficient(t, alpha) == pytest.approx(by_hand, rel=1e-9)
    assert apo.weights(t, alpha).sum() == pytest.approx(by_hand, rel=1e-9)
    assert apo.weights(t, alpha)[-1] == pytest.approx(1)


@given(seeds, st.floats(0.2, 3), st.floats(0, 0.9), st.integers(1, 15))
def test_rounds_are_worth_c_t_rounds(seed, beta, alpha, t):
    rewards, log_reference = bandit(seed)
    run = apo.APO.of_reward(rewards, log_reference, beta, alpha).advance(t)
    closed = dpo_solution(rewards, log_reference, beta / apo.coefficient(t, alpha))
    np.testing.assert_allclose(run.proposal, closed[0], atol=1e-12)
    np.testing.assert_allclose(run.policy.sum(), 1, atol=1e-12)


def test_without_momentum_it_is_sppo():
    game = random_game(5, 3, reference=[0.1, 0.2, 0.3, 0.2, 0.2])
    run, sppo = apo.APO.of_game(game, 0.3, 0.0).advance(25), SPPO(game, 0.3).advance(25)
    np.testing.assert_allclose(run.policy, sppo.policy, atol=1e-13)
    np.testing.assert_allclose(run.policy, run.proposal, atol=1e-15)


def test_a_run_goes_on_where_it_stopped():
    game = random_game(4, 1)
    whole, parts = (apo.APO.of_game(game, 0.5, 0.4).advance(a).advance(b) for a, b in ((12, 0), (5, 7)))
    np.testing.assert_array_equal(whole.log_policy, parts.log_policy)
    assert whole.t == parts.t == 12


def test_a_fitted_round_can_be_followed():
    rewards, log_reference = bandit(7)
    game = bradley_terry_game(rewards, reference=np.exp(log_reference))
    table, exact = SoftmaxTable(4), apo.APO.of_reward(rewards, log_reference, 1.5, 0.3)
    run = apo.APO.of_reward(rewards, log_reference, 1.5, 0.3)
    for _ in range(3):
        pairs = Pairs.population(game, run.policy)
        p, w = pairs.tensors()
        anchor = gather(torch.as_tensor(run.log_policy), pairs)
        found = fit(
            lambda lp, pairs=pairs, p=p, w=w, anchor=anchor: apo.apo_loss(
                gather(lp, pairs), anchor, p, w, beta=1.5
            ),
            table,
            tolerance=1e-13,
        )
        run.follow(table.log_probabilities(found.theta).numpy())
        exact.advance(1)
        np.testing.assert_allclose(run.proposal, exact.proposal, atol=1e-9)


def test_sppo_s_own_loss_misses_a_round_by_the_cube_of_the_step():
    game, table = random_game(4, 2), SoftmaxTable(4)
    misses = []
    for eta in (0.2, 0.1):
        run = apo.APO.of_game(game, eta, 0.5).advance(3)
        law, previous = torch.as_tensor(run.policy), torch.as_tensor(run.log_policy)
        wins = torch.as_tensor(game.wins(run.policy))
        found = fit(
            lambda lp, law=law, previous=previous, wins=wins, eta=eta: sppo_loss(
                lp, previous, wins, law, eta=eta
            ),
            table,
            run.log_policy,
            tolerance=1e-14,
        )
        step = run.advance(1).log_proposal
        misses.append(np.abs(table.log_probabilities(found.theta).numpy() - step).max())
    assert math.log2(misses[0] / misses[1]) == pytest.approx(3, abs=0.3)


def test_the_loss_is_dpo_s_with_the_extrapolated_reference():
    policy, previous = torch.randn(2, 6, 2, generator=torch.Generator().manual_seed(0))
    previous.requires_grad_(True)
    policy.requires_grad_(True)
    loss = apo.apo_loss(policy, previous, torch.ones(6), beta=0.3)
    assert loss.item() == dpo_loss(policy, previous, torch.ones(6), beta=0.3).item()
    loss.backward()
    assert previous.grad is None


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"alpha is 1; it must lie in \[0, 1\)"):
        apo.APO.of_reward([0, 1], [0, 0], 1.0, 1)
    with pytest.raises(ValueError, match=r"alpha is -0\.1"):
        apo.coefficient(3, -0.1)
    with pytest.raises(ValueError, match="beta is 0"):
        apo.APO.of_reward([0, 1], [0, 0], 0, 0.5)
    with pytest.raises(ValueError, match="eta is -1"):
        apo.APO.of_game(random_game(2, 0), -1, 0.5)
    with pytest.raises(ValueError, match="a response without mass stays without"):
        apo.APO.of_reward([0, 1], [0, -math.inf], 1.0, 0.5)


def test_the_spec_reads_the_signature():
    assert apo.LOSS.inputs == ("policy", "previous", "preferred", "weight")
    assert apo.LOSS.parameters == ("beta",)
