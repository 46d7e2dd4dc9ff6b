"""What holds for every claim of every paper: it expands to cells of fresh seeds, and its controls to other cells."""

from __future__ import annotations

import pytest
from preflab.theory.claim import Plan
from preflab.theory.registry import load_claims, select_claims

CLAIMS = load_claims()


@pytest.mark.parametrize(
    "plan", [Plan(), Plan(quick=True), Plan(seeds=2)], ids=["full", "quick", "two seeds"]
)
@pytest.mark.parametrize("paper", sorted({claim.paper for claim in CLAIMS.values()}))
def test_a_claim_and_its_controls_expand_to_different_cells_of_fresh_seeds(paper, plan):
    claims = select_claims([paper])
    assert [claim.name for claim in claims] == [name for name in CLAIMS if name.startswith(f"{paper}.")]
    for claim in claims:
        cells = list(claim.cells(plan))
        assert cells
        assert all(cell.seed >= 1000 for cell in cells)  # those under 100 were for choosing windows and seeds
        for control in claim.controls:
            assert list(control.cells(plan)) != cells, f"{claim.name}: {control.name} measures the same"
