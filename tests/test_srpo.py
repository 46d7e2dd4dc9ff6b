"""SRPO against a game of two responses by hand, random policies, sampled comparisons and worked losses."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from preflab.algorithms import srpo as s
from preflab.envs import PreferenceGame, bradley_terry_game, random_game
from scipy.special import expit

seeds = st.integers(0, 10**6)


def drawn(seed, n=4):
    rng = np.random.default_rng(seed)
    game = random_game(n, rng, reference=0.8 * rng.dirichlet(np.ones(n)) + 0.2 / n)
    return game, 0.8 * rng.dirichlet(np.ones(n), size=n) + 0.2 / n, rng


def test_two_responses_by_hand():
    """P(0 > 1) = p, uniform references, beta = 1: Z(0) = (e^{1/2} + e^{1-p}) / 2, Z(1) = (e^p + e^{1/2}) / 2."""
    p = 0.8
    found = s.srpo(PreferenceGame([[0.5, p], [1 - p, 0.5]]), 1.0)
    Z = np.array([math.exp(0.5) + math.exp(1 - p), math.exp(p) + math.exp(0.5)]) / 2
    np.testing.assert_allclose(found.values, np.log(Z), atol=1e-15)
    np.testing.assert_allclose(found.policy, (1 / Z) / (1 / Z).sum(), atol=1e-15)
    np.testing.assert_allclose(found.improvement[0], [expit(p - 0.5), expit(0.5 - p)], atol=1e-15)
    np.testing.assert_allclose(found.improvement[1], [expit(p - 0.5), expit(0.5 - p)], atol=1e-15)
    assert found.value == pytest.approx(-math.log((0.5 / Z).sum()), abs=1e-15)


@given(seeds, st.floats(0.05, 3))
def test_no_policy_leaves_less_to_improve(seed, beta):
    game, ref, rng = drawn(seed)
    found = s.srpo(game, beta, ref)
    assert s.objective(game, beta, found.policy, found.improvement, ref) == pytest.approx(
        found.value, abs=1e-12
    )
    for law in 0.9 * rng.dirichlet(np.ones(4), size=50) + 0.025:
        assert s.objective(game, beta, law, found.improvement, ref) >= found.value - 1e-12
    np.testing.assert_allclose(found.policy, np.exp(found.log_policy), atol=1e-15)
    np.testing.assert_allclose(found.improvement, np.exp(found.log_improvement), atol=1e-14)


def test_the_fixed_point_with_one_reference():
    game, _, _ = drawn(5)
    ref, beta = game.reference, 0.3
    by_hand = [ref[y] / sum(ref[z] * math.exp(game.P[z, y] / beta) for z in range(4)) for y in range(4)]
    np.testing.assert_allclose(s.srpo(game, beta).policy, np.array(by_hand) / sum(by_hand), atol=1e-14)


def test_the_losses_on_one_pair_by_hand():
    x = [
        torch.tensor([v], dtype=torch.float64) for v in ([-1.0, -2.0], [-1.5, -1.5], [-1.0, -3.0, -2.0, -2.5])
    ]
    zero, one = torch.zeros(1, 4, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    beta = 0.5
    # h = 1 + (-1 + 3) = 3; after the second -1 + 2.5, after the first -2 + 3
    L = s.generative_loss(*x, zero, one, beta=beta)
    improved = s.improvement_loss(x[2], zero, one, beta=beta)
    assert L.item() == pytest.approx((1.5 - 1) ** 2, abs=1e-15)
    assert improved.item() == pytest.approx((0.75 - 0.5) ** 2 + (0.5 - 0.5) ** 2, abs=1e-15)
    total = s.srpo_loss(*x, zero, one, beta=beta, alpha=0.25)
    assert total.item() == pytest.approx(0.75 * 0.25 + 0.25 * 0.0625, abs=1e-15)


@given(seeds, st.floats(0, 1))
def test_the_order_of_a_pair_does_not_matter(seed, alpha):
    rng = np.random.default_rng(seed)
    policy, reference = torch.tensor(rng.normal(size=(2, 5, 2)))
    four, anchor = torch.tensor(rng.normal(size=(2, 5, 4)))
    p, w = torch.tensor(rng.random((2, 5)))
    mirrored = [1, 0, 3, 2]
    a = s.srpo_loss(policy, reference, four, anchor, p, w, beta=0.7, alpha=alpha)
    b = s.srpo_loss(
        policy.flip(1),
        reference.flip(1),
        four[:, mirrored],
        anchor[:, mirrored],
        1 - p,
        w,
        beta=0.7,
        alpha=alpha,
    )
    torch.testing.assert_close(a, b)


def test_the_references_are_constants():
    x = [torch.zeros(2, k, dtype=torch.float64, requires_grad=True) for k in (2, 2, 4, 4)]
    s.srpo_loss(*x, torch.ones(2, dtype=torch.float64), beta=1.0, alpha=0.5).backward()
    assert x[0].grad is not None
    assert x[2].grad is not None
    assert x[1].grad is None
    assert x[3].grad is None


def test_revisions_help_against_the_first_answer():
    game = bradley_terry_game([1.0, 0.0, -1.0], reference=[0.1, 0.3, 0.6])
    found = s.srpo(game, 0.2)
    np.testing.assert_array_equal(s.revised(found.policy, found.improvement, 0), found.policy)
    rates = [
        game.probability(s.revised(game.reference, found.improvement, k), game.reference) for k in range(4)
    ]
    assert rates[0] == pytest.approx(0.5)
    assert rates[1] > 0.6
    # a chain: the law of one more revision
    twice = s.revised(game.reference, found.improvement, 1) @ found.improvement
    np.testing.assert_allclose(s.revised(game.reference, found.improvement, 2), twice, atol=1e-15)


def test_a_hot_temperature_leaves_the_references_and_a_cold_one_the_best_reply():
    game, ref, _ = drawn(2)
    hot, cold = s.srpo(game, 1e6, ref), s.srpo(game, 1e-3, ref)
    np.testing.assert_allclose(hot.policy, game.reference, atol=1e-5)
    np.testing.assert_array_equal(cold.improvement.argmax(axis=1), game.P.argmax(axis=0))
    assert np.isfinite(cold.log_improvement).all()


def test_bad_input_is_named():
    game, ref, _ = drawn(0)
    with pytest.raises(ValueError, match="beta is 0; it must be positive"):
        s.srpo(game, 0)
    with pytest.raises(ValueError, match=r"improvement_reference has shape \(3, 4\); expected \(4, 4\)"):
        s.srpo(game, 1.0, ref[:3])
    ref[2] = [0.5, 0.5, 0.0, 0.0]
    with pytest.raises(ValueError, match=r"improvement_reference\[2, 2\] is 0"):
        s.srpo(game, 1.0, ref)
    x = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="first after second, second after first"):
        s.improvement_loss(x, x, torch.ones(1), beta=1.0)
    with pytest.raises(ValueError, match=r"alpha is 2; it must lie in \[0, 1\]"):
        s.srpo_loss(x, x, torch.zeros(1, 4), torch.zeros(1, 4), torch.ones(1), beta=1.0, alpha=2)


def test_the_spec_reads_the_signature():
    assert s.LOSS.inputs == (
        "policy",
        "reference",
        "improvement",
        "improvement_reference",
        "preferred",
        "weight",
    )
    assert s.LOSS.parameters == ("beta", "alpha")
