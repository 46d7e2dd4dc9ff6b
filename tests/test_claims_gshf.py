"""The claims about GSHF, on their own cells and on made-up outcomes whose verdict is known."""

from __future__ import annotations

import numpy as np
import pytest
from preflab.theory.claim import Outcome, Plan
from preflab.theory.claims import _gshf_runs as runs
from preflab.theory.claims import gshf

CLAIMS = {claim.name: claim for claim in gshf.CLAIMS}
EXACT = ("gshf.enhancer", "gshf.optimum_inside", "gshf.pessimism")


def measured(cells):
    return [Outcome(cell, cell.run()) for cell in cells]


def made(cells, regret):
    """Regrets `regret(radius, given, batches)` of each cell, a little different for each seed."""
    return [
        Outcome(
            c,
            {
                "regret": regret(p["radius"], p.get("given", "none"), np.arange(1, p["iterations"] + 1.0))
                * (1 + 0.02 * (c.seed % 5))
            },
        )
        for c in cells
        for p in [c.parameters]
    ]


@pytest.mark.parametrize("name", EXACT)
def test_claims_hold_and_their_controls_are_caught(name):
    claim, plan = CLAIMS[name], Plan(quick=True, seeds=12)
    judgement = claim.judge(measured(claim.cells(plan)))
    assert judgement.verdict == "verified", judgement.detail
    for control in claim.controls:
        assert claim.judge(measured(control.cells(plan))).verdict == "refuted", control.name


@pytest.mark.parametrize(
    ("active", "passive", "verdict"),
    [(0.5, 1.0, "verified"), (0.1, 1.0, "verified"), (0.8, 1.0, "refuted"), (0.5, 0.7, "refuted")],
)
def test_the_regret_is_judged_by_both_exponents(active, passive, verdict):
    claim = CLAIMS["gshf.regret"]
    outcomes = made(claim.cells(Plan()), lambda radius, _, T: T ** (active if radius else passive))
    judgement = claim.judge(outcomes)
    assert judgement.verdict == verdict
    assert len(claim.figure(outcomes, judgement).axes[0].lines) >= 2


@pytest.mark.parametrize(("share", "verdict"), [(0.2, "verified"), (0.8, "refuted"), (1.0, "refuted")])
def test_the_ordering_asks_for_half(share, verdict):
    claim = CLAIMS["gshf.beats_passive"]
    outcomes = made(claim.cells(Plan()), lambda radius, _, T: T * (share if radius else 1.0))
    assert claim.judge(outcomes).verdict == verdict


@pytest.mark.parametrize(("share", "verdict"), [(0.5, "verified"), (1.0, "inconclusive"), (2.0, "refuted")])
def test_given_data_are_judged_by_what_they_save(share, verdict):
    claim = CLAIMS["gshf.hybrid"]
    outcomes = made(claim.cells(Plan()), lambda _, given, T: T * (1.0 if given == "none" else share))
    assert claim.judge(outcomes).verdict == verdict


def test_online_cells():
    options = {"iterations": 12, "batch": 8}
    a, b = (runs.online(seed=1, radius=4.0, **options)["regret"] for _ in range(2))
    np.testing.assert_array_equal(a, b)
    passive = runs.online(seed=1, radius=0.0, **options)["regret"]
    assert a[-1] < passive[-1]
    given = {
        g: runs.online(seed=1, radius=4.0, given=g, **options)["regret"][0] for g in ("covering", "common")
    }
    assert given["covering"] < given["common"]
