"""The claims about preference games, on their own cells and on made-up outcomes whose verdict is known."""

from __future__ import annotations

import numpy as np
import pytest
from preflab.theory.cells import Cell
from preflab.theory.claim import Outcome, Plan
from preflab.theory.claims import _game_runs as runs
from preflab.theory.claims import inpo, nash_md, sppo

CLAIMS = {claim.name: claim for module in (nash_md, inpo, sppo) for claim in module.CLAIMS}
_results: dict[Cell, dict] = {}


def measured(cells):
    """Outcomes of the real cells; claims share some of them."""
    for cell in cells:
        if cell not in _results:
            _results[cell] = cell.run()
    return [Outcome(cell, _results[cell]) for cell in cells]


def made(cells, measure):
    return [Outcome(cell, measure(cell)) for cell in cells]


@pytest.mark.parametrize("name", [name for name in CLAIMS if name != "sppo.average_policy"])
def test_claims_hold_and_their_controls_are_caught(name):
    claim, plan = CLAIMS[name], Plan(quick=True, seeds=2)
    outcomes = measured(claim.cells(plan))
    judgement = claim.judge(outcomes)
    assert judgement.verdict == "verified", judgement.detail
    for control in claim.controls:
        assert claim.judge(measured(control.cells(plan))).verdict == "refuted", control.name
    if claim.figure is not None:
        assert claim.figure(outcomes, judgement).axes[0].lines


@pytest.mark.parametrize(
    ("power", "verdict"), [(-0.5, "verified"), (-1.0, "verified"), (-0.3, "refuted"), (0.0, "refuted")]
)
def test_sppo_is_judged_by_the_exponent(power, verdict):
    claim = CLAIMS["sppo.average_policy"]
    T = np.array(sppo.TS, dtype=float)
    outcomes = made(claim.cells(Plan(seeds=4)), lambda c: {"exploitability": 0.1 * T**power, "bound": T**0})
    assert claim.judge(outcomes).verdict == verdict
    assert claim.figure(outcomes, claim.judge(outcomes)).axes[0].lines
    above = made(claim.cells(Plan(seeds=4)), lambda c: {"exploitability": T**power, "bound": 0.9 * T**power})
    assert claim.judge(above).verdict == "refuted"


@pytest.mark.parametrize(("fault", "kept"), [("none", True), ("losing", False), ("last_policy", False)])
def test_sppo_keeps_its_regret_bound(fault, kept):
    found = [runs.averages(seed=s, world="random", Ts=[100, 1600], fault=fault) for s in range(4)]
    assert all(np.less_equal(f["exploitability"], f["bound"]).all() for f in found) is kept
    # promised: half of the answer lies within a factor of the bound, which is no empty one
    listeners = runs.averages(seed=0, world="listeners", Ts=[100])
    assert 0.2 < listeners["exploitability"][0] / listeners["bound"][0] <= 1


@pytest.mark.parametrize(("power", "verdict"), [(2.0, "verified"), (1.0, "refuted"), (3.0, "refuted")])
def test_the_bias_is_judged_by_its_exponent(power, verdict):
    claim = CLAIMS["nash_md.constant_step_bias"]
    outcomes = made(
        claim.cells(Plan(quick=True)), lambda c: {"divergence": np.array(nash_md.SHARES) ** power}
    )
    assert claim.judge(outcomes).verdict == verdict


@pytest.mark.parametrize(
    ("power", "slack", "verdict"), [(-1.0, 0.0, "verified"), (-0.5, 0.0, "refuted"), (-2.0, -1e-9, "refuted")]
)
def test_the_last_iterate_is_judged_by_bound_and_exponent(power, slack, verdict):
    claim = CLAIMS["nash_md.last_iterate"]
    outcomes = made(
        claim.cells(Plan(quick=True)),
        lambda c: {"bound": slack, "divergence": np.array(nash_md.CHECKPOINTS, dtype=float) ** power},
    )
    assert claim.judge(outcomes).verdict == verdict


def test_cells_are_pure_and_games_differ_by_their_seed():
    cells = [claim.cells(Plan(quick=True))[1] for name, claim in CLAIMS.items() if "last" not in name]
    for cell in cells:
        assert cell.run() == cell.run()
    assert runs.game(1, "cyclic").P[0, 1] != runs.game(2, "cyclic").P[0, 1]
    assert not np.array_equal(runs.game(1).P, runs.game(2).P)
    assert runs.seeds_of("listeners", range(9)) == [0, 1, 2, 3]
    start = runs.concentrated(runs.game(0), 0)
    assert start.sum() == pytest.approx(1, abs=1e-12)
    assert start.max() > 0.99999


def test_two_opponents_make_nash_md_inpo_and_back():
    """The planted faults are the other method: same policies, step by step."""
    game = runs.game(3)
    pairs = [("own_opponent", "inpo"), ("mixture_opponent", "nash_md")]
    for fault, other in pairs:
        a, b = (runs.KINDS[name](game, 0.3, 0.7).advance(20).policy for name in (fault, other))
        np.testing.assert_allclose(a, b, atol=1e-12)
