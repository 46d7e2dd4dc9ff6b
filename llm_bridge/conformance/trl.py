"""TRL's DPOTrainer and GRPOTrainer as trainers of the protocol: their own `_compute_loss`, on enumerated tokens.

Nothing of the trainer is copied. Its method runs on a stand-in for the trainer (loss type, beta, no distributed gather)
and on models that answer with our log-probabilities in the place of a fused language-model head. So what is held to
the target is everything between the model's token log-probabilities and the loss; tokenisation, truncation, collation,
the model's forward pass and the optimiser are not. Written for TRL 1.16.0; another release may need other attributes,
and says so by an AttributeError.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from .batch import PairBatch, SampleBatch, TrainerLoss

if TYPE_CHECKING:
    from torch import Tensor

LOSS_TYPES = (
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "sigmoid_norm",
)


def trl_dpo(loss_type: str, beta: float, label_smoothing: float = 0.0) -> TrainerLoss:
    """The loss of `trl.DPOTrainer` with DPOConfig(loss_type=[loss_type], beta=..., label_smoothing=...)."""
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"TRL's DPOTrainer has no loss type {loss_type!r}; it has {', '.join(LOSS_TYPES)}")
    trainer = trainer_class("trainer.dpo_trainer", "DPOTrainer")
    loss = trl_dpo_of(trainer, loss_type, beta, label_smoothing)
    loss.__name__ = f"trl_dpo_{loss_type}"  # type: ignore[attr-defined]
    return loss


def trl_dpo_of(
    trainer: Any,
    loss_type: str = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    own: Sequence[str] = (),
) -> TrainerLoss:
    """`_compute_loss` of DPOTrainer or a subclass; `own` are further methods of it that this one calls."""

    def loss(batch: PairBatch) -> Tensor:
        import torch

        sides = (batch.chosen, batch.rejected)
        mask = torch.cat([c.mask for c in sides]).long()
        # Position 0 is predicted by nothing in a language model: TRL drops it when it shifts the mask.
        inputs = {"input_ids": torch.cat([c.ids for c in sides]), "completion_mask": mask}
        inputs["attention_mask"] = torch.ones_like(mask)
        here = stand_in(loss_type, beta, label_smoothing)
        policy, here.ref_model, here.previous_model = (
            tokens_model(torch.cat([getattr(c, name) for c in sides]))
            for name in ("policy", "reference", "previous")
        )
        for name in own:
            setattr(here, name, partial(getattr(trainer, name), here))
        return trainer._compute_loss(here, policy, inputs, return_outputs=False)  # type: ignore[no-any-return]

    return loss


GRPO_LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")


def trl_grpo(loss_type: str, beta: float, *options: str) -> TrainerLoss:
    """The loss of `trl.GRPOTrainer` on samples of the current policy (ratios are 1), with its KL coefficient `beta`.

    options  "none": scale_rewards="none", so that advantages are not divided by the group's deviation; "k3":
             use_bias_correction_kl=False; "sequence": importance_sampling_level="sequence"
    Advantages are made here as TRL documents them, from groups of the batch; the method runs on them.
    """
    unknown = set(options) - {"none", "k3", "sequence"}
    if loss_type not in GRPO_LOSS_TYPES or unknown:
        raise ValueError(
            f"TRL's GRPOTrainer is written grpo[LOSS_TYPE,...]: LOSS_TYPE of {', '.join(GRPO_LOSS_TYPES)}, then any of "
            f"none, k3, sequence; got {', '.join((loss_type, *options))}"
        )
    trainer = trainer_class("trainer.grpo_trainer", "GRPOTrainer")

    def loss(batch: SampleBatch) -> Tensor:
        c = batch.completions
        r = batch.reward.reshape(-1, batch.group_size)
        advantages = r - r.mean(1, keepdim=True)
        if "none" not in options:
            advantages = advantages / (r.std(1, keepdim=True) + 1e-4)
        here = stand_in(loss_type, beta, 0.0)
        here.loss_type = loss_type
        here.args.use_bias_correction_kl = "k3" not in options
        here.importance_sampling_level = "sequence" if "sequence" in options else "token"
        here.max_completion_length = c.mask.shape[1]
        here._get_per_token_logps_and_entropies = lambda *_, **__: (c.policy, c.policy.detach() * 0, None)
        inputs = {
            "prompt_ids": c.ids[:, :0],
            "prompt_mask": c.mask[:, :0].long(),
            "completion_ids": c.ids,
            "completion_mask": c.mask.long(),
            "advantages": advantages.reshape(-1),
            "ref_per_token_logps": c.reference,
            "num_items_in_batch": c.mask.sum(),
        }
        return trainer._compute_loss(here, None, inputs)  # type: ignore[no-any-return]

    loss.__name__ = f"trl_grpo_{'_'.join((loss_type, *options))}"
    return loss


def trainer_class(module: str, name: str, release: str = "1.16.0") -> Any:
    """A trainer of the installed trl; ValueError with a release that has it where this one does not."""
    remedy = f"pip install trl=={release} datasets"
    try:
        return getattr(importlib.import_module(f"trl.{module}"), name)
    except ImportError as error:
        raise ValueError(f"trl's {name} cannot be imported ({error}); {remedy}") from error


def tokens_model(tokens: Tensor) -> Any:
    """A model whose head gives log p of the next token where it is labelled, 0 elsewhere, as TRL's fused head does."""

    def forward(labels: Tensor, **_: Any) -> SimpleNamespace:
        shifted, at = labels[:, 1:], tokens[:, 1:]
        log_probs = at.masked_fill(shifted == -100, 0.0)
        blank = log_probs.detach() * 0
        return SimpleNamespace(log_probs=log_probs, entropy=blank, mean_logits=blank, is_top1=blank.bool())

    return forward


def stand_in(loss_type: str, beta: float, label_smoothing: float) -> SimpleNamespace:
    from collections import defaultdict

    metrics: dict[str, Any] = {"train": defaultdict(list), "eval": defaultdict(list)}
    accelerator = SimpleNamespace(
        device="cpu",
        num_processes=1,
        process_index=0,
        gather=lambda x: x,
        gather_for_metrics=lambda x: x,
        reduce=lambda x, reduction: x,
        unwrap_model=lambda x: x,
        autocast=nullcontext,
    )
    args = SimpleNamespace(
        gradient_checkpointing_kwargs=None, discopop_tau=0.05, delta=None, steps_per_generation=1
    )
    return SimpleNamespace(
        model=SimpleNamespace(
            training=True, is_gradient_checkpointing=False, _modules={}
        ),  # no children: not of peft
        accelerator=accelerator,
        args=args,
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=False,
        f_divergence_type="reverse_kl",
        loss_types=[loss_type],
        loss_weights=[1.0],
        beta=beta,
        label_smoothing=label_smoothing,
        use_weighting=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        epsilon_low=0.2,
        epsilon_high=0.2,
        use_vllm=False,
        vllm_importance_sampling_correction=False,
        current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=False,
        _metrics=metrics,
        _total_train_tokens=0,
        _tp_size=1,
    )
