"""The claims about APO on their own cells; the sampled rounds' estimator against an independent optimiser."""

from __future__ import annotations

import numpy as np
import pytest
from preflab.theory.claim import Outcome, Plan
from preflab.theory.claims import apo as claims
from scipy.optimize import minimize
from scipy.special import log_expit

CLAIMS = {claim.name: claim for claim in claims.CLAIMS}


def measured(cells):
    return [Outcome(cell, cell.run()) for cell in cells]


@pytest.mark.parametrize("name", CLAIMS)
def test_claims_hold_and_their_controls_are_caught(name):
    claim = CLAIMS[name]
    plan = Plan(quick=True, seeds={"ordering": 10, "inequality": 6}.get(claim.kind, 2))
    judgement = claim.judge(measured(claim.cells(plan)))
    assert judgement.verdict == "verified", judgement.detail
    for control in claim.controls:
        verdict = claim.judge(measured(control.cells(plan))).verdict
        # ten seeds need not tell how far the wrong way it goes
        assert verdict == "refuted" or (claim.kind == "ordering" and verdict == "inconclusive"), control.name


def test_the_rewards_of_a_round_against_a_general_optimiser():
    rng = np.random.default_rng(0)
    wins = rng.integers(0, 4, size=(3, 4, 4)).astype(float)
    wins[:, range(4), range(4)] = 0

    def loss(r, w):
        return -(w * log_expit(r[:, None] - r)).sum() + 0.25 * r @ r

    for w, found in zip(wins, claims.map_rewards(wins), strict=True):
        best = minimize(loss, np.zeros(4), args=(w,), method="BFGS", options={"gtol": 1e-10}).x
        np.testing.assert_allclose(found, best, atol=1e-6)


def test_the_small_step_factor():
    found = claims.spiral_rate(seed=3, alpha=0.3)
    assert found["factor"] == pytest.approx(found["small_steps"], rel=0.05)
    assert found["small_steps"] == pytest.approx(0.88 / 0.343)


def test_cells_are_pure():
    for claim in CLAIMS.values():
        cell = claim.cells(Plan(quick=True))[1]
        assert cell.run() == cell.run()
