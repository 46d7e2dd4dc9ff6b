"""KL-regularised policy gradients against finite differences, sampling, the soft Bellman solver and gradient ascent."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from preflab.algorithms import kl_bayes
from preflab.algorithms import kl_policy_gradient as pg
from preflab.algorithms.optimisation import PrefixTree, SoftmaxTable
from preflab.algorithms.planning import soft_value_iteration
from preflab.envs import random_token_mdp

seeds = st.integers(0, 10**6)


def bandit(seed, n=4):
    rng = np.random.default_rng(seed)
    return rng.normal(size=n), np.log(0.9 * rng.dirichlet(np.ones(n)) + 0.1 / n), rng


def surrogate_gradient(table, theta, rewards, log_reference, beta, **options):
    theta = theta.clone().requires_grad_(True)
    log_pi = table.log_probabilities(theta)
    reward, ref = torch.as_tensor(rewards), torch.as_tensor(log_reference)
    weight = pg.on_policy(log_pi, table.prompts)
    loss = pg.policy_gradient_loss(log_pi, ref, reward, weight, beta=beta, **options)
    return -torch.autograd.grad(loss, theta)[0].numpy()


def test_two_responses_by_hand():
    # pi = (sigma(t), sigma(-t)), ref = (1/2, 1/2), r = (1, 0): dJ/dt = s (1 - s) (1 - beta t)
    theta, beta = torch.tensor([0.8, 0.0], dtype=torch.float64), 0.5
    s = 1 / (1 + math.exp(-0.8))
    g = surrogate_gradient(SoftmaxTable(2), theta, np.array([1.0, 0.0]), np.log([0.5, 0.5]), beta)
    np.testing.assert_allclose(g, np.array([1, -1]) * s * (1 - s) * (1 - beta * 0.8), atol=1e-15)


@given(seeds, st.floats(0.1, 2), st.floats(-3, 3))
def test_the_gradient_by_finite_differences(seed, beta, baseline):
    rewards, log_reference, rng = bandit(seed)
    law = 0.9 * rng.dirichlet(np.ones(4)) + 0.025

    def value(logits):
        p = np.exp(logits - np.logaddexp.reduce(logits))
        return kl_bayes.objective(p / p.sum(), np.exp(log_reference), rewards, beta)

    x = np.log(law)
    wanted = [(value(x + 1e-5 * e) - value(x - 1e-5 * e)) / 2e-5 for e in np.eye(4)]
    found = surrogate_gradient(
        SoftmaxTable(4), torch.tensor(x), rewards, log_reference, beta, baseline=baseline
    )
    np.testing.assert_allclose(found, wanted, atol=1e-8)


def test_samples_give_the_gradient_on_average():
    model = random_token_mdp(2, 3, seed=1)
    table, rng = PrefixTree(model.kernel), np.random.default_rng(0)
    rewards, log_reference = model.leaf_rewards, model.leaf_log_probabilities()
    theta = torch.tensor(rng.normal(size=table.size))
    wanted = surrogate_gradient(table, theta, rewards, log_reference, 0.4)
    law = table.log_probabilities(theta).exp().numpy()
    drawn = torch.tensor(rng.choice(len(law), size=(400, 50), p=law / law.sum()))
    ref, reward = torch.as_tensor(log_reference)[drawn], torch.as_tensor(rewards)[drawn]
    of_ref = table.token_log_probabilities(table.start(log_reference))[drawn]
    for to_go in (False, True):
        gradients = []
        for k in range(len(drawn)):
            live = theta.clone().requires_grad_(True)
            if to_go:
                tokens = table.token_log_probabilities(live)[drawn[k]]
                loss = pg.reward_to_go_loss(tokens, of_ref[k], reward[k], beta=0.4)
            else:
                loss = pg.policy_gradient_loss(
                    table.log_probabilities(live)[drawn[k]], ref[k], reward[k], beta=0.4
                )
            gradients.append(-torch.autograd.grad(loss, live)[0].numpy())
        error = np.mean(gradients, axis=0) - wanted
        assert (np.abs(error) <= 5 * np.std(gradients, axis=0) / 20 + 1e-12).all()


def test_the_reference_and_the_reward_are_constants():
    policy = torch.zeros(3, 2, dtype=torch.float64, requires_grad=True)
    reference = torch.ones(3, 2, dtype=torch.float64, requires_grad=True)
    reward = torch.ones(3, dtype=torch.float64)
    pg.reward_to_go_loss(policy, reference, reward, beta=0.5).backward()
    assert reference.grad is None
    # advantages 1 + 0.5 (2, 1), the mean over three responses
    np.testing.assert_allclose(policy.grad.numpy(), [[-2 / 3, -0.5]] * 3, atol=1e-15)


def test_a_tree_ends_where_the_soft_bellman_equation_does():
    model = random_token_mdp(3, 3, prompts=2, seed=5)
    table, beta = PrefixTree(model.kernel), 0.3
    rewards, log_reference = model.leaf_rewards, model.leaf_log_probabilities()
    soft = soft_value_iteration(model, model.reference, beta)
    found = pg.solve(table, rewards, log_reference, beta)
    log_pi = table.log_probabilities(found.theta).numpy()
    np.testing.assert_allclose(np.exp(log_pi), model.leaf_probabilities(soft.policy), atol=1e-9)
    assert -found.value == pytest.approx(float(model.initial @ soft.V[0]), abs=1e-12)
    assert found.gradient <= 1e-10
    assert 0 <= pg.gap_bound(log_pi, log_reference, rewards, beta, 2) <= 1e-12


@pytest.mark.parametrize("kind", ["table", "tree"])
def test_plain_ascent_gets_there_and_never_goes_down(kind):
    if kind == "table":
        rewards, log_reference, _ = bandit(3)
        table = SoftmaxTable(4)
    else:
        model = random_token_mdp(2, 2, seed=2)
        table, rewards, log_reference = (
            PrefixTree(model.kernel),
            model.leaf_rewards,
            model.leaf_log_probabilities(),
        )
    theta, gaps = table.start(), []
    star = kl_bayes.posterior(np.exp(log_reference) / np.exp(log_reference).sum(), rewards, 0.5)
    for _ in range(6):
        log_pi = table.log_probabilities(theta).numpy()
        gaps.append(0.5 * kl_bayes.divergence(np.exp(log_pi), star.law))
        assert gaps[-1] <= pg.gap_bound(log_pi, log_reference, rewards, 0.5) + 1e-12
        theta = pg.ascend(table, theta, rewards, log_reference, 0.5, eta=2.0, steps=150)
    assert np.diff(gaps).max() <= 1e-13
    assert gaps[-1] <= 1e-3 * gaps[0]


@given(seeds, st.floats(0.05, 3), st.floats(0.01, 1))
def test_a_mirror_step_is_the_maximiser_of_its_definition(seed, beta, share):
    rewards, log_reference, rng = bandit(seed)
    eta, log_pi = share / beta, np.log(0.9 * rng.dirichlet(np.ones(4)) + 0.025)
    step = pg.natural_step(log_pi, log_reference, rewards, beta, eta)
    assert np.exp(step).sum() == pytest.approx(1, abs=1e-12)
    # argmax of eta <q, a> - KL(q, pi), a = r - beta log pi/ref
    a = rewards - beta * (log_pi - log_reference)

    def value(log_q):
        return float(np.exp(log_q) @ (eta * a - (log_q - log_pi)))

    for q in 0.9 * rng.dirichlet(np.ones(4), size=5) + 0.025:
        short = float(q @ (np.log(q) - step))
        assert value(step) - value(np.log(q)) == pytest.approx(short, abs=1e-10)


def test_bad_input_is_named():
    model = random_token_mdp(2, 2)
    table, ref = PrefixTree(model.kernel), model.leaf_log_probabilities()
    x = torch.zeros(2)
    with pytest.raises(ValueError, match="beta is -1; it must be positive"):
        pg.policy_gradient_loss(x, x, x, beta=-1)
    with pytest.raises(ValueError, match="rewards has 3 entries; the table has 7 responses"):
        pg.solve(table, [1, 2, 3], ref, 1.0)
    with pytest.raises(ValueError, match=r"log_reference\[1\] is -inf"):
        pg.solve(table, model.leaf_rewards, np.where(np.arange(7) == 1, -np.inf, ref), 1.0)
    with pytest.raises(ValueError, match=r"eta beta = 1\.5; it must be at most 1: take eta <= 2"):
        pg.token_natural_step(table, table.start(), ref, model.leaf_rewards, 0.5, 3.0)
    with pytest.raises(ValueError, match="eta is 0"):
        pg.ascend(table, table.start(), model.leaf_rewards, ref, 1.0, eta=0.0, steps=1)


def test_the_spec_reads_the_signature():
    assert pg.LOSS.inputs == ("policy", "reference", "reward", "weight")
    assert pg.LOSS.parameters == ("beta", "baseline")
