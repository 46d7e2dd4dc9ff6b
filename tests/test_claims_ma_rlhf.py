"""The claims about macro actions, on their own cells."""

from __future__ import annotations

import numpy as np
import pytest
from preflab.theory.claim import Outcome, Plan
from preflab.theory.claims import ma_rlhf

CLAIMS = {claim.name: claim for claim in ma_rlhf.CLAIMS}


def measured(cells):
    return [Outcome(cell, cell.run()) for cell in cells]


@pytest.mark.parametrize("name", [name for name in CLAIMS if name != "ma_rlhf.speed"])
def test_claims_hold_and_their_controls_are_caught(name):
    claim, plan = CLAIMS[name], Plan(quick=True, seeds=2)
    judgement = claim.judge(measured(claim.cells(plan)))
    assert judgement.verdict == "verified", judgement.detail
    for control in claim.controls:
        assert claim.judge(measured(control.cells(plan))).verdict == "refuted", control.name
    cell = claim.cells(plan)[0]
    assert cell.run() == cell.run()


def test_the_speed_is_judged_by_areas():
    claim = CLAIMS["ma_rlhf.speed"]
    cells = claim.cells(Plan(seeds=8))

    def judged(lead):
        made = lambda c: {"area": 0.7 + lead * (c.parameters["n"] == 6) + 1e-4 * c.seed, "curve": np.ones(30)}  # noqa: E731
        return claim.judge([Outcome(cell, made(cell)) for cell in cells]).verdict

    assert [judged(x) for x in (0.05, 0.005, -0.05)] == ["verified", "refuted", "refuted"]


def test_learning_curves_are_pure_and_agree_without_decay():
    runs = [ma_rlhf.phrases(seed=3, n=n, step=10.0, lam=1.0, updates=40) for n in (1, 6)]
    assert runs[0]["area"] == pytest.approx(runs[1]["area"], abs=1e-9)
    assert runs[0] == ma_rlhf.phrases(seed=3, n=1, step=10.0, lam=1.0, updates=40)
    assert runs[0]["curve"][0] == pytest.approx(1 / 27)
    claim, cells = CLAIMS["ma_rlhf.speed"], CLAIMS["ma_rlhf.speed"].cells(Plan(seeds=2))
    outcomes = measured(cells)
    assert claim.figure(outcomes, claim.judge(outcomes)).axes[0].lines
