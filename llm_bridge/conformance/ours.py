"""The package's own losses as trainers: each gets what a trainer has and hands its sums, or its tokens, on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ...algorithms.cpl import cpl_loss
from ...algorithms.dpo import dpo_loss
from ...algorithms.inpo import inpo_loss
from ...algorithms.ipo import ipo_loss
from ...algorithms.kl_estimators import kl_loss
from ...algorithms.kl_policy_gradient import policy_gradient_loss, reward_to_go_loss
from ...algorithms.nash_md_pg import nash_md_pg_loss
from ...algorithms.r_to_q_star import token_dpo_loss
from ...algorithms.rpo import rpo_loss
from ...algorithms.sppo import sppo_loss
from ...algorithms.vpo import vpo_loss
from ...algorithms.xpo import xpo_loss
from .batch import PairBatch, SampleBatch, TrainerLoss, total

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Ours:
    """against: the target; build: its parameters -> the trainer's loss."""

    against: str
    build: Callable[..., TrainerLoss]


def sums(batch: PairBatch, which: str = "policy") -> Tensor:
    """(B, 2) log-probabilities of chosen and rejected, summed over the completion's tokens."""
    import torch

    return torch.stack([total(getattr(c, which), c.mask) for c in (batch.chosen, batch.rejected)], dim=1)


def tokens(batch: PairBatch) -> tuple[Tensor, Tensor, Tensor]:
    """policy, reference and mask, (B, 2, T)."""
    import torch

    sides = (batch.chosen, batch.rejected)
    policy, reference, mask = (
        torch.stack([getattr(c, name) for c in sides], dim=1) for name in ("policy", "reference", "mask")
    )
    return policy, reference, mask


def first_wins(batch: PairBatch) -> Tensor:
    import torch

    return torch.ones(len(batch.chosen.policy), dtype=torch.float64)


def opponent_wins(batch: SampleBatch, share: float) -> Tensor:
    """P(y > m), m the geometric mixture of policy and reference over whole responses; share is the reference's."""
    mixture = ((1 - share) * batch.opponent_policy + share * batch.opponent_reference).softmax(1)
    return (mixture * batch.preference).sum(1)


def _dpo(beta: float, label_smoothing: float) -> TrainerLoss:
    return lambda b: dpo_loss(
        sums(b), sums(b, "reference"), first_wins(b), beta=beta, label_smoothing=label_smoothing
    )


def _token_dpo(beta: float, label_smoothing: float) -> TrainerLoss:
    _no_smoothing("r_to_q_star", label_smoothing)

    def loss(b: PairBatch) -> Tensor:
        policy, reference, mask = tokens(b)
        return token_dpo_loss(policy, reference, first_wins(b), mask=mask, beta=beta)

    return loss


def _cpl(beta: float, label_smoothing: float) -> TrainerLoss:
    _no_smoothing("cpl", label_smoothing)

    def loss(b: PairBatch) -> Tensor:
        policy, reference, mask = tokens(b)
        return cpl_loss(policy, reference, first_wins(b), mask=mask, alpha=beta)

    return loss


def _no_smoothing(name: str, label_smoothing: float) -> None:
    if label_smoothing:
        raise ValueError(
            f"{name} has no label smoothing; label_smoothing is {label_smoothing}, leave it at 0"
        )


def _ipo(tau: float) -> TrainerLoss:
    return lambda b: ipo_loss(sums(b), sums(b, "reference"), first_wins(b), tau=tau)


def _inpo(tau: float, eta: float) -> TrainerLoss:
    return lambda b: inpo_loss(
        sums(b), sums(b, "reference"), sums(b, "previous"), first_wins(b), tau=tau, eta=eta
    )


def _sppo(eta: float) -> TrainerLoss:
    def loss(b: SampleBatch) -> Tensor:
        c = b.completions
        return sppo_loss(total(c.policy, c.mask), total(c.previous, c.mask), b.wins, eta=eta)

    return loss


def _rpo(beta: float, eta: float) -> TrainerLoss:
    return lambda b: rpo_loss(sums(b), sums(b, "reference"), first_wins(b), beta=beta, eta=eta)


def _vpo(beta: float, alpha: float, sign: float) -> TrainerLoss:
    def loss(b: PairBatch) -> Tensor:
        drawn = b.calibration
        extra = total(drawn.policy, drawn.mask), total(drawn.reference, drawn.mask)
        direction: Literal[1, -1] = 1 if sign > 0 else -1
        return vpo_loss(
            sums(b), sums(b, "reference"), *extra, first_wins(b), beta=beta, alpha=alpha, sign=direction
        )

    return loss


def drawn_is_chosen(batch: PairBatch) -> Tensor:
    """(B,) whether the response that the reference drew is the chosen one; XPO's batches."""
    return (batch.chosen.ids == batch.calibration.ids).all(1)


def _xpo(beta: float, alpha: float) -> TrainerLoss:
    def loss(b: PairBatch) -> Tensor:
        import torch

        second = drawn_is_chosen(b)
        pi, ref = (torch.where(second[:, None], x.flip(1), x) for x in (sums(b), sums(b, "reference")))
        return xpo_loss(pi, ref, (~second).double(), beta=beta, alpha=alpha)

    return loss


def _kl_policy_gradient(beta: float) -> TrainerLoss:
    def loss(b: SampleBatch) -> Tensor:
        c = b.completions
        return policy_gradient_loss(total(c.policy, c.mask), total(c.reference, c.mask), b.reward, beta=beta)

    return loss


def _to_go(beta: float) -> TrainerLoss:
    def loss(b: SampleBatch) -> Tensor:
        c = b.completions
        policy, reference = (x.masked_fill(~c.mask, 0.0) for x in (c.policy, c.reference))
        return reward_to_go_loss(policy, reference, b.reward, beta=beta)

    return loss


def _nash_md_pg(tau: float, share: float) -> TrainerLoss:
    def loss(b: SampleBatch) -> Tensor:
        c, wins = b.completions, opponent_wins(b, share)
        return nash_md_pg_loss(total(c.policy, c.mask), total(c.reference, c.mask), wins, tau=tau)

    return loss


def _kl(estimator: str, level: str, use: str) -> Callable[[], TrainerLoss]:
    def loss(b: SampleBatch) -> Tensor:
        c = b.completions
        policy, reference = (x.masked_fill(~c.mask, 0.0) for x in (c.policy, c.reference))
        return kl_loss(policy, reference, estimator=estimator, level=level, use=use)

    return lambda: loss


def trainers() -> Mapping[str, Ours]:
    """By name: the losses of `preflab list losses` that the protocol's batches can feed, and variants of theirs."""
    found = {
        "dpo": Ours("dpo", _dpo),
        "r_to_q_star": Ours("dpo", _token_dpo),
        "cpl": Ours("dpo", _cpl),
        "ipo": Ours("ipo", _ipo),
        "inpo": Ours("inpo", _inpo),
        "sppo": Ours("sppo", _sppo),
        "kl_policy_gradient": Ours("kl_policy_gradient", _kl_policy_gradient),
        "reward_to_go": Ours("kl_policy_gradient", _to_go),
        "nash_md_pg": Ours("nash_md_pg", _nash_md_pg),
        "rpo": Ours("rpo", _rpo),
        "vpo": Ours("vpo", _vpo),
        "xpo": Ours("xpo", _xpo),
    }
    exact = (
        ("k1", "response", "reward"),
        ("k2", "response", "loss"),
        ("k1", "response", "corrected"),
        ("k3", "response", "corrected"),
        ("k1", "token", "reward"),
        ("k1", "token", "sequence_corrected"),
        ("k3", "token", "sequence_corrected"),
    )
    for estimator, level, use in exact:
        found[f"kl_estimators[{estimator},{level},{use}]"] = Ours("kl", _kl(estimator, level, use))
    return found
