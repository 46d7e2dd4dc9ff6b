r"""The form that all policy-optimisation losses share, and the few pieces they are made of.

    loss(policy, reference, preferred, weight=None, *, beta, ...) -> scalar tensor

policy, reference   log-probabilities of whole responses, each the SUM over the response's tokens, its end included:
                    tensors (..., 2) for comparisons, [..., 0] the first response and [..., 1] the second; (..., K) for
                    rankings, best first; (...,) for single responses
preferred           (...,) in [0, 1]: that the first wins, as a probability (population) or as a label (1 or 0)
weight              (...,) >= 0, of each comparison; None = all equal, the mean. For the population: the probability of
                    the comparison, so that the loss is an expectation
previous, ...       further log-probabilities, where a paper has them, of the shape of `policy`

Gradients flow through `policy` alone; whatever else is given is a constant. A loss knows no model, no table and no data
set, so that the same object runs on the tables of this package and on a transformer.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def check_positive(value: float, name: str) -> float:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} is {value}; it must be positive and finite")
    return float(value)


def check_share(value: float, name: str) -> float:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is {value}; it must lie in [0, 1]")
    return float(value)


def average(values: Tensor, weight: Tensor | None = None) -> Tensor:
    """sum weight * values; the mean where weight is None."""
    if weight is None:
        return values.mean()
    if weight.shape != values.shape:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; expected {tuple(values.shape)}")
    return (weight * values).sum()


def margin(policy: Tensor, reference: Tensor) -> Tensor:
    """h = log pi(y)/ref(y) - log pi(y')/ref(y') of comparisons (..., 2) -> (...,)."""
    if policy.shape != reference.shape or policy.shape[-1:] != (2,):
        raise ValueError(
            f"policy has shape {tuple(policy.shape)} and reference {tuple(reference.shape)}; "
            "comparisons are (..., 2): the first and the second response"
        )
    ratio = policy - reference.detach()
    return ratio[..., 0] - ratio[..., 1]


def logistic_loss(logit: Tensor, preferred: Tensor) -> Tensor:
    """-p log sigma(x) - (1 - p) log sigma(-x), elementwise; exact for every x (torch's softplus is not, above 20)."""
    from torch.nn.functional import logsigmoid

    return -(preferred * logsigmoid(logit) + (1 - preferred) * logsigmoid(-logit))
