"""The claims about KL-regularised RL as inference, on their own cells."""

from __future__ import annotations

import numpy as np
import pytest
from preflab.theory.claim import Outcome, Plan
from preflab.theory.claims import kl_bayes

CLAIMS = {claim.name: claim for claim in kl_bayes.CLAIMS}


def measured(cells):
    return [Outcome(cell, cell.run()) for cell in cells]


@pytest.mark.parametrize("name", list(CLAIMS))
def test_claims_hold_and_their_controls_are_caught(name):
    claim, plan = CLAIMS[name], Plan(quick=True, seeds=2)
    judgement = claim.judge(measured(claim.cells(plan)))
    assert judgement.verdict == "verified", judgement.detail
    for control in claim.controls:
        assert claim.judge(measured(control.cells(plan))).verdict == "refuted", control.name
    cell = claim.cells(plan)[0]
    assert cell.run() == cell.run()


def test_responses_of_a_tree_have_their_lengths():
    model, _ = kl_bayes.world(0)
    trajectories = model.trajectories(np.arange(model.n_leaves))
    np.testing.assert_array_equal(kl_bayes.lengths(model), (trajectories.states > 0).sum(axis=1))


def test_complex_steps_are_derivatives():
    gradient = kl_bayes.complex_gradient(lambda t: np.exp(2 * t[0]) * t[1], np.array([0.3, 0.7]))
    np.testing.assert_allclose(gradient, [1.4 * np.exp(0.6), np.exp(0.6)], rtol=1e-14)


def test_the_projections_differ_where_the_target_has_two_modes():
    for seed in range(3):
        found = kl_bayes.modes(seed=seed)
        assert found["minor"] < 0.02
        assert found["off"] < 0.1 < 0.3 < found["outside"]
