r"""DPO: direct preference optimisation.

R. Rafailov, A. Sharma, E. Mitchell, et al., "Direct Preference Optimization: Your Language Model is Secretly a Reward
Model", NeurIPS 2023 (arXiv 2305.18290). The maximiser of E_pi[r] - beta KL(pi || ref) is pi_r ∝ ref exp(r / beta), so a
policy stands for the reward r = beta log pi/ref, up to a constant of the prompt, which cancels in comparisons:

  h        = log pi(y)/ref(y) - log pi(y')/ref(y')
  L(pi)    = -E[p log sigma(beta h) + (1 - p) log sigma(-beta h)],   p = P(y > y')         `dpo_loss`   (eq. 7)
  r        = beta log pi/ref                                                             `implicit_reward`
  L_K(pi)  = -E log prod_k exp(r(y_k)) / sum_{j >= k} exp(r(y_j)),   y_1 > ... > y_K     `plackett_luce_loss`  (eq. 20)
  pi_r     = ref exp(r / beta) / Z                                                       `dpo_solution` (eq. 4)

`label_smoothing` = eps replaces p by (1 - eps) p + eps (1 - p) (cDPO). Guarantee: where P is Bradley-Terry with reward
r and the comparisons connect all responses, pi_r is the only minimiser of the population loss, whatever the law of the
pairs. Responses that no chain of comparisons connects keep an arbitrary share of the mass; a certain preference (p = 1)
has no minimiser.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from ..envs.kernels import Array
from .optimisation.losses import average, check_positive, logistic_loss, margin
from .planning.games import softmax
from .spec import LossSpec

if TYPE_CHECKING:
    from torch import Tensor


def dpo_loss(
    policy: Tensor,
    reference: Tensor,
    preferred: Tensor,
    weight: Tensor | None = None,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Comparisons (..., 2) of sums of token log-probabilities; beta > 0 in units of reward; the form is `losses`'."""
    beta = check_positive(beta, "beta")
    if not 0 <= label_smoothing <= 0.5:
        raise ValueError(f"label_smoothing is {label_smoothing}; it must lie in [0, 1/2]")
    p = (1 - label_smoothing) * preferred + label_smoothing * (1 - preferred)
    return average(logistic_loss(beta * margin(policy, reference), p), weight)


def implicit_reward(policy: Tensor, reference: Tensor, *, beta: float) -> Tensor:
    """r = beta log pi/ref, elementwise; determined up to a constant of the prompt."""
    return check_positive(beta, "beta") * (policy - reference)


def plackett_luce_loss(
    policy: Tensor, reference: Tensor, weight: Tensor | None = None, *, beta: float
) -> Tensor:
    """Rankings (..., K), best first; K = 2 is `dpo_loss` with preferred = 1."""
    scores = implicit_reward(policy, reference.detach(), beta=beta)
    if scores.shape[-1] < 2:
        raise ValueError(f"rankings have {scores.shape[-1]} responses; there must be at least 2")
    tails = scores.flip(-1).logcumsumexp(-1).flip(-1)  # log sum_{j >= k} exp(r(y_j))
    return average((tails - scores).sum(-1), weight)


def dpo_solution(rewards: ArrayLike, log_reference: ArrayLike, beta: float) -> tuple[Array, Array]:
    """pi_r = ref exp(r / beta) / Z and its logarithm, (n,) each: one prompt."""
    r, ref = np.asarray(rewards, dtype=np.float64), np.asarray(log_reference, dtype=np.float64)
    return softmax(ref + r / check_positive(beta, "beta"))


LOSS = LossSpec(
    name="dpo",
    title="Direct preference optimisation",
    paper="Rafailov et al., NeurIPS 2023 (arXiv 2305.18290)",
    loss=dpo_loss,
)
