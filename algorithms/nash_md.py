r"""Nash-MD: mirror descent to the regularised Nash equilibrium of a preference game.

R. Munos, M. Valko, D. Calandriello, et al., "Nash Learning from Human Feedback", ICML 2024 (arXiv 2312.00886),
the tabular algorithm with exact preferences. With temperature tau, reference mu and steps eta_t, eta_t tau <= 1:

  pi_t^mu(y) = pi_t(y)^{1 - eta_t tau} mu(y)^{eta_t tau} / Z_t         the geometric mixture      `mixture`
  pi_{t+1}   = argmax_pi [eta_t P(pi > pi_t^mu) - KL(pi, pi_t^mu)]     the mirror step            `NashMD`
             ∝ pi_t^mu(y) exp(eta_t P(y > pi_t^mu))

The opponent is the mixture, not pi_t; mu's weight is eta_t tau.

Guarantee (Theorem 1): KL(pi*, pi_{t+1}) <= (1 - eta_t tau) KL(pi*, pi_t) + 2 eta_t^2, and with the default steps
eta_t = 2 / (tau (t + 2)), KL(pi*, pi_T) <= 8 / (tau^2 (T + 1)), whatever the number of responses. With a constant step
the limit is the best response to its own mixture, which is not pi*: its KL to pi* is of order eta^2.
"""

from __future__ import annotations

import numpy as np

from ..envs.kernels import Array
from .planning.games import softmax
from .self_play import SelfPlay


class NashMD(SelfPlay):
    """NashMD(game, tau, eta=None, start=None), see `SelfPlay`; eta = None are the paper's decreasing steps."""

    def _next(self, eta: float) -> tuple[Array, Array]:
        # The mixture up to its normaliser, which the last softmax takes out.
        share = eta * self.tau
        log_mixture = (1 - share) * self.log_policy
        log_mixture += share * self.game.log_reference
        log_mixture -= log_mixture.max()
        opponent = np.exp(log_mixture)
        opponent /= opponent.sum()
        wins = self.game.wins(opponent)
        wins *= eta
        wins += log_mixture
        return softmax(wins)
