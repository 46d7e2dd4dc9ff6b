"""Cells and claims with which the tests try the runner: slow, failing and dying ones. Not a paper; not listed."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..cells import Cell
from ..claim import Claim, Control, Judgement, Outcome, Plan
from ..statistics import judge_identity

JOURNAL = "PREFLAB_SELFTEST_JOURNAL"  # names a file that gets one line for each execution of `draw`


def draw(*, seed: int, n: int = 3, pause: float = 0.0, shift: float = 0.0) -> dict[str, Any]:
    """n normal draws plus `shift`, after `pause` seconds."""
    if JOURNAL in os.environ:
        with open(os.environ[JOURNAL], "a", encoding="utf-8") as file:
            file.write(f"{shift} {seed}\n")
    time.sleep(pause)
    x = shift + np.random.default_rng([seed, n]).normal(size=n)
    return {"x": x, "odd": [np.nan, np.inf, -np.inf]}


def fail(*, seed: int) -> dict[str, Any]:
    """Raises."""
    raise RuntimeError(f"seed {seed} was never going to work")


def die(*, seed: int) -> dict[str, Any]:
    """Ends its process, as a worker that runs out of memory does."""
    os._exit(9)


def threads(*, seed: int, n: int = 0) -> dict[str, Any]:
    """How many threads the numerical libraries were told to use."""
    return {"threads": os.environ.get("OMP_NUM_THREADS", ""), "pid": os.getpid()}


def not_a_dict(*, seed: int) -> int:
    """Breaks the contract of a cell."""
    return seed


def slow_cells(plan: Plan, **parameters: float) -> list[Cell]:
    seeds = plan.seed_range(quick=8, full=24)
    return [Cell("claims._selftest:draw", {"pause": 0.1, **parameters}, seed) for seed in seeds]


def judge_draws(outcomes: Sequence[Outcome]) -> Judgement:
    expected = [np.random.default_rng([o.seed, 3]).normal(size=3) for o in outcomes]
    return judge_identity([np.array(o["x"]) - x for o, x in zip(outcomes, expected, strict=True)])


SHIFTED = Control("shifted", "one is added to every draw", lambda plan: slow_cells(plan, shift=1.0)[:4])

CLAIMS = (
    Claim(
        name="_selftest.slow",
        kind="identity",
        title="A draw is what its seed says",
        statement="$x_s = x(s)$ for every seed $s$",
        cells=slow_cells,
        judge=judge_draws,
        controls=(SHIFTED,),
    ),
    Claim(
        name="_selftest.broken",
        kind="identity",
        title="Its cells fail",
        statement="none",
        cells=lambda plan: [Cell("claims._selftest:fail", {}, seed) for seed in range(2)],
        judge=judge_draws,
        controls=(SHIFTED,),
    ),
    Claim(
        name="_selftest.blind",
        kind="identity",
        title="Its control looks like the real thing",
        statement="none",
        cells=slow_cells,
        judge=judge_draws,
        controls=(Control("nothing_broken", "nothing was broken", slow_cells),),
    ),
)
