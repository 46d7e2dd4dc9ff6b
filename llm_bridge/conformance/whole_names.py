"""Whole trainers by name, for the command line.

preflab:policy, preflab:loop[dpo], ...   the package's own (`ours_whole`, `ours_loop`)
planted:NAME                             a bug (`planted_whole`, `planted_loop`)
MODULE:NAME                              imported; a class or function of a world (`whole.is_whole`)
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .conform_trainer import LEVELS
from .models import ModelWorld
from .ours_loop import loop_trainer
from .ours_whole import WHOLE
from .planted import PLANTED
from .planted_loop import PLANTED_LOOP
from .planted_whole import PLANTED_WHOLE, PlantedWhole
from .runs import OBJECTIVES
from .trainers import imported
from .whole import is_whole

PLANTED_TRAINERS: Mapping[str, PlantedWhole] = {**PLANTED_WHOLE, **PLANTED_LOOP}


def our_whole() -> dict[str, Callable[[ModelWorld], Any]]:
    loops = {f"loop[{name}]": loop_trainer(name) for name in OBJECTIVES}
    return {**WHOLE, **loops, "loop[dpo,adapter]": loop_trainer("dpo", adapter=True)}


def whole_names() -> list[str]:
    return [
        *(f"preflab:{name}" for name in our_whole()),
        *(f"planted:{name}" for name in PLANTED_TRAINERS),
        "MODULE:ADAPTER",
    ]


def find_whole(name: str) -> Callable[[ModelWorld], Any] | None:
    """The adapter of that name; None where it is a loss's name, or nobody's. ValueError with the nearest names."""
    head, colon, tail = name.partition(":")
    if not colon or head == "trl":
        return None
    if head == "preflab":
        if tail not in our_whole():
            near = difflib.get_close_matches(tail, our_whole(), n=2, cutoff=0.4)
            hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(our_whole())}"
            raise ValueError(f"preflab has no whole trainer {tail!r}; {hint}")
        return our_whole()[tail]
    if head == "planted":
        if tail in PLANTED_TRAINERS:
            return PLANTED_TRAINERS[tail].make
        near = difflib.get_close_matches(tail, [*PLANTED, *PLANTED_TRAINERS], n=1, cutoff=0.5)
        if near and near[0] in PLANTED_TRAINERS:
            raise ValueError(f"there is no planted bug {tail!r}; did you mean {near[0]}?")
        return None
    found = imported(head, tail)
    return found if is_whole(found) else None


def read_levels(text: str | None) -> Sequence[int] | None:
    """ "2,3" -> (2, 3); None = all."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() for part in parts):
        raise ValueError(f"--levels {text!r} is no list of numbers such as {','.join(map(str, LEVELS))}")
    return tuple(int(part) for part in parts)
