"""TRL's DPOTrainer as a trainer of the protocol: its own `_compute_loss`, on log-probabilities that we enumerate.

Nothing of the trainer is copied. Its method runs on a stand-in for the trainer (loss type, beta, no distributed gather)
and on models that answer with our log-probabilities in the place of a fused language-model head. So what is held to
the target is everything between the model's token log-probabilities and the loss; tokenisation, truncation, collation,
the model's forward pass and the optimiser are not. Written for TRL 1.16.0; another release may need other attributes,
and says so by an AttributeError.
"""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from .batch import PairBatch, TrainerLoss

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
    try:
        trainer = importlib.import_module("trl.trainer.dpo_trainer").DPOTrainer
    except ImportError as error:
        raise ValueError(f"trl cannot be imported ({error}); pip install trl==1.16.0 datasets") from error

    def loss(batch: PairBatch) -> Tensor:
        import torch

        sides = (batch.chosen, batch.rejected)
        mask = torch.cat([c.mask for c in sides]).long()
        # Position 0 is predicted by nothing in a language model: TRL drops it when it shifts the mask.
        inputs = {"input_ids": torch.cat([c.ids for c in sides]), "completion_mask": mask}
        inputs["attention_mask"] = torch.ones_like(mask)
        stand_in = _stand_in(loss_type, beta, label_smoothing)
        stand_in.ref_model = _model(torch.cat([c.reference for c in sides]))
        value = trainer._compute_loss(
            stand_in, _model(torch.cat([c.policy for c in sides])), inputs, return_outputs=False
        )
        return value  # type: ignore[no-any-return]

    loss.__name__ = f"trl_dpo_{loss_type}"
    return loss


def _model(tokens: Tensor) -> Any:
    """A model whose head gives log p of the next token where it is labelled, 0 elsewhere, as TRL's fused head does."""

    def forward(labels: Tensor, **_: Any) -> SimpleNamespace:
        shifted, at = labels[:, 1:], tokens[:, 1:]
        log_probs = at.masked_fill(shifted == -100, 0.0)
        blank = log_probs.detach() * 0
        return SimpleNamespace(log_probs=log_probs, entropy=blank, mean_logits=blank, is_top1=blank.bool())

    return forward


def _stand_in(loss_type: str, beta: float, label_smoothing: float) -> SimpleNamespace:
    from collections import defaultdict

    metrics: dict[str, Any] = {"train": defaultdict(list), "eval": defaultdict(list)}
    accelerator = SimpleNamespace(
        device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x, unwrap_model=lambda x: x
    )
    return SimpleNamespace(
        model=SimpleNamespace(training=True, is_gradient_checkpointing=False),
        accelerator=accelerator,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None, discopop_tau=0.05),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=False,
        f_divergence_type="reverse_kl",
        loss_types=[loss_type],
        loss_weights=[1.0],
        beta=beta,
        label_smoothing=label_smoothing,
        use_weighting=False,
        _metrics=metrics,
        _total_train_tokens=0,
        _tp_size=1,
    )
