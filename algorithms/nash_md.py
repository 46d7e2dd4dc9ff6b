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

from numpy.typing import ArrayLike

from ..envs.kernels import Array
from ..envs.preference_games import PreferenceGame
from .planning.games import check_tau, softmax
from .self_play import SelfPlay, Step, constant, decreasing, mixture


class NashMD(SelfPlay):
    """eta: None = the paper's decreasing steps, a number = that constant step, or a function t -> eta_t."""

    def __init__(
        self,
        game: PreferenceGame,
        tau: float,
        eta: float | Step | None = None,
        start: ArrayLike | None = None,
    ) -> None:
        tau = check_tau(tau)
        step = decreasing(tau) if eta is None else eta if callable(eta) else constant(eta)
        super().__init__(game, tau, step, start)

    def _next(self, eta: float) -> tuple[Array, Array]:
        opponent, log_mixture = mixture(self.log_policy, self.game.log_reference, eta * self.tau)
        wins = self.game.P @ opponent
        wins *= eta
        wins += log_mixture
        return softmax(wins)
