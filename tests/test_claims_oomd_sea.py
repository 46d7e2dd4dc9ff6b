"""The claims about optimistic mirror descent, on their own cells and on made-up outcomes whose verdict is known."""

from __future__ import annotations

import numpy as np
import pytest
from preflab.theory.cells import Cell
from preflab.theory.claim import Outcome, Plan
from preflab.theory.claims import oomd_sea

CLAIMS = {claim.name: claim for claim in oomd_sea.CLAIMS}
MEASURED = (
    "regret_inequality",
    "constant_regret",
    "exp_concave_inequality",
    "path_inequality",
    "last_iterate",
    "forms",
)  # with few seeds, the others need more
_results: dict[Cell, dict] = {}


def measured(cells):
    for cell in cells:
        if cell not in _results:
            _results[cell] = cell.run()
    return [Outcome(cell, _results[cell]) for cell in cells]


def made(cells, measure):
    return [Outcome(cell, measure(cell)) for cell in cells]


@pytest.mark.parametrize("name", [f"oomd_sea.{name}" for name in MEASURED])
def test_claims_hold_and_their_controls_are_caught(name):
    claim, plan = CLAIMS[name], Plan(quick=True, seeds=5)
    judgement = claim.judge(measured(claim.cells(plan)))
    assert judgement.verdict == "verified", judgement.detail
    for control in claim.controls:
        assert claim.judge(measured(control.cells(plan))).verdict == "refuted", control.name


@pytest.mark.parametrize(
    ("power", "verdict"), [(0.5, "verified"), (1.0, "refuted"), (0.0, "refuted"), (0.75, "refuted")]
)
def test_noise_alone_is_judged_by_the_exponent(power, verdict):
    claim = CLAIMS["oomd_sea.stochastic"]
    T = np.array(oomd_sea.TS, dtype=float)
    outcomes = made(claim.cells(Plan(seeds=4)), lambda c: {"regret": T**power})
    judgement = claim.judge(outcomes)
    assert judgement.verdict == verdict
    assert claim.figure(outcomes, judgement).axes[0].lines


@pytest.mark.parametrize(
    ("noise", "drift", "verdict"),
    [(1.0, 1.0, "verified"), (2.0, 1.0, "refuted"), (1.0, 2.0, "refuted"), (0.0, 1.0, "refuted")],
)
def test_noise_and_drift_are_judged_apart(noise, drift, verdict):
    claim = CLAIMS["oomd_sea.noise_and_drift"]

    def measure(cell):
        sigma, s = cell.parameters["sigma"], cell.parameters["drift"]
        return {
            "noise": 4000 * sigma**2,
            "variation": 5000 * s**2,
            "regret": [7 * sigma**noise if sigma else 3 * s**drift],
        }

    outcomes = made(claim.cells(Plan(seeds=4)), measure)
    judgement = claim.judge(outcomes)
    assert judgement.verdict == verdict
    assert claim.figure(outcomes, judgement).axes[0].lines


@pytest.mark.parametrize(
    ("curve", "verdict"), [(np.log, "verified"), (np.sqrt, "refuted"), (lambda T: 0.1 * T, "refuted")]
)
def test_a_logarithm_is_told_from_a_root(curve, verdict):
    claim = CLAIMS["oomd_sea.strongly_convex"]
    T = np.array(oomd_sea.TS, dtype=float)
    assert claim.judge(made(claim.cells(Plan(seeds=4)), lambda c: {"regret": curve(T)})).verdict == verdict


@pytest.mark.parametrize(
    ("broken", "verdict"), [(None, "verified"), ("narrow_gap", "refuted"), ("sea", "refuted")]
)
def test_either_growth_refutes_constant_regret(broken, verdict):
    claim = CLAIMS["oomd_sea.constant_regret"]

    def measure(cell):
        name = cell.function.partition(":")[2]
        T = np.array(oomd_sea.GAPS if name == "narrow_gap" else oomd_sea.TS, dtype=float)
        return {"regret": T ** (0.3 if name == broken else 0.0)}

    assert claim.judge(made(claim.cells(Plan(seeds=4)), measure)).verdict == verdict


@pytest.mark.parametrize(
    ("dimension", "curve", "exact", "verdict"),
    [
        (1.0, np.log, 0.0, "verified"),
        (1.0, np.sqrt, 0.0, "refuted"),  # a root of T
        (2.0, np.log, 0.0, "refuted"),  # d squared
        (0.0, np.log, 0.0, "refuted"),  # no d
        (1.0, np.log, 0.3, "refuted"),  # regret without noise
    ],
)
def test_reward_learning_is_judged_in_its_parts(dimension, curve, exact, verdict):
    claim = CLAIMS["oomd_sea.exp_concave"]

    def measure(cell):
        T = np.array(cell.parameters["checkpoints"], dtype=float)
        if cell.parameters["sampled"]:
            return {"regret": cell.parameters["dimension"] ** dimension * curve(T)}
        return {"regret": 5 * T**exact}

    assert claim.judge(made(claim.cells(Plan(seeds=4)), measure)).verdict == verdict


@pytest.mark.parametrize(
    ("noisy", "exact", "verdict"),
    [(0.75, 0.5, "verified"), (1.0, 0.5, "refuted"), (0.5, 0.5, "refuted"), (0.75, 1.0, "refuted")],
)
def test_regret_against_the_minimisers_is_judged_by_both_exponents(noisy, exact, verdict):
    claim = CLAIMS["oomd_sea.dynamic_regret"]
    T = np.array(oomd_sea.SQUARES, dtype=float)
    outcomes = made(
        claim.cells(Plan(seeds=4)), lambda c: {"regret": T ** (noisy if c.parameters["sigma"] else exact)}
    )
    judgement = claim.judge(outcomes)
    assert judgement.verdict == verdict
    assert claim.figure(outcomes, judgement).axes[0].lines


def test_a_negative_regret_is_not_one_against_the_minimisers():
    claim = CLAIMS["oomd_sea.dynamic_regret"]
    T = np.array(oomd_sea.SQUARES, dtype=float)
    outcomes = made(claim.cells(Plan(seeds=4)), lambda c: {"regret": T**0.75 - 100})
    judgement = claim.judge(outcomes)
    assert judgement.verdict == "refuted"
    assert "cannot be negative" in judgement.detail


def test_cells_are_pure():
    for claim in CLAIMS.values():
        cell = claim.cells(Plan(quick=True, seeds=1))[0]
        cell = Cell(
            cell.function, {**cell.parameters, **({"T": 50} if "T" in cell.parameters else {})}, cell.seed
        )
        if "Ts" in cell.parameters and "T" not in cell.parameters:
            cell = Cell(cell.function, {**cell.parameters, "Ts": [50]}, cell.seed)
        if "checkpoints" not in cell.parameters:
            assert cell.run() == cell.run()
        else:
            small = Cell(cell.function, {**cell.parameters, "checkpoints": [50]}, cell.seed)
            assert small.run() == small.run()
