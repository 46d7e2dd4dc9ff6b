r"""PRO: preference ranking optimisation, one response against the rest of a ranking, again and again.

F. Song, B. Yu, M. Li, H. Yu, F. Huang, Y. Li, H. Wang, "Preference Ranking Optimization for Human Alignment", AAAI 2024
(arXiv 2306.17492). Responses y_1, ..., y_n to a prompt come with scores r_1 >= ... >= r_n. The policy's own score of a
response is its mean log-probability a token; there is no reference policy and no beta.

  s_k     = (1 / |y_k|) sum_t log pi(y_k,t | x, y_k,<t)                                              `mean_scores`
  stage k = log[exp(s_k m_kk) + sum_{i > k} exp(s_i m_ki)] - s_k m_kk,    k = 1, ..., n - 1          `ranking_loss`
  m_ki    = r_k - r_i,  m_kk = max_{i > k} m_ki                temperature="gap": the inverse temperatures 1 / T_k^i
  m_ki    = 1                                                  temperature="none": Plackett-Luce in s
  L       = E[sum_k stage k  +  sft_weight (n - 1)^2 (-sum_t log pi(y_1,t | x, y_1,<t))]             `pro_loss`

The last term takes the SUM over tokens. With "gap" a tie has m_ki = 0 and adds exp(0) = 1 to its stage, a constant that
still weakens the stage's gradient: ties="keep" is the authors' code, ties="skip" leaves the tied response out.

What holds: n = 2 is the logistic loss of (r_1 - r_2)(s_1 - s_2). Without temperatures the loss sees differences of
scores alone; with them (n >= 3) it also falls when all scores rise. The loss leads to no KL-regularised optimum.
Without temperatures and imitation, on noisy rankings of a Plackett-Luce law with rewards r, it is least where s = r + c
(`pro_solution`), which is the softmax of r only where all responses have one token; on rankings without noise its
infimum 0 is not attained.

Departures: the authors add 1e-10 inside the logarithm, which is left out here (a log-sum-exp needs none).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import ArrayLike

from ..envs.kernels import Array
from .optimisation.losses import average
from .spec import LossSpec

if TYPE_CHECKING:
    from torch import Tensor

Temperature = Literal["gap", "none"]
Ties = Literal["keep", "skip"]


def mean_scores(policy: Tensor, mask: Tensor | None = None) -> Tensor:
    """s: token log-probabilities (..., n, T) -> (..., n), the mean over the tokens where mask (..., n, T) is True."""
    if mask is None:
        return policy.mean(-1)
    length = mask.sum(-1)
    if (length == 0).any():
        row = (length == 0).nonzero()[0].tolist()
        raise ValueError(f"mask{row} has no token: a response holds at least its end")
    return _token_sums(policy, mask) / length


def ranking_loss(
    scores: Tensor, rewards: Tensor, *, temperature: Temperature = "gap", ties: Ties = "keep"
) -> Tensor:
    """sum_k stage k of rankings: the policy's scores s and the rewards r, best first, (..., n) each -> (...,)."""
    import torch

    if temperature not in ("gap", "none") or ties not in ("keep", "skip"):
        raise ValueError(
            f"temperature is {temperature!r} and ties {ties!r}; expected 'gap' or 'none', and 'keep' or 'skip'"
        )
    rewards = rewards.detach()
    _check_rewards(rewards, scores)
    gaps = rewards[..., :, None] - rewards[..., None, :]  # [..., k, i] = r_k - r_i
    n = scores.shape[-1]
    later = torch.ones(n, n, dtype=torch.bool).triu(1)
    if temperature == "gap":
        best = gaps[..., -1]  # max_{i > k} r_k - r_i, as the last reward is the smallest
        multiplier = gaps + torch.diag_embed(best)
    else:
        multiplier = torch.ones_like(gaps)
    logits = multiplier * scores[..., None, :]
    left_out = ~(later | torch.eye(n, dtype=torch.bool))
    if ties == "skip":
        left_out = left_out | (later & (gaps == 0))
    stages = logits.masked_fill(left_out, -torch.inf).logsumexp(-1) - logits.diagonal(dim1=-2, dim2=-1)
    return stages[..., :-1].sum(-1)


def pro_loss(
    policy: Tensor,
    rewards: Tensor,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    sft_weight: float = 0.05,
    temperature: Temperature = "gap",
    ties: Ties = "keep",
) -> Tensor:
    """Rankings of n responses, best first.

    policy   (..., n, T) log-probabilities of the tokens, the end included
    rewards  (..., n) scores, descending; what ranked the responses
    weight   (...,) of each ranking, as in `losses`
    mask     (..., n, T) bool, False where a response has no token (its value there does not matter); None = all count
    """
    if not 0 <= sft_weight < float("inf"):
        raise ValueError(f"sft_weight is {sft_weight}; it must be at least 0 and finite")
    if mask is not None and mask.shape != policy.shape:
        raise ValueError(f"mask has shape {tuple(mask.shape)}; expected {tuple(policy.shape)}")
    ranked = ranking_loss(mean_scores(policy, mask), rewards, temperature=temperature, ties=ties)
    best = policy[..., 0, :] if mask is None else _token_sums(policy, mask)[..., 0, None]
    imitation = -sft_weight * (rewards.shape[-1] - 1) ** 2 * best.sum(-1)
    return average(ranked + imitation, weight)


def pro_solution(rewards: ArrayLike, lengths: ArrayLike) -> Array:
    """log pi(y) = |y| (r(y) + c) with the c that makes it a law, (n,): the policy whose mean scores are r + c.

    The minimiser of the population loss with temperature="none" and sft_weight = 0 where rankings follow the
    Plackett-Luce law of the rewards (n,) and connect all responses; lengths (n,) >= 1 in tokens.
    """
    from scipy.optimize import brentq
    from scipy.special import logsumexp

    r, length = np.asarray(rewards, dtype=np.float64), np.asarray(lengths, dtype=np.float64)
    if r.ndim != 1 or r.shape != length.shape or not (length >= 1).all():
        raise ValueError(
            f"rewards have shape {r.shape} and lengths {length.shape}; expected (n,) and (n,), lengths at least 1"
        )
    low, high = -r.max() - np.log(len(r)), -r.max()  # n exp(r_max + c) <= 1, and the best alone has mass 1
    c = brentq(lambda c: logsumexp(length * (r + c)), low - 1, high + 1, xtol=1e-15, rtol=1e-15)
    return length * (r + c)


def _token_sums(policy: Tensor, mask: Tensor) -> Tensor:
    """Not a product with the mask: 0 times an infinite log-probability is no number."""
    return policy.masked_fill(~mask, 0.0).sum(-1)


def _check_rewards(rewards: Tensor, scores: Tensor) -> None:
    if rewards.shape != scores.shape:
        raise ValueError(
            f"rewards have shape {tuple(rewards.shape)}; expected one a response, {tuple(scores.shape)}"
        )
    bad = ~(rewards[..., :-1] >= rewards[..., 1:])
    if bad.any():
        *row, k = bad.nonzero()[0].tolist()
        pair = rewards[(*row, slice(k, k + 2))].tolist()
        raise ValueError(
            f"rewards{row} go from {pair[0]:.6g} to {pair[1]:.6g} at places {k} and {k + 1}: "
            "sort every ranking from the best response to the worst"
        )


LOSS = LossSpec(
    name="pro",
    title="Preference ranking optimisation",
    paper="Song et al., AAAI 2024 (arXiv 2306.17492)",
    loss=pro_loss,
)
