"""CPL's loss against the formula, DPO, closed forms on two actions, and the limits of its regret model."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from preflab.algorithms.cpl import LOSS, advantages, cpl_loss, segment_scores
from preflab.algorithms.dpo import dpo_loss
from preflab.algorithms.optimisation import SoftmaxTable, fit
from preflab.algorithms.planning import soft_value_iteration, uniform_policy
from preflab.envs import BradleyTerry, RegretPreference, random_linear_mdp
from scipy.optimize import brentq
from scipy.special import expit, log_expit

ONE = torch.ones(1, dtype=torch.float64)


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def test_a_worked_pair():
    policy = tensor([[[-1.0, -2.0], [-3.0, -0.5]]])  # S+ = .1 (-1 - .9 * 2), S- = .1 (-3 - .9 * .5)
    loss = cpl_loss(policy, None, ONE, alpha=0.1, gamma=0.9, lam=0.5)
    assert loss.item() == pytest.approx(-math.log(expit(-0.28 + 0.5 * 0.345)), abs=1e-15)
    assert segment_scores(policy, alpha=0.1, gamma=0.9).numpy() == pytest.approx(
        np.array([[-0.28, -0.345]]), abs=1e-15
    )


@given(st.integers(0, 10**6), st.sampled_from([1.0, 0.5, 0.1]), st.booleans())
def test_the_loss_is_the_paper_s(seed, lam, with_reference):
    rng = np.random.default_rng(seed)
    lp, ref = rng.normal(size=(2, 6, 2, 3)) - 2
    used = np.ones((6, 2, 3), dtype=bool)
    used[:, :, 2] = rng.random((6, 2)) < 0.5
    p, w = rng.random((2, 6))
    alpha, gamma = rng.uniform(0.1, 2), rng.uniform(0.3, 1)
    S = np.zeros((6, 2))
    for i, k, t in np.argwhere(used):
        S[i, k] += gamma**t * alpha * (lp[i, k, t] - with_reference * ref[i, k, t])
    by_hand = 0.0
    for (plus, minus), chance, weight in zip(S, p, w, strict=True):
        forth = math.exp(plus) / (math.exp(plus) + math.exp(lam * minus))
        back = math.exp(minus) / (math.exp(minus) + math.exp(lam * plus))
        by_hand -= weight * (chance * math.log(forth) + (1 - chance) * math.log(back))
    lp[~used] = -np.inf  # what stands in the padding does not matter
    loss = cpl_loss(
        tensor(lp),
        tensor(ref) if with_reference else None,
        tensor(p),
        tensor(w),
        torch.as_tensor(used),
        alpha=alpha,
        gamma=gamma,
        lam=lam,
    )
    assert loss.item() == pytest.approx(by_hand, abs=1e-11)


@given(st.integers(0, 10**6))
def test_one_step_segments_with_a_reference_are_dpo_with_its_gradient(seed):
    rng = np.random.default_rng(seed)
    policy = tensor(rng.normal(size=(5, 2))).requires_grad_(True)
    reference, p = tensor(rng.normal(size=(5, 2))), tensor(rng.random(5))
    ours = cpl_loss(policy[..., None], reference[..., None], p, alpha=0.3)
    theirs = dpo_loss(policy, reference, p, beta=0.3)
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-15)
    gradients = [torch.autograd.grad(x, policy)[0] for x in (ours, theirs)]
    torch.testing.assert_close(*gradients, atol=1e-16, rtol=0)


@pytest.mark.parametrize("lam", [0.3, 0.9, 1.0])
@pytest.mark.parametrize("alpha", [0.2, 3.0])
def test_two_actions_against_the_root_of_the_derivative(lam, alpha):
    star = 0.8
    p = float(expit(alpha * math.log(star / (1 - star))))

    def slope(q):
        x, y = alpha * math.log(q), alpha * math.log1p(-q)
        rises, falls = 1 / q + lam / (1 - q), 1 / (1 - q) + lam / q
        return -p * expit(lam * y - x) * rises + (1 - p) * expit(lam * x - y) * falls

    table = SoftmaxTable(2)
    found = fit(
        lambda lp: cpl_loss(lp[None, :, None], None, p * ONE, alpha=alpha, lam=lam), table, tolerance=1e-13
    )
    law = table.log_probabilities(found.theta).exp()[0].item()
    assert law == pytest.approx(brentq(slope, 1e-9, 1 - 1e-9, xtol=1e-15), abs=1e-9)
    if lam == 1:
        assert law == pytest.approx(star, abs=1e-10)
    else:  # small alpha shrinks towards the uniform policy, large alpha goes beyond the optimum
        assert abs(law - star) > 1e-3
        assert (law > star) == (alpha == 3.0)


def test_lambda_punishes_mass_that_leaves_the_data():
    policy = tensor([[[-1.0, -1.5], [-0.7, -2.0]]])
    lost = [[cpl_loss(policy - c, None, ONE, alpha=0.5, lam=lam).item() for c in (0, 5)] for lam in (1, 0.5)]
    assert lost[0][1] == pytest.approx(lost[0][0], abs=1e-14)
    assert lost[1][1] > lost[1][0] + 1


def test_advantages_of_the_soft_optimum_tend_to_those_of_the_hard_one():
    model = random_linear_mdp(4, 3, 4, 3, seed=1)
    reference = uniform_policy(model)
    hard = RegretPreference(model, 0).reward
    for alpha in (0.1, 0.01, 0.001):
        soft = soft_value_iteration(model, reference, alpha)
        ours = advantages(soft.policy, alpha, reference)
        for h, theirs in enumerate(hard):
            np.testing.assert_allclose(ours[h], soft.Q[h] - soft.V[h][:, None], atol=1e-12)
            # V is within alpha log(1 / min ref) of its limit at each remaining step
            assert np.abs(ours[h] - theirs).max() <= (3 - h) * alpha * math.log(3) + 1e-12


def test_the_regret_annotator_is_bradley_terry_on_advantages():
    model = random_linear_mdp(4, 3, 4, 3, seed=2)
    reference = np.full((3, 4, 3), 1 / 3)
    soft = soft_value_iteration(model, reference, 0.4)
    A = advantages(soft.policy, 0.4, reference)
    rng = np.random.default_rng(0)
    first, second = (model.rollout(soft.policy, 50, rng) for _ in range(2))
    tokens = [
        torch.as_tensor(
            np.array(
                [
                    [np.log(soft.policy[h][s[h], a[h]]) for h in range(3)]
                    for s, a in zip(x.states, x.actions, strict=True)
                ]
            )
        )
        for x in (first, second)
    ]
    flat = torch.full((50, 2, 3), -math.log(3), dtype=torch.float64)
    S = segment_scores(torch.stack(tokens, 1), flat, alpha=0.4)
    asked = BradleyTerry(model, 0, reward=A).probability(first, second)
    np.testing.assert_allclose(expit((S[:, 0] - S[:, 1]).numpy()), asked, atol=1e-13)


def test_far_scores_do_not_overflow():
    policy = tensor([[[-4000.0], [-1.0]]])
    assert cpl_loss(policy, None, ONE, alpha=1).item() == pytest.approx(-log_expit(-3999.0))


def test_advantages_where_there_is_no_mass():
    A = advantages([np.array([[0.0, 1.0, 0.0]])], 0.5, [np.array([[0.5, 0.5, 0.0]])])[0]
    np.testing.assert_array_equal(A, [[-np.inf, 0.5 * math.log(2), 0.0]])
    with pytest.raises(ValueError, match=r"policy\[h=0, s=0, a=2\] is 0\.5 where the reference has no mass"):
        advantages([np.array([[0.5, 0.0, 0.5]])], 1, [np.array([[0.5, 0.5, 0.0]])])


def test_bad_input_is_named():
    x = torch.zeros(1, 2, 3).double()
    for options, message in (
        ({"alpha": 0}, "alpha is 0; it must be positive"),
        ({"alpha": 1, "gamma": 1.5}, r"gamma is 1\.5; it must lie in \(0, 1\]"),
        ({"alpha": 1, "lam": 0}, r"lam is 0; it must lie in \(0, 1\]"),
        ({"alpha": 1, "mask": torch.ones(1, 2, 3)}, "mask is torch.float32"),
        ({"alpha": 1, "mask": torch.ones(1, 3, dtype=torch.bool)}, r"shape \(1, 3\); expected bool"),
    ):
        with pytest.raises(ValueError, match=message):
            cpl_loss(x, None, ONE, **options)
    with pytest.raises(ValueError, match=r"comparisons of segments are \(..., 2, T\)"):
        cpl_loss(torch.zeros(3, 3), None, ONE, alpha=1)


def test_the_spec_reads_the_signature():
    assert LOSS.inputs == ("policy", "reference", "preferred", "weight", "mask")
    assert LOSS.parameters == ("alpha", "gamma", "lam")
