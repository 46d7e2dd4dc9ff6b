"""The claims about the penalty method, on their own cells."""

from __future__ import annotations

import numpy as np
import pytest
from preflab.theory.claim import Outcome, Plan
from preflab.theory.claims import bilevel_penalty

CLAIMS = {claim.name: claim for claim in bilevel_penalty.CLAIMS}


def measured(cells):
    return [Outcome(cell, cell.run()) for cell in cells]


@pytest.mark.parametrize("name", list(CLAIMS))
def test_claims_hold_and_their_controls_are_caught(name):
    claim, plan = CLAIMS[name], Plan(quick=True, seeds=6 if name.endswith("two_stages") else 3)
    judgement = claim.judge(measured(claim.cells(plan)))
    assert judgement.verdict == "verified", judgement.detail
    for control in claim.controls:
        assert claim.judge(measured(control.cells(plan))).verdict == "refuted", control.name
    cell = claim.cells(plan)[0]
    assert cell.run() == cell.run()


@pytest.mark.parametrize(("power", "verdict"), [(1.0, "verified"), (0.5, "refuted"), (2.0, "refuted")])
def test_the_bias_is_judged_by_its_exponents(power, verdict):
    claim, s = CLAIMS["bilevel_penalty.bias"], np.array(bilevel_penalty.SIGMAS)
    made = {"below": s**power, "apart": s, "rest": s**2}
    outcomes = [Outcome(cell, made) for cell in claim.cells(Plan(quick=True))]
    judgement = claim.judge(outcomes)
    assert judgement.verdict == verdict
    assert claim.figure(outcomes, judgement).axes[0].lines


def test_a_value_that_falls_with_sigma_is_refuted():
    claim = CLAIMS["bilevel_penalty.below"]
    outcomes = [Outcome(cell, {"below": [2e-3, 1e-3, 3e-3, 4e-3]}) for cell in claim.cells(Plan(quick=True))]
    assert claim.judge(outcomes).verdict == "refuted"
