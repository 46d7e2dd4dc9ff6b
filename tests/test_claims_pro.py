"""The claims about PRO on their own cells and on made-up outcomes, and their controls."""

from __future__ import annotations

import numpy as np
import pytest
from preflab.theory.claim import Outcome, Plan
from preflab.theory.claims import pro
from scipy.stats import kendalltau

CLAIMS = {claim.name: claim for claim in pro.CLAIMS}
ORDERING = "pro.longer_rankings"


def measured(cells):
    return [Outcome(cell, cell.run()) for cell in cells]


@pytest.mark.parametrize("name", [name for name in CLAIMS if name != ORDERING])
def test_claims_hold_and_their_controls_are_caught(name):
    claim, plan = CLAIMS[name], Plan(quick=True, seeds=3)
    judgement = claim.judge(measured(claim.cells(plan)))
    assert judgement.verdict == "verified", judgement.detail
    for control in claim.controls:
        assert claim.judge(measured(control.cells(plan))).verdict == "refuted", control.name


@pytest.mark.parametrize(("order", "verdict"), [((0, 1, 2), "verified"), ((2, 1, 0), "refuted")])
def test_the_ordering_needs_every_part(order, verdict):
    claim, rng = CLAIMS[ORDERING], np.random.default_rng(0)
    cells = claim.cells(Plan(seeds=20))
    rows = [np.array(order) + 0.3 * rng.normal(size=3) for _ in cells]
    full = [Outcome(c, {"rewards": x, "taus": x}) for c, x in zip(cells, rows, strict=True)]
    assert claim.judge(full).verdict == verdict
    flat = [
        Outcome(c, {"rewards": x, "taus": [0.1 * rng.normal()] * 3}) for c, x in zip(cells, rows, strict=True)
    ]
    assert claim.judge(flat).verdict != "verified"


def test_training_stops_where_the_kl_is_reached_and_longer_rankings_earn_more():
    runs = [pro.longer(seed=s) for s in range(3)]
    means = np.mean([r["rewards"] for r in runs], axis=0)
    assert means[0] < means[2]
    backwards = np.mean([pro.longer(seed=s, fault="reversed")["rewards"] for s in range(2)], axis=0)
    assert (backwards < 0).all()
    with pytest.raises(ArithmeticError, match="below 50"):
        pro.longer(seed=0, kappa=50.0, steps=20)


def test_kendall_s_tau():
    x, y = np.random.default_rng(0).normal(size=(2, 17))
    assert pro.kendall(x, y) == pytest.approx(kendalltau(x, y)[0], abs=1e-14)


def test_rankings_of_a_plackett_luce_law_are_a_law():
    orders, p = pro.luce_rankings(np.array([0.3, -1.0, 2.0, 0.1]), 3)
    assert len(orders) == 24
    assert p.sum() == pytest.approx(1, abs=1e-14)
