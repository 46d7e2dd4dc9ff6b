r"""INPO: iterative Nash policy optimisation, online mirror descent against oneself.

Y. Zhang, D. Yu, B. Peng, et al., "Iterative Nash Policy Optimization", ICLR 2025 (arXiv 2407.00617). The paper's eta is
an inverse step; here eta = 1 / eta_paper, so that INPO, Nash-MD and SPPO read alike:

  pi_{t+1}(y) ∝ exp(eta P(y > pi_t)) mu(y)^{eta tau} pi_t(y)^{1 - eta tau},   eta tau <= 1 (the paper: eta_paper >= tau)

Its fixed point, for every step, is the regularised equilibrium pi* ∝ mu exp(P(. > pi*) / tau). The step is also the
minimiser of a loss that needs no win rates, only who won (`population_loss`):

  L_t(pi) = E_{y, y' ~ pi_t, (y_w, y_l) by P} [(h_t(y_w, y_l) - eta / 2)^2],
  h_t(y, y') = log pi(y)/pi(y') - eta tau log mu(y)/mu(y') - (1 - eta tau) log pi_t(y)/pi_t(y').

At eta = 1 / tau it is IPO (`ipo`), the best response to the law that the pairs are drawn from.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from ..envs.kernels import Array
from ..envs.preference_games import Game, PreferenceGame
from .planning.games import best_response, check_tau, softmax
from .self_play import SelfPlay


class INPO(SelfPlay):
    """INPO(game, tau, eta=None, start=None), see `SelfPlay`; eta = None is the schedule of the last iterate."""

    def _next(self, eta: float) -> tuple[Array, Array]:
        share = eta * self.tau
        anchor = (1 - share) * self.log_policy
        anchor += share * self.game.log_reference
        wins = self.game.wins(self.policy)
        wins *= eta
        wins += anchor
        return softmax(wins)


def ipo(game: Game, opponent: ArrayLike, tau: float) -> Array:
    """IPO's solution, mu exp(P(y > opponent) / tau) / Z: argmax_pi P(pi > opponent) - tau KL(pi, mu).

    M. G. Azar, M. Rowland, B. Piot, et al., "A General Theoretical Paradigm to Understand Learning from Human
    Preferences" (arXiv 2310.12036).
    """
    return best_response(game, opponent, check_tau(tau))


def population_loss(
    game: PreferenceGame, log_policy: Array, anchor: Array, pairs: Array, margin: float
) -> float:
    """E over y, y' iid from `pairs`, the winner w by P, of (d(w) - d(l) - margin)^2 with d = log_policy - anchor.

    INPO's L_t: anchor = eta tau log mu + (1 - eta tau) log pi_t, pairs = pi_t, margin = eta / 2.
    IPO: anchor = log mu, pairs = the law of the data, margin = 1 / (2 tau). Shapes (n,); enumerated, exact.
    """
    d = log_policy - anchor
    h = d[:, None] - d
    weights = (
        2 * np.outer(pairs, pairs) * game.P
    )  # i won against j, and the same pair drawn the other way round
    return float((weights * (h - margin) ** 2).sum())
