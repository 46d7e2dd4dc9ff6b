"""The claims about token-level DPO on their own cells, and their controls."""

from __future__ import annotations

import numpy as np
import pytest
from preflab.theory.claim import Outcome, Plan
from preflab.theory.claims import r_to_q_star

CLAIMS = {claim.name: claim for claim in r_to_q_star.CLAIMS}


def measured(cells):
    return [Outcome(cell, cell.run()) for cell in cells]


@pytest.mark.parametrize("name", CLAIMS)
def test_claims_hold_and_their_controls_are_caught(name):
    claim = CLAIMS[name]
    plan = Plan(quick=True, seeds=1 if name.endswith("language_world") else 3)
    judgement = claim.judge(measured(claim.cells(plan)))
    assert judgement.verdict == "verified", judgement.detail
    for control in claim.controls:
        assert claim.judge(measured(control.cells(plan))).verdict == "refuted", control.name


def test_transitions_are_lucky_where_they_are_random_only():
    assert r_to_q_star.telescoping(seed=3, certain=True)["luck"] <= 1e-14
    assert r_to_q_star.telescoping(seed=3, certain=False)["luck"] > 0.1


def test_cells_depend_on_their_seed_alone():
    for cell in r_to_q_star.searches(Plan(seeds=1)) + r_to_q_star.chosens(Plan(seeds=1)):
        assert cell.run() == cell.run()


def test_the_broken_pass_is_the_pass_where_it_is_not_broken():
    model, reference, beta, _ = r_to_q_star.tree(1)
    policy, V = r_to_q_star.backward(model, reference, beta, 1.0, 0.0)
    soft = r_to_q_star.solve(model, reference, beta)
    np.testing.assert_allclose(V, soft.V[0][1:], atol=1e-14)
    assert max(r_to_q_star.gaps(policy, soft.policy)) <= 1e-14
