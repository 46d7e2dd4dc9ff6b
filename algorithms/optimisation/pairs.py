r"""Comparisons as data: the whole population with its exact probabilities, or a sample.

A comparison is an unordered pair of responses to one prompt, written as (first, second) with the probability, or the
label, that the first wins. A population holds each pair once with the probability that the data contain it, so that a
loss over it is an expectation and not an estimate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from ...envs.kernels import Array, Index
from ...envs.preference_games import PreferenceGame, check_law

if TYPE_CHECKING:
    from torch import Tensor


def gather(log_probabilities: Tensor, pairs: Pairs) -> Tensor:
    """(m, 2): the log-probabilities of the pairs' responses, from those of all responses."""
    import torch

    return log_probabilities[torch.as_tensor(pairs.index)]


@dataclass(frozen=True, eq=False)
class Pairs:
    """m comparisons of responses.

    index      (m, 2) numbers of the first and the second response (over prompts: prompt * responses + response)
    preferred  (m,) in [0, 1]: that the first wins; a label is 1 or 0
    weight     (m,) > 0, sums to 1
    """

    index: Index
    preferred: Array
    weight: Array

    def __post_init__(self) -> None:
        index = np.asarray(self.index, dtype=np.int64)
        p, w = (np.asarray(x, dtype=np.float64) for x in (self.preferred, self.weight))
        m = len(index)
        if index.shape != (m, 2) or p.shape != (m,) or w.shape != (m,) or not m:
            raise ValueError(
                f"index {index.shape}, preferred {p.shape} and weight {w.shape} are not (m, 2), (m,), (m,), m >= 1"
            )
        bad = ~((p >= 0) & (p <= 1)) | ~((w > 0) & (w < np.inf)) | (index < 0).any(axis=1)
        if bad.any():
            k = int(np.flatnonzero(bad)[0])
            raise ValueError(
                f"comparison {k} of {index[k].tolist()} has preferred {p[k]} and weight {w[k]}; "
                "numbers of responses are >= 0, probabilities lie in [0, 1], weights are positive"
            )
        for name, array in (("index", index), ("preferred", p), ("weight", w / w.sum())):
            object.__setattr__(self, name, array)

    def __len__(self) -> int:
        return len(self.index)

    @classmethod
    def population(cls, game: PreferenceGame, law: ArrayLike | None = None) -> Pairs:
        """All pairs y < y' of a game with their exact probabilities.

        law  of the pairs: (n,) = both responses are iid from it (pairs of equal responses teach nothing and are left
             out); (n, n) = any joint law of (first, second); None = the game's reference, iid
        """
        n = len(game)
        law = game.reference if law is None else np.asarray(law, dtype=np.float64)
        if law.ndim == 1:
            law = check_law(law, n, "law")
            joint = np.outer(law, law)
        else:
            joint = check_law(law.reshape(-1), n * n, "law").reshape(n, n)
        i, j = np.triu_indices(n, 1)
        weight = joint[i, j] + joint[j, i]
        seen = weight > 0
        i, j = i[seen], j[seen]
        return cls(np.column_stack([i, j]), game.P[i, j], weight[seen])

    @classmethod
    def sampled(
        cls, game: PreferenceGame, n: int, rng: np.random.Generator, law: ArrayLike | None = None
    ) -> Pairs:
        """n comparisons drawn: both responses iid from `law` (default the reference), the winner by P.

        Equal comparisons are added up: `preferred` is then the share that the first won, which every loss that is
        linear in the label cannot tell from single labels.
        """
        mu = game.reference if law is None else check_law(law, len(game), "law")
        y = rng.choice(len(game), size=(n, 2), p=mu / mu.sum())
        won = rng.random(n) < game.P[y[:, 0], y[:, 1]]
        return cls.counted(y, won)

    @classmethod
    def counted(cls, index: ArrayLike, won: ArrayLike) -> Pairs:
        """Labelled comparisons (m, 2) added up pair by pair; won (m,) is 1 where the first won; y = y' drops out."""
        y, first_won = np.asarray(index, dtype=np.int64), np.asarray(won, dtype=np.float64)
        flipped = y[:, 0] > y[:, 1]
        y, first_won = np.sort(y, axis=1), np.where(flipped, 1 - first_won, first_won)
        different = y[:, 0] != y[:, 1]
        if not different.any():
            raise ValueError("no comparison is between two different responses")
        pairs, where, counts = np.unique(y[different], axis=0, return_inverse=True, return_counts=True)
        wins = np.bincount(where.reshape(-1), weights=first_won[different], minlength=len(pairs))
        return cls(pairs, wins / counts, counts / counts.sum())

    def importance(self, responses: int) -> Array:
        """(responses,): the weight of the pairs that hold a response, for `fit`; one in no pair counts as rare."""
        weight = np.bincount(self.index.reshape(-1), weights=self.weight.repeat(2), minlength=responses)
        return np.where(weight > 0, weight, weight[weight > 0].min())

    def tensors(self) -> tuple[Tensor, Tensor]:
        """preferred and weight for torch."""
        import torch

        return torch.as_tensor(self.preferred), torch.as_tensor(self.weight)
