r"""SPPO: self-play preference optimisation, multiplicative weights against oneself.

Y. Wu, Z. Sun, H. Yuan, et al., "Self-Play Preference Optimization for Language Model Alignment" (arXiv 2405.00675):

  pi_{t+1}(y) ∝ pi_t(y) exp(eta P(y > pi_t)),

Nash-MD and INPO at tau = 0. Guarantee: with eta of order 1 / sqrt(T) the average of the policies has a duality gap
of order 1 / sqrt(T) (`hedge_step` gives the step of the regret bound). The last policy need not converge: on a cycle it
goes round.

The loss of a response with win rate P(y > pi_t) (`sppo_loss`) puts 1/2 where the step has its normaliser:

  L(pi) = E_{y ~ pi_t} [(log pi(y)/pi_t(y) - eta (P(y > pi_t) - 1/2))^2]

Its minimiser is the step up to a difference of order eta^3 in log pi: 1/2 misses the normaliser, log Z / eta, by order
eta, and all but eta^3 of that is a constant, which the normalisation of pi takes up.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from numpy.typing import ArrayLike

from ..envs.kernels import Array
from ..envs.preference_games import Game
from .optimisation.losses import average, check_positive
from .planning.games import softmax
from .self_play import SelfPlay, Step
from .spec import LossSpec

if TYPE_CHECKING:
    from torch import Tensor


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


def sppo_loss(
    policy: Tensor, previous: Tensor, wins: Tensor, weight: Tensor | None = None, *, eta: float
) -> Tensor:
    """Single responses y ~ pi_t, (...,) each: log pi, log pi_t and P(y > pi_t), exact or estimated; eta > 0."""
    target = check_positive(eta, "eta") * (wins - 0.5)
    return average((policy - previous.detach() - target) ** 2, weight)


LOSS = LossSpec(
    name="sppo",
    title="Self-play preference optimisation",
    paper="Wu et al. (arXiv 2405.00675)",
    loss=sppo_loss,
)
