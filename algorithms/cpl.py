r"""CPL: contrastive preference learning, from preferences over segments to a policy without a reward or RL.

J. Hejna, R. Rafailov, H. Sikchi, C. Finn, S. Niekum, W. B. Knox, D. Sadigh, "Contrastive Preference Learning: Learning
from Human Feedback without RL", ICLR 2024 (arXiv 2310.13639). People prefer the segment of smaller regret, measured by
the advantage A* of the optimal policy pi* of their reward with an entropy bonus alpha (or KL to a reference):

  P(s+ > s-) = sigma(sum_t gamma^t A*(s+_t, a+_t) - sum_t gamma^t A*(s-_t, a-_t))
  A*(s, a)   = alpha log pi*(a|s),  hence sum_a exp(A*(s, a) / alpha) = 1                          `advantages`
               (with a reference: alpha log pi*/ref, and sum_a ref exp(A* / alpha) = 1)
  S          = sum_t gamma^t alpha log pi(a_t|s_t)     (log pi/ref)                                `segment_scores`
  L_lambda   = -E log[exp S+ / (exp S+ + exp(lambda S-))] = -E log sigma(S+ - lambda S-)           `cpl_loss`

The loss needs no dynamics: a policy stands for its own advantage. alpha > 0 in units of reward, gamma in (0, 1] counts
the steps within a segment, lambda in (0, 1] is the paper's conservative bias, which weighs the loser's score down.

Guarantee: where the answers follow the model and the comparisons connect the segments, pi* is the only minimiser of the
population loss with lambda = 1. With lambda < 1 it is not, whatever the amount of data: lambda is a regulariser for
finite data, where lambda = 1 lets the mass move to what nobody compared. From one start to the end of an episode with
gamma = lambda = 1 and a reference the loss is DPO's with beta = alpha.

Departures: an answer may be a probability p, and the loss is then p times that of one order plus 1 - p times that of
the other (the authors' code does the same with labels). The paper's horizon is infinite; the loss does not ask.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..envs.kernels import Array
from ..envs.mdp import Layered
from .optimisation.losses import average, check_positive
from .spec import LossSpec

if TYPE_CHECKING:
    from torch import Tensor


def check_unit(value: float, name: str) -> float:
    if not 0 < value <= 1:
        raise ValueError(f"{name} is {value}; it must lie in (0, 1]")
    return float(value)


def segment_scores(
    policy: Tensor,
    reference: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    alpha: float,
    gamma: float = 1.0,
) -> Tensor:
    """S = sum_t gamma^t alpha log pi(a_t|s_t) of segments (..., T) -> (...,).

    policy, reference  log-probabilities of the actions taken; reference None = the entropy form
    mask               (..., T) bool, False where a segment has no step t; what stands there does not matter. None =
                       every step counts. t is the position in the segment
    """
    import torch

    alpha, gamma = check_positive(alpha, "alpha"), check_unit(gamma, "gamma")
    ratio = policy if reference is None else policy - reference.detach()
    if mask is not None:
        if mask.shape != policy.shape or mask.dtype != torch.bool:
            raise ValueError(
                f"mask is {mask.dtype} of shape {tuple(mask.shape)}; expected bool of shape {tuple(policy.shape)}"
            )
        ratio = ratio.masked_fill(
            ~mask, 0.0
        )  # not a product: 0 times an infinite log-probability is no number
    return alpha * (ratio * gamma ** torch.arange(policy.shape[-1], dtype=policy.dtype)).sum(-1)


def cpl_loss(
    policy: Tensor,
    reference: Tensor | None,
    preferred: Tensor,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    alpha: float,
    gamma: float = 1.0,
    lam: float = 1.0,
) -> Tensor:
    """Comparisons of segments (..., 2, T), [..., 0, :] the first; lam is the paper's lambda.

    The other arguments are those of `segment_scores` and, for preferred and weight (...,), of `losses`. The authors
    train with alpha = 0.1, lambda = 0.5, gamma = 1, on 64 steps a segment.
    """
    from torch.nn.functional import logsigmoid

    if policy.ndim < 2 or policy.shape[-2] != 2:
        raise ValueError(
            f"policy has shape {tuple(policy.shape)}; comparisons of segments are (..., 2, T): the steps of the first "
            "and of the second segment"
        )
    lam = check_unit(lam, "lam")
    S = segment_scores(policy, reference, mask, alpha=alpha, gamma=gamma)
    first, second = S[..., 0], S[..., 1]
    losses = preferred * logsigmoid(first - lam * second) + (1 - preferred) * logsigmoid(second - lam * first)
    return average(-losses, weight)


def advantages(policy: Layered, alpha: float, reference: Layered | None = None) -> list[Array]:
    """A = alpha log pi (alpha log pi/ref), layered (S_h, A): the advantage for which `policy` is optimal.

    -inf where the policy has no mass; 0 where the reference has none either, on actions that nobody can take.
    """
    alpha = check_positive(alpha, "alpha")
    layers = []
    for h, pi in enumerate(policy):
        ref = np.ones_like(pi) if reference is None else reference[h]
        if (outside := (pi > 0) & (ref == 0)).any():
            s, a = np.argwhere(outside)[0]
            raise ValueError(f"policy[h={h}, s={s}, a={a}] is {pi[s, a]} where the reference has no mass")
        with np.errstate(divide="ignore", invalid="ignore"):
            layers.append(np.where(ref > 0, alpha * (np.log(pi) - np.log(ref)), 0.0))
    return layers


LOSS = LossSpec(
    name="cpl",
    title="Contrastive preference learning",
    paper="Hejna et al., ICLR 2024 (arXiv 2310.13639)",
    loss=cpl_loss,
)
