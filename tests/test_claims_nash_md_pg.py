"""The claims about Nash-MD-PG and Nash-EMA-PG on their own cells and on made-up curves."""

from __future__ import annotations

import numpy as np
import pytest
from preflab.theory.claim import Outcome, Plan
from preflab.theory.claims import nash_md_pg as claims

CLAIMS = {claim.name: claim for claim in claims.CLAIMS}


def measured(cells):
    return [Outcome(cell, cell.run()) for cell in cells]


@pytest.mark.parametrize("name", CLAIMS)
def test_claims_hold_and_their_controls_are_caught(name):
    claim = CLAIMS[name]
    plan = Plan(quick=True, seeds=4 if claim.kind == "rate" else 1)
    outcomes = measured(claim.cells(plan))
    judgement = claim.judge(outcomes)
    assert judgement.verdict == "verified", judgement.detail
    for control in claim.controls:
        assert claim.judge(measured(control.cells(plan))).verdict == "refuted", control.name
    if claim.figure is not None:
        assert claim.figure(outcomes, judgement).axes[0].lines


@pytest.mark.parametrize(("power", "verdict"), [(2.0, "verified"), (1.0, "refuted"), (3.0, "refuted")])
def test_the_bias_is_judged_by_its_exponent(power, verdict):
    claim = CLAIMS["nash_md_pg.mixture_bias"]
    curve = np.array(claims.SHARES) ** power
    outcomes = [Outcome(cell, {"divergence": curve}) for cell in claim.cells(Plan(seeds=3))]
    assert claim.judge(outcomes).verdict == verdict


def test_cells_are_pure():
    for claim in CLAIMS.values():
        cell = claim.cells(Plan(quick=True))[0]
        assert cell.run() == cell.run()
