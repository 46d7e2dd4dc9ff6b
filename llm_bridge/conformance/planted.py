"""Known bugs of RLHF trainers, planted in the package's own losses, each with the cause that must be named.

The faults are made where trainers make them, in what is handed to a right loss (masks, sums, references, labels,
weights, rewards), and not with the parts of the `catalogue`. `thread` cites a public issue where the bug was met
(owner/repository and number), "" where it is only well known.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ...algorithms.dpo import dpo_loss
from ...algorithms.inpo import inpo_loss
from ...algorithms.ipo import ipo_loss
from ...algorithms.kl_estimators import joint_form, kl_loss
from ...algorithms.kl_policy_gradient import policy_gradient_loss
from ...algorithms.nash_md_pg import nash_md_pg_loss
from ...algorithms.sppo import sppo_loss
from .batch import Completions, PairBatch, SampleBatch, TrainerLoss, total
from .ours import first_wins, opponent_wins, sums

if TYPE_CHECKING:
    from torch import Tensor

BETA, TAU, ETA, SHARE = 0.1, 0.1, 2.0, 0.25  # the defaults of the targets


@dataclass(frozen=True)
class Planted:
    """A faulty loss, held to `against` at the target's default parameters and the changes in `parameters`."""

    name: str
    against: str
    cause: str
    loss: TrainerLoss
    thread: str
    parameters: Mapping[str, float]


_FOUND: dict[str, Planted] = {}


def _plant(
    against: str, cause: str, thread: str = "", **parameters: float
) -> Callable[[TrainerLoss], TrainerLoss]:
    def keep(loss: TrainerLoss) -> TrainerLoss:
        name = str(getattr(loss, "__name__", "")).lstrip("_")
        _FOUND[name] = Planted(name, against, cause, loss, thread, MappingProxyType(parameters))
        return loss

    return keep


# ---- scores of sequences -------------------------------------------------------------------------------------------


def _stack(batch: PairBatch, score: Callable[[Completions, str], Tensor], which: str) -> Tensor:
    import torch

    return torch.stack([score(batch.chosen, which), score(batch.rejected, which)], dim=1)


def _dpo_of(batch: PairBatch, score: Callable[[Completions, str], Tensor]) -> Tensor:
    policy, reference = (_stack(batch, score, which) for which in ("policy", "reference"))
    return dpo_loss(policy, reference, first_wins(batch), beta=BETA)


def _mean(c: Completions, which: str) -> Tensor:
    return total(getattr(c, which), c.mask) / c.mask.sum(1)


@_plant("dpo", "token_mean")
def _dpo_token_mean(batch: PairBatch) -> Tensor:
    return _dpo_of(batch, _mean)


@_plant("ipo", "token_mean", "huggingface/trl 1677")
def _ipo_token_mean(batch: PairBatch) -> Tensor:
    return ipo_loss(
        _stack(batch, _mean, "policy"), _stack(batch, _mean, "reference"), first_wins(batch), tau=TAU
    )


@_plant("dpo", "no_end", "huggingface/trl 6357")
def _dpo_pad_is_eos(batch: PairBatch) -> Tensor:
    """Labels are ignored where the id is the padding's, which is the end token's."""
    return _dpo_of(batch, lambda c, which: (getattr(c, which) * (c.mask & c.ids.ne(c.end))).sum(1))


@_plant("dpo", "shift_left")
def _dpo_shifted(batch: PairBatch) -> Tensor:
    """Log-probabilities are of the next token already, and the mask is shifted once more."""
    return _dpo_of(batch, lambda c, which: (getattr(c, which)[:, :-1] * c.mask[:, 1:]).sum(1))


@_plant("ipo", "shift_right")
def _ipo_shifted_right(batch: PairBatch) -> Tensor:
    def score(c: Completions, which: str) -> Tensor:
        return (getattr(c, which)[:, 1:] * c.mask[:, :-1]).sum(1)

    return ipo_loss(
        _stack(batch, score, "policy"), _stack(batch, score, "reference"), first_wins(batch), tau=TAU
    )


@_plant("dpo", "padding")
def _dpo_padding_scored(batch: PairBatch) -> Tensor:
    return _dpo_of(batch, lambda c, which: (getattr(c, which) * (c.mask.cumsum(1) > 0)).sum(1))


@_plant("dpo", "mean_prompt")
def _dpo_prompt_in_mean(batch: PairBatch) -> Tensor:
    def score(c: Completions, which: str) -> Tensor:
        attention = c.mask.flip(1).cumsum(1).flip(1) > 0
        return (getattr(c, which) * attention).sum(1) / attention.sum(1)

    return _dpo_of(batch, score)


@_plant("rpo", "prompt")
def _rpo_prompt_scored(batch: PairBatch) -> Tensor:
    """The attention mask in place of the labels' mask: invisible in the comparison, not in the SFT term."""

    def score(c: Completions, which: str) -> Tensor:
        return (getattr(c, which) * (c.mask.flip(1).cumsum(1).flip(1) > 0)).sum(1)

    return _dpo_of(batch, score) - 0.5 * BETA * score(batch.chosen, "policy").mean()


@_plant("ipo", "batch_tokens", "huggingface/transformers 34191")
def _ipo_batch_tokens(batch: PairBatch) -> Tensor:
    def score(c: Completions, which: str) -> Tensor:
        return total(getattr(c, which), c.mask) * len(c.mask) / c.mask.sum()

    return ipo_loss(
        _stack(batch, score, "policy"), _stack(batch, score, "reference"), first_wins(batch), tau=TAU
    )


@_plant("dpo", "constant_length")
def _dpo_constant_length(batch: PairBatch) -> Tensor:
    return _dpo_of(batch, lambda c, which: total(getattr(c, which), c.mask) / c.mask.shape[1])


# ---- reference, beta, labels ---------------------------------------------------------------------------------------


@_plant("dpo", "no_reference", "linkedin/Liger-Kernel 387")
def _dpo_no_reference(batch: PairBatch) -> Tensor:
    import torch

    policy = sums(batch)
    return dpo_loss(policy, torch.zeros_like(policy), first_wins(batch), beta=BETA)


@_plant("dpo", "reference_is_policy", "huggingface/trl 2423")
def _dpo_adapter_still_on(batch: PairBatch) -> Tensor:
    return dpo_loss(sums(batch), sums(batch).detach(), first_wins(batch), beta=BETA)


@_plant("dpo", "reference_exchanged")
def _dpo_reference_exchanged(batch: PairBatch) -> Tensor:
    return dpo_loss(sums(batch), sums(batch, "reference").flip(1), first_wins(batch), beta=BETA)


@_plant("dpo", "beta_twice", "AI-Hypercomputer/maxtext 1530")
def _dpo_beta_twice(batch: PairBatch) -> Tensor:
    rewards = BETA * sums(batch), BETA * sums(batch, "reference")
    return dpo_loss(*rewards, first_wins(batch), beta=BETA)


@_plant("dpo", "labels_exchanged")
def _dpo_labels_exchanged(batch: PairBatch) -> Tensor:
    return dpo_loss(sums(batch), sums(batch, "reference"), 1 - first_wins(batch), beta=BETA)


@_plant("dpo", "label_smoothing", label_smoothing=0.2)
def _dpo_smoothing_ignored(batch: PairBatch) -> Tensor:
    return dpo_loss(sums(batch), sums(batch, "reference"), first_wins(batch), beta=BETA)


@_plant("ipo", "dpo_sum", "modelscope/ms-swift 10167")
def _ipo_ignored(batch: PairBatch) -> Tensor:
    """The configured loss is not looked at: always the sigmoid."""
    return dpo_loss(sums(batch), sums(batch, "reference"), first_wins(batch), beta=TAU)


@_plant("ipo", "target_doubled")
def _ipo_target(batch: PairBatch) -> Tensor:
    return ipo_loss(sums(batch), sums(batch, "reference"), first_wins(batch), tau=TAU / 2)


@_plant("dpo", "dropout", "huggingface/trl 3234")
def _dpo_dropout(batch: PairBatch) -> Tensor:
    from torch.nn.functional import dropout

    return _dpo_of(batch, lambda c, which: total(dropout(getattr(c, which), 0.1), c.mask))


@_plant("inpo", "mixture_swapped")
def _inpo_mixture_swapped(batch: PairBatch) -> Tensor:
    anchors = sums(batch, "previous"), sums(batch, "reference")
    return inpo_loss(sums(batch), *anchors, first_wins(batch), tau=TAU, eta=ETA)


@_plant("inpo", "previous_missing")
def _inpo_previous_missing(batch: PairBatch) -> Tensor:
    return ipo_loss(sums(batch), sums(batch, "reference"), first_wins(batch), tau=1 / ETA)


@_plant("sppo", "half_missing")
def _sppo_half_missing(batch: SampleBatch) -> Tensor:
    c = batch.completions
    return sppo_loss(total(c.policy, c.mask), total(c.previous, c.mask), batch.wins + 0.5, eta=1.0)


@_plant("sppo", "reference_is_base")
def _sppo_anchored_at_the_base(batch: SampleBatch) -> Tensor:
    c = batch.completions
    return sppo_loss(total(c.policy, c.mask), total(c.reference, c.mask), batch.wins, eta=1.0)


# ---- imitation -----------------------------------------------------------------------------------------------------


@_plant("rpo", "sft_sign")
def _rpo_sft_sign(batch: PairBatch) -> Tensor:
    log_pi = total(batch.chosen.policy, batch.chosen.mask)
    return _dpo_of(batch, lambda c, which: total(getattr(c, which), c.mask)) + 0.5 * BETA * log_pi.mean()


@_plant("rpo", "sft_batch_tokens", "huggingface/transformers 35856")
def _rpo_sft_batch_tokens(batch: PairBatch) -> Tensor:
    c = batch.chosen
    return (
        _dpo_of(batch, lambda c, which: total(getattr(c, which), c.mask))
        - 0.5 * BETA * c.policy[c.mask].mean()
    )


@_plant("dpo", "token_mean_beta_other")
def _dpo_token_mean_of_its_own_beta(batch: PairBatch) -> Tensor:
    policy, reference = _stack(batch, _mean, "policy"), _stack(batch, _mean, "reference")
    return dpo_loss(policy, reference, first_wins(batch), beta=2.0)


@_plant("dpo", "beta_other")
def _dpo_default_beta(batch: PairBatch) -> Tensor:
    """The configured beta is not passed on."""
    return dpo_loss(sums(batch), sums(batch, "reference"), first_wins(batch), beta=0.5)


@_plant("vpo", "bonus_sign", sign=1.0, alpha=0.05)
def _xpo_sign(batch: PairBatch) -> Tensor:
    """XPO adds alpha log pi of the reference's responses: alpha beta of VPO online. Subtracted it is imitation."""
    log_pi = total(batch.calibration.policy, batch.calibration.mask)
    return _dpo_of(batch, lambda c, which: total(getattr(c, which), c.mask)) - 0.05 * BETA * log_pi.mean()


@_plant("xpo", "bonus_beta")
def _xpo_alpha_of_vpo(batch: PairBatch) -> Tensor:
    log_pi = total(batch.calibration.policy, batch.calibration.mask)
    return _dpo_of(batch, lambda c, which: total(getattr(c, which), c.mask)) + 0.001 * BETA * log_pi.mean()


@_plant("xpo", "bonus_on_policy")
def _xpo_bonus_on_policy(batch: PairBatch) -> Tensor:
    """The bonus of the responses that pi_t drew: exploration of what is drawn anyway."""
    own = (
        total(batch.chosen.policy, batch.chosen.mask)
        + total(batch.rejected.policy, batch.rejected.mask)
        - total(batch.calibration.policy, batch.calibration.mask)
    )
    return _dpo_of(batch, lambda c, which: total(getattr(c, which), c.mask)) + 0.001 * own.mean()


@_plant("vpo", "bonus_sign")
def _vpo_sign(batch: PairBatch) -> Tensor:
    log_pi = total(batch.calibration.policy, batch.calibration.mask)
    return _dpo_of(batch, lambda c, which: total(getattr(c, which), c.mask)) + 0.5 * BETA * log_pi.mean()


# ---- rewards and their KL ------------------------------------------------------------------------------------------


def _masked(c: Completions) -> tuple[Tensor, Tensor]:
    return c.policy.masked_fill(~c.mask, 0.0), c.reference.masked_fill(~c.mask, 0.0)


def _reinforce(batch: SampleBatch, advantage: Tensor) -> Tensor:
    c = batch.completions
    return -(advantage * total(c.policy, c.mask)).mean()


def _penalised(batch: SampleBatch, **form: Any) -> Tensor:
    return _reinforce(batch, batch.reward) + BETA * kl_loss(*_masked(batch.completions), **form)


@_plant("kl_policy_gradient", "kl_k3_token", "huggingface/trl 3025")
def _k3_as_a_loss(batch: SampleBatch) -> Tensor:
    return _penalised(batch, estimator="k3", level="token")


@_plant("kl_policy_gradient", "kl_k1_loss", "allenai/open-instruct 534")
def _k1_as_a_loss(batch: SampleBatch) -> Tensor:
    return _penalised(batch, estimator="k1", level="token")


@_plant("kl_policy_gradient", "kl_frozen", "huggingface/trl 3556")
def _kl_of_tokens(batch: SampleBatch) -> Tensor:
    return _penalised(batch, estimator="k1", level="token", use="own_reward")


@_plant("kl_policy_gradient", "kl_maximised", "Unakar/Logic-RL 58")
def _kl_maximised(batch: SampleBatch) -> Tensor:
    return _reinforce(batch, batch.reward) - BETA * kl_loss(*_masked(batch.completions), estimator="k2")


@_plant("kl_policy_gradient", "kl_none")
def _kl_missing(batch: SampleBatch) -> Tensor:
    return _reinforce(batch, batch.reward)


@_plant("kl_policy_gradient", "kl_twice")
def _kl_in_reward_and_loss(batch: SampleBatch) -> Tensor:
    c = batch.completions
    inside = policy_gradient_loss(
        total(c.policy, c.mask), total(c.reference, c.mask), batch.reward, beta=BETA
    )
    return inside + BETA * kl_loss(*_masked(c), estimator="k2")


@_plant("kl_policy_gradient", "beta")
def _kl_weight(batch: SampleBatch) -> Tensor:
    return _reinforce(batch, batch.reward) + 0.37 * BETA * kl_loss(
        *_masked(batch.completions), estimator="k2"
    )


@_plant("kl_policy_gradient", "token_mean", "sail-sg/understand-r1-zero 10")
def _length_normalised(batch: SampleBatch) -> Tensor:
    c = batch.completions
    policy, reference = _masked(c)
    advantage = batch.reward - BETA * (policy - reference).sum(1).detach()
    return -(advantage * policy.sum(1) / c.mask.sum(1)).mean()


@_plant("kl_policy_gradient", "batch_tokens", "allenai/open-instruct 636")
def _normalised_by_the_batch(batch: SampleBatch) -> Tensor:
    c = batch.completions
    policy, reference = _masked(c)
    advantage = batch.reward - BETA * (policy - reference).sum(1).detach()
    return -(advantage[:, None] * policy).sum() / c.mask.sum()


@_plant("kl_policy_gradient", "std_mean_k3_token", "huggingface/trl 2854")
def _grpo(batch: SampleBatch) -> Tensor:
    c = batch.completions
    policy, reference = _masked(c)
    r = batch.reward.reshape(-1, batch.group_size)
    advantage = ((r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + 1e-4)).reshape(-1, 1)
    ratio = (policy - policy.detach()).exp()
    kl = (reference - policy).exp() - (reference - policy) - 1
    rows = ((-ratio * advantage + BETA * kl) * c.mask).sum(1) / c.mask.sum(1)
    return rows.mean()


@_plant("kl_policy_gradient", "loo_std", "NVIDIA-NeMo/RL 1518")
def _leave_one_out_std(batch: SampleBatch) -> Tensor:
    import torch

    c, K = batch.completions, batch.group_size
    r = batch.reward.reshape(-1, K)
    advantage = torch.empty_like(r)
    for k in range(K):
        others = r[:, [j for j in range(K) if j != k]]
        advantage[:, k] = (r[:, k] - others.mean(1)) / (others.std(1, unbiased=False) + 1e-6)
    return _reinforce(batch, advantage.reshape(-1)) + BETA * kl_loss(*_masked(c), estimator="k2")


@_plant("kl_policy_gradient", "group_baseline")
def _own_reward_in_the_baseline(batch: SampleBatch) -> Tensor:
    r = batch.reward.reshape(-1, batch.group_size)
    advantage = (r - r.mean(1, keepdim=True)).reshape(-1)
    return _reinforce(batch, advantage) + BETA * kl_loss(*_masked(batch.completions), estimator="k2")


@_plant("kl_policy_gradient", "paid_after_end", "huggingface/trl 3750")
def _reward_after_the_end(batch: SampleBatch) -> Tensor:
    """The reward stands one token behind the end token, where the mask is False; a cut response has no end token."""
    c = batch.completions
    ended = (c.mask & (c.ids == c.end)).any(1)
    return policy_gradient_loss(
        total(c.policy, c.mask), total(c.reference, c.mask), batch.reward * ~ended, beta=BETA
    )


@_plant("kl_policy_gradient", "paid_last")
def _reward_not_carried_back(batch: SampleBatch) -> Tensor:
    c = batch.completions
    policy, _ = _masked(c)
    last = c.mask & (c.mask.long().flip(1).cumsum(1).flip(1) == 1)
    return -(batch.reward * (policy * last).sum(1)).mean() + BETA * kl_loss(*_masked(c), estimator="k2")


@_plant("kl_policy_gradient", "sign")
def _advantage_sign(batch: SampleBatch) -> Tensor:
    return _reinforce(batch, -batch.reward) + BETA * kl_loss(*_masked(batch.completions), estimator="k2")


@_plant("kl_policy_gradient", "no_end", "verl-project/verl 535")
def _end_not_scored(batch: SampleBatch) -> Tensor:
    c = batch.completions
    seen = c.mask & (c.ids != c.end)
    return policy_gradient_loss(total(c.policy, seen), total(c.reference, seen), batch.reward, beta=BETA)


@_plant("kl_policy_gradient", "prompt")
def _prompt_scored(batch: SampleBatch) -> Tensor:
    c = batch.completions
    seen = c.mask.flip(1).cumsum(1).flip(1) > 0
    return policy_gradient_loss(total(c.policy, seen), total(c.reference, seen), batch.reward, beta=BETA)


# ---- games ---------------------------------------------------------------------------------------------------------


def _nash(batch: SampleBatch, wins: Tensor) -> Tensor:
    c = batch.completions
    return nash_md_pg_loss(total(c.policy, c.mask), total(c.reference, c.mask), wins, tau=TAU)


@_plant("nash_md_pg", "kl_joint", "huggingface/trl 2277")
def _nash_kl_not_detached(batch: SampleBatch) -> Tensor:
    return _reinforce(batch, opponent_wins(batch, SHARE) - 0.5) + TAU * joint_form(
        *_masked(batch.completions)
    )


@_plant("nash_md_pg", "mixture_swapped")
def _nash_mixture_swapped(batch: SampleBatch) -> Tensor:
    return _nash(batch, opponent_wins(batch, 1 - SHARE))


@_plant("nash_md_pg", "opponent_policy")
def _nash_against_itself(batch: SampleBatch) -> Tensor:
    return _nash(batch, opponent_wins(batch, 0.0))


@_plant("nash_md_pg", "mixture_arithmetic")
def _nash_arithmetic_mixture(batch: SampleBatch) -> Tensor:
    law = (1 - SHARE) * batch.opponent_policy.exp() + SHARE * batch.opponent_reference.exp()
    return _nash(batch, (law * batch.preference).sum(1))


@_plant("kl", "kl_k3_token", "verl-project/verl 2953")
def _kl_by_k3(batch: SampleBatch) -> Tensor:
    return kl_loss(*_masked(batch.completions), estimator="k3", level="token")


@_plant("kl", "kl_k1_loss", "NVIDIA-NeMo/RL 2506")
def _kl_by_k1(batch: SampleBatch) -> Tensor:
    return kl_loss(*_masked(batch.completions), estimator="k1", level="token")


PLANTED: Mapping[str, Planted] = MappingProxyType(_FOUND)
