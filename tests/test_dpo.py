"""DPO's loss against worked numbers, its closed form, reward MLE followed by KL-regularised RL, and enumeration."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from preflab.algorithms.dpo import LOSS, dpo_loss, dpo_solution, implicit_reward, plackett_luce_loss
from preflab.algorithms.optimisation import Pairs, SoftmaxTable, fit, gather
from preflab.envs import bradley_terry_game, random_game
from scipy.special import expit, logit, softmax


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def fitted(game, pairs, beta, start=None, **options):
    table = SoftmaxTable(len(game))
    reference = gather(torch.as_tensor(game.log_reference), pairs)
    p, w = pairs.tensors()
    found = fit(
        lambda lp: dpo_loss(gather(lp, pairs), reference, p, w, beta=beta, **options),
        table,
        game.log_reference if start is None else start,
        tolerance=1e-12,
    )
    return table.log_probabilities(found.theta).numpy()


def test_the_worked_pair():
    policy, reference = tensor([-40, -55]), tensor([-42, -50])
    policy.requires_grad_(True)
    loss = dpo_loss(policy, reference, tensor(1), beta=0.1)
    loss.backward()
    assert loss.item() == pytest.approx(-math.log(expit(0.7)), abs=1e-15)  # h = 7
    assert loss.item() == pytest.approx(0.403, abs=5e-4)
    assert policy.grad.tolist()[0] == pytest.approx([-0.1 * expit(-0.7), 0.1 * expit(-0.7)], abs=1e-16)


def test_at_the_reference_the_loss_is_log_2_and_the_weight_one_half():
    policy = tensor([-3.0, -9.0], [-1.0, -2.0]).requires_grad_(True)
    loss = dpo_loss(policy, policy.detach(), tensor(1, 1), beta=0.25)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2), abs=1e-15)
    np.testing.assert_allclose(policy.grad.numpy(), [[-0.0625, 0.0625]] * 2, atol=1e-16)


@given(st.integers(0, 10**6), st.integers(2, 6))
def test_the_population_minimiser_is_the_kl_optimum_for_any_connected_pairs(seed, n):
    rng = np.random.default_rng(seed)
    rewards, beta = rng.normal(size=n), rng.uniform(0.2, 2)
    game = bradley_terry_game(rewards, reference=0.9 * rng.dirichlet(np.ones(n)) + 0.1 / n)
    joint = np.zeros((n, n))
    order = rng.permutation(n)  # a random path connects all responses
    joint[order[:-1], order[1:]] = rng.random(n - 1) + 0.1
    found = fitted(game, Pairs.population(game, joint / joint.sum()), beta)
    np.testing.assert_allclose(found, dpo_solution(rewards, game.log_reference, beta)[1], atol=1e-7)


def test_two_stages_are_one():
    # the reward MLE by an independent solver, then KL-regularised RL in closed form
    import choix

    rng = np.random.default_rng(0)
    game = bradley_terry_game(rng.normal(size=5), reference=rng.dirichlet(np.ones(5)))
    pairs = Pairs.sampled(game, 3000, rng)
    counts = np.zeros((5, 5))
    won = np.rint(pairs.preferred * pairs.weight * 1e9)
    i, j = pairs.index.T
    counts[i, j] += won
    counts[j, i] += np.rint(pairs.weight * 1e9) - won
    rewards = choix.ilsr_pairwise_dense(counts, max_iter=10_000, tol=1e-12)
    found = fitted(game, pairs, 0.3)
    np.testing.assert_allclose(found, dpo_solution(rewards, game.log_reference, 0.3)[1], atol=1e-6)


@pytest.mark.parametrize("eps", [0.0, 0.1, 0.4])
def test_label_noise_shrinks_the_log_odds_of_two_arms(eps):
    game = bradley_terry_game([logit(0.8), 0.0])
    found = fitted(game, Pairs.population(game), 0.1, label_smoothing=eps)
    assert found[0] - found[1] == pytest.approx(logit((1 - 2 * eps) * 0.8 + eps) / 0.1, abs=1e-8)
    if eps == 0:
        assert found[0] - found[1] == pytest.approx(13.863, abs=1e-3)


def test_a_component_that_nobody_compares_keeps_its_share():
    game = bradley_terry_game([2.0, 0.0, 1.0, -1.0], reference=[0.1, 0.2, 0.3, 0.4])
    joint = np.zeros((4, 4))
    joint[0, 1] = joint[2, 3] = 0.5
    pairs = Pairs.population(game, joint)
    for start in ([0.25] * 4, [0.7, 0.1, 0.1, 0.1]):
        found = np.exp(fitted(game, pairs, 1.0, np.log(start)))
        within = found / np.array([found[:2].sum(), found[2:].sum()]).repeat(2)
        best = dpo_solution([2, 0, 1, -1], game.log_reference, 1.0)[0]
        np.testing.assert_allclose(
            within, best / np.array([best[:2].sum(), best[2:].sum()]).repeat(2), atol=1e-8
        )
    assert found[:2].sum() != pytest.approx(best[:2].sum(), abs=0.05)


@given(st.integers(0, 10**6))
def test_constants_of_the_prompt_and_the_order_of_a_pair_do_not_matter(seed):
    rng = np.random.default_rng(seed)
    policy, reference = torch.tensor(rng.normal(size=(2, 7, 2)))
    p, w = torch.tensor(rng.random((2, 7)))
    loss = dpo_loss(policy, reference, p, w, beta=0.4)
    shift = torch.tensor(rng.normal(size=(7, 1)))
    torch.testing.assert_close(dpo_loss(policy + shift, reference, p, w, beta=0.4), loss)
    torch.testing.assert_close(dpo_loss(policy.flip(1), reference.flip(1), 1 - p, w, beta=0.4), loss)


@given(st.integers(0, 10**6), st.integers(2, 5))
def test_rankings(seed, K):
    rng = np.random.default_rng(seed)
    policy, reference = torch.tensor(rng.normal(size=(2, 3, K)))
    r = implicit_reward(policy, reference, beta=0.6).numpy()
    by_hand = [-sum(row[k] - np.log(np.exp(row[k:]).sum()) for k in range(K)) for row in r]
    assert plackett_luce_loss(policy, reference, beta=0.6).item() == pytest.approx(
        np.mean(by_hand), abs=1e-12
    )
    two = policy[:, :2], reference[:, :2]
    torch.testing.assert_close(
        plackett_luce_loss(*two, beta=0.6), dpo_loss(*two, torch.ones(3, dtype=torch.float64), beta=0.6)
    )


def test_bad_parameters_are_named():
    x = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="beta is -1; it must be positive"):
        dpo_loss(x, x, torch.ones(1), beta=-1)
    with pytest.raises(ValueError, match=r"label_smoothing is 0\.7"):
        dpo_loss(x, x, torch.ones(1), beta=1, label_smoothing=0.7)
    with pytest.raises(ValueError, match="at least 2"):
        plackett_luce_loss(x[:, :1], x[:, :1], beta=1)
    with pytest.raises(ValueError, match="beta is inf"):
        dpo_solution([0, 1], [0, 0], math.inf)


def test_the_spec_reads_the_signature():
    assert LOSS.inputs == ("policy", "reference", "preferred", "weight")
    assert LOSS.parameters == ("beta", "label_smoothing")


def test_the_solution_is_a_softmax():
    law, log_law = dpo_solution([1.0, 2.0], np.log([0.4, 0.6]), 0.5)
    np.testing.assert_allclose(law, softmax(np.log([0.4, 0.6]) + np.array([2.0, 4.0])), atol=1e-15)
    np.testing.assert_allclose(np.exp(log_law), law, atol=1e-15)


def test_a_cycle_has_no_reward_and_the_fit_depends_on_the_pairs():
    game = random_game(4, 5)
    mu = np.array([0.7, 0.1, 0.1, 0.1])
    assert (
        np.abs(
            fitted(game, Pairs.population(game), 1.0) - fitted(game, Pairs.population(game, mu), 1.0)
        ).max()
        > 0.1
    )
