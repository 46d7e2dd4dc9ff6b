"""XPO's loss on worked numbers, its sign, and its rounds."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from preflab.algorithms.dpo import dpo_loss
from preflab.algorithms.incentives import OnlinePreferences, policy_of
from preflab.algorithms.xpo import LOSS, XPO, xpo_loss
from scipy.special import expit


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_a_worked_pair_whoever_wins():
    policy, reference = tensor([-4.0, -5.0]), tensor([-4.2, -4.6])  # margin 0.6
    for p, sign in ((1.0, 1), (0.0, -1)):
        loss = xpo_loss(policy, reference, tensor(p), beta=0.5, alpha=0.01)
        assert loss.item() == pytest.approx(-math.log(expit(sign * 0.3)) + 0.01 * -5.0, abs=1e-14)


@given(st.integers(0, 10**6))
def test_the_bonus_lowers_the_reference_s_samples(seed):
    rng = np.random.default_rng(seed)
    policy, reference = torch.tensor(rng.normal(size=(2, 6, 2)))
    p = torch.tensor(rng.random(6))
    torch.testing.assert_close(
        xpo_loss(policy, reference, p, beta=0.3, alpha=0.0), dpo_loss(policy, reference, p, beta=0.3)
    )
    gradients = []
    for alpha in (0.0, 0.2):
        x = policy.clone().requires_grad_(True)
        xpo_loss(x, reference, p, torch.ones(6).double(), beta=0.3, alpha=alpha).backward()
        gradients.append(x.grad)
    moved = (gradients[1] - gradients[0]).numpy()
    np.testing.assert_allclose(moved, np.tile([0.0, 0.2], (6, 1)), atol=1e-15)  # sums: + alpha each


def start(method, **options):
    log_ref = np.log([math.exp(-10), (1 - math.exp(-10)) / 2, (1 - math.exp(-10)) / 2])
    return method(
        [[1.0, 0.2, 0.0], [-0.1, 0.2, 0.0]], log_ref, 0.05, **{"box": 2.0, "seeds": [5, 6]} | options
    )


def test_second_responses_come_from_the_reference():
    run = start(XPO, alpha=0.05 / 8, batch=8).advance(50)
    assert run.second_counts[:, 0].sum() == 0  # once in 22,000
    np.testing.assert_array_equal(run.second_counts.sum(1), 400)


def test_it_tries_the_rare_response_and_drops_it_where_it_is_bad():
    run = start(XPO, alpha=0.05 / math.sqrt(800), batch=8).advance(100)
    passive = start(OnlinePreferences, batch=8).advance(100)
    assert run.regret[0, -1] < 0.05 < 0.2 < passive.regret[0, -1]
    tried = run.wins[1, 0].sum() + run.wins[1, :, 0].sum()
    assert 0 < tried < 400
    assert passive.wins[:, 0].sum() + passive.wins[:, :, 0].sum() == 0


def test_the_incentive_is_the_bonus_up_to_a_constant():
    """alpha sum log pi_r(y~) against the incentive's (alpha t / beta)(E_q r - J*(r)) at two rewards."""
    run = start(XPO, alpha=0.01, batch=8).advance(5)
    incentive, q = run._incentive()
    rng = np.random.default_rng(0)
    values = []
    for r in rng.normal(size=(2, 3)):
        log_pi = policy_of(r, run.log_reference[0], 0.05)[1]
        promised = 0.05 * np.log(np.exp(run.log_reference[0] + r / 0.05).sum()) - q[0] @ r
        values.append(0.01 * run.second_counts[0] @ log_pi - incentive * promised)
    assert values[0] == pytest.approx(values[1], abs=1e-10)


def test_bad_input_is_refused():
    x = torch.zeros(1, 2)
    with pytest.raises(ValueError, match=r"alpha is -0\.1; it must be at least 0"):
        xpo_loss(x, x, torch.ones(1), beta=1.0, alpha=-0.1)
    with pytest.raises(ValueError, match="beta is 0"):
        xpo_loss(x, x, torch.ones(1), beta=0, alpha=0.1)
    with pytest.raises(ValueError, match="alpha is nan"):
        start(XPO, alpha=math.nan)
    assert LOSS.inputs == ("policy", "reference", "preferred", "weight")
    assert LOSS.parameters == ("beta", "alpha")
