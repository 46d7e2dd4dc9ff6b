"""RPO's loss on worked numbers, its two forms against cvxpy, limits in eta, and over-optimisation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from preflab.algorithms.dpo import dpo_loss
from preflab.algorithms.incentives import policy_of
from preflab.algorithms.rpo import LOSS, adversarial_value, chosen_law, rpo_loss, rpo_rewards
from scipy.special import expit


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_a_worked_pair():
    policy, reference = tensor([-4.0, -5.0]), tensor([-4.2, -4.6])  # margin 0.6
    dpo = -math.log(expit(0.3))
    chosen = rpo_loss(policy, reference, tensor(1.0), beta=0.5, eta=0.2)
    assert chosen.item() == pytest.approx(dpo + 0.2 * 0.5 * 4.0, abs=1e-14)
    half = rpo_loss(policy, reference, tensor(0.5), beta=0.5, eta=0.2)
    assert half.item() == pytest.approx((dpo - math.log(expit(-0.3))) / 2 + 0.1 * 4.5, abs=1e-14)
    base = rpo_loss(
        policy, reference, tensor(1.0), None, tensor(-3.0, -7.0), tensor(0.25, 0.75), beta=0.5, eta=0.2
    )
    assert base.item() == pytest.approx(dpo + 0.1 * 6.0, abs=1e-14)


@given(st.integers(0, 10**6))
def test_without_eta_it_is_dpo_and_the_mean_of_the_chosen_is_their_law(seed):
    rng = np.random.default_rng(seed)
    n, m = 5, 9
    log_pi, log_ref = (torch.tensor(np.log(rng.dirichlet(np.ones(n)))) for _ in range(2))
    y = torch.tensor(rng.integers(n, size=(m, 2)))
    p = torch.tensor(rng.integers(2, size=m).astype(float))
    plain = rpo_loss(log_pi[y], log_ref[y], p, beta=0.3, eta=0.0)
    torch.testing.assert_close(plain, dpo_loss(log_pi[y], log_ref[y], p, beta=0.3))
    wins = np.zeros((n, n))
    first = p.numpy() == 1
    pairs = y.numpy()
    np.add.at(wins, (np.where(first, *pairs.T), np.where(first, *pairs.T[::-1])), 1.0)
    with_eta = rpo_loss(log_pi[y], log_ref[y], p, beta=0.3, eta=0.7) - plain
    assert with_eta.item() == pytest.approx(-0.7 * 0.3 * float(chosen_law(wins) @ log_pi.numpy()), abs=1e-12)


def data(seed=0, n=5):
    rng = np.random.default_rng(seed)
    rewards = rng.normal(size=n)
    y = rng.integers(n, size=(60, 2))
    won = rng.random(60) < expit(rewards[y[:, 0]] - rewards[y[:, 1]])
    wins = np.zeros((n, n))
    np.add.at(wins, (np.where(won, *y.T), np.where(won, *y.T[::-1])), 1.0)
    np.fill_diagonal(wins, 0)
    return wins, np.log(0.9 * rng.dirichlet(np.ones(n)) + 0.1 / n)


@pytest.mark.parametrize("box", [1.0, 8.0])
def test_both_sides_of_the_saddle_by_a_conic_solver(box):
    import cvxpy as cp

    wins, log_ref = data()
    base, beta, eta = chosen_law(wins), 0.5, 0.8
    W = wins / wins.sum()
    found = rpo_rewards(wins, log_ref, base, beta=beta, eta=eta, box=box)
    pi, log_pi = policy_of(found.rewards, log_ref, beta)

    r = cp.Variable(5)
    i, j = np.nonzero(W)
    data_loss = W[i, j] @ cp.logistic(r[j] - r[i])
    inside = [cp.abs(r) <= box / 2]
    minimax = cp.Problem(
        cp.Minimize(data_loss + eta * (beta * cp.log_sum_exp(r / beta + log_ref) - base @ r)), inside
    )
    assert minimax.solve(solver=cp.CLARABEL) == pytest.approx(float(found.value), abs=1e-7)

    inner = cp.Problem(cp.Minimize(data_loss + eta * (pi - base) @ r), inside)
    value, worst = adversarial_value(log_pi, wins, log_ref, base, beta=beta, eta=eta, box=box)
    assert inner.solve(solver=cp.CLARABEL) - eta * beta * float(pi @ (log_pi - log_ref)) == pytest.approx(
        value, abs=1e-7
    )
    assert value == pytest.approx(float(found.value), abs=1e-9)  # pi is the maximin policy
    assert np.abs(worst).max() <= box / 2
    for other in np.random.default_rng(1).dirichlet(np.ones(5), size=5):
        lower, _ = adversarial_value(np.log(other), wins, log_ref, base, beta=beta, eta=eta, box=box)
        assert lower < value


def test_limits_in_eta():
    wins, log_ref = data(1)
    base = chosen_law(wins)
    far = rpo_rewards(wins, log_ref, base, beta=0.5, eta=1e6, box=40.0).rewards
    np.testing.assert_allclose(policy_of(far, log_ref, 0.5)[0], base, atol=1e-5)
    batch = rpo_rewards(
        np.stack([wins, wins]), log_ref, np.stack([base, base]), beta=0.5, eta=[0.0, 1e6], box=40.0
    )
    np.testing.assert_allclose(policy_of(batch.rewards[1], log_ref, 0.5)[0], base, atol=1e-5)
    assert np.abs(policy_of(batch.rewards[0], log_ref, 0.5)[0] - base).max() > 0.05


def test_a_lucky_comparison():
    """The third response won its only comparison; DPO believes it, RPO gives it about 1 / (N eta)."""
    N = 4000
    wins = np.array([[0, 2500, 0], [1499, 0, 0], [0, 1, 0.0]])
    log_ref, masses = np.log(np.full(3, 1 / 3)), {}
    for eta in (0.0, 0.01):
        r = rpo_rewards(wins, log_ref, chosen_law(wins), beta=0.05, eta=eta, box=2.0).rewards
        masses[eta] = policy_of(r, log_ref, 0.05)[0][2]
    assert masses[0.0] > 0.99
    assert masses[0.01] < 2 / (N * 0.01)


def test_bad_input_is_refused():
    x = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="eta is -1; it must be at least 0"):
        rpo_loss(x, x, torch.ones(1), beta=1.0, eta=-1)
    with pytest.raises(ValueError, match="beta is 0"):
        rpo_loss(x, x, torch.ones(1), beta=0, eta=1)
    with pytest.raises(ValueError, match="nothing was compared: wins is 0"):
        rpo_rewards(np.zeros((2, 2)), np.log([0.5, 0.5]), [0.5, 0.5], beta=1.0, eta=1.0, box=1.0)
    with pytest.raises(ValueError, match="eta is -2"):
        rpo_rewards(np.ones((2, 2)), np.log([0.5, 0.5]), [0.5, 0.5], beta=1.0, eta=-2, box=1.0)
    assert LOSS.inputs == ("policy", "reference", "preferred", "weight", "base", "base_weight")
    assert LOSS.parameters == ("beta", "eta")
