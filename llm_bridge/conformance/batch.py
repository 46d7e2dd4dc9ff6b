"""What a trainer's loss is given, and the whole adapter protocol: `loss(batch) -> scalar tensor`.

A batch holds what every trainer has after its forward passes: the log-probability of each token of each sequence, under
the policy and the reference, with masks. Sequences are rows of T positions, prompt first, then the completion, then
padding: token ids (B, T), log-probabilities (B, T) aligned with them (position t is log p(token t | tokens before)),
and a mask (B, T) that is True on the completion, its end token included where it has one. Positions outside the mask
hold finite numbers as well, as they do in a trainer; a loss that uses them is found out. Padding is the end token.

The rows of a batch are draws: a loss averages over them and weighs none. Gradients are taken with respect to the
policy's parameters through `policy`; everything else is a constant.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Completions:
    """Sequences as rows.

    policy, reference  token log-probabilities (B, T)
    previous           those of pi_t, the policy that drew the responses (INPO, SPPO); a constant
    mask               (B, T) bool: True on the tokens of the completion
    ids                (B, T) token ids; `end` is the id of the end token and of padding
    """

    policy: Tensor
    reference: Tensor
    previous: Tensor
    mask: Tensor
    ids: Tensor
    end: int


@dataclass(frozen=True, eq=False)
class PairBatch:
    """Comparisons: row i of `chosen` was preferred to row i of `rejected`, a draw from the annotator.

    calibration  single responses drawn from the reference. VPO: further ones, whose number need not be B. XPO: of each
                 comparison the one that the reference drew, row by row
    """

    chosen: Completions
    rejected: Completions
    calibration: Completions


@dataclass(frozen=True, eq=False)
class SampleBatch:
    """Single responses: drawn from the policy itself, or for SPPO from pi_t.

    reward     (B,) of the whole response; zeros where the method has preferences instead
    wins       (B,) P(y > pi_t), the rate at which the response beats draws of pi_t
    group      (B,) long: rows with one number answer one prompt, `group_size` of them, consecutive
    For methods against an opponent the expectation over the opponent's response lists all its L responses:
    opponent_policy, opponent_reference  (B, L) their log-probabilities under the policy and the reference, constants
    preference                           (B, L) P(y > y')
    """

    completions: Completions
    reward: Tensor
    wins: Tensor
    group: Tensor
    group_size: int
    opponent_policy: Tensor
    opponent_reference: Tensor
    preference: Tensor


TrainerLoss = Callable[[Any], "Tensor"]


def total(log_probabilities: Tensor, mask: Tensor) -> Tensor:
    """The log-probability of the completion: the sum over its tokens, (B, T) -> (B,)."""
    return log_probabilities.masked_fill(~mask, 0.0).sum(-1)
