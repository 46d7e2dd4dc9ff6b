"""The claims about greedy and pessimistic maximum likelihood, on their own cells."""

from __future__ import annotations

import numpy as np
import pytest
from preflab.theory.claim import Outcome, Plan
from preflab.theory.claims import baselines_theory as bt

CLAIMS = {claim.name: claim for claim in bt.CLAIMS}


def measured(cells):
    return [Outcome(cell, cell.run()) for cell in cells]


@pytest.mark.parametrize("name", list(CLAIMS))
def test_claims_hold_and_their_controls_are_caught(name):
    claim, plan = CLAIMS[name], Plan(seeds=10 if name.endswith("bound") else 1)
    judgement = claim.judge(measured(claim.cells(plan)))
    assert judgement.verdict == "verified", judgement.detail
    for control in claim.controls:
        assert claim.judge(measured(control.cells(plan))).verdict == "refuted", control.name
    cell = claim.cells(plan)[0]
    assert str(cell.run()) == str(cell.run())


def test_the_paper_s_instance_comes_first():
    np.testing.assert_array_equal(bt.rewards(1000), [1, 0.5, 0])
    found = bt.recovery(seed=1000)
    greedy = bt.recovery(seed=1000, rule="greedy")
    assert greedy["loss"][-1] == pytest.approx(0.3775, abs=1e-4)
    assert found["loss"][0] == pytest.approx(0.14, abs=0.01)  # 28 % of arm 2, at a loss of 1/2


def test_both_outcomes_of_the_single_comparison_are_mirror_images():
    for won in (True, False):
        lead, last = bt.estimates(9, won)
        assert (np.diff(lead) >= 0).all()
        spread = np.stack([lead, np.zeros(10), last])
        assert np.ptp(spread, axis=0).max() <= 2 + 1e-12
        assert (last >= 0).all() if won else (last <= 0).all()


def test_the_binomial_law():
    np.testing.assert_allclose(bt.binomial(2, 0.3), [0.49, 0.42, 0.09], rtol=1e-12)
