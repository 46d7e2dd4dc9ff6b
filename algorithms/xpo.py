r"""XPO: exploratory preference optimisation, DPO with a bonus that makes it optimistic.

T. Xie, D. J. Foster, A. Krishnamurthy, et al., "Exploratory Preference Optimization: Harnessing Implicit
Q*-Approximation for Sample-Efficient RLHF", ICLR 2025 (arXiv 2405.21046), on bandits of whole responses. In round t

  y ~ pi_t,  y~ ~ ref,  a label;
  pi_{t+1} = argmin_pi  alpha sum_{i <= t} log pi(y~_i) - sum_{i <= t} log sigma(beta log pi(y_w)/ref(y_w)
                                                                           - beta log pi(y_l)/ref(y_l))      `xpo_loss`

with PLUS alpha: the likelihood of the reference's own samples is lowered. Why that is optimism: the optimal policy of a
reward r has the value V*(r) = E_ref[r] - beta E_ref[log pi_r/ref], so that the smaller E_ref log pi is, the more the
policy claims to be better than ref. A minus sign is an SFT term on ref's samples: pessimism.

It is VPO online (`vpo`) whose calibration law is the samples y~: the same minimiser for alpha_VPO = alpha t / beta
(sums; alpha / beta on the mean over comparisons).

Guarantee (with policies whose beta log pi/ref is bounded): J(pi*) - max_t J(pi_t) is of order sqrt(1/T) times a
coverability of the responses, for alpha ~ beta / sqrt(T); iterative DPO (alpha = 0) can need exp(1 / beta) rounds.
Departures: the policy class is all pi_r with max r - min r <= box; ratios inside the bonus are not clipped (the paper's
practice clips them at +-500); no validation picks the best round.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from ..envs.kernels import Array
from .incentives import OnlinePreferences
from .optimisation.losses import average, check_positive, logistic_loss, margin
from .spec import LossSpec

if TYPE_CHECKING:
    from torch import Tensor


def check_bonus(alpha: float) -> float:
    if not 0 <= alpha < np.inf:
        raise ValueError(
            f"alpha is {alpha}; it must be at least 0 and finite (0 is DPO, a negative one pessimism)"
        )
    return float(alpha)


def xpo_loss(
    policy: Tensor,
    reference: Tensor,
    preferred: Tensor,
    weight: Tensor | None = None,
    *,
    beta: float,
    alpha: float,
) -> Tensor:
    """Comparisons (..., 2) written as (y, y~): [..., 0] from pi_t, [..., 1] FROM THE REFERENCE; whoever won.

    preferred in [0, 1]: that y wins. The form is `losses`': the mean, 1/t of the paper's sums, which are weight = 1.
    beta > 0 in units of reward; alpha >= 0, in units of the paper (1e-5 and 5e-6 for its language models, beta = 0.1).
    """
    logits = check_positive(beta, "beta") * margin(policy, reference)
    return average(check_bonus(alpha) * policy[..., 1] + logistic_loss(logits, preferred), weight)


class XPO(OnlinePreferences):
    """XPO on S bandits, see `OnlinePreferences`; alpha of order beta / sqrt(T) for T comparisons."""

    def __init__(
        self,
        rewards: ArrayLike,
        log_reference: ArrayLike,
        beta: float,
        *,
        alpha: float,
        box: float,
        seeds: ArrayLike,
        batch: int = 1,
    ) -> None:
        super().__init__(rewards, log_reference, beta, box=box, seeds=seeds, batch=batch)
        self.alpha = check_bonus(alpha)

    def _second(self, policy: Array) -> Array:
        return self.reference

    def _incentive(self) -> tuple[float, Array]:
        """alpha sum_i log pi_r(y~_i) = (alpha t / beta) (E_q[r] - J*(r)) + const, q the law of the t samples."""
        return -self.alpha * self.t / self.beta, self.second_counts / self.t


LOSS = LossSpec(
    name="xpo",
    title="Exploratory preference optimisation",
    paper="Xie et al., ICLR 2025 (arXiv 2405.21046)",
    loss=xpo_loss,
)
