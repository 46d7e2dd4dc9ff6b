r"""INPO: iterative Nash policy optimisation, online mirror descent against oneself.

Y. Zhang, D. Yu, B. Peng, et al., "Iterative Nash Policy Optimization", ICLR 2025 (arXiv 2407.00617). The paper's eta is
an inverse step; here eta = 1 / eta_paper, so that INPO, Nash-MD and SPPO read alike:

  pi_{t+1}(y) ∝ exp(eta P(y > pi_t)) mu(y)^{eta tau} pi_t(y)^{1 - eta tau},   eta tau <= 1 (the paper: eta_paper >= tau)

Its fixed point, for every step, is the regularised equilibrium pi* ∝ mu exp(P(. > pi*) / tau). The step is also the
minimiser of a loss that needs no win rates, only who won (`inpo_loss`):

  L_t(pi) = E_{y, y' ~ pi_t, (y_w, y_l) by P} [(h_t(y_w, y_l) - eta / 2)^2],
  h_t(y, y') = log pi(y)/pi(y') - eta tau log mu(y)/mu(y') - (1 - eta tau) log pi_t(y)/pi_t(y').

At eta = 1 / tau it is IPO (`ipo`), the best response to the law that the pairs are drawn from.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..envs.kernels import Array
from .ipo import square_loss
from .optimisation.losses import check_positive, check_share, margin
from .planning.games import softmax
from .self_play import SelfPlay
from .spec import LossSpec

if TYPE_CHECKING:
    from torch import Tensor


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


def inpo_loss(
    policy: Tensor,
    reference: Tensor,
    previous: Tensor,
    preferred: Tensor,
    weight: Tensor | None = None,
    *,
    tau: float,
    eta: float,
) -> Tensor:
    """L_t on comparisons (..., 2) whose responses were both drawn from pi_t; the form is `optimisation.losses`'.

    previous  log pi_t of both responses; reference: log mu. tau > 0; eta > 0 the step, eta tau <= 1 (the paper's
    eta is 1 / eta, its practice 1 / eta = 7.5e-3, tau = eta_paper / 3)
    """
    share = check_share(check_positive(eta, "eta") * check_positive(tau, "tau"), "eta tau")
    anchor = share * reference + (1 - share) * previous
    return square_loss(margin(policy, anchor), preferred, eta / 2, weight)


LOSS = LossSpec(
    name="inpo",
    title="Iterative Nash policy optimisation",
    paper="Zhang et al., ICLR 2025 (arXiv 2407.00617)",
    loss=inpo_loss,
)
