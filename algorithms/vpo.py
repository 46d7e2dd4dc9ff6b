r"""VPO: value-incentivised preference optimisation, optimistic online and pessimistic offline.

S. Cen, J. Mei, K. Goshvadi, et al., "Value-Incentivized Preference Optimization: A Unified Approach to Online and
Offline RLHF", ICLR 2025 (arXiv 2405.19320). With J*(r) = max_pi E_pi[r] - beta KL(pi, ref) = beta log E_ref exp(r /
beta), and rewards whose constant is fixed by a calibration law, R = {r : E_cal[r] = 0}:

  reward form   r_hat  = argmin_{r in R} ell(r; D) - sign alpha J*(r)                                  `vpo_rewards`
  policy form   pi_hat = argmin_pi  -sum_D log sigma(beta log pi(y_w)/ref(y_w) - beta log pi(y_l)/ref(y_l))
                                    + sign alpha beta E_{y ~ pi_cal}[log pi(y) - log ref(y)]              `vpo_loss`
  sign = +1     online: optimism; ADDS log pi on pi_cal's responses, so pushes mass away from them          `VPO`
  sign = -1     offline: pessimism; imitates pi_cal, as SFT does (RPO with eta = alpha, `rpo`)

The two forms are one: for r = beta log pi/ref + const in R they have the same value, since for every r and every law q
J*(r) = E_q[r] - beta E_q[log pi_r/ref]. In the slope of J*(r) - E_cal[r] in r, pi_r - pi_cal, both laws are seen: with
y_cal ~ pi itself the term has no expected gradient.

Guarantee: with r_alpha a minimiser, J*(r_alpha) never falls in sign * alpha; alpha = 0 is DPO, alpha -> inf offline is
pi_cal. The regret online is of order sqrt(T) for alpha ~ sqrt(T), the gap offline of order 1/sqrt(N) for alpha ~
sqrt(N) (sums over comparisons; alpha / N for means), with constants exponential in the reward's range that the paper
leaves open.

Where beta is small against the rewards' range B, pi_t can be certain of one response and compare it with itself, which
teaches nothing: an optimism that errs is then not corrected before exp(B / beta) rounds (the claim `vpo.own_pairs`).

Departures: the reward class is all tables with max r - min r <= box, not a linear class with a ball; the constant of a
prompt is taken out by the objective itself (J*(r) - E_cal[r] for J*(r)), which is the same as calibrating r.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import ArrayLike

from ..envs.kernels import Array
from .incentives import OnlinePreferences, RewardFit, best_value, comparison_loss, fit_rewards, policy_of
from .optimisation.losses import average, check_positive, logistic_loss, margin
from .spec import LossSpec

if TYPE_CHECKING:
    from torch import Tensor

Sign = Literal[1, -1]


def check_alpha(alpha: float, sign: int, name: str = "alpha") -> float:
    """sign * alpha."""
    if sign not in (1, -1):
        raise ValueError(f"sign is {sign}; it is 1 online (optimism) or -1 offline (pessimism)")
    if not 0 <= alpha < np.inf:
        raise ValueError(
            f"{name} is {alpha}; it must be at least 0 and finite (the sign is an argument of its own)"
        )
    return float(sign * alpha)


def log_ratio(policy: Tensor, reference: Tensor, weight: Tensor | None) -> Tensor:
    """E[log pi - log ref] over single responses (...,)."""
    if policy.shape != reference.shape:
        raise ValueError(
            f"calibration has shape {tuple(policy.shape)} and calibration_reference {tuple(reference.shape)}"
        )
    return average(policy - reference.detach(), weight)


def vpo_loss(
    policy: Tensor,
    reference: Tensor,
    calibration: Tensor,
    calibration_reference: Tensor,
    preferred: Tensor,
    weight: Tensor | None = None,
    calibration_weight: Tensor | None = None,
    *,
    beta: float,
    alpha: float,
    sign: Sign,
) -> Tensor:
    """DPO's loss + sign alpha beta E_cal[log pi - log ref]; the form is `losses`', means or expectations.

    policy, reference    (..., 2) log-probabilities, sums over tokens, of the comparisons
    calibration          (...,) log pi of responses y_cal of the calibration law: gradients flow through it too
    calibration_reference  log ref of the same responses; calibration_weight: of each, None = all equal, the mean
    alpha >= 0           on the scale of the mean over comparisons (the paper's alpha over the number of comparisons)
    sign                 1 online, -1 offline
    """
    incentive = check_alpha(alpha, sign) * check_positive(beta, "beta")
    comparisons = average(logistic_loss(beta * margin(policy, reference), preferred), weight)
    return comparisons + incentive * log_ratio(calibration, calibration_reference, calibration_weight)


def calibrate(rewards: ArrayLike, calibration: ArrayLike) -> Array:
    """r - E_cal[r], the member of R that tells the same comparisons; (..., n) each."""
    r, q = np.asarray(rewards, dtype=np.float64), np.asarray(calibration, dtype=np.float64)
    return np.asarray(r - (r * q).sum(-1, keepdims=True))


def reward_objective(
    rewards: ArrayLike,
    wins: ArrayLike,
    log_reference: ArrayLike,
    calibration: ArrayLike,
    *,
    beta: float,
    alpha: float,
    sign: Sign,
) -> Array:
    """ell(r) - sign alpha J*(r) at the calibrated r: the reward form, for wins (..., n, n) and rewards (..., n)."""
    r = calibrate(rewards, calibration)
    return comparison_loss(wins, r) - check_alpha(alpha, sign) * best_value(r, log_reference, beta)


def vpo_rewards(
    wins: ArrayLike,
    log_reference: ArrayLike,
    calibration: ArrayLike,
    *,
    beta: float,
    alpha: float,
    sign: Sign,
    box: float,
) -> RewardFit:
    """The minimiser of the reward form (the best of n + 1 stationary points online); its rewards are calibrated."""
    found = fit_rewards(
        wins, log_reference, beta, incentive=-check_alpha(alpha, sign), law=calibration, box=box
    )
    return RewardFit(calibrate(found.rewards, calibration), found.value, found.residual)


def vpo_policy(rewards: ArrayLike, log_reference: ArrayLike, beta: float) -> tuple[Array, Array]:
    """pi_hat of the fitted rewards and its logarithm."""
    return policy_of(rewards, log_reference, beta)


class VPO(OnlinePreferences):
    """Online VPO on S bandits: both responses of a round from pi_t, the calibration law fixed; see `OnlinePreferences`.

    alpha        of the sum over comparisons; of order sqrt(T) for T of them
    calibration  (n,) or (S, n); None = the reference
    sign         1; -1 is the pessimist, who never looks elsewhere
    """

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
        calibration: ArrayLike | None = None,
        sign: Sign = 1,
    ) -> None:
        super().__init__(rewards, log_reference, beta, box=box, seeds=seeds, batch=batch)
        self.alpha = check_alpha(alpha, sign)
        self.calibration = self.reference
        if calibration is not None:
            self.calibration = np.broadcast_to(np.asarray(calibration, dtype=np.float64), self.true.shape)

    def _incentive(self) -> tuple[float, Array]:
        return -self.alpha, self.calibration


LOSS = LossSpec(
    name="vpo",
    title="Value-incentivised preference optimisation",
    paper="Cen et al., ICLR 2025 (arXiv 2405.19320)",
    loss=vpo_loss,
)
