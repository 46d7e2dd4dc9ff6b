"""Cells with which the tests try the runner: slow, failing and dying ones. Not a paper; not listed."""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np


def draw(*, seed: int, n: int = 3, pause: float = 0.0, journal: str = "") -> dict[str, Any]:
    """n normal draws after `pause` seconds; `journal` names a file that gets one line an execution."""
    if journal:
        with open(journal, "a", encoding="utf-8") as file:
            file.write(f"{n} {seed}\n")
    time.sleep(pause)
    return {"x": np.random.default_rng([seed, n]).normal(size=n), "odd": [np.nan, np.inf, -np.inf]}


def fail(*, seed: int) -> dict[str, Any]:
    """Raises."""
    raise RuntimeError(f"seed {seed} was never going to work")


def die(*, seed: int) -> dict[str, Any]:
    """Ends its process, as a worker that runs out of memory does."""
    os._exit(9)


def threads(*, seed: int) -> dict[str, Any]:
    """How many threads the numerical libraries were told to use."""
    return {"threads": os.environ.get("OMP_NUM_THREADS", ""), "pid": os.getpid()}


def not_a_dict(*, seed: int) -> int:
    """Breaks the contract of a cell."""
    return seed
