"""Claims: a paper's statements as objects that a computer checks and tries to break.

A claim says what is measured (cells), how it is judged (judge) and on what the same judge must not say
"verified" (controls: a sabotaged algorithm, a violated assumption, a planted bug). A minimal example is
`claims/_example.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from .cells import Cell

Kind = Literal["identity", "inequality", "probability", "rate", "ordering", "event"]
Verdict = Literal["verified", "refuted", "inconclusive"]
_NAME = re.compile(r"_?[a-z][a-z0-9_]*\.[a-z][a-z0-9_]*")


@dataclass(frozen=True)
class Plan:
    """How much to measure: quick or full, with the number of seeds fixed by the user or left to the claim."""

    quick: bool = False
    seeds: int | None = None

    def __post_init__(self) -> None:
        if self.seeds is not None and self.seeds < 1:
            raise ValueError(f"seeds is {self.seeds}; it must be at least 1")

    def pick(self, quick: Any, full: Any) -> Any:
        """One of two sizes, e.g. `T = plan.pick(quick=500, full=4000)`."""
        return quick if self.quick else full

    def seed_range(self, quick: int, full: int) -> range:
        """The seeds to run: 0, ..., n-1 with n the user's number, or else the claim's for this plan."""
        return range(self.seeds if self.seeds is not None else self.pick(quick, full))


@dataclass(frozen=True)
class Outcome:
    """A cell and what it returned."""

    cell: Cell
    result: Mapping[str, Any]

    def __getitem__(self, name: str) -> Any:
        """A number of the result, or else a parameter of the cell."""
        return self.result[name] if name in self.result else self.cell.parameters[name]

    @property
    def seed(self) -> int:
        return self.cell.seed


@dataclass(frozen=True)
class Judgement:
    """A verdict with the number behind it: `statistic` was held against `threshold`; `detail` says it in a
    sentence."""

    verdict: Verdict
    statistic: float
    threshold: float
    detail: str
    numbers: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.verdict not in get_args(Verdict):
            raise ValueError(f"verdict {self.verdict!r} is not one of {', '.join(get_args(Verdict))}")


Cells = Callable[[Plan], Sequence[Cell]]
Judge = Callable[[Sequence[Outcome]], Judgement]


@dataclass(frozen=True)
class Control:
    """Cells on which the claim's judge must not say "verified"; `description` says what was broken."""

    name: str
    description: str
    cells: Cells


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A statement, what is measured about it, how that is judged, and the controls that keep the judge
    honest.

    name         "paper.statement", with `paper` the module in theory/claims
    kind         identity (to 1e-9), inequality (in every run), probability (at least 1 - delta), rate (an
                 exponent), ordering (paired over seeds), event (of the proof)
    title        one line
    statement    LaTeX: text with $...$
    assumptions  what the statement needs, each checked on the instance by the cells
    source       where the statement stands (paper, theorem, equation)
    cells        plan -> cells; the seed is the unit of every statistic
    judge        outcomes, in the order of the cells -> Judgement
    controls     at least one
    figure       (outcomes, judgement) -> matplotlib Figure, drawn into the report
    """

    name: str
    kind: Kind
    title: str
    statement: str
    cells: Cells
    judge: Judge
    controls: tuple[Control, ...]
    assumptions: tuple[str, ...] = ()
    source: str = ""
    figure: Callable[[Sequence[Outcome], Judgement], Any] | None = None

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"claim name {self.name!r} is not of the form 'paper.statement'")
        if self.kind not in get_args(Kind):
            raise ValueError(
                f"claim {self.name}: kind {self.kind!r} is not one of {', '.join(get_args(Kind))}"
            )
        if not self.controls:
            raise ValueError(
                f"claim {self.name} has no control: give at least one that its judge must not verify"
            )
        names = [control.name for control in self.controls]
        if len(set(names)) < len(names):
            raise ValueError(f"claim {self.name}: two controls share a name in {names}")

    @property
    def paper(self) -> str:
        return self.name.partition(".")[0]
