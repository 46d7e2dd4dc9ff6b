"""The claims about DPO and IPO, and the losses of INPO and SPPO, on their own cells and on made-up outcomes."""

from __future__ import annotations

import numpy as np
import pytest
from preflab.theory.claim import Outcome, Plan
from preflab.theory.claims import dpo, inpo, ipo, sppo

CLAIMS = {claim.name: claim for module in (dpo, ipo, inpo, sppo) for claim in module.CLAIMS}
RATES = ("dpo.sample_rate", "sppo.population_minimiser")
EXACT = [n for n in CLAIMS if n.startswith(("dpo", "ipo")) and n not in RATES] + ["inpo.population_minimiser"]


def measured(cells):
    return [Outcome(cell, cell.run()) for cell in cells]


@pytest.mark.parametrize("name", EXACT)
def test_claims_hold_and_their_controls_are_caught(name):
    claim, plan = CLAIMS[name], Plan(quick=True, seeds=2)
    judgement = claim.judge(measured(claim.cells(plan)))
    assert judgement.verdict == "verified", judgement.detail
    for control in claim.controls:
        assert claim.judge(measured(control.cells(plan))).verdict == "refuted", control.name


def test_sppo_s_loss_misses_by_the_cube():
    claim, plan = CLAIMS["sppo.population_minimiser"], Plan(quick=True, seeds=4)
    outcomes = measured(claim.cells(plan))
    judgement = claim.judge(outcomes)
    assert judgement.verdict == "verified", judgement.detail
    assert claim.figure(outcomes, judgement).axes[0].lines
    for control in claim.controls:
        assert claim.judge(measured(control.cells(plan))).verdict == "refuted", control.name


@pytest.mark.parametrize(("power", "verdict"), [(-1.0, "verified"), (-0.5, "refuted"), (-2.0, "refuted")])
def test_the_sample_rate_is_judged_by_its_exponent(power, verdict):
    claim = CLAIMS["dpo.sample_rate"]
    cells = claim.cells(Plan(seeds=3))
    outcomes = [Outcome(c, {"gaps": np.array(dpo.NS, dtype=float) ** power}) for c in cells]
    assert claim.judge(outcomes).verdict == verdict
    assert claim.figure(outcomes, claim.judge(outcomes)).axes[0].lines


@pytest.mark.parametrize("fault", ["none", "noise", "disconnected"])
def test_the_gap_goes_where_it_should(fault):
    cells = dpo.samples(Plan(seeds=12), fault)
    gaps = np.mean([c.run()["gaps"] for c in cells], axis=0)
    shrinks = gaps[-1] / gaps[0] < 1 / 8  # a 32nd at the rate 1 / N
    assert shrinks is np.bool_(fault == "none")
