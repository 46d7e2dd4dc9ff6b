"""The claims about SRPO on their own cells."""

from __future__ import annotations

import pytest
from preflab.theory.claim import Outcome, Plan
from preflab.theory.claims import srpo as claims

CLAIMS = {claim.name: claim for claim in claims.CLAIMS}


def measured(cells):
    return [Outcome(cell, cell.run()) for cell in cells]


@pytest.mark.parametrize("name", CLAIMS)
def test_claims_hold_and_their_controls_are_caught(name):
    claim, plan = CLAIMS[name], Plan(quick=True, seeds=1 if name == "srpo.robust" else 2)
    judgement = claim.judge(measured(claim.cells(plan)))
    assert judgement.verdict == "verified", judgement.detail
    for control in claim.controls:
        assert claim.judge(measured(control.cells(plan))).verdict == "refuted", control.name


def test_cells_are_pure():
    for name in ("identities", "saddle", "special_preferences"):
        cell = CLAIMS[f"srpo.{name}"].cells(Plan(quick=True))[1]
        assert cell.run() == cell.run()
