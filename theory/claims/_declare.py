"""How claims files name their cells and their controls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..cells import ROOT, Cell
from ..claim import Control, Plan


def cells_of(module: str) -> Callable[..., Cell]:
    """cell(function, seed, **parameters): a cell of a function of `module`, its `__name__`.

    The n-th seed is 1,000 + n: windows, thresholds, sizes and numbers of seeds are chosen on seeds under 100, which
    no verdict is based on.
    """
    place = module.removeprefix(f"{ROOT}.")

    def cell(function: str, seed: int, **parameters: Any) -> Cell:
        return Cell(f"{place}:{function}", parameters, 1000 + seed)

    return cell


def controls(cells: Callable[..., Sequence[Cell]], key: str = "fault", **faults: str) -> tuple[Control, ...]:
    """A control for each value of the cells' parameter `key`: value = what was broken."""

    def of(value: str) -> Callable[[Plan], Sequence[Cell]]:
        return lambda plan: cells(plan, **{key: value})

    return tuple(Control(value, text, of(value)) for value, text in faults.items())
