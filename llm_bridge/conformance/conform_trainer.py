r"""`conform_trainer(Mine)`: a whole trainer's sampling, scores and runs, held to what can be enumerated.

Level 3 comes first in a report, since it is exact, then 2 (draws), 6 (exact) and 5 (draws); the likely cause of a
report is that of the first check that fails with a name. Which levels there are follows from the adapter's methods:

  log_probabilities, rewards  3      sample  2      train  6 and 5 (with log_probabilities)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ...envs.kernels import Array
from .invariance import Bench, invariance_level
from .laws import Finding, sampling_level
from .models import TOLERANCES, ModelWorld, model_world
from .report import Report
from .runs import SEEDS, STEPS, policy_law, problem_of, run_level
from .scores import reward_level, scoring_level
from .whole import Declared, declared, make_trainer, methods, trained

LEVELS = (2, 3, 5, 6)
ALPHA = 0.001
DRAWS = 2000


def conform_trainer(
    make: Callable[[ModelWorld], Any],
    *,
    levels: Sequence[int] | None = None,
    world: str | ModelWorld = "tiny",
    dtype: str | None = None,
    name: str | None = None,
    draws: int = DRAWS,
    runs: int = SEEDS,
    steps: int = STEPS,
    alpha: float = ALPHA,
    tolerance: float | None = None,
    seed: int = 0,
) -> Report:
    """Hold a whole trainer to enumeration.

    make       world -> an object as `whole.WholeTrainer` describes; its class will do
    levels     of 2, 3, 5, 6; None = all that the adapter's methods allow
    world      a kind of `model_world`, or a world
    dtype      of the models of a world that is named by its kind: "float64" (None), "float32", "bfloat16"
    draws      a prompt, a role and an option at level 2
    runs       from different seeds at level 5, of so many steps
    alpha      the probability with which an honest trainer may fail at level 2, and again at level 5
    tolerance  of log-probabilities, in nats; None = by the world's dtype. Trained ones may differ by ten times as much
    seed       of the world and of the draws
    """
    if not 0 < alpha < 0.5:
        raise ValueError(f"alpha is {alpha}; it must lie in (0, 0.5)")
    if draws < 100:
        raise ValueError(f"draws is {draws}; at least 100 a prompt are needed")
    if runs < 3 or steps < 2:
        raise ValueError(f"there are {runs} runs of {steps} steps; level 5 needs 3 runs of 2 steps at least")
    if dtype is not None and not isinstance(world, str):
        raise ValueError(f"the world that is given has models of {world.dtype}: leave dtype out")
    here = model_world(world, seed=seed, dtype=dtype or "float64") if isinstance(world, str) else world
    within = TOLERANCES[here.dtype] if tolerance is None else tolerance
    trainer = make_trainer(make, here)
    if getattr(trainer, "start", "policy") == "reference":
        here = here.at_reference()
        trainer = make_trainer(make, here)
    said, has = declared(trainer), methods(trainer)
    wanted = _wanted(levels, has)
    if {5, 6} & set(wanted) and not callable(make):
        raise ValueError(
            "levels 5 and 6 train afresh for every run: give the adapter's class, not an object of it"
        )
    found: list[Finding] = []
    if 3 in wanted and "log_probabilities" in has:
        found += scoring_level(trainer, here, said, within)
    if 3 in wanted and "rewards" in has:
        found += reward_level(trainer, here, within)
    if 2 in wanted:
        after = None
        if "train" in has and "log_probabilities" in has and callable(make) and "policy" in said.roles:
            after = _trained(make, here, said, within, seed)
        found += sampling_level(trainer, here, said, draws=draws, seed=seed, alpha=alpha, after=after)
    if 6 in wanted:
        bench = Bench(make, problem_of(here, trainer), said, 10 * within, seed)
        found += invariance_level(bench)
    if 5 in wanted:
        found += run_level(make, problem_of(here, trainer), seeds=runs, steps=steps, seed=seed, alpha=alpha)
    return _report(name or str(getattr(make, "__name__", type(make).__name__)), here, found)


def assert_trainer_conforms(make: Callable[[ModelWorld], Any], **options: Any) -> Report:
    """For tests: AssertionError with the whole report where the trainer does not conform."""
    report = conform_trainer(make, **options)
    if not report.ok:
        raise AssertionError(str(report))
    return report


def _trained(
    make: Callable[[ModelWorld], Any], world: ModelWorld, said: Declared, tolerance: float, seed: int
) -> tuple[Any, Array, Array]:
    """A trainer after a few steps, its policy's own scores then, and before."""
    bench = Bench(make, problem_of(world, make_trainer(make, world)), said, tolerance, seed)
    trainer = make_trainer(make, world)
    before = policy_law(trainer, world)
    trained(trainer, bench.task(optimiser=bench.offered("optimisers", "sgd")), seed, **bench.usual)
    return trainer, policy_law(trainer, world), before


NEEDS = {2: ("sample",), 3: ("log_probabilities", "rewards"), 5: ("train",), 6: ("train",)}


def _wanted(levels: Sequence[int] | None, has: Sequence[str]) -> list[int]:
    offered = [level for level in LEVELS if any(m in has for m in NEEDS[level])]
    if {5, 6} & set(offered) and "log_probabilities" not in has:
        offered = [level for level in offered if level < 5]
    if levels is None:
        return offered
    for level in levels:
        if level not in LEVELS:
            raise ValueError(f"there is no level {level} for a whole trainer; there are 2, 3, 5 and 6")
        if level not in offered:
            needs = " or ".join(NEEDS[level]) + (" and log_probabilities" if level > 3 else "")
            raise ValueError(f"level {level} needs the method {needs}, which the adapter does not have")
    return sorted(levels)


def _report(name: str, world: ModelWorld, found: Sequence[Finding]) -> Report:
    failed = [f for f in found if f.check.status == "fail"]
    named = next((f for f in failed if f.cause_name is not None), failed[0] if failed else None)
    return Report(
        name,
        f"enumeration on the {world.kind} world",
        {},
        tuple(f.check for f in found),
        named.cause_name if named else None,
        named.cause if named else None,
        named.nearest if named else (),
    )
