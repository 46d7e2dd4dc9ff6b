r"""APO: iterative preference optimisation as a proximal-point method, with Nesterov's extrapolation.

J. He, H. Yuan, Q. Gu, "Accelerated Preference Optimization for Large Language Model Alignment" (arXiv 2410.06293). From
pi_0 = pi_hat_0 = ref, with momentum alpha in [0, 1), rounds t = 0, 1, ...:

  pi_hat_{t+1} = argmin_pi of a preference loss with REFERENCE pi_t, on pairs of pi_t                     `apo_loss`
               ∝ pi_t exp(r / beta)           DPO flavour, P Bradley-Terry with reward r                 `APO.of_reward`
               ∝ pi_t exp(eta P(. > pi_t))    SPPO flavour, any P                                          `APO.of_game`
  pi_{t+1}     ∝ pi_hat_{t+1} (pi_hat_{t+1} / pi_hat_t)^alpha                                            `extrapolate`

The next reference is pi_{t+1}, the extrapolated policy; momentum is taken between pi_hat's. alpha = 0 is
iterative DPO (SPPO). An extrapolated policy is a law like any other: logits need no clipping.

Guarantees, DPO flavour with exact rounds. pi_hat_t ∝ ref exp(c_t r / beta) with

  c_t = sum_{k=1}^t (1 - alpha^k) / (1 - alpha) = [t - alpha (1 - alpha^t) / (1 - alpha)] / (1 - alpha)    `coefficient`

so that t rounds are worth c_t rounds of iterative DPO, c_t / t -> 1 / (1 - alpha), and the reward falls short by at
most beta log(1 / ref(y*)) / c_t; with a gap between the best and the second reward 1 - pi_hat_t(y*) falls like
exp(-gap t / (beta (1 - alpha))). KL to ref is not controlled: the limit is greedy. If round k's reward is an estimate
r_k, r c_T becomes sum_k w_k r_k, w_k = (1 - alpha^{T-k}) / (1 - alpha) for k = 0, ..., T-1 (`weights`): every error is
amplified by up to 1 / (1 - alpha). In the SPPO flavour momentum is not optimism: on a cycle the last policy still
spirals outwards, and faster.

The SPPO flavour's step is the minimiser of `ipo.ipo_loss` with reference pi_t, tau = 1 / eta, on pairs of pi_t; that of
`sppo.sppo_loss` differs by order eta^3. Departure: extrapolation is of log-probabilities; for a transformer the paper
extrapolates the weights in their place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import ArrayLike

from ..envs.kernels import Array
from ..envs.preference_games import Game
from .dpo import dpo_loss
from .optimisation.losses import check_positive
from .planning.games import softmax
from .spec import LossSpec

if TYPE_CHECKING:
    from torch import Tensor


def check_momentum(alpha: float) -> float:
    if not 0 <= alpha < 1:
        raise ValueError(f"alpha is {alpha}; it must lie in [0, 1)")
    return float(alpha)


def weights(rounds: int, alpha: float) -> Array:
    """(rounds,): how much round k = 0, ..., rounds - 1 counts in pi_hat_rounds; they add up to `coefficient`."""
    alpha = check_momentum(alpha)
    return (1 - alpha ** np.arange(rounds, 0, -1)) / (1 - alpha)


def coefficient(rounds: int, alpha: float) -> float:
    """c_t: t rounds with momentum alpha are worth c_t rounds without."""
    alpha = check_momentum(alpha)
    return (rounds - alpha * (1 - alpha**rounds) / (1 - alpha)) / (1 - alpha)


def extrapolate(log_proposal: Array, log_before: Array, alpha: float) -> tuple[Array, Array]:
    """pi_hat (pi_hat / pi_hat_before)^alpha / Z and its logarithm, (n,) each."""
    return softmax(log_proposal + alpha * (log_proposal - log_before))


def apo_loss(
    policy: Tensor, previous: Tensor, preferred: Tensor, weight: Tensor | None = None, *, beta: float
) -> Tensor:
    """A round's loss, DPO flavour: comparisons (..., 2) of pi_t; `previous` = log pi_t, of the extrapolated policy."""
    return dpo_loss(policy, previous, preferred, weight, beta=beta)


class APO:
    """A run: advance(N) then advance(M) equals advance(N + M), bit for bit.

    log_reference  (n,), finite
    direction      pi_t (n,) -> what a round adds to log pi_t: r / beta, or eta P(. > pi_t)
    policy, log_policy              pi_t, extrapolated: whence the next pairs come, and the next round's reference
    proposal, log_proposal          pi_hat_t
    t                               rounds made
    """

    def __init__(self, log_reference: ArrayLike, direction: Callable[[Array], Array], alpha: float) -> None:
        log_ref = np.asarray(log_reference, dtype=np.float64)
        if log_ref.ndim != 1 or not np.isfinite(log_ref).all():
            raise ValueError("log_reference must be a finite vector: a response without mass stays without")
        self.direction, self.alpha = direction, check_momentum(alpha)
        self.policy, self.log_policy = self.proposal, self.log_proposal = softmax(log_ref)
        self.t = 0

    @classmethod
    def of_reward(cls, rewards: ArrayLike, log_reference: ArrayLike, beta: float, alpha: float) -> Self:
        """DPO flavour: exact rounds where P is Bradley-Terry with these rewards."""
        step = np.asarray(rewards, dtype=np.float64) / check_positive(beta, "beta")
        return cls(log_reference, lambda law: step, alpha)

    @classmethod
    def of_game(cls, game: Game, eta: float, alpha: float) -> Self:
        """SPPO flavour: exact rounds for any game."""
        eta = check_positive(eta, "eta")
        return cls(game.log_reference, lambda law: eta * game.wins(law), alpha)

    def advance(self, rounds: int) -> Self:
        for _ in range(rounds):
            self.follow(self.log_policy + self.direction(self.policy))
        return self

    def follow(self, log_proposal: Array) -> Self:
        """A round whose pi_hat_{t+1} is given by log-weights (n,), say of a fitted loss."""
        before = self.log_proposal
        self.proposal, self.log_proposal = softmax(log_proposal)
        self.policy, self.log_policy = extrapolate(self.log_proposal, before, self.alpha)
        self.t += 1
        return self


LOSS = LossSpec(
    name="apo",
    title="Accelerated preference optimisation",
    paper="He, Yuan, Gu (arXiv 2410.06293)",
    loss=apo_loss,
)
