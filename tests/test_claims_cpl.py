"""The claims about CPL on their own cells, and their controls."""

from __future__ import annotations

import numpy as np
import pytest
from preflab.theory.claim import Outcome, Plan
from preflab.theory.claims import cpl

CLAIMS = {claim.name: claim for claim in cpl.CLAIMS}


def measured(cells):
    return [Outcome(cell, cell.run()) for cell in cells]


@pytest.mark.parametrize("name", CLAIMS)
def test_claims_hold_and_their_controls_are_caught(name):
    claim, plan = CLAIMS[name], Plan(quick=True, seeds=3)
    judgement = claim.judge(measured(claim.cells(plan)))
    assert judgement.verdict == "verified", judgement.detail
    for control in claim.controls:
        assert claim.judge(measured(control.cells(plan))).verdict == "refuted", control.name


def test_a_discount_is_a_chance_to_fall_off():
    who = cpl.person(5, kl=True)
    Q = who.reward + who.gamma * who.P @ who.V
    V = who.alpha * np.log((who.reference * np.exp(Q / who.alpha)).sum(axis=1))
    np.testing.assert_allclose(V, who.V, atol=1e-12)


def test_all_segments_are_listed():
    steps, used = cpl.segments(2, 3, (1, 2))
    assert len({(tuple(s[u]), u.sum()) for s, u in zip(steps, used, strict=True)}) == len(steps) == 6 + 36


def test_cells_depend_on_their_seed_alone():
    for cell in cpl.consistencies(Plan(seeds=1)) + cpl.judged_labels(Plan(seeds=1)):
        assert cell.run() == cell.run()
