"""Trainers by name, for the command line: ours, planted bugs, TRL's losses, and anybody's `module:function`.

dpo, ipo, ...             the package's losses (`ours`)
planted:NAME              a bug (`planted`)
trl:dpo[LOSS_TYPE], ...   TRL's trainers, where trl is installed (`trl_names`)
MODULE:FUNCTION           imported; FUNCTION(batch) is the loss. The current folder is on the path
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .batch import TrainerLoss
from .conform import TOLERANCE, conform
from .ours import trainers as our_trainers
from .planted import PLANTED
from .report import Report
from .targets import TARGETS
from .trl_names import NAMES as TRL_NAMES


@dataclass(frozen=True)
class Trainer:
    """A loss, what it is held to, and the target's parameters that it was made with."""

    name: str
    loss: TrainerLoss
    against: str
    parameters: Mapping[str, float]
    tolerance: float = TOLERANCE


def names() -> list[str]:
    return [
        *our_trainers(),
        *(f"planted:{name}" for name in PLANTED),
        *TRL_NAMES,
        "MODULE:FUNCTION",
    ]


def find_trainer(
    name: str, against: str | None = None, parameters: Mapping[str, float] | None = None
) -> Trainer:
    """ValueError with the nearest names where there is none; `against` and `parameters` default to the trainer's."""
    if against is not None and against not in TARGETS:
        raise ValueError(f"there is no target {against!r}{_hint(against, TARGETS)}")
    given = dict(parameters or {})
    head, colon, tail = name.partition(":")
    if name in our_trainers():
        ours = our_trainers()[name]
        own = against is None or against == ours.against
        # Held to another target, it is made with its own defaults and judged by the other's.
        made = TARGETS[ours.against].checked(given if own else {})
        target = against or ours.against
        return Trainer(name, ours.build(**made), target, TARGETS[target].checked(given))
    if not colon:
        raise ValueError(f"there is no trainer {name!r}{_hint(name, names())} See: preflab conform --list")
    if head == "planted":
        if tail not in PLANTED:
            raise ValueError(f"there is no planted bug {tail!r}{_hint(tail, PLANTED)}")
        bug = PLANTED[tail]
        target = against or bug.against
        own_parameters = bug.parameters if target == bug.against else {}
        return Trainer(name, bug.loss, target, TARGETS[target].checked({**own_parameters, **given}))
    if head == "trl":
        from .trl_names import trl_trainer

        return Trainer(name, *trl_trainer(tail, against, given))
    target = against or "dpo"
    return Trainer(name, imported(head, tail), target, TARGETS[target].checked(given))


def run_trainer(trainer: Trainer, tolerance: float | None = None, seed: int = 0) -> Report:
    return conform(
        trainer.loss,
        trainer.against,
        name=trainer.name,
        tolerance=trainer.tolerance if tolerance is None else tolerance,
        seed=seed,
        variance=True,
        **dict(trainer.parameters),
    )


def imported(module: str, function: str, signature: str = "(batch) -> loss") -> Any:
    """A function by name, also of a module in the current folder; ValueError where there is none."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"module {module!r} cannot be imported: {error}") from error
    loss = getattr(found, function, None)
    if not callable(loss):
        what = "has no" if loss is None else "holds no callable"
        raise ValueError(
            f"module {module!r} {what} {function!r}; give MODULE:FUNCTION with FUNCTION{signature}"
        )
    return loss


def _hint(name: str, known: object) -> str:
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)  # type: ignore[call-overload]
    return f"; did you mean {' or '.join(near)}?" if near else "."
