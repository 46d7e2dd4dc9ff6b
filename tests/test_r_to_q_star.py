"""Token-level DPO: its loss, token rewards, inverse soft Q, potentials and beams, against other routes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from preflab.algorithms.dpo import dpo_loss
from preflab.algorithms.optimisation import PrefixTree
from preflab.algorithms.planning import leaf_tokens, soft_value_iteration
from preflab.algorithms.r_to_q_star import (
    LOSS,
    beam_search,
    inverse_soft_q,
    q_function,
    shaped,
    token_dpo_loss,
    token_rewards,
)
from preflab.envs import FiniteMDP, load_language_world, random_linear_mdp, random_token_mdp
from scipy.special import softmax


@given(st.integers(0, 10**6), st.floats(0.05, 3))
def test_the_token_loss_is_dpo_of_the_sums(seed, beta):
    rng = np.random.default_rng(seed)
    model = random_token_mdp(2, 3, seed=seed)
    table = PrefixTree(model.kernel)
    theta = torch.tensor(rng.normal(size=table.size), requires_grad=True)
    reference = table.start(model.leaf_log_probabilities())
    index = torch.as_tensor(rng.integers(table.responses, size=(7, 2)))
    p, w = torch.as_tensor(rng.random((2, 7)))
    mask = torch.as_tensor(np.arange(3) < table.lengths[:, None])[index]
    losses = [
        token_dpo_loss(
            *(table.token_log_probabilities(x)[index] for x in (theta, reference)), p, w, m, beta=beta
        )
        for m in (None, mask)
    ]
    losses.append(dpo_loss(*(table.log_probabilities(x)[index] for x in (theta, reference)), p, w, beta=beta))
    gradients = [torch.autograd.grad(x, theta)[0] for x in losses]
    for loss, gradient in zip(losses[:2], gradients[:2], strict=True):
        assert loss.item() == pytest.approx(losses[2].item(), abs=1e-13)
        torch.testing.assert_close(gradient, gradients[2], atol=1e-13, rtol=0)


def test_credit_goes_to_the_token_that_earns():
    # the reward is for the second token alone, the reference knows no prefix, and responses end at the horizon
    k, H, beta = 3, 3, 0.4
    model = random_token_mdp(k, H, seed=1)
    ref, earned = np.array([0.5, 0.3, 0.2, 0.0]), np.array([1.0, -0.5, 0.2])
    reward, reference = [np.zeros(r.shape) for r in model.reward], [p.copy() for p in model.reference]
    reward[1][1:, :k] = earned
    for p in reference:
        p[1:] = ref
    soft = soft_value_iteration(model, reference, beta, reward)
    first, second, third = token_rewards(soft.policy, reference, beta)
    np.testing.assert_allclose(first, 0, atol=1e-12)
    np.testing.assert_allclose(third, 0, atol=1e-12)
    value = beta * math.log(ref[:k] @ np.exp(earned / beta))
    np.testing.assert_allclose(second[1:, :k], np.broadcast_to(earned - value, (k, k)), atol=1e-12)


def test_a_reward_at_the_end_is_spread_over_the_tokens():
    model = random_token_mdp(2, 3, seed=4)
    model = model.with_response_reward(np.random.default_rng(0).normal(size=model.n_leaves))
    soft = soft_value_iteration(model, model.reference, 0.5)
    own = token_rewards(soft.policy, model.reference, 0.5)
    assert np.abs(own[0][1]).max() > 0.1  # although nothing is paid for the first token, unless it ends
    np.testing.assert_allclose(model.along(own), model.leaf_rewards - soft.V[0][1], atol=1e-12)


@given(st.integers(0, 10**6))
def test_every_policy_is_optimal_for_its_reward_without_values(seed):
    rng = np.random.default_rng(seed)
    model = random_linear_mdp(4, 3, 3, 3, seed=seed)
    reference, policy = rng.dirichlet(np.ones(3), size=(2, 3, 4)) * 0.9 + 0.1 / 3
    reward = inverse_soft_q(model, policy, reference, 0.7)
    for own, again in zip(reward, token_rewards(policy, reference, 0.7), strict=True):
        np.testing.assert_array_equal(own, again)
    soft = soft_value_iteration(model, reference, 0.7, reward)
    np.testing.assert_allclose(soft.policy, policy, atol=1e-12)
    np.testing.assert_allclose(soft.V, 0, atol=1e-12)


def test_logits_are_q_values():
    rng = np.random.default_rng(2)
    logits, reference = rng.normal(size=(3, 4, 3)), rng.dirichlet(np.ones(3), size=(3, 4))
    Q, V = q_function(logits, reference, 0.3)
    for x, ref, q, v in zip(logits, reference, Q, V, strict=True):
        np.testing.assert_allclose(v, 0.3 * np.log((ref * np.exp(q / 0.3)).sum(axis=1)), atol=1e-12)
        np.testing.assert_allclose(ref * np.exp((q - v[:, None]) / 0.3), softmax(x, axis=1), atol=1e-12)
    Q, V = q_function([np.array([[0.0, -np.inf]])], [np.array([[1.0, 0.0]])], 2.0)
    np.testing.assert_array_equal(Q[0], [[0.0, -np.inf]])
    assert V[0] == pytest.approx(0)
    with pytest.raises(ValueError, match=r"logits\[h=0, s=0, a=1\] is 0 where the reference has no mass"):
        q_function([np.array([[0.0, 0.0]])], [np.array([[1.0, 0.0]])], 2.0)


def test_a_potential_of_certain_transitions_is_a_difference():
    kernel = np.eye(3)[np.random.default_rng(0).integers(3, size=(2, 3, 2))]
    model = FiniteMDP.dense(kernel, np.zeros((2, 3, 2)))
    Phi = [np.arange(3.0), np.arange(3.0) ** 2, np.zeros(3)]
    reward = shaped(model, Phi)
    for h in range(2):
        for s in range(3):
            for a in range(2):
                assert reward[h][s, a] == Phi[h + 1][kernel[h, s, a].argmax()] - Phi[h][s]
    with pytest.raises(ValueError, match=r"potential\[h=2, s=1\] is 1; it must be 0 after the last step"):
        shaped(model, [*Phi[:2], np.array([0.0, 1.0, 0.0])])
    with pytest.raises(ValueError, match=r"potential has shapes \[\(3,\), \(3,\)\]; expected"):
        shaped(model, Phi[:2])


def brute_beam(model, scores, width, values, prompt):
    """The same search on strings of tokens, with totals summed from the start each time."""
    k, H = model.branching, model.horizon

    def total(tokens, ended):
        s, t = 1 + prompt, 0.0
        for h, a in enumerate(tokens):
            t += scores[h][s, a]
            s = 1 + (s - 1) * k + a
        if ended and len(tokens) < H:
            t += scores[len(tokens)][s, k]
        return t, (0.0 if ended or values is None else values[len(tokens)][s])

    kept = [((), False)]
    for _ in range(H):
        wider = [x for x in kept if x[1]]
        for tokens, ended in kept:
            if not ended:
                wider += [((*tokens, a), len(tokens) + 1 == H) for a in range(k)] + [(tokens, True)]
        kept = sorted(wider, key=lambda x: -sum(total(*x)))[:width]
    return [(tokens, total(tokens, True)[0]) for tokens, _ in kept]


@given(st.integers(0, 10**6), st.integers(1, 9), st.booleans())
def test_beams_are_those_on_strings(seed, width, with_values):
    rng = np.random.default_rng(seed)
    model = random_token_mdp(2, 3, prompts=2, seed=seed)
    scores = [rng.normal(size=r.shape) for r in model.reward]
    values = [rng.normal(size=n) for n in model.sizes] if with_values else None
    for prompt in range(2):
        found = beam_search(model, scores, width, values, prompt)
        wanted = brute_beam(model, scores, width, values, prompt)
        assert [leaf_tokens(model.kernel, leaf) for leaf in found.leaves] == [tokens for tokens, _ in wanted]
        np.testing.assert_allclose(found.totals, [t for _, t in wanted], atol=1e-12)
        assert all(ended for _, _, ended in found.trace[-1])


def test_greedy_search_misses_what_a_wide_beam_finds_on_the_language_world():
    model = load_language_world()
    soft = soft_value_iteration(model, model.reference, 0.1)
    ratio = token_rewards(soft.policy, model.reference, 0.1)
    returns = model.leaf_rewards.reshape(model.roots, -1)
    short = []
    for prompt in range(model.roots):
        found = [beam_search(model, ratio, w, None, prompt).leaves[0] for w in (1, 1024)]
        assert returns[prompt, found[1]] == pytest.approx(returns[prompt].max(), abs=1e-9)
        short.append(returns[prompt].max() - returns[prompt, found[0]])
    assert min(short) >= -1e-9
    assert max(short) > 0.01


def test_a_small_beta_lowers_the_winners_implicit_reward_too():
    model = random_token_mdp(3, 3, seed=0)
    r, law = np.random.default_rng(0).normal(size=model.n_leaves), model.leaf_probabilities()
    winners = 2 * law * (1 / (1 + np.exp(r[None] - r[:, None])) @ law)
    assert winners.sum() == pytest.approx(1)
    means = []
    for beta in (0.1, 3.0):
        soft = soft_value_iteration(model.with_response_reward(r), model.reference, beta)
        means.append(winners @ model.along(token_rewards(soft.policy, model.reference, beta)))
        assert means[-1] == pytest.approx(winners @ r - soft.value, abs=1e-12)
    assert means[0] < 0 < means[1]


def test_bad_input_is_named():
    model = random_token_mdp(2, 2)
    x = torch.zeros(3, 2, 4).double()
    with pytest.raises(ValueError, match="beta is -1; it must be positive"):
        token_dpo_loss(x, x, torch.ones(3), beta=-1)
    with pytest.raises(ValueError, match=r"comparisons of tokens are \(..., 2, T\)"):
        token_dpo_loss(x[:, 0], x[:, 0], torch.ones(3), beta=1)
    with pytest.raises(ValueError, match="width is 0"):
        beam_search(model, model.reward, 0)
    with pytest.raises(ValueError, match=r"prompt is 1; the model has prompts 0\.\.0"):
        beam_search(model, model.reward, 2, prompt=1)
    with pytest.raises(ValueError, match="beta is 0"):
        token_rewards(model.reference, model.reference, 0)


def test_the_spec_reads_the_signature():
    assert LOSS.inputs == ("policy", "reference", "preferred", "weight", "mask")
    assert LOSS.parameters == ("beta",)
