r"""Two small claims, as a pattern to copy: how to write a claim. Not a paper; run it with `preflab verify _example`.

1. A cell is a function of a seed and of JSON-able parameters. All its randomness comes from the seed.
2. A judge turns outcomes into a Judgement; `theory.statistics` has one for each kind of claim.
3. A control breaks something, and the same judge must not verify the broken thing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from .. import figures
from ..cells import Cell
from ..claim import Claim, Control, Judgement, Outcome, Plan
from ..statistics import judge_probability, judge_rate, slope_loglog

SIZES = (16, 32, 64, 128, 256, 512, 1024)
DELTA = 0.1


def coin(*, seed: int, bias: float = 0.5) -> dict[str, Any]:
    """|mean of the first n flips - 1/2| for each n in SIZES."""
    flips = np.random.default_rng(seed).random(SIZES[-1]) < bias
    return {"error": [abs(flips[:n].mean() - 0.5) for n in SIZES]}


def coins(plan: Plan, **broken: float) -> list[Cell]:
    """One coin a seed."""
    return [Cell("claims._example:coin", broken, seed) for seed in plan.seed_range(quick=100, full=200)]


def judge_root_n(outcomes: Sequence[Outcome]) -> Judgement:
    return judge_rate(slope_loglog(SIZES, [o["error"] for o in outcomes]), expected=-0.5, slack=0.15)


def draw_root_n(outcomes: Sequence[Outcome], judgement: Judgement) -> Any:
    errors = [o["error"] for o in outcomes]
    curve = figures.Curve("mean of n flips", SIZES, errors, slope_loglog(SIZES, errors))
    return figures.loglog([curve], x="flips n", y="mean error", reference=-0.5)


def judge_hoeffding(outcomes: Sequence[Outcome]) -> Judgement:
    bound = math.sqrt(math.log(2 / DELTA) / (2 * SIZES[-1]))
    return judge_probability(sum(o["error"][-1] <= bound for o in outcomes), len(outcomes), 1 - DELTA)


CLAIMS = (
    Claim(
        name="_example.root_n",
        kind="rate",
        title="The error of a mean falls like one over root n",
        statement=r"$\mathbb{E}\,|\bar X_n - p| = \Theta(n^{-1/2})$ for $n$ independent flips of a coin.",
        assumptions=("the flips are independent", r"the coin is fair, $p = 1/2$"),
        source="central limit theorem",
        cells=coins,
        judge=judge_root_n,
        controls=(
            Control(
                "unfair", "the coin shows heads with probability 0.7", lambda plan: coins(plan, bias=0.7)
            ),
        ),
        figure=draw_root_n,
    ),
    Claim(
        name="_example.hoeffding",
        kind="probability",
        title="Hoeffding's interval holds as often as promised",
        statement=r"$|\bar X_n - p| \leq \sqrt{\log(2/\delta)/(2n)}$ with probability at least $1 - \delta = 0.9$.",
        assumptions=("the flips are independent", r"the coin is fair, $p = 1/2$"),
        source="Hoeffding (1963), theorem 2",
        cells=coins,
        judge=judge_hoeffding,
        controls=(
            Control("slightly_unfair", "heads with probability 0.54", lambda plan: coins(plan, bias=0.54)),
        ),
    ),
)
