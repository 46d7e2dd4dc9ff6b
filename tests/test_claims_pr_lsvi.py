"""The judges and cells of PR-LSVI's claims, on tiny cells and on made-up outcomes whose verdict is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from preflab.theory.cells import Cell
from preflab.theory.claim import Outcome, Plan
from preflab.theory.claims import _pr_lsvi_runs as runs
from preflab.theory.claims import pr_lsvi

CLAIMS = {claim.name.partition(".")[2]: claim for claim in pr_lsvi.CLAIMS}


def outcomes(cells, measure):
    return [Outcome(cell, measure(cell)) for cell in cells]


@pytest.mark.parametrize(
    "name", ["query_rule", "invariance", "transition_regression", "regret_identity", "elliptical_potential"]
)
def test_cheap_claims_hold_and_their_controls_are_caught(name):
    """The real cells of the quick plan, fewest seeds, without a process pool or a store."""
    claim, plan = CLAIMS[name], Plan(quick=True, seeds=2)
    kept = [c for c in claim.cells(plan) if c.parameters.get("world") != "language"]
    assert claim.judge(outcomes(kept, Cell.run)).verdict == "verified"
    for control in claim.controls:
        assert claim.judge(outcomes(control.cells(plan), Cell.run)).verdict != "verified", control.name


def test_equal_trajectories_need_to_be_seen():
    claim, plan = CLAIMS["equal_trajectories"], Plan(quick=True, seeds=2)
    cells = list(claim.cells(plan))
    judge = claim.judge
    assert judge(outcomes(cells, lambda c: {"equal": 0, "equal_and_asked": 0})).verdict == "inconclusive"
    assert judge(outcomes(cells, lambda c: {"equal": 9, "equal_and_asked": 0})).verdict == "verified"
    assert judge(outcomes(cells, lambda c: {"equal": 9, "equal_and_asked": 1})).verdict == "refuted"


def regret(power):
    """Outcomes of `regret_exponent` with regret exactly T^power(beta)."""

    def measure(cell):
        p = cell.parameters
        if "checkpoints" in p:
            return {"regret": [7.0 * t + 50 for t in p["checkpoints"]]}
        beta = (
            round(-math.log(p["eps"] / pr_lsvi.EPS_0[p["world"]]) / math.log(p["T"] / pr_lsvi.T_0), 6)
            if p["T"] > 500
            else 0
        )
        noise = 1 + 0.01 * np.random.default_rng(cell.seed).standard_normal()
        return {
            "regret": [noise * 500 ** (1 - power(beta)) * p["T"] ** power(beta) if beta else noise * 500.0]
        }

    return measure


@pytest.mark.parametrize(
    ("power", "verdict"),
    [
        (lambda beta: max(1 - beta, 0.5), "verified"),
        (lambda beta: 0.3, "verified"),  # an upper bound: less is fine
        (lambda beta: 1.0, "refuted"),
        (lambda beta: 0.5 if beta == 0.5 else 0.95, "refuted"),
    ],
)
def test_regret_is_judged_by_its_exponent(power, verdict):
    claim = CLAIMS["regret_exponent"]
    made = outcomes(claim.cells(Plan(quick=True)), regret(power))
    assert claim.judge(made).verdict == verdict
    curves = pr_lsvi.regret_curves(made)
    assert set(curves) == {("tabular", beta) for beta in pr_lsvi.BETAS}
    for (_, beta), (Ts, Y) in curves.items():
        assert Y.shape == (16, len(Ts))
        slope = np.polyfit(np.log(Ts), np.log(Y.mean(0)), 1)[0]
        assert slope == pytest.approx(1.0 if beta == 0 else power(beta), abs=1e-3)


@pytest.mark.parametrize(("power", "verdict"), [(-2.0, "verified"), (-1.4, "verified"), (-3.0, "refuted")])
def test_queries_in_a_world_are_bounded_by_the_exponent(power, verdict):
    cells = pr_lsvi.query_runs(Plan(quick=True))
    made = outcomes(cells, lambda c: {"queries": [100 * c.parameters["eps"] ** power]})
    assert CLAIMS["query_exponent"].judge(made).verdict == verdict


@pytest.mark.parametrize(("power", "verdict"), [(-2.0, "verified"), (-1.0, "refuted"), (-3.0, "refuted")])
def test_queries_on_isotropic_differences_have_the_exponent(power, verdict):
    cells = pr_lsvi.streams(Plan(quick=True))
    made = outcomes(cells, lambda c: {"queries": [100 * e**power for e in c.parameters["eps"]]})
    assert CLAIMS["query_exponent"].judge(made).verdict == verdict


@pytest.mark.parametrize(("share", "verdict"), [(1.0, "verified"), (0.9, "inconclusive"), (0.5, "refuted")])
def test_coverage_is_a_probability_over_seeds(share, verdict):
    cells = pr_lsvi.coverages(Plan(quick=True), ["tabular"])
    made = outcomes(cells, lambda c: {"score": 0.5, "ellipsoid": 0.5 if c.seed - 1000 < share * 48 else 1.5})
    assert CLAIMS["coverage"].judge(made).verdict == verdict


def test_optimism_reports_the_relative_event_beside_the_absolute():
    cells = pr_lsvi.optimisms(Plan(quick=True), ["tabular"])
    judgement = CLAIMS["optimism"].judge(
        outcomes(cells, lambda c: {"absolute": 1.0 if c.seed % 2 else -1.0, "relative": -1.0})
    )
    assert judgement.verdict == "verified"
    assert judgement.numbers["frequency relative to the comparator"] == {"tabular, T = 100": 0.0}
    never = CLAIMS["optimism"].judge(outcomes(cells, lambda c: {"absolute": -1.0, "relative": 1.0}))
    assert never.verdict == "refuted"


@pytest.mark.parametrize(("gain", "verdict"), [(5.0, "verified"), (-5.0, "refuted"), (0.0, "inconclusive")])
def test_active_against_passive_is_paired_over_seeds(gain, verdict):
    cells = pr_lsvi.matches(Plan(quick=True))

    def measure(cell):
        noise = float(np.random.default_rng(cell.seed).standard_normal())
        return {"active": 100.0, "passive": 100.0 + gain + noise, "labels": 10}

    assert CLAIMS["active_beats_passive"].judge(outcomes(cells, measure)).verdict == verdict


def test_small_cells_run_in_every_world():
    for name in pr_lsvi.WORLDS:
        one = runs.run(seed=0, world=name, T=30, eps=0.5)
        assert one["regret"][0] > 0
        assert one["log_det_error"] < 1e-9
        assert runs.coverage(seed=0, world=name, T=20, eps=0.1, delta=0.1)["score"] < 1
        pair = runs.matched(seed=0, world=name, T=30, eps=0.5)
        assert pair["labels"] > 0
        assert math.isfinite(runs.optimism(seed=0, world=name, T=5, eps=0.1)["relative"])


def test_planted_faults_do_what_they_say():
    plain = runs.run(seed=0, world="tabular", T=200, eps=0.8)
    assert (
        runs.run(seed=0, world="tabular", T=200, eps=0.8, fault="threshold_on_root")["queries"]
        != plain["queries"]
    )
    assert runs.run(seed=0, world="language", T=50, eps=0.5, fault="same_policy")["queries"] == [0]
    flipped = runs.run(seed=0, world="tabular", T=400, eps=0.5, labels="flipped")
    assert flipped["regret"] > 2 * runs.run(seed=0, world="tabular", T=400, eps=0.5)["regret"]
    known = runs.matched(seed=0, world="tabular", T=200, eps=0.8, fault="asks_the_known")
    assert known["active"] > plain["regret"][0]


def test_the_assumptions_are_checked_on_the_instance():
    model = runs.world("tabular")
    features = type(model.features)([3 * phi for phi in model.features.phi], model.features.mode)
    long = model.plain(features=features, theta=model.theta / 3)
    with pytest.raises(ValueError, match="exceeds 1"):
        runs.check_assumptions(long)
    silent = model.plain(theta=None)
    with pytest.raises(ValueError, match="not linear"):
        runs.check_assumptions(silent)
    large = model.plain(reward=[2 * r for r in model.reward], theta=2 * model.theta)
    with pytest.raises(ValueError, match=r"leave \[0, 1\]"):
        runs.check_assumptions(large)
    with pytest.raises(ValueError, match="not one of"):
        runs.world("nowhere")


@pytest.mark.parametrize(
    "name", ["coverage", "optimism", "regret_exponent", "query_exponent", "active_beats_passive"]
)
def test_figures_are_drawn(name):
    claim = CLAIMS[name]
    made = {
        "coverage": {"score": 0.5, "ellipsoid": 0.5},
        "optimism": {"absolute": 1.0, "relative": 1.0},
        "active_beats_passive": {"active": 50.0, "passive": 80.0, "labels": 9},
    }

    def measure(cell):
        p = cell.parameters
        if name == "regret_exponent":
            return regret(lambda beta: 0.5)(cell)
        if name == "query_exponent":
            eps = p["eps"] if isinstance(p["eps"], list) else [p["eps"]]
            return {"queries": [100 * e**-2.0 for e in eps]}
        return made[name]

    results = outcomes(claim.cells(Plan(quick=True)), measure)
    figure = claim.figure(results, claim.judge(results))
    assert figure.axes
    assert figure.axes[0].get_xlabel()
