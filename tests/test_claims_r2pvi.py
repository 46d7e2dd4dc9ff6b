"""The claims about robust duals, on their own cells."""

from __future__ import annotations

import numpy as np
import pytest
from preflab.theory.claim import Outcome, Plan
from preflab.theory.claims import r2pvi

CLAIMS = {claim.name: claim for claim in r2pvi.CLAIMS}


def measured(cells):
    return [Outcome(cell, cell.run()) for cell in cells]


@pytest.mark.parametrize("name", list(CLAIMS))
def test_claims_hold_and_their_controls_are_caught(name):
    claim, plan = CLAIMS[name], Plan(quick=True, seeds=4)
    judgement = claim.judge(measured(claim.cells(plan)))
    assert judgement.verdict == "verified", judgement.detail
    for control in claim.controls:
        assert claim.judge(measured(control.cells(plan))).verdict == "refuted", control.name
    cell = claim.cells(plan)[0]
    assert cell.run() == cell.run()


def test_the_primal_solvers_agree_with_each_other_where_nothing_moves():
    V, p, _ = r2pvi.instance(0)
    for primal in r2pvi.PRIMALS.values():
        assert primal(V, p, 1e6) == pytest.approx(float(p @ V), abs=1e-4)
        assert primal(np.full(len(V), 0.7), p, 0.5) == pytest.approx(0.7, abs=1e-9)
