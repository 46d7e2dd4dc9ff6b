r"""SRPO: self-improving robust preference optimisation.

E. Choi, A. Ahmadian, M. Geist, O. Pietquin, M. Gheshlaghi Azar, "Self-Improving Robust Preference Optimization"
(arXiv 2406.01660). A generative policy pi(y) and a self-improvement policy pi'(y2|y1), which sees a response and writes
a better one; p(y2 > y1) any preference, beta > 0:

  J(pi, pi') = E_{y1 ~ pi}[E_{y2 ~ pi'(.|y1)} p(y2 > y1) - beta KL(pi'(.|y1), ref(.|y1))] + beta KL(pi, ref)

min over pi, max over pi': pi leaves as little to improve as possible. The solution (`srpo`), with inner value
beta log Z(y1),

  pi'*(y2|y1) = ref(y2|y1) exp(p(y2 > y1) / beta) / Z(y1),     pi*(y) ∝ ref(y) / Z(y)

is a saddle point, J(pi, pi'*) - J* = beta KL(pi, pi*) and J* - J(pi*, pi') = beta E_{pi*} KL(pi', pi'*), and satisfies,
with rho(y) = log pi*/ref and rho(y|x) = log pi'*/ref,

  (I1)  p(y2 > y1) - 1/2          = beta [rho(y2|y1) - rho(y1|y1)]
  (I2)  p(y2 > y1) - p(y1 > y2)   = beta [rho(y2) - rho(y1) + rho(y2|y1) - rho(y1|y2)]

which become least squares over labelled pairs, winner w and loser l, in place of the preference the label:

  L(pi, pi') = E[(beta [rho(w) - rho(l) + rho(w|l) - rho(l|w)] - 1)^2]                                `generative_loss`
  L'(pi')    = E[(beta [rho(w|l) - rho(l|l)] - 1/2)^2 + (beta [rho(w|w) - rho(l|w)] - 1/2)^2]        `improvement_loss`
  total      = (1 - alpha) L + alpha L'                                                                     `srpo_loss`

Guarantee: for 0 < alpha < 1 the population's minimiser is (pi*, pi'*), whatever the law of the pairs as long as all
pairs have mass; IPO's and DPO's depend on it. All log-probabilities are sums over tokens; those of pi' are of the
second response after a prompt that holds the first, the same prompt for the reference. Answers are drawn from pi and
revised a few times by pi' (`revised`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from ..envs.kernels import Array
from ..envs.preference_games import PreferenceGame, check_law
from .ipo import square_loss
from .optimisation.losses import check_positive, check_share, margin
from .planning.games import softmax
from .planning.soft import soft_maximum
from .spec import LossSpec

if TYPE_CHECKING:
    from torch import Tensor


# ---- the solution ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Solution:
    """policy (n,) = pi* and log_policy; improvement (n, n) = pi'*, row y1, and its logarithm; values (n,) = beta log Z;
    value = J at the saddle point."""

    policy: Array
    log_policy: Array
    improvement: Array
    log_improvement: Array
    values: Array
    value: float


def check_conditional(reference: ArrayLike | None, game: PreferenceGame) -> Array:
    """ref(y2|y1), (n, n), row y1, positive; None = the game's reference whatever y1."""
    n = len(game)
    if reference is None:
        return np.tile(game.reference, (n, 1))
    rows = np.asarray(reference, dtype=np.float64)
    if rows.shape != (n, n):
        raise ValueError(f"improvement_reference has shape {rows.shape}; expected ({n}, {n}), row y1")
    for i, row in enumerate(rows):
        if not (check_law(row, n, f"improvement_reference[{i}]") > 0).all():
            raise ValueError(
                f"improvement_reference[{i}, {int(np.argmin(row))}] is 0; every response needs mass"
            )
    return rows


def srpo(game: PreferenceGame, beta: float, improvement_reference: ArrayLike | None = None) -> Solution:
    """The saddle point; improvement_reference (n, n) as in `check_conditional`."""
    beta, ref = check_positive(beta, "beta"), check_conditional(improvement_reference, game)
    values, improvement = soft_maximum(game.P.T, ref, beta)
    ref = ref / ref.sum(axis=1, keepdims=True)
    log_improvement = np.log(ref) + (game.P.T - values[:, None]) / beta
    policy, log_policy = softmax(game.log_reference - values / beta)
    value = float(policy @ (values + beta * (log_policy - game.log_reference)))
    return Solution(policy, log_policy, improvement, log_improvement, values, value)


def objective(
    game: PreferenceGame,
    beta: float,
    policy: Array,
    improvement: Array,
    improvement_reference: ArrayLike | None = None,
) -> float:
    """J(pi, pi') of positive laws: policy (n,), improvement (n, n), row y1."""
    ref = check_conditional(improvement_reference, game)
    better = (improvement * (game.P.T - beta * np.log(improvement / ref))).sum(axis=1)
    return float(policy @ (better + check_positive(beta, "beta") * (np.log(policy) - game.log_reference)))


def revised(policy: Array, improvement: Array, revisions: int) -> Array:
    """The law (n,) of the response after so many self-revisions: y0 ~ pi, y_{k+1} ~ pi'(.|y_k)."""
    return policy @ np.linalg.matrix_power(improvement, revisions)


# ---- the losses ------------------------------------------------------------------------------------------------------


def _improvement_ratios(improvement: Tensor, reference: Tensor) -> Tensor:
    if improvement.shape != reference.shape or improvement.shape[-1:] != (4,):
        raise ValueError(
            f"improvement has shape {tuple(improvement.shape)} and its reference {tuple(reference.shape)}; expected "
            "(..., 4): first after second, second after first, first after first, second after second"
        )
    return improvement - reference.detach()


def generative_loss(
    policy: Tensor,
    reference: Tensor,
    improvement: Tensor,
    improvement_reference: Tensor,
    preferred: Tensor,
    weight: Tensor | None = None,
    *,
    beta: float,
) -> Tensor:
    """L: see `srpo_loss`."""
    rho = _improvement_ratios(improvement, improvement_reference)
    h = check_positive(beta, "beta") * (margin(policy, reference) + rho[..., 0] - rho[..., 1])
    return square_loss(h, preferred, 1.0, weight)


def improvement_loss(
    improvement: Tensor,
    improvement_reference: Tensor,
    preferred: Tensor,
    weight: Tensor | None = None,
    *,
    beta: float,
) -> Tensor:
    """L': see `srpo_loss`."""
    rho = check_positive(beta, "beta") * _improvement_ratios(improvement, improvement_reference)
    after_second, after_first = rho[..., 0] - rho[..., 3], rho[..., 2] - rho[..., 1]
    return sum(square_loss(h, preferred, 0.5, weight) for h in (after_second, after_first))  # type: ignore[return-value]


def srpo_loss(
    policy: Tensor,
    reference: Tensor,
    improvement: Tensor,
    improvement_reference: Tensor,
    preferred: Tensor,
    weight: Tensor | None = None,
    *,
    beta: float,
    alpha: float,
) -> Tensor:
    """(1 - alpha) L + alpha L' of comparisons (..., 2), in the form of `optimisation.losses`; trained: pi and pi'.

    improvement  (..., 4): log pi' of the first response after the second, the second after the first, the first after
                 itself, the second after itself; improvement_reference the reference's
    beta > 0, alpha in [0, 1]; at alpha = 0 or 1 not all is determined.
    """
    alpha = check_share(alpha, "alpha")
    L = generative_loss(policy, reference, improvement, improvement_reference, preferred, weight, beta=beta)
    improved = improvement_loss(improvement, improvement_reference, preferred, weight, beta=beta)
    return (1 - alpha) * L + alpha * improved


LOSS = LossSpec(
    name="srpo",
    title="Self-improving robust preference optimisation",
    paper="Choi et al. (arXiv 2406.01660)",
    loss=srpo_loss,
)
