"""The claims about correlated proxies, on their own cells."""

from __future__ import annotations

import numpy as np
import pytest
from preflab.theory.claim import Outcome, Plan
from preflab.theory.claims import correlated_proxies_orpo

CLAIMS = {claim.name: claim for claim in correlated_proxies_orpo.CLAIMS}


def measured(cells):
    return [Outcome(cell, cell.run()) for cell in cells]


@pytest.mark.parametrize("name", list(CLAIMS))
def test_claims_hold_and_their_controls_are_caught(name):
    claim, plan = CLAIMS[name], Plan(quick=True, seeds=8)
    judgement = claim.judge(measured(claim.cells(plan)))
    assert judgement.verdict == "verified", judgement.detail
    for control in claim.controls:
        assert claim.judge(measured(control.cells(plan))).verdict == "refuted", control.name
    cell = claim.cells(plan)[0]
    assert cell.run() == cell.run()


def test_the_worst_reward_has_the_correlation_that_was_asked_for():
    rng = np.random.default_rng(0)
    base, proxy = rng.dirichlet(np.ones(12)).reshape(4, 3), rng.normal(size=(4, 3))
    true = correlated_proxies_orpo.truth(base, proxy, 0.7, 1.5, rng.normal(size=(4, 3)))
    found = correlated_proxies_orpo.Proxy.under(base, true, proxy)
    assert found.r == pytest.approx(0.7, abs=1e-12)
    assert found.sigma_true == pytest.approx(1.5, abs=1e-12)


def test_at_the_tangent_the_papers_bound_is_attained():
    found = correlated_proxies_orpo.bounds(seed=3, reward="tangent")
    assert np.abs(found["paper"]).max() <= 1e-9
