r"""IPO: identity preference optimisation.

M. G. Azar, M. Rowland, B. Piot, et al., "A General Theoretical Paradigm to Understand Learning from Human Preferences",
AISTATS 2024 (arXiv 2310.12036). It maximises P(pi > mu) - tau KL(pi, ref), with mu the law of the data's responses:

  pi*    = ref exp(P(y > mu) / tau) / Z                                                `ipo`  (eq. 10)
  h      = log pi(y)/ref(y) - log pi(y')/ref(y')
  L(pi)  = E[(h(y_w, y_l) - 1 / (2 tau))^2],   y, y' iid from mu, the winner by P      `ipo_loss`  (eq. 17)

Guarantee: pi* is the only minimiser of L where mu has full support, whatever P is; no reward need exist, and certain
preferences leave h finite. Unlike DPO's, the solution depends on mu even if a reward explains P. h is a SUM over
tokens; trainers that average it minimise something else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from numpy.typing import ArrayLike

from ..envs.kernels import Array
from ..envs.preference_games import Game
from .optimisation.losses import average, check_positive, margin
from .planning.games import best_response, check_tau
from .spec import LossSpec

if TYPE_CHECKING:
    from torch import Tensor


def ipo(game: Game, opponent: ArrayLike, tau: float) -> Array:
    """pi* (n,) against the law `opponent` = mu: the best response argmax_pi P(pi > mu) - tau KL(pi, ref)."""
    return best_response(game, opponent, check_tau(tau))


def square_loss(h: Tensor, preferred: Tensor, target: float, weight: Tensor | None = None) -> Tensor:
    """E[p (h - target)^2 + (1 - p) (h + target)^2]: the winner's margin is to be `target`."""
    return average(preferred * (h - target) ** 2 + (1 - preferred) * (h + target) ** 2, weight)


def ipo_loss(
    policy: Tensor, reference: Tensor, preferred: Tensor, weight: Tensor | None = None, *, tau: float
) -> Tensor:
    """Comparisons (..., 2) of sums of token log-probabilities, in the form of `optimisation.losses`; tau > 0."""
    return square_loss(margin(policy, reference), preferred, 1 / (2 * check_positive(tau, "tau")), weight)


def product_loss(log_ratio: Tensor, law: Tensor, wins: Tensor, target: float) -> Tensor:
    """`square_loss` over all pairs y, y' iid from `law`, n numbers in place of n^2 pairs; (n,) each.

    log_ratio  d(y), with h(y, y') = d(y) - d(y')
    wins       P(y > law), the probability to win against a draw from the law

    Multiplied out: 2 Var(d) + target^2 - 4 target Cov(d, wins), moments under the law; equal responses count, with
    h = 0, so that it is the square loss of `Pairs.population` times the probability of two different responses, plus
    target^2 times that of equal ones.
    """
    d = log_ratio - law @ log_ratio
    return 2 * law @ d**2 + target**2 - 8 * target * (law @ (d * wins))


LOSS = LossSpec(
    name="ipo",
    title="Identity preference optimisation",
    paper="Azar et al., AISTATS 2024 (arXiv 2310.12036)",
    loss=ipo_loss,
)
