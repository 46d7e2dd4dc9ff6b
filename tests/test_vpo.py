"""VPO's loss on worked numbers and by differentiation; its reward form against the policy form; online runs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from preflab.algorithms.dpo import dpo_loss
from preflab.algorithms.incentives import best_value, comparison_loss
from preflab.algorithms.vpo import (
    LOSS,
    VPO,
    calibrate,
    reward_objective,
    vpo_loss,
    vpo_policy,
    vpo_rewards,
)
from scipy.special import expit

seeds = st.integers(0, 10**6)


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_a_worked_pair():
    policy, reference = tensor([-4.0, -5.0]), tensor([-4.2, -4.6])  # margin 0.6
    cal, cal_ref = tensor(-3.0, -2.0), tensor(-3.5, -2.2)  # log ratios 0.5 and 0.2
    for sign in (1, -1):
        loss = vpo_loss(policy, reference, cal, cal_ref, tensor(1.0), beta=0.5, alpha=2.0, sign=sign)
        assert loss.item() == pytest.approx(-math.log(expit(0.3)) + sign * 2 * 0.5 * 0.35, abs=1e-14)
    weighted = vpo_loss(
        policy, reference, cal, cal_ref, tensor(1.0), None, tensor(0.2, 0.8), beta=0.5, alpha=2.0, sign=1
    )
    assert weighted.item() == pytest.approx(-math.log(expit(0.3)) + 0.26, abs=1e-14)


@given(seeds)
def test_without_alpha_it_is_dpo_and_gradients_go_through_the_policy_alone(seed):
    rng = np.random.default_rng(seed)
    policy, reference = torch.tensor(rng.normal(size=(2, 5, 2)))
    cal, cal_ref = torch.tensor(rng.normal(size=(2, 3)))
    p = torch.tensor(rng.random(5))
    for x in (policy, reference, cal, cal_ref):
        x.requires_grad_(True)
    free = vpo_loss(policy, reference, cal, cal_ref, p, beta=0.4, alpha=0.0, sign=1)
    torch.testing.assert_close(free, dpo_loss(policy, reference, p, beta=0.4))
    vpo_loss(policy, reference, cal, cal_ref, p, beta=0.4, alpha=1.5, sign=-1).backward()
    assert reference.grad is None
    assert cal_ref.grad is None
    np.testing.assert_allclose(cal.grad, -1.5 * 0.4 / 3)  # offline: more of the calibration responses


@given(seeds, st.sampled_from([1, -1]))
def test_the_reward_form_ignores_constants(seed, sign):
    rng = np.random.default_rng(seed)
    n = 4
    r, q, log_ref = rng.normal(size=n), rng.dirichlet(np.ones(n)), np.log(rng.dirichlet(np.ones(n)))
    wins = rng.random((n, n))
    options = {"beta": 0.7, "alpha": 0.9, "sign": sign}
    value = reward_objective(r, wins, log_ref, q, **options)
    assert value == pytest.approx(reward_objective(r + 17.0, wins, log_ref, q, **options), abs=1e-12)
    centred = r - q @ r
    np.testing.assert_allclose(calibrate(r + 3, q), centred, atol=1e-12)
    by_hand = comparison_loss(wins, centred) - sign * 0.9 * best_value(centred, log_ref, 0.7)
    assert value == pytest.approx(by_hand, abs=1e-12)


def test_signs_move_mass_in_opposite_directions():
    wins = np.array([[0, 6, 5], [4, 0, 5], [5, 5, 0]]) / 30
    log_ref, q = np.log([0.2, 0.5, 0.3]), np.array([0.1, 0.6, 0.3])
    masses = {}
    for sign in (1, -1):
        found = vpo_rewards(wins, log_ref, q, beta=1.0, alpha=0.05, sign=sign, box=10.0)
        assert q @ found.rewards == pytest.approx(0, abs=1e-12)
        masses[sign] = q @ vpo_policy(found.rewards, log_ref, 1.0)[1]
    plain = vpo_rewards(wins, log_ref, q, beta=1.0, alpha=0.0, sign=1, box=10.0)
    middle = q @ vpo_policy(plain.rewards, log_ref, 1.0)[1]
    assert masses[1] < middle - 1e-4 < middle + 1e-4 < masses[-1]


def rare(method, **options):
    log_ref = np.log([math.exp(-10), (1 - math.exp(-10)) / 2, (1 - math.exp(-10)) / 2])
    return method([[1.0, 0.2, 0.0]], log_ref, 0.05, **{"box": 2.0, "seeds": [5]} | options)


def test_the_optimist_finds_the_rare_response_and_the_pessimist_does_not():
    found = rare(VPO, alpha=6.0, batch=8).advance(20)
    lost = rare(VPO, alpha=6.0, batch=8, sign=-1).advance(20)
    assert found.regret[0, -1] < 0.05
    assert lost.regret[0, -1] > 0.2
    assert np.exp(found.log_policy)[0, 0] > 0.9


def test_the_calibration_law_can_be_given():
    calibrated = rare(VPO, alpha=6.0, calibration=[0.0, 0.0, 1.0]).advance(3)
    np.testing.assert_array_equal(calibrated.calibration, [[0, 0, 1]])
    assert rare(VPO, alpha=6.0).calibration[0, 0] == pytest.approx(math.exp(-10))


def test_bad_input_is_refused():
    x = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="sign is 2; it is 1 online"):
        vpo_loss(x, x, x[:, 0], x[:, 0], torch.ones(1), beta=1.0, alpha=1.0, sign=2)
    with pytest.raises(ValueError, match="alpha is -1; it must be at least 0"):
        vpo_loss(x, x, x[:, 0], x[:, 0], torch.ones(1), beta=1.0, alpha=-1, sign=1)
    with pytest.raises(ValueError, match=r"calibration has shape \(1,\)"):
        vpo_loss(x, x, x[:, 0], x, torch.ones(1), beta=1.0, alpha=1.0, sign=1)
    with pytest.raises(ValueError, match="alpha is inf"):
        rare(VPO, alpha=math.inf)


def test_the_spec_reads_the_signature():
    assert LOSS.inputs[:4] == ("policy", "reference", "calibration", "calibration_reference")
    assert LOSS.parameters == ("beta", "alpha", "sign")
