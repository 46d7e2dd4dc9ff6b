r"""SPPO: self-play preference optimisation, multiplicative weights against oneself.

Y. Wu, Z. Sun, H. Yuan, et al., "Self-Play Preference Optimization for Language Model Alignment" (arXiv 2405.00675):

  pi_{t+1}(y) ∝ pi_t(y) exp(eta P(y > pi_t)),

Nash-MD and INPO at tau = 0. Guarantee: with eta of order 1 / sqrt(T) the average of the policies has a duality gap
of order 1 / sqrt(T) (`hedge_step` gives the step of the regret bound). The last policy need not converge: on a cycle it
goes round.
"""

from __future__ import annotations

import math

from numpy.typing import ArrayLike

from ..envs.kernels import Array
from ..envs.preference_games import Game
from .planning.games import softmax
from .self_play import SelfPlay, Step


def hedge_step(n: int, steps: int) -> float:
    """sqrt(8 log n / T), with which the regret of T steps of n responses is at most sqrt(T log n / 2)."""
    return math.sqrt(8 * math.log(n) / steps)


class SPPO(SelfPlay):
    """eta: a constant step, or a function t -> eta_t."""

    tempered = False

    def __init__(self, game: Game, eta: float | Step, start: ArrayLike | None = None) -> None:
        super().__init__(game, 0.0, eta, start)

    def _next(self, eta: float) -> tuple[Array, Array]:
        wins = self.game.wins(self.policy)
        wins *= eta
        wins += self.log_policy
        return softmax(wins)
