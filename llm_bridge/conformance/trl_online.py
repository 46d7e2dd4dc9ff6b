"""TRL's trainers that draw their own responses, as trainers of the protocol: RLOO, online DPO, Nash-MD and XPO.

As in `trl`, the trainer's own methods run on a stand-in for the rest of it. What a model would say is made of the
batch's log-probabilities, what would be drawn are the batch's responses, and what a reward model would say is the
batch's reward or label. So the trainer's masks, shifts, sums, baselines and losses are its own; its sampling is looked
at by `trl_whole`.

  rloo        RLOOTrainer._generate_and_score_completions (penalty, baseline) and _compute_loss      TRL 1.16.0
  online_dpo  OnlineDPOTrainer.training_step and _forward                                           TRL 1.16.0
  nash_md     NashMDTrainer._compute_logprobs and _compute_losses                                   TRL 1.13.0
  xpo         XPOTrainer._compute_logprobs and _compute_losses                                      TRL 1.13.0
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from .batch import Completions, PairBatch, SampleBatch, TrainerLoss
from .ours import drawn_is_chosen, opponent_wins
from .trl import stand_in, trainer_class

if TYPE_CHECKING:
    from torch import Tensor

PAIR_LOSSES = ("sigmoid", "ipo")


# ---- the batch as TRL lays it out ------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Rows:
    """Prompts padded on the left, completions on the right: (n, P + C) each; `context` is P.

    ids, mask  token ids; 1 on tokens of prompt and completion
    policy, reference  log-probabilities aligned with the ids, finite numbers at padding
    """

    ids: Tensor
    mask: Tensor
    policy: Tensor
    reference: Tensor
    context: int

    def part(self, at: slice) -> Rows:
        return replace(
            self,
            ids=self.ids[at],
            mask=self.mask[at],
            policy=self.policy[at],
            reference=self.reference[at],
        )

    @property
    def prompts(self) -> dict[str, Tensor]:
        return {"prompt_ids": self.ids[:, : self.context], "prompt_mask": self.mask[:, : self.context]}

    @property
    def completions(self) -> tuple[Tensor, Tensor]:
        return self.ids[:, self.context :], self.mask[:, self.context :]

    @property
    def data(self) -> dict[str, Tensor]:
        return {"input_ids": self.ids, "attention_mask": self.mask}

    def lists(self) -> tuple[list[list[int]], list[list[int]]]:
        """Prompts and completions without padding."""
        ids, mask, at = self.ids, self.mask.bool(), self.context
        return (
            [row[m].tolist() for row, m in zip(ids[:, :at], mask[:, :at], strict=True)],
            [row[m].tolist() for row, m in zip(ids[:, at:], mask[:, at:], strict=True)],
        )


def rows_of(*parts: Completions) -> Rows:
    """Completions below one another."""
    import torch

    ids, policy, reference, inside = (
        torch.cat([getattr(c, name) for c in parts]) for name in ("ids", "policy", "reference", "mask")
    )
    first, lengths = inside.int().argmax(1), inside.sum(1)
    context, longest = int(first.max()), int(lengths.max())
    place = torch.arange(context + longest) - context
    at = first[:, None] + place
    real = (at >= 0) & (place < lengths[:, None])
    at = at.clamp(0, ids.shape[1] - 1)
    end = parts[0].end
    return Rows(
        ids.gather(1, at).masked_fill(~real, end),
        real.long(),
        policy.gather(1, at),
        reference.gather(1, at),
        context,
    )


def model_of(ids: Tensor, tokens: Tensor) -> Any:
    """A causal language model that gives `ids` the log-probabilities `tokens`, (n, T) each: logits at t are of t + 1.

    What is left of each probability is spread evenly over the other tokens, so that a softmax changes nothing.
    """
    import torch

    V = int(ids.max()) + 2
    said = tokens[:, 1:]
    rest = torch.log1p(-said.exp()) - math.log(V - 1)
    logits = rest[..., None].expand(*rest.shape, V).scatter(2, ids[:, 1:, None], said[..., None])
    logits = torch.cat([logits, torch.zeros_like(logits[:, :1])], 1)

    def forward(input_ids: Tensor, attention_mask: Tensor, **_: Any) -> SimpleNamespace:
        if not torch.equal(input_ids, ids):
            raise ValueError("the trainer asks for other tokens than it was given")
        return SimpleNamespace(logits=logits)

    return forward


def bound(trainer: type, here: SimpleNamespace, *names: str) -> None:
    """Give the stand-in the trainer's own methods."""
    for name in names:
        setattr(here, name, partial(getattr(trainer, name), here))


# ---- RLOO ------------------------------------------------------------------------------------------------------------

RLOO_OPTIONS = ("normalize",)


def trl_rloo(beta: float, *options: str) -> TrainerLoss:
    """The loss of `trl.RLOOTrainer` with RLOOConfig(beta=..., num_generations=3) on samples of the current policy.

    options  "normalize": normalize_advantages=True
    """
    unknown = sorted(set(options) - set(RLOO_OPTIONS))
    if unknown:
        raise ValueError(f"TRL's RLOOTrainer is written rloo or rloo[normalize]; got {unknown[0]!r}")
    trainer = trainer_class("trainer.rloo_trainer", "RLOOTrainer", "1.16.0")

    def loss(batch: SampleBatch) -> Tensor:
        import torch

        rows = rows_of(batch.completions)
        here = stand_in("sigmoid", beta, 0.0)
        prompts, completions = rows.lists()
        here.ref_model = "reference"
        here.num_generations = batch.group_size
        here.args.per_device_train_batch_size = len(prompts)
        here.normalize_advantages = "normalize" in options
        here._tokenizer = SimpleNamespace(pad_token_id=batch.completions.end)
        here.eos_token_ids = [batch.completions.end]
        here.reward_weights, here.reward_clip_range = torch.ones(1), None
        here.reward_func_names = ["reward"]
        here.pad_to_multiple_of, here.mask_truncated_completions = None, False
        here.log_multimodal = False
        here._pending_extra_logs, here._pending_metrics = {}, {}
        here._logs = defaultdict(list, rewards=defaultdict(list), extra=defaultdict(list))
        here._generate = lambda _: (prompts, completions, ["" for _ in completions])
        here._calculate_rewards = lambda *_: batch.reward[:, None]

        def speak(model: Any, *_: Any, **__: Any) -> tuple[Tensor, Tensor, None]:
            said = (rows.reference if model == "reference" else rows.policy)[:, rows.context :]
            return said, said.detach() * 0, None

        here._get_per_token_logps_and_entropies = speak
        inputs = trainer._generate_and_score_completions(here, [{"prompt": ""} for _ in prompts])
        return trainer._compute_loss(here, here.model, inputs)  # type: ignore[no-any-return]

    loss.__name__ = "_".join(("trl_rloo", *options))
    return loss


# ---- online DPO ------------------------------------------------------------------------------------------------------


def trl_online_dpo(loss_type: str, beta: float) -> TrainerLoss:
    """The loss of `trl.experimental.online_dpo.OnlineDPOTrainer` with OnlineDPOConfig(loss_type=..., beta=...).

    The label of a comparison is the larger reward: 1 for the chosen response of the batch, 0 for the rejected one.
    """
    _check_loss_type("OnlineDPOTrainer", loss_type)
    trainer = trainer_class("experimental.online_dpo.online_dpo_trainer", "OnlineDPOTrainer", "1.16.0")

    def loss(batch: PairBatch) -> Tensor:
        import torch

        n = len(batch.chosen.ids)
        swapped = torch.arange(n) % 2 == 1  # both halves of TRL's batch have winners
        first, second = (
            _where(swapped, a, b) for a, b in ((batch.rejected, batch.chosen), (batch.chosen, batch.rejected))
        )
        rows = rows_of(first, second)
        here = _online(rows, loss_type, beta)
        here.eos_token_ids = [batch.chosen.end]
        rewards = torch.cat([(~swapped).double(), swapped.double()])
        here._calculate_rewards_from_functions = lambda **_: rewards
        here._generate = lambda *_: (*rows.prompts.values(), *rows.completions, None)
        bound(trainer, here, "_forward")
        trainer.training_step(here, here.model, {"prompt": [""] * n})
        return here.losses[0]  # type: ignore[no-any-return]

    loss.__name__ = f"trl_online_dpo_{loss_type}"
    return loss


def _online(rows: Rows, loss_type: str, beta: float) -> SimpleNamespace:
    here = stand_in(loss_type, beta, 0.0)
    here.losses = []
    here.accelerator.backward = lambda value, **_: here.losses.append(value)
    here.model = model_of(rows.ids, rows.policy)
    here.model.train = lambda: None
    here.ref_model = model_of(rows.ids, rows.reference)
    here.args = SimpleNamespace(
        loss_type=loss_type,
        use_vllm=False,
        missing_eos_penalty=None,
        torch_empty_cache_steps=None,
        optim="adamw_torch",
        n_gpu=1,
        gradient_accumulation_steps=1,
    )
    here.max_length = rows.ids.shape[1]
    here.processing_class = SimpleNamespace(batch_decode=lambda ids, **_: ["" for _ in ids])
    here.reward_funcs, here.stats = ["reward"], defaultdict(list)
    here.state = SimpleNamespace(global_step=0)
    return here


def _where(which: Tensor, a: Completions, b: Completions) -> Completions:
    import torch

    def pick(name: str) -> Tensor:
        return torch.where(which[:, None], getattr(a, name), getattr(b, name))

    return Completions(pick("policy"), pick("reference"), pick("previous"), pick("mask"), pick("ids"), a.end)


# ---- Nash-MD and XPO -------------------------------------------------------------------------------------------------


def trl_nash_md(tau: float, share: float) -> TrainerLoss:
    """The loss of `trl.experimental.nash_md.NashMDTrainer` with NashMDConfig(beta=tau, mixture_coef=share).

    Its probability of winning is one draw of the opponent; here it is the expectation over the mixture of whole
    responses, in which the loss is linear. What the trainer really draws its opponents from is another question, of
    `trl_whole`.
    """
    trainer = trainer_class("experimental.nash_md.nash_md_trainer", "NashMDTrainer", "1.13.0")

    def loss(batch: SampleBatch) -> Tensor:
        rows = rows_of(batch.completions)
        here = _online(rows, "sigmoid", tau)
        said = trainer._compute_logprobs(here, here.model, rows.data, rows.context)
        return trainer._compute_losses(here, *said, opponent_wins(batch, share))[0]  # type: ignore[no-any-return]

    loss.__name__ = "trl_nash_md"
    return loss


def trl_xpo(loss_type: str, beta: float, alpha: float) -> TrainerLoss:
    """The loss of `trl.experimental.xpo.XPOTrainer` with XPOConfig(loss_type=..., beta=..., alpha=...)."""
    _check_loss_type("XPOTrainer", loss_type)
    trainer = trainer_class("experimental.xpo.xpo_trainer", "XPOTrainer", "1.13.0")

    def loss(batch: PairBatch) -> Tensor:
        import torch

        second = drawn_is_chosen(batch)
        own = _where(second, batch.rejected, batch.chosen)
        rows = rows_of(own, batch.calibration)
        n = len(second)
        halves = [rows.part(slice(0, n)), rows.part(slice(n, None))]
        here = _online(rows, loss_type, beta)
        here.alpha = alpha

        def of(name: str) -> Any:
            models = [model_of(half.ids, getattr(half, name)) for half in halves]
            return lambda ids, **k: models[int(not torch.equal(ids, halves[0].ids))](ids, **k)

        here.ref_model = of("reference")
        mine, theirs = (half.data for half in halves)
        said = trainer._compute_logprobs(here, of("policy"), mine, theirs, rows.context)
        return trainer._compute_losses(here, *said, ~second)[0]  # type: ignore[no-any-return]

    loss.__name__ = f"trl_xpo_{loss_type}"
    return loss


def _check_loss_type(trainer: str, loss_type: str) -> None:
    if loss_type not in PAIR_LOSSES:
        raise ValueError(
            f"TRL's {trainer} has no loss type {loss_type!r}; it has {' and '.join(PAIR_LOSSES)}"
        )
