"""The claims about KL-regularised policy gradients on their own cells."""

from __future__ import annotations

import pytest
from preflab.theory.claim import Outcome, Plan
from preflab.theory.claims import kl_policy_gradient as claims

CLAIMS = {claim.name: claim for claim in claims.CLAIMS}


def measured(cells):
    return [Outcome(cell, cell.run()) for cell in cells]


@pytest.mark.parametrize("name", CLAIMS)
def test_claims_hold_and_their_controls_are_caught(name):
    claim, plan = CLAIMS[name], Plan(quick=True, seeds=4 if name.endswith("certificate") else 2)
    judgement = claim.judge(measured(claim.cells(plan)))
    assert judgement.verdict == "verified", judgement.detail
    for control in claim.controls:
        assert claim.judge(measured(control.cells(plan))).verdict == "refuted", control.name


def test_cells_are_pure_and_worlds_differ_by_their_seed():
    for claim in CLAIMS.values():
        cell = claim.cells(Plan(quick=True))[1]
        assert cell.run() == cell.run()
    assert claims.world(1, "table")[3] != claims.world(2, "table")[3]
