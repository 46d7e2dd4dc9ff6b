"""Replay of a saved log of answers."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .annotators import Annotator
from .comparisons import ComparisonLog
from .kernels import Array, Index
from .mdp import FiniteMDP


class ReplayMismatch(ValueError):
    """A replayed log was asked another comparison than it recorded."""


class Replay(Annotator):
    """The recorded answers of a log, to the same comparisons in the same order; any other raises `ReplayMismatch`.

    Its budget is the length of the log. It has answers and no law, so `probability` raises.
    """

    def __init__(self, model: FiniteMDP, log: ComparisonLog):
        super().__init__(model, 0, budget=len(log))
        if log.horizon != model.horizon:
            raise ValueError(
                f"the log compares {log.horizon} steps but the model's horizon is {model.horizon}"
            )
        self._record = log

    def _probability(self, pairs: Index) -> Array:
        raise TypeError("a replayed log has answers, not probabilities")

    def _draw(self, pairs: Index) -> tuple[NDArray[np.int8], Index | int]:
        asked = slice(self.count, self.count + len(pairs))
        differs = (pairs != self._record.pairs[asked]).any(axis=(2, 3))
        if differs.any():
            i, side = (int(k) for k in np.argwhere(differs)[0])
            want, got = self._record.pairs[self.count + i, side], pairs[i, side]
            raise ReplayMismatch(
                f"comparison {self.count + i}: the {('first', 'second')[side]} trajectory asked is states "
                f"{got[0].tolist()}, actions {got[1].tolist()}, but the log recorded states {want[0].tolist()}, "
                f"actions {want[1].tolist()}; a replay answers the recorded comparisons in their order"
            )
        return self._record.outcomes[asked].copy(), self._record.users[asked].astype(np.int64)
