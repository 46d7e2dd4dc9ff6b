"""The claims about the structure of preferences (heron, bradley_terry_fit, judges), on their own cells."""

from __future__ import annotations

import numpy as np
import pytest
from preflab.theory.cells import Cell
from preflab.theory.claim import Outcome, Plan
from preflab.theory.claims import _structure_runs as runs
from preflab.theory.claims import bradley_terry_fit, heron, judges

CLAIMS = {claim.name: claim for module in (heron, bradley_terry_fit, judges) for claim in module.CLAIMS}
SLOW = ("judges.reward_errs", "judges.reward_cannot", "judges.one_judge")
_results: dict[Cell, dict] = {}


def measured(cells):
    """Outcomes of the real cells; claims share some of them."""
    for cell in cells:
        if cell not in _results:
            _results[cell] = cell.run()
    return [Outcome(cell, _results[cell]) for cell in cells]


def made(cells, measure):
    return [Outcome(cell, measure(cell)) for cell in cells]


@pytest.mark.parametrize("name", [name for name in CLAIMS if name not in SLOW])
def test_claims_hold_and_their_controls_are_caught(name):
    claim = CLAIMS[name]
    plan = Plan(
        quick=True, seeds=None if name in ("heron.cycle_share", "heron.winner", "heron.no_weight") else 3
    )
    outcomes = measured(claim.cells(plan))
    judgement = claim.judge(outcomes)
    assert judgement.verdict == "verified", judgement.detail
    for control in claim.controls:
        assert claim.judge(measured(control.cells(plan))).verdict == "refuted", control.name
    if claim.figure is not None:
        assert claim.figure(outcomes, judgement).axes[0].lines


@pytest.mark.parametrize("name", SLOW)
def test_claims_about_the_judges_on_one_prompt(name):
    claim, plan = CLAIMS[name], Plan(quick=True)

    def first(cells):
        return measured([cell for cell in cells if cell.parameters["prompt"] == 4])

    judgement = claim.judge(first(claim.cells(plan)))
    assert judgement.verdict == "verified", judgement.detail
    for control in claim.controls:
        assert claim.judge(first(control.cells(plan))).verdict == "refuted", control.name


@pytest.mark.parametrize(
    ("factor", "verdict"),
    [(1.0, "verified"), (1.04, "verified"), (1.2, "refuted"), (0.8, "refuted"), (1.05, "inconclusive")],
)
def test_the_share_of_circles_is_judged_by_its_interval(factor, verdict):
    claim = CLAIMS["heron.cycle_share"]
    outcomes = made(
        claim.cells(Plan(seeds=100)),
        lambda c: {"found": round(c.parameters["draws"] * 0.0135 * factor), "expected": 0.0135},
    )
    assert claim.judge(outcomes).verdict == verdict


@pytest.mark.parametrize(
    ("power", "verdict"), [(-2.0, "verified"), (-1.7, "refuted"), (-2.3, "refuted"), (0.0, "refuted")]
)
def test_the_lightest_weight_is_judged_by_its_exponent(power, verdict):
    claim = CLAIMS["heron.no_weight"]
    outcomes = made(
        claim.cells(Plan(seeds=5)), lambda c: {"weight": np.array(heron.SIZES, dtype=float) ** power}
    )
    assert claim.judge(outcomes).verdict == verdict


@pytest.mark.parametrize("seed", range(3))
def test_the_lightest_weight_against_its_definition(seed):
    """A little less orders the sample lexicographically, a little more does not."""
    (weight,) = runs.lightest(seed=seed, sizes=[12])["weight"]
    z = np.random.default_rng([seed, 10]).random((12, 2))
    order = np.lexsort((z[:, 1], z[:, 0])).tolist()
    assert np.argsort(z @ [1, 0.999 * weight]).tolist() == order
    assert np.argsort(z @ [1, 1.001 * weight]).tolist() != order


def test_cells_are_pure():
    for name, claim in CLAIMS.items():
        if name not in SLOW:
            cell = claim.cells(Plan(quick=True))[1]
            assert cell.run() == cell.run()


@pytest.mark.parametrize("seed", range(5))
def test_a_connected_law_is_connected_and_seldom_complete(seed):
    law = runs.connected_law(6, np.random.default_rng(seed))
    assert law.sum() == pytest.approx(1)
    assert 5 <= np.count_nonzero(law + law.T) / 2 < 15


def test_the_closed_equilibrium_of_the_three_types_belongs_to_their_jump():
    found = runs.jump(seed=0, step=1e-4)
    assert found["closed"] <= 1e-12
    assert found["reward"] < 5e-4
