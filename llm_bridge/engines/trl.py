r"""TRL's DPOTrainer with our pure losses: a subclass that overrides one method, `_compute_loss`.

    Trainer = dpo_trainer("rpo", beta=0.1, eta=0.005)
    Trainer(model=model, args=DPOConfig(...), train_dataset=comparisons, processing_class=tokenizer).train()

Data, collation, adapters, precomputed references, the fused head, accumulation and checkpoints stay TRL's. The loss is
of the sums over the completion's tokens, chosen first:

  dpo   beta, label_smoothing  `algorithms.dpo`   TRL's own "sigmoid", with smoothing
  ipo   tau                    `algorithms.ipo`   by sums, as in the paper; TRL's own "ipo" averages over tokens
  rpo   beta, eta              `algorithms.rpo`   imitation of the chosen response (VPO offline, calibrated by it)
  inpo  tau, eta; previous     `algorithms.inpo`  previous: the model pi_t that drew the comparisons, frozen
  sppo  eta                    `algorithms.sppo`  chosen won and rejected lost for certain; TRL's ref_model is pi_t
  apo   beta                   `algorithms.apo`   a round of accelerated DPO; TRL's ref_model is pi_t, extrapolated

`loss_type` and `beta` of the DPOConfig are not read by these losses, and what would change TRL's own loss (another
loss_type, use_weighting, ld_alpha, an f-divergence) is refused. Rewards are logged as beta log pi/ref with the
method's beta, or as log pi/ref where it has none. One process or many: the mean over comparisons is TRL's own.

`engine_loss` is the same method as a trainer of conformance. Written for TRL 1.16.0.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ...algorithms.apo import apo_loss
from ...algorithms.dpo import dpo_loss
from ...algorithms.inpo import inpo_loss
from ...algorithms.ipo import ipo_loss
from ...algorithms.rpo import rpo_loss
from ...algorithms.sppo import sppo_loss
from ..conformance.batch import TrainerLoss
from ..conformance.trl import trainer_class, trl_dpo_of

if TYPE_CHECKING:
    from torch import Tensor

RELEASE = "1.16.0"


def _sppo(policy: Tensor, reference: Tensor, preferred: Tensor, *, eta: float) -> Tensor:
    import torch

    wins = torch.stack([preferred, 1 - preferred], 1)
    return sppo_loss(policy.reshape(-1), reference.reshape(-1), wins.reshape(-1), eta=eta)


LOSSES: Mapping[str, Callable[..., Tensor]] = {
    "dpo": dpo_loss,
    "ipo": ipo_loss,
    "rpo": rpo_loss,
    "inpo": inpo_loss,
    "sppo": _sppo,
    "apo": apo_loss,
}


def checked(method: str, parameters: Mapping[str, float]) -> None:
    """ValueError for a method or a parameter that there is not, or for one that is missing."""
    if method not in LOSSES:
        raise ValueError(f"there is no method {method!r}; there are {', '.join(LOSSES)}")
    takes = {
        name: p
        for name, p in inspect.signature(LOSSES[method]).parameters.items()
        if p.kind is p.KEYWORD_ONLY
    }
    unknown = sorted(set(parameters) - set(takes))
    missing = [n for n, p in takes.items() if p.default is p.empty and n not in parameters]
    if unknown or missing:
        what = f"has no parameter {unknown[0]!r}" if unknown else f"needs the parameter {missing[0]!r}"
        raise ValueError(f"{method} {what}; it takes {', '.join(takes)}")


def dpo_trainer(method: str, *, previous: Any = None, **parameters: float) -> Any:
    """A subclass of `trl.DPOTrainer` that descends the method's loss; `previous`, for inpo alone, as above."""
    checked(method, parameters)
    if (method == "inpo") != (previous is not None):
        raise ValueError("previous is the model pi_t of inpo: it needs one, and the other methods have none")
    pure = LOSSES[method]
    base = trainer_class("trainer.dpo_trainer", "DPOTrainer", RELEASE)

    class PreflabDPOTrainer(base):  # type: ignore[misc, valid-type]
        previous_model: Any = None

        def __init__(self, *given: Any, **named: Any) -> None:
            super().__init__(*given, **named)
            self._refuse_what_is_not_read()
            if previous is not None:
                trainer_class("trainer.utils", "add_fused_lm_head", RELEASE)(previous)
                previous.requires_grad_(False).eval()
                self.previous_model = self.accelerator.prepare_model(previous, evaluation_mode=True)

        def _refuse_what_is_not_read(self) -> None:
            read = {
                "loss_type": self.loss_types == ["sigmoid"],
                "use_weighting": not self.use_weighting,
                "ld_alpha": self.ld_alpha is None,
                "f_divergence_type": self.f_divergence_type == "reverse_kl",
                "router_aux_loss_coef": not self.aux_loss_enabled,
            }
            for name, usual in read.items():
                if not usual:
                    raise ValueError(
                        f"DPOConfig.{name} changes TRL's own loss, and is not read by {method}: leave it as it is"
                    )

        def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
            import torch

            policy = _sums(model, inputs)
            if self.precompute_ref_logps:
                sides = [inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]]
            else:
                sides = list(self.compute_ref_log_probs(self.ref_model or self.model, inputs))
            reference = torch.stack(sides, 1).to(policy)
            anchors = [reference]
            if previous is not None:
                with torch.no_grad():
                    anchors.append(_sums(self.previous_model, inputs))
            loss = pure(policy, *anchors, torch.ones_like(policy[:, 0]), **parameters)
            self._note(policy.detach(), reference)
            if not return_outputs:
                return loss
            with torch.no_grad():
                given = {k: v for k, v in inputs.items() if k in ("input_ids", "attention_mask")}
                return loss, model(**given, use_cache=False)

        def _note(self, policy: Tensor, reference: Tensor) -> None:
            """Numbers under TRL's names, over all processes."""
            noted = self._metrics["train" if self.model.training else "eval"]
            scale = parameters.get("beta", 1.0)
            chosen, rejected = (
                self.accelerator.gather(scale * (policy - reference)[:, i].contiguous()) for i in (0, 1)
            )
            numbers = {
                "rewards/chosen": chosen,
                "rewards/rejected": rejected,
                "rewards/margins": chosen - rejected,
                "rewards/accuracies": (chosen > rejected).double(),
                "logps/chosen": self.accelerator.gather(policy[:, 0].contiguous()),
                "logps/rejected": self.accelerator.gather(policy[:, 1].contiguous()),
            }
            for name, values in numbers.items():
                noted[name].append(values.mean().item())

    PreflabDPOTrainer.__name__ = PreflabDPOTrainer.__qualname__ = f"PreflabDPOTrainer_{method}"
    return PreflabDPOTrainer


def _sums(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """(B, 2) log-probabilities of chosen and rejected completions, by TRL's fused head."""
    import torch

    of_the_loss = ("completion_mask", "ref_chosen_logps", "ref_rejected_logps")
    given = {k: v for k, v in inputs.items() if k not in of_the_loss}
    labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
    tokens = model(**given, use_cache=False, labels=labels, fused_lm_head=True).log_probs
    # Prompt-learning adapters put virtual tokens before the real ones.
    tokens = tokens[:, -(labels.shape[1] - 1) :]
    return torch.stack(tokens.sum(1).chunk(2), 1)


def engine_loss(method: str, **parameters: float) -> TrainerLoss:
    """The subclass's `_compute_loss` as a trainer of conformance, on enumerated log-probabilities."""
    stand_in = object() if method == "inpo" else None
    kind = dpo_trainer(method, previous=stand_in, **parameters)
    loss = trl_dpo_of(kind, own=("compute_ref_log_probs", "_note"))
    loss.__name__ = f"trl_preflab_{method}"  # type: ignore[attr-defined]
    return loss
