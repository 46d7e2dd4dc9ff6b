r"""Level 6: what must not change what is learnt: micro-batches, padding, the order of a batch, a precomputed reference,
an interruption.

The trainer runs one task with its usual options and with each other value of each option that `train` takes, from the
same seed, and the trained policies are compared in log-probabilities of all completions. Some options have meanings:

    micro_batch  rows of a step in one backward pass; None = all. Best one that does not divide 12
    side         "left", "right": where padding goes
    reference    "live", "precomputed": log-probabilities of the reference asked for in each step, or beforehand
    resume       True: stopped after task.steps // 2 steps, and gone on with by objects that are made anew

Where two runs differ, the trainer itself shows why: with its usual options it is given tasks made so that they end
where a certain fault would (the learning rate times the number of micro-batches, rows that count more than once, a
world whose reference is another model, fewer steps), and the fault whose task ends there is named. Whatever is left has
the cause that the option itself suggests.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np

from ...envs.kernels import Array
from .conform import TrainerError
from .laws import Finding
from .models import ModelWorld
from .report import Check
from .runs import Comparison, Problem, Task, make_task, policy_law
from .scores import distance
from .whole import Declared, make_trainer, trained, variants, words_of

ROWS = 12
STEPS = 4
STRIDE = 0.3
SPLITS = 150  # of a batch into micro-batches that are tried

CAUSES = {
    "not_repeatable": "two runs from one seed differ: dropout on, or random numbers that the seed does not set",
    "micro_added": "gradients of micro-batches are added, where they should be averaged: accumulation is not divided "
    "by their number",
    "micro_divided": "gradients of micro-batches are divided by their number twice",
    "micro_means": "each micro-batch is averaged on its own and counts alike, also the last one, which has fewer rows",
    "micro_means_added": "each micro-batch is averaged on its own, and they are added: normalised by the micro-batch",
    "micro_last": "only the last micro-batch of a step counts: gradients are cleared in between",
    "micro_dropped": "the last micro-batch, which has fewer rows, is dropped",
    "micro_steps": "the optimiser steps after every micro-batch: nothing is accumulated",
    "micro_batch": "what is learnt depends on the micro-batch: the loss is normalised by what it holds (its tokens), "
    "or uses statistics of it",
    "side": "what is learnt depends on the padding's side: padding is read, or positions count it",
    "order": "what is learnt depends on the order of the rows in a batch: neighbours, or statistics that know it",
    "precomputed_is_policy": "the precomputed reference log-probabilities are those of the policy",
    "precomputed_is_base": "the precomputed reference log-probabilities are those of the base model",
    "precomputed": "the precomputed reference is not the live one: numbers of other rows, of another model, with "
    "another padding, or with dropout on",
    "reference_moves": "the reference changes while the policy is trained: they share weights, or the adapter is on",
    "resume_restarts": "the step counter is lost on resume: all steps are made once more",
    "resume_weights": "the trained weights are lost on resume: it goes on from the first ones",
    "resume_reference": "the reference is made anew on resume, from the trained policy",
    "resume_data": "the data order is lost on resume: rows are repeated or skipped, or random numbers are others",
    "resume_schedule": "the learning rate's schedule is lost on resume",
    "resume_optimiser": "the optimiser's state is lost on resume: its moments begin at zero",
    "resume": "resuming changes the run, though neither steps, weights nor data are lost",
    "not_exact": "equal to rounding, and not bit for bit: sums are made in another order, or state is stored rounded",
    "option": "the option changes what is learnt",
}


@dataclass(frozen=True, eq=False)
class Bench:
    """A trainer and how to run it once more: every run is of a fresh one."""

    make: Callable[[ModelWorld], Any]
    problem: Problem
    said: Declared
    tolerance: float
    seed: int

    @cached_property
    def trainer(self) -> Any:
        return make_trainer(self.make, self.problem.world)

    @property
    def usual(self) -> dict[str, Any]:
        return variants(self.trainer, "train")[0]

    def offered(self, what: Literal["optimisers", "schedules"], wanted: Any) -> Any:
        """The wanted one where the adapter has it, else its first; it has all of those it says nothing of."""
        every = ("sgd", "adamw") if what == "optimisers" else ("constant", "linear")
        offered = tuple(getattr(self.trainer, what, every))
        return wanted if wanted in offered else offered[0]

    def run(self, task: Task, options: Mapping[str, Any], world: ModelWorld | None = None) -> Array:
        """log pi after training, (prompts, C)."""
        here = self.problem.world if world is None else world
        trainer = make_trainer(self.make, here)
        trained(trainer, task, self.seed, **options)
        return policy_law(trainer, here)

    def same(self, a: Array, b: Array) -> bool:
        return distance(a.ravel(), b.ravel()) <= self.tolerance

    def task(self, draw: int = 0, **given: Any) -> Task:
        how: dict[str, Any] = {"steps": STEPS, "batch": ROWS, "stride": STRIDE, "round_steps": 3}
        return make_task(self.problem, 7000 + 2 * self.seed + draw, **{**how, **given})


def invariance_level(bench: Bench) -> list[Finding]:
    usual, *others = variants(bench.trainer, "train")
    task = bench.task(optimiser=bench.offered("optimisers", "sgd"))
    first, again = (bench.run(task, bench.usual) for _ in range(2))
    gap = distance(first.ravel(), again.ravel())
    title = "runs from one seed"
    if not gap <= bench.tolerance:
        return [_fail(title, "not_repeatable", f"they differ by {gap:.2g} nats", gap=gap)]
    found = [_pass(title, gap)]
    if "reference" in bench.said.roles:
        found.append(_reference_stays(bench, task))
    if task.comparisons:
        found.append(_order(bench))
    for options in others:
        changed = {name: value for name, value in options.items() if value != usual[name]}
        found.append(_option(bench, options, changed))
    return found


def _fail(title: str, name: str, text: str, cause: str | None = None, **numbers: float) -> Finding:
    return Finding(Check(title, 6, "fail", text, numbers), name, CAUSES[name] if cause is None else cause)


def _pass(title: str, gap: float) -> Finding:
    text = "bit for bit the same policy" if gap == 0 else f"the same policy to {gap:.1e} nats"
    return Finding(Check(title, 6, "pass", text, {"gap": gap}))


# ---- checks ----------------------------------------------------------------------------------------------------------


def _reference_stays(bench: Bench, task: Task) -> Finding:
    world, trainer = bench.problem.world, make_trainer(bench.make, bench.problem.world)
    before = policy_law(trainer, world, "reference")
    trained(trainer, task, bench.seed, **bench.usual)
    gap = distance(before.ravel(), policy_law(trainer, world, "reference").ravel())
    title = "the reference after training"
    if gap <= bench.tolerance:
        return _pass(title, gap)
    return _fail(title, "reference_moves", f"it has moved by {gap:.2g} nats", gap=gap)


def _order(bench: Bench) -> Finding:
    """One batch, again and again; its rows in the other order."""
    task = bench.task(rows=ROWS, optimiser=bench.offered("optimisers", "sgd"))
    turned = replace(task, comparisons=task.comparisons[::-1])
    a, b = bench.run(task, bench.usual), bench.run(turned, bench.usual)
    gap = distance(a.ravel(), b.ravel())
    title = "order of the batch"
    if gap <= bench.tolerance:
        return _pass(title, gap)
    return _fail(title, "order", f"another policy, by up to {gap:.2g} nats", gap=gap)


def _option(bench: Bench, options: Mapping[str, Any], changed: Mapping[str, Any]) -> Finding:
    (name,) = changed
    given = {"optimiser": bench.offered("optimisers", "sgd")}
    if name == "resume":
        given = {
            "optimiser": bench.offered("optimisers", "adamw"),
            "schedule": bench.offered("schedules", "linear"),
        }
    task = bench.task(**given)
    a, b = bench.run(task, bench.usual), bench.run(task, options)
    gap, title = distance(a.ravel(), b.ravel()), words_of(changed)
    if gap <= bench.tolerance:
        if name in getattr(bench.trainer, "exact", ()) and gap > 0:
            return _fail(title, "not_exact", f"another policy, by {gap:.2g} nats", gap=gap)
        return _pass(title, gap)
    causes: dict[str, Callable[..., str | None]] = {
        "micro_batch": _why_micro,
        "reference": _why_reference,
        "resume": _why_resume,
    }
    try:
        why = causes[name](bench, options) if name in causes else None
    except TrainerError:  # of another batch than was asked for, which it may refuse
        why = None
    general = {"reference": "precomputed"}.get(name, name if name in CAUSES else "option")
    text = f"another policy, by up to {gap:.2g} nats"
    if general == "option" and why is None:
        return _fail(title, general, text, f"the option {title} changes what is learnt", gap=gap)
    return _fail(title, why or general, text, gap=gap)


# ---- why -------------------------------------------------------------------------------------------------------------


def _why_micro(bench: Bench, options: Mapping[str, Any]) -> str | None:
    """One step on two micro-batches of unlike size, and what else would end there."""
    m = options["micro_batch"]
    if not isinstance(m, int) or m < 1 or bench.offered("optimisers", "sgd") != "sgd":
        return None
    n = m + 1
    found: list[set[str]] = []
    for draw in range(2):  # rows of one draw may have lengths that make two faults alike
        task = bench.task(draw, steps=1, batch=n, rows=n)
        seen, matched = bench.run(task, options), set[str]()
        for name, other in _micro_tasks(task, m):
            if name not in matched and all(name in names for names in found):
                matched |= {name} if bench.same(seen, bench.run(other, bench.usual)) else set()
        found.append(matched)
    for name in ("micro_added", "micro_divided", *CAUSES):
        if all(name in names for names in found):
            return name
    even = bench.task(steps=1, batch=2 * m, rows=2 * m)
    stepped = replace(even, steps=2, batch=m)
    if bench.same(bench.run(even, options), bench.run(stepped, bench.usual)):
        return "micro_steps"
    return None


def _micro_tasks(task: Task, m: int) -> Iterator[tuple[str, Task]]:
    n, rate = task.batch, task.learning_rate
    yield "micro_added", replace(task, learning_rate=2 * rate)
    yield "micro_divided", replace(task, learning_rate=rate / 2)
    if not task.comparisons:
        return
    splits: Iterator[tuple[int, ...]] = itertools.combinations(range(n), m)
    if math.comb(n, m) > SPLITS:  # in order, or in the opposite order
        splits = iter([tuple(range(m)), tuple(range(n - m, n))])
    every = list(splits)
    for kind in ("means", "last", "dropped"):
        for inside in every:
            first = [task.comparisons[i] for i in inside]
            last = [row for i, row in enumerate(task.comparisons) if i not in inside]
            if kind == "means":
                common = math.gcd(m, n - m)
                rows = first * ((n - m) // common) + last * (m // common)
                yield "micro_means", _only(task, rows)
                yield "micro_means_added", replace(_only(task, rows), learning_rate=2 * rate)
            elif kind == "last":
                yield "micro_last", _only(task, last)
                yield "micro_last", replace(_only(task, last), learning_rate=rate * len(last) / n)
            else:
                yield "micro_dropped", _only(task, first)
                yield "micro_dropped", replace(_only(task, first), learning_rate=rate * len(first) / n)


def _only(task: Task, rows: Sequence[Comparison]) -> Task:
    return replace(task, comparisons=tuple(rows), batch=len(rows))


def _why_reference(bench: Bench, options: Mapping[str, Any]) -> str | None:
    """In a world where the reference is another model, the live one would end there."""
    world, task = bench.problem.world, bench.task(optimiser=bench.offered("optimisers", "sgd"))
    seen = bench.run(task, options)
    for role in ("policy", "base"):
        other = replace(world, models={**world.models, "reference": world.models[role]}, _exact={})
        if bench.same(seen, bench.run(task, bench.usual, other)):
            return f"precomputed_is_{role}"
    return None


def _why_resume(bench: Bench, options: Mapping[str, Any]) -> str | None:
    """From the plainest task, where nothing but steps and weights can be lost, to those where more can."""
    sgd, adamw = (bench.offered("optimisers", kind) for kind in ("sgd", "adamw"))
    linear = bench.offered("schedules", "linear")
    constant = bench.offered("schedules", "constant")
    half = STEPS // 2

    def differs(task: Task) -> bool:
        return not bench.same(bench.run(task, bench.usual), bench.run(task, options))

    plain = bench.task(rows=ROWS, optimiser=sgd, schedule=constant)
    if plain.comparisons and differs(plain):
        seen = bench.run(plain, options)
        if bench.same(seen, bench.run(replace(plain, steps=STEPS + half), bench.usual)):
            return "resume_restarts"
        if bench.same(seen, bench.run(replace(plain, steps=STEPS - half), bench.usual)):
            return "resume_weights"
        return "resume_reference" if _reference_after(bench, plain, options) else None
    if differs(bench.task(optimiser=sgd, schedule=constant)):
        return "resume_data"
    if linear != constant and differs(bench.task(rows=ROWS, optimiser=sgd, schedule=linear)):
        return "resume_schedule"
    if adamw != sgd and differs(bench.task(optimiser=adamw, schedule=constant)):
        return "resume_optimiser"
    return None


def _reference_after(bench: Bench, task: Task, options: Mapping[str, Any]) -> bool:
    """Whether the reference of the resumed run is another one than the world's; True where it cannot be asked."""
    if "reference" not in bench.said.roles:
        return True
    world = bench.problem.world
    trainer = make_trainer(bench.make, world)
    trained(trainer, task, bench.seed, **options)
    now = policy_law(trainer, world, "reference")
    return not bench.same(now, np.asarray(world.law("reference", bench.said.sampling)))
