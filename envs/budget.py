"""Whoever is asked: counts its answers, keeps to a budget, draws from one generator, and can be continued."""

from __future__ import annotations

from typing import Any

import numpy as np

Seed = int | np.random.SeedSequence | np.random.Generator


class BudgetExhausted(RuntimeError):
    """More was asked than the budget allows. Nothing was answered, drawn, counted or logged.

    asked: the size of the refused request. remaining: how many answers are left.
    """

    def __init__(self, asked: int, remaining: int, budget: int):
        super().__init__(asked, remaining, budget)
        self.asked, self.remaining, self.budget = asked, remaining, budget

    def __str__(self) -> str:
        return (
            f"{self.asked} answers asked but {self.remaining} of the budget of {self.budget} are left; "
            "nothing was answered"
        )


class Asked:
    """What is asked with a seed and a budget: `count` answers given so far, of at most `budget` (None: no limit)."""

    def __init__(self, seed: Seed, budget: int | None = None):
        if seed is None:
            raise TypeError("an annotator needs a seed: an int, a SeedSequence or a Generator")
        if budget is not None and budget < 0:
            raise ValueError(f"budget is {budget}; give a number >= 0, or None for no limit")
        self.rng = np.random.default_rng(seed)
        self.budget = budget
        self.count = 0

    @property
    def remaining(self) -> int | None:
        return None if self.budget is None else max(self.budget - self.count, 0)

    def _reserve(self, n: int) -> None:
        if self.budget is not None and self.count + n > self.budget:
            raise BudgetExhausted(n, max(self.budget - self.count, 0), self.budget)

    def checkpoint(self) -> dict[str, Any]:
        """All that an equally constructed object needs to go on with the same answers; JSON-able."""
        return {"kind": type(self).__name__, "count": self.count, "rng": _plain(self.rng.bit_generator.state)}

    def restore(self, saved: dict[str, Any]) -> None:
        """Take up the state of a checkpoint. The budget stays this object's own, so a run can be extended."""
        if saved.get("kind") != type(self).__name__:
            raise ValueError(f"the checkpoint is of {saved.get('kind')!r}, not of {type(self).__name__!r}")
        generator = self.rng.bit_generator
        if saved["rng"]["bit_generator"] != generator.state["bit_generator"]:
            raise ValueError(
                f"the checkpoint's generator is {saved['rng']['bit_generator']} but this one is "
                f"{generator.state['bit_generator']}; construct it with the same kind"
            )
        generator.state = saved["rng"]
        self.count = int(saved["count"])


def _plain(state: Any) -> Any:
    """A bit generator's state with its arrays as lists."""
    if isinstance(state, dict):
        return {key: _plain(value) for key, value in state.items()}
    return state.tolist() if isinstance(state, np.ndarray) else state
