"""Rankings of K trajectories."""

from __future__ import annotations

import numpy as np

from .attainable import reward_layers
from .budget import Asked, Seed
from .kernels import Array, Index
from .mdp import FiniteMDP, Layered
from .trajectories import Trajectories


class PlackettLuce(Asked):
    """Ranks K trajectories: P(order) = prod_k exp(r(order_k)) / sum_{j >= k} exp(r(order_j)). K = 2: Bradley-Terry.

    A ranking counts as one answer. reward: as for `LinkAnnotator`.
    """

    def __init__(
        self,
        model: FiniteMDP,
        seed: Seed,
        *,
        reward: Layered | Array | None = None,
        budget: int | None = None,
    ):
        super().__init__(seed, budget)
        self.model = model.replace(reward=reward_layers(model, reward), theta=None)

    def rank(self, trajectories: Trajectories) -> Index:
        """Indices (K,) from the most to the least preferred, by adding Gumbel noise to the returns and sorting."""
        returns = self.model.returns(trajectories)
        self._reserve(1)
        self.count += 1
        return np.argsort(-(returns + self.rng.gumbel(size=len(returns))), kind="stable")

    def log_probability(self, trajectories: Trajectories, order: Index) -> float:
        """log P(order), order a permutation of 0..K-1."""
        if not np.array_equal(np.sort(order), np.arange(len(trajectories))):
            raise ValueError(
                f"order {np.asarray(order).tolist()} is not a permutation of 0..{len(trajectories) - 1}"
            )
        scores = self.model.returns(trajectories)[np.asarray(order)]
        tails = np.logaddexp.accumulate(scores[::-1])[::-1]
        return float((scores - tails).sum())
