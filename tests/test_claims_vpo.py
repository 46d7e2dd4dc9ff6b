"""The claims about VPO, XPO and RPO, on their own cells and on made-up outcomes whose verdict is known."""

from __future__ import annotations

import numpy as np
import pytest
from preflab.theory.claim import Outcome, Plan
from preflab.theory.claims import _optimism_runs as runs
from preflab.theory.claims import rpo, vpo, xpo

CLAIMS = {claim.name: claim for module in (vpo, xpo, rpo) for claim in module.CLAIMS}
ONLINE = ("vpo.explores", "vpo.own_pairs", "xpo.regret", "xpo.beats_passive", "xpo.optimism")
SAMPLED = "rpo.over_optimisation"


def measured(cells):
    return [Outcome(cell, cell.run()) for cell in cells]


def made(cells, regret):
    """Outcomes with `regret(method, world, Ts)` for 8 runs, which differ a little."""
    spread = np.exp(np.linspace(-0.1, 0.1, 8))[:, None]
    return [
        Outcome(c, {"regret": spread * regret(p["method"], p["world"], np.array(p["Ts"], dtype=float))})
        for c in cells
        for p in [c.parameters]
    ]


@pytest.mark.parametrize("name", [name for name in CLAIMS if name not in (*ONLINE, SAMPLED)])
def test_claims_hold_and_their_controls_are_caught(name):
    claim, plan = CLAIMS[name], Plan(quick=True, seeds=3)
    outcomes = measured(claim.cells(plan))
    judgement = claim.judge(outcomes)
    assert judgement.verdict == "verified", judgement.detail
    for control in claim.controls:
        assert claim.judge(measured(control.cells(plan))).verdict == "refuted", control.name
    if claim.figure is not None:
        assert claim.figure(outcomes, judgement).axes[0].lines


def test_over_optimisation():
    claim, plan = CLAIMS[SAMPLED], Plan(quick=True, seeds=20)
    outcomes = measured(claim.cells(plan))
    judgement = claim.judge(outcomes)
    assert judgement.verdict == "verified", judgement.detail
    for control in claim.controls:
        assert claim.judge(measured(control.cells(plan))).verdict == "refuted", control.name
    assert claim.figure(outcomes, judgement).axes[0].lines
    for o in outcomes:  # the instance is what it says: DPO believes the lucky response
        assert (np.array(o["mass"]) > 0.9).all() == (o["c"] == 0)


@pytest.mark.parametrize(
    ("active", "passive", "verdict"),
    [(0.5, 1.0, "verified"), (0.2, 1.0, "verified"), (0.8, 1.0, "refuted"), (0.5, 0.7, "refuted")],
)
def test_the_regret_of_xpo_is_judged_by_both_exponents(active, passive, verdict):
    claim = CLAIMS["xpo.regret"]
    outcomes = made(
        claim.cells(Plan()), lambda method, _, T: T ** (passive if method == "passive" else active)
    )
    judgement = claim.judge(outcomes)
    assert judgement.verdict == verdict
    assert len(claim.figure(outcomes, judgement).axes[0].lines) >= 3


@pytest.mark.parametrize("name", ["vpo.explores", "xpo.beats_passive"])
@pytest.mark.parametrize(("share", "verdict"), [(0.1, "verified"), (0.7, "refuted"), (1.0, "refuted")])
def test_the_orderings_ask_for_half(name, share, verdict):
    claim = CLAIMS[name]
    outcomes = made(claim.cells(Plan()), lambda method, _, T: T * (1.0 if method == "passive" else share))
    judgement = claim.judge(outcomes)
    assert judgement.verdict == verdict
    if claim.figure is not None:
        assert len(claim.figure(outcomes, judgement).axes[0].lines) >= 2


@pytest.mark.parametrize(
    ("own", "mixed", "verdict"), [(1.0, 0.4, "verified"), (0.5, 0.4, "refuted"), (1.0, 0.9, "refuted")]
)
def test_own_pairs_are_judged_by_both_exponents(own, mixed, verdict):
    claim = CLAIMS["vpo.own_pairs"]
    outcomes = made(claim.cells(Plan()), lambda method, _, T: T ** (own if method == "vpo" else mixed))
    assert claim.judge(outcomes).verdict == verdict


def test_optimism_in_every_round():
    claim = CLAIMS["xpo.optimism"]
    slacks = {m: runs.promises(seed=7, T=40, method=m)["slack"] for m in ("xpo", "pessimist", "passive")}
    for method, slack in slacks.items():
        outcome = Outcome(claim.cells(Plan(quick=True))[0], {"slack": slack})
        assert (claim.judge([outcome]).verdict == "verified") == (method == "xpo")


def test_the_rare_response_is_worth_finding_where_it_is_said_to_be():
    for seed in range(50):
        for world, best in (("best", True), ("worst", False)):
            r, log_ref = runs.hidden(seed, world)
            pi = runs.policy_of(r, log_ref, runs.BETA)[0]
            assert np.exp(log_ref).sum() == pytest.approx(1)
            assert np.exp(log_ref[0]) == pytest.approx(np.exp(-10))
            assert (pi[0] > 0.9) == best
            assert (pi[0] < 1e-3) == (not best)


def test_online_cells_are_pure_and_paired():
    options = {"Ts": [32, 64], "world": "best", "size": 4}
    a, b = (runs.online(seed=3, method="xpo", c=1.0, **options)["regret"] for _ in range(2))
    np.testing.assert_array_equal(a, b)
    passive = runs.online(seed=3, method="passive", **options)["regret"]
    no_bonus = runs.online(seed=3, method="vpo", c=0.0, **options)["regret"]
    np.testing.assert_array_equal(passive, no_bonus)
    assert a.shape == (4, 2)
    assert (a[:, 1] < passive[:, 1]).all()
    for method in ("vpo", "vpo_reference", "pessimist", "vpo_pessimist"):
        assert runs.online(seed=3, method=method, c=0.5, **options)["regret"].shape == (4, 2)
