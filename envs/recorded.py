"""An annotator that draws the answers people gave."""

from __future__ import annotations

import numpy as np

from .annotators import Annotator
from .budget import Seed
from .kernels import Array, Index
from .mdp import FiniteMDP
from .option_table import OptionTable, Ties


class RecordedAnnotator(Annotator):
    """Answers (context, option) against (same context, option) with one of the recorded answers, with replacement.

    model     horizon 1; state c is context c, action i is option i of `table`
    table     the recorded answers; of one listener: `table.where(rater="04")`
    context   the column whose level c is state c; None where the model has one state
    ties      "half": a drawn tie is answered by a fair coin; "drop": ties are never drawn; "error": there may be none

    The law is exactly the recorded frequency, `preferences[c, i, j]` of `answers[c, i, j]` answers (1/2 for an option
    against itself). A pair that nobody answered raises. No link and no kappa: people owe none.
    """

    def __init__(
        self,
        model: FiniteMDP,
        seed: Seed,
        table: OptionTable,
        *,
        context: str | None = None,
        ties: Ties = "error",
        budget: int | None = None,
        keep_log: bool = True,
    ):
        super().__init__(model, seed, budget=budget, keep_log=keep_log)
        wins = table.wins(context, ties)
        shape = (1, len(wins), len(table.options))
        if (model.horizon, model.sizes[0], model.n_actions) != shape:
            raise ValueError(
                f"the model has horizon {model.horizon}, {model.sizes[0]} states and {model.n_actions} actions; the "
                f"recorded answers need 1, {shape[1]} (contexts) and {shape[2]} (options)"
            )
        self.table, self.context = table, context
        self.answers: Array = wins + wins.transpose(0, 2, 1)
        self.preferences: Array = table.preferences(context, ties)

    def _probability(self, pairs: Index) -> Array:
        c, other = pairs[:, 0, 0, 0], pairs[:, 1, 0, 0]
        if (c != other).any():
            k = int(np.flatnonzero(c != other)[0])
            raise ValueError(
                f"pair {k} compares options in {self._name(c[k])} and in {self._name(other[k])}; people compared "
                "them within one context: start both trajectories in the same state"
            )
        i, j = pairs[:, 0, 1, 0], pairs[:, 1, 1, 0]
        p = self.preferences[c, i, j]
        if np.isnan(p).any():
            k = int(np.flatnonzero(np.isnan(p))[0])
            a, b = self.table.options[i[k]], self.table.options[j[k]]
            raise ValueError(f"pair {k}: no answer is recorded for {a!r} against {b!r} in {self._name(c[k])}")
        return p

    def _name(self, c: int) -> str:
        return (
            "the only context"
            if self.context is None
            else f"{self.context} {self.table.levels[self.context][c]!r}"
        )
