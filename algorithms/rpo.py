r"""RPO: regularised preference optimisation, DPO with an imitation term, which is an adversary in disguise.

Z. Liu, M. Lu, S. Zhang, et al., "Provably Mitigating Overoptimization in RLHF: Your SFT Loss is Implicitly an
Adversarial Regularizer", NeurIPS 2024 (arXiv 2405.16436); not the reward-aware loss of the same initials. With the
data's loss L_D(r) = -E_D log sigma(r(y_w) - r(y_l)), a baseline policy pi_base and J_beta(pi; r) = E_pi[r] - beta
KL(pi, ref):

  maximin   pi_hat = argmax_pi min_{r in R} eta (J_beta(pi; r) - E_base[r]) + L_D(r)            `adversarial_value`
  minimax   r_hat  = argmin_{r in R} L_D(r) + eta (max_pi J_beta(pi; r) - E_base[r])            `rpo_rewards`
            pi_hat = pi_{r_hat}, ref exp(r_hat / beta) / Z
  loss      L_RPO(pi) = L_D(beta log pi/ref) - eta beta E_{y ~ pi_base}[log pi(y)]              `rpo_loss`

For convex R both values and both policies agree (the saddle point). With r = beta log pi/ref + const the loss is the
minimax objective minus the constant eta beta E_base[log ref]; its last term has the gradient eta (pi_r - pi_base) in r.
Where the class does not bind, a response that nobody compared gets pi_base's mass, whatever eta > 0 is; eta = 0 is
DPO, which leaves it anywhere, and eta -> inf gives pi_base. It is VPO offline with pi_cal = pi_base and alpha = eta
on means.

Guarantee: with eta ~ 1/sqrt(N) the gap to every policy that the data cover is of order 1/sqrt(N), with constants
exponential in the reward's range that are not asserted here. A fixed eta leaves a bias.
Departures: R = {r : max r - min r <= box}, which is convex and contains with r all r + const.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from ..envs.kernels import Array
from .incentives import RewardFit, fit_rewards, worst_rewards
from .optimisation.losses import average, check_positive, logistic_loss, margin
from .planning.games import kl
from .spec import LossSpec

if TYPE_CHECKING:
    from torch import Tensor


def check_eta(eta: float) -> float:
    if not 0 <= eta < np.inf:
        raise ValueError(f"eta is {eta}; it must be at least 0 and finite (0 is DPO)")
    return float(eta)


def rpo_loss(
    policy: Tensor,
    reference: Tensor,
    preferred: Tensor,
    weight: Tensor | None = None,
    base: Tensor | None = None,
    base_weight: Tensor | None = None,
    *,
    beta: float,
    eta: float,
) -> Tensor:
    """DPO's loss + eta beta E_base[-log pi]; comparisons (..., 2), sums over tokens; the form is `losses`'.

    base   (...,) log pi of responses of pi_base, weighted by base_weight (None = the mean): gradients flow through it.
           None: the chosen responses, the paper's practice, each weighing as its comparison does
    eta    >= 0, on the scale of the mean over comparisons. The coefficient of the log-likelihood is eta beta: trainers
           that have one number for it mean that product (0.005 of 0.01 in the paper's code is eta beta = 5e-5), and
           those that average over tokens divide it by the length
    """
    comparisons = average(
        logistic_loss(check_positive(beta, "beta") * margin(policy, reference), preferred), weight
    )
    if base is None:
        chosen = preferred * policy[..., 0] + (1 - preferred) * policy[..., 1]
        return comparisons - check_eta(eta) * beta * average(chosen, weight)
    return comparisons - check_eta(eta) * beta * average(base, base_weight)


def chosen_law(wins: ArrayLike) -> Array:
    """The law of the chosen responses: how often each won, (..., n) from wins (..., n, n), over the number of wins."""
    W = np.asarray(wins, dtype=np.float64)
    return np.asarray(W.sum(-1) / W.sum((-1, -2))[..., None])


def rpo_rewards(
    wins: ArrayLike, log_reference: ArrayLike, base: ArrayLike, *, beta: float, eta: ArrayLike, box: float
) -> RewardFit:
    """The minimax form: the reward of the least objective L_D(r) + eta (J*(r) - E_base[r]), for a batch of data sets.

    wins (..., n, n) are divided by their sum, so that eta is on the scale of the mean; eta scalar or (...,).
    """
    W = np.asarray(wins, dtype=np.float64)
    total = W.sum((-1, -2))
    if not (total > 0).all():
        raise ValueError("nothing was compared: wins is 0")
    etas = np.asarray(eta, dtype=np.float64)
    check_eta(float(etas.min()))
    return fit_rewards(W / total[..., None, None], log_reference, beta, incentive=etas, law=base, box=box)


def adversarial_value(
    log_policy: ArrayLike,
    wins: ArrayLike,
    log_reference: ArrayLike,
    base: ArrayLike,
    *,
    beta: float,
    eta: float,
    box: float,
) -> tuple[float, Array]:
    """min_{r in R} eta (J_beta(pi; r) - E_base[r]) + L_D(r) and the reward (n,) that attains it.

    What the maximin form maximises over pi: concave in the law pi. wins (n, n) are divided by their sum.
    """
    log_pi, W = np.asarray(log_policy, dtype=np.float64), np.asarray(wins, dtype=np.float64)
    push = check_eta(eta) * (np.exp(log_pi) - np.asarray(base, dtype=np.float64))
    worst = worst_rewards(W / W.sum(), push, box)
    return float(worst.value) - eta * beta * kl(log_pi, np.asarray(log_reference)), worst.rewards


LOSS = LossSpec(
    name="rpo",
    title="Regularised preference optimisation",
    paper="Liu et al., NeurIPS 2024 (arXiv 2405.16436)",
    loss=rpo_loss,
)
