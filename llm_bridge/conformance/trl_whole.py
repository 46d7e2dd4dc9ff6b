"""TRL's trainers themselves, as whole trainers: what they draw and what they score, held to enumeration (levels 2, 3).

Each is built by its own constructor on the models of a `model_world` of kind "gpt2" or "llama" (`TrlRloo(world)`), on
the CPU, in the world's precision, in training mode as in a training step, and is asked through the methods that its
training step calls:

  TrlDpo        the collator and compute_ref_log_probs                                               TRL 1.16.0
  TrlGrpo       _generate_single_turn and _get_per_token_logps_and_entropies                         TRL 1.16.0
  TrlRloo       the same                                                                             TRL 1.16.0
  TrlOnlineDpo  _generate and _forward                                                               TRL 1.16.0
  TrlNashMd     _generate_completions, _process_completions, _compute_logprobs, _compute_rewards     TRL 1.13.0
  TrlXpo        the same                                                                             TRL 1.13.0

What is set: the length of completions, no dropout, temperature 1, the mixture's share 0.3; `settings` of a class hold
the rest, by the names of its configuration. A world whose policy is a peft model (`with_lora`) makes trainers without a
reference of their own: they turn the adapter off.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar

from ..policy import Tokens
from .models import ModelWorld
from .trl import trainer_class
from .trl_train import arguments_of, fit

if TYPE_CHECKING:
    from torch import Tensor

    from .runs import Task

SHARE = 0.3


# ---- worlds and texts ------------------------------------------------------------------------------------------------


def with_lora(world: ModelWorld, seed: int = 0, scale: float = 1.0) -> ModelWorld:
    """The world whose policy is the reference with a LoRA adapter of random weights on it, by peft itself."""

    def policy() -> Any:
        import torch
        from peft import LoraConfig, get_peft_model

        base = world.model("reference")
        gpt2 = world.kind == "gpt2"
        target = ["c_attn", "c_proj"] if gpt2 else ["q_proj", "v_proj", "down_proj"]
        config = LoraConfig(r=4, target_modules=target, fan_in_fan_out=gpt2, lora_dropout=0.0)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = get_peft_model(base, config)
            for name, weight in model.named_parameters():
                if "lora_" in name:
                    torch.nn.init.normal_(weight, std=scale)
        return model.to(next(base.parameters()).dtype).train()

    return replace(world, models={**world.models, "policy": policy}, _exact={})


def tokenizer_of(world: ModelWorld) -> Any:
    """Words of the world with spaces between them; the end token pads."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(world.words)}, unk_token=world.words[0])
    )
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    end = world.words[world.end]
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token=end, pad_token=end, padding_side="left")


def text_of(world: ModelWorld, tokens: Tokens) -> str:
    return " ".join(world.words[int(t)] for t in tokens)


# ---- trainers --------------------------------------------------------------------------------------------------------


class _Trl:
    """What they share: how a trainer is made, and rows as it pads them."""

    module: ClassVar[str]
    name: ClassVar[str]
    config: ClassVar[str]
    release: ClassVar[str] = "1.16.0"
    settings: ClassVar[Mapping[str, Any]] = {}
    roles: ClassVar[tuple[str, ...]] = ("policy", "reference")
    drawn: ClassVar[tuple[str, ...]] = ("policy",)
    scored: ClassVar[tuple[str, ...]] = ("policy", "reference")
    temperature = 1.0

    def __init__(self, world: ModelWorld) -> None:
        if world.kind not in ("gpt2", "llama"):
            raise ValueError(
                f"TRL's trainers take models of transformers; this world is {world.kind!r}: "
                'model_world("llama", dtype="float32"), or "gpt2"'
            )
        self.world = world
        self.folder = tempfile.mkdtemp(prefix="preflab-trl-")
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        self.tokens = tokenizer_of(world)
        rows = [self.row(prompt) for prompt in world.prompts] * 3
        self.trainer = self.made(trainer_class(self.module, self.name, self.release), rows, **self.judge())

    def made(
        self, kind: Any, rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any] = {}, **given: Any
    ) -> Any:
        """A trainer on the world's models; `settings` of its configuration come after those of the class."""
        import datasets
        import torch

        arguments = trainer_class(self.module.replace("_trainer", "_config"), self.config, self.release)
        with torch.random.fork_rng():
            trainer = kind(
                **self.models(),
                args=arguments(**{"output_dir": self.folder, **self.common(), **self.settings, **settings}),
                train_dataset=datasets.Dataset.from_list(list(rows)),
                processing_class=self.tokens,
                **given,
            )
        policy = self.world.model("policy")
        if hasattr(policy, "peft_config"):
            trainer.model.load_state_dict(policy.state_dict())
        trainer.model.train()
        return trainer

    def row(self, prompt: Tokens) -> dict[str, Any]:
        return {"prompt": text_of(self.world, prompt)}

    def prompts(self, task: Task, n: int) -> list[dict[str, Any]]:
        """The prompts of all steps, n to a step, and which of the task's they are."""
        P = len(task.prompts)
        return [{**self.row(task.prompts[k % P]), "number": k % P} for k in range(task.steps * n)]

    def models(self) -> dict[str, Any]:
        """A peft world: the reference, and the adapter's configuration; its weights come in afterwards."""
        policy = self.world.model("policy")
        if hasattr(policy, "peft_config"):
            return {"model": self.world.model("reference"), "peft_config": policy.peft_config["default"]}
        return {"model": policy, "ref_model": self.world.model("reference")}

    def judge(self) -> dict[str, Any]:
        return {}

    def common(self) -> dict[str, Any]:
        return {
            "per_device_train_batch_size": 3,
            "use_cpu": True,
            "bf16": False,
            "report_to": "none",
            "disable_dropout": True,
            "save_strategy": "no",
        }

    def padded(
        self, prompts: Sequence[Tokens], completions: Sequence[Tokens], token: int | None = None
    ) -> tuple[Tensor, Tensor, int]:
        """Prompts on the left, completions on the right, by TRL's `pad`: ids, mask, and where completions begin."""
        import torch
        from trl.trainer.utils import pad

        sides, filler = [], self.world.pad if token is None else token
        for texts, side in ((prompts, "left"), (completions, "right")):
            rows = [torch.tensor(list(x)) for x in texts]
            ids = pad(rows, padding_value=filler, padding_side=side)
            sides.append((ids, pad([torch.ones_like(x) for x in rows], padding_value=0, padding_side=side)))
        (x, a), (y, b) = sides
        return torch.cat([x, y], 1), torch.cat([a, b], 1), x.shape[1]


class TrlDpo(_Trl):
    """`train` gives it token ids, since its own preparation of texts ends every completion; `against` "ipo" is its
    loss type "ipo"."""

    module, name, config = "trainer.dpo_trainer", "DPOTrainer", "DPOConfig"
    options: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "micro_batch": (None, 4),
        "pad_to": ("auto", 8),
        "reference": ("live", "precomputed"),
        "resume": (False, True),
    }
    exact: ClassVar[tuple[str, ...]] = ("resume",)
    against = "dpo"

    def row(self, prompt: Tokens) -> dict[str, Any]:
        world = self.world
        chosen, rejected = world.completions[0], world.completions[1]
        return {
            **super().row(prompt),
            "chosen": f" {text_of(world, chosen)}",
            "rejected": f" {text_of(world, rejected)}",
        }

    def common(self) -> dict[str, Any]:
        return {**super().common(), "max_length": None}

    def log_probabilities(self, prompts: Sequence[Tokens], completions: Sequence[Tokens], role: str) -> Any:
        """Each completion as the chosen one, beside the next row's as the rejected one."""
        import torch
        from trl.trainer.dpo_trainer import DataCollatorForPreference

        ys = [list(y) for y in completions]
        rows = [
            {"prompt_ids": list(x), "chosen_ids": y, "rejected_ids": z}
            for x, y, z in zip(prompts, ys, [*ys[1:], ys[0]], strict=True)
        ]
        batch = DataCollatorForPreference(pad_token_id=self.world.pad)(rows)
        t = self.trainer
        if role == "reference":
            return t.compute_ref_log_probs(t.ref_model or t.model, batch)[0]
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        given = {k: v for k, v in batch.items() if k != "completion_mask"}
        with torch.no_grad():
            said = t.model(**given, labels=labels, use_cache=False, fused_lm_head=True).log_probs.sum(1)
        return said.chunk(2)[0]

    def train(
        self,
        task: Task,
        seed: int,
        micro_batch: int | None,
        pad_to: str | int,
        reference: str,
        resume: bool,
    ) -> None:
        kind = trainer_class(self.module, self.name, self.release)
        prepared = type(kind.__name__, (kind,), {"_prepare_dataset": lambda self, rows, *_: rows})
        rows = [
            {"prompt_ids": [*r.prompt], "chosen_ids": [*r.chosen], "rejected_ids": [*r.rejected]}
            for r in task.comparisons
        ]
        loss, weight = {"dpo": ("sigmoid", "beta"), "ipo": ("ipo", "tau")}[task.objective]
        settings = {
            **arguments_of(task, seed, micro_batch),
            "train_sampling_strategy": "sequential",
            "loss_type": [loss],
            "beta": task.parameters[weight],
            "pad_to_multiple_of": pad_to,
            "precompute_ref_log_probs": reference == "precomputed",
            **self.settings,
        }
        self.trainer = fit(self, prepared, rows, settings, resume)


class _Grouped(_Trl):
    """GRPO and RLOO: the reference is loaded from where the policy's configuration says it came from.

    `train`: the rows of a step are completions, in groups of `group` to a prompt. They are all drawn before the first
    micro-batch, so that its size must not matter."""

    options: ClassVar[Mapping[str, tuple[Any, ...]]] = {"micro_batch": (None, 4), "resume": (False, True)}
    exact: ClassVar[tuple[str, ...]] = ("resume",)
    against = "kl_policy_gradient"
    group = 4

    def models(self) -> dict[str, Any]:
        found = super().models()
        if found.pop("ref_model", None) is not None:
            place = f"{self.folder}/reference"
            self.world.model("reference").save_pretrained(place)
            found["model"].config._name_or_path = place
        return found

    def judge(self) -> dict[str, Any]:
        return {"reward_funcs": lambda prompts, **_: [0.0] * len(prompts)}

    def common(self) -> dict[str, Any]:
        return {
            **super().common(),
            "beta": 0.1,
            "num_generations": 3,
            "max_completion_length": self.world.horizon,
            "temperature": self.temperature,
        }

    def sample(self, prompts: Sequence[Tokens], horizon: int, seed: int, role: str) -> Sequence[Tokens]:
        import torch

        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.trainer.generation_config.max_new_tokens = horizon
            return self.generate([list(x) for x in prompts])

    def generate(self, prompts: list[list[int]]) -> list[list[int]]:
        return self.trainer._generate_single_turn(prompts, None, {})  # type: ignore[no-any-return]

    def log_probabilities(self, prompts: Sequence[Tokens], completions: Sequence[Tokens], role: str) -> Any:
        import torch

        ids, mask, at = self.padded(prompts, completions)
        t, keep = self.trainer, ids.shape[1] - at
        with torch.no_grad():
            if role == "policy" or t.ref_model is not None:
                model = t.model if role == "policy" else t.ref_model
                said = t._get_per_token_logps_and_entropies(model, ids, mask, keep)[0]
            else:
                with use_adapter(t, None):
                    said = t._get_per_token_logps_and_entropies(t.model, ids, mask, keep)[0]
        return said * mask[:, at:]

    def train(self, task: Task, seed: int, micro_batch: int | None, resume: bool) -> None:
        def reward(prompts: Any, completion_ids: list[list[int]], number: list[int], **_: Any) -> list[float]:
            return task.reward([task.prompts[i] for i in number], completion_ids).tolist()  # type: ignore[misc, no-any-return]

        settings = {
            **arguments_of(task, seed, micro_batch),
            "shuffle_dataset": False,
            "num_generations": self.group,
            "max_completion_length": task.horizon,
            "beta": task.parameters["beta"],
            **self.settings,
        }
        rows = self.prompts(task, task.batch // self.group)
        kind = trainer_class(self.module, self.name, self.release)
        self.trainer = fit(self, kind, rows, settings, resume, reward_funcs=reward)


def use_adapter(trainer: Any, name: str | None) -> Any:
    """TRL's own context manager, as the trainer's module calls it."""
    module = importlib.import_module(type(trainer).__module__)
    return module.use_adapter(trainer.accelerator.unwrap_model(trainer.model), adapter_name=name)


class TrlRloo(_Grouped):
    module, name, config = "trainer.rloo_trainer", "RLOOTrainer", "RLOOConfig"


class TrlGrpo(_Grouped):
    module, name, config = "trainer.grpo_trainer", "GRPOTrainer", "GRPOConfig"

    def generate(self, prompts: list[list[int]]) -> list[list[int]]:
        return self.trainer._generate_single_turn(prompts, None, {}, num_generations=1)[0]  # type: ignore[no-any-return]


class _Online(_Trl):
    def judge(self) -> dict[str, Any]:
        return {"reward_funcs": [lambda prompts, **_: [0.0] * len(prompts)]}

    def common(self) -> dict[str, Any]:
        return {
            **super().common(),
            "max_new_tokens": self.world.horizon,
            "max_length": self.world.context,
            "temperature": self.temperature,
        }


class TrlOnlineDpo(_Online):
    """`train`: its judge, a reward function, is told the task's preference by a draw: the winner of a pair gets 1.

    Completions are drawn micro-batch by micro-batch, so that another split of a batch is another draw: level 5 looks at
    accumulation, where `settings` ask for it."""

    module = "experimental.online_dpo.online_dpo_trainer"
    name, config = "OnlineDPOTrainer", "OnlineDPOConfig"
    options: ClassVar[Mapping[str, tuple[Any, ...]]] = {"resume": (False, True)}
    exact: ClassVar[tuple[str, ...]] = ("resume",)
    against = "online_dpo"

    def train(self, task: Task, seed: int, resume: bool) -> None:
        import torch

        def judge(prompts: Any, completion_ids: list[list[int]], number: list[int], **_: Any) -> list[float]:
            n, end = len(number) // 2, self.world.end
            ys = [y[: y.index(end) + 1] if end in y else y for y in completion_ids]  # the rest is padding
            asked = [task.prompts[i] for i in number[:n]]
            p = torch.as_tensor(task.preference(asked, ys[:n], ys[n:]))  # type: ignore[misc]
            first = (torch.rand(n) < p).double()  # torch's own numbers, which a checkpoint keeps
            return torch.cat([first, 1 - first]).tolist()  # type: ignore[no-any-return]

        settings = {
            **arguments_of(task, seed, None),
            "train_sampling_strategy": "sequential",
            "max_new_tokens": task.horizon,
            "beta": task.parameters["beta"],
            **self.settings,
        }
        kind = trainer_class(self.module, self.name, self.release)
        rows = self.prompts(task, task.batch)
        self.trainer = fit(self, kind, rows, settings, resume, reward_funcs=[judge])

    def sample(self, prompts: Sequence[Tokens], horizon: int, seed: int, role: str) -> Sequence[Tokens]:
        """It draws two to a prompt; one of them."""
        import torch

        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.trainer.generation_config.max_new_tokens = horizon
            texts = [text_of(self.world, x) for x in prompts]
            _, _, ids, mask, _ = self.trainer._generate(self.trainer.model, texts)
        half = slice(0, len(prompts)) if seed % 2 else slice(len(prompts), None)
        return [row[m].tolist() for row, m in zip(ids[half], mask[half].bool(), strict=True)]

    def log_probabilities(self, prompts: Sequence[Tokens], completions: Sequence[Tokens], role: str) -> Any:
        import torch

        ids, mask, at = self.padded(prompts, completions)
        t = self.trainer
        off = role == "reference" and t.ref_model is None
        model = t.ref_model if role == "reference" and not off else t.model
        with torch.no_grad(), t.model.disable_adapter() if off else contextlib.nullcontext():
            said = t._forward(model, ids[:, :at], mask[:, :at], ids[:, at:], mask[:, at:])
        return said * mask[:, at:]


class _Paired(_Online):
    """Nash-MD and XPO: a response of the policy beside one of the mixture, or of the reference."""

    release = "1.13.0"
    own_pad: ClassVar[bool] = (
        False  # whether rewards are asked for with a pad token that is not the end token
    )

    def scores(self, data: dict[str, Tensor], at: int) -> tuple[Tensor, Tensor]:
        """Of the policy and of the reference, by token."""
        raise NotImplementedError

    def log_probabilities(self, prompts: Sequence[Tokens], completions: Sequence[Tokens], role: str) -> Any:
        import torch

        ids, mask, at = self.padded(prompts, completions)
        with torch.no_grad():
            return self.scores({"input_ids": ids, "attention_mask": mask}, at)[int(role == "reference")]

    def generated(self, prompts: dict[str, Any]) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def sample(self, prompts: Sequence[Tokens], horizon: int, seed: int, role: str) -> Sequence[Tokens]:
        import torch

        ids, mask, at = self.padded(prompts, [(self.world.end,) for _ in prompts])
        given: dict[str, Any] = {
            "input_ids": ids[:, :at],
            "attention_mask": mask[:, :at],
            "raw": list(prompts),
        }
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.trainer.generation_config.max_new_tokens = horizon
            both = self.generated(given)
        sides = self.trainer._process_completions(*both, given)
        data = sides[0 if role == "policy" else 1]
        rows = zip(data["input_ids"][:, at:], data["attention_mask"][:, at:].bool(), strict=True)
        return [row[m].tolist() for row, m in rows]

    def rewards(
        self,
        prompts: Sequence[Tokens],
        completions: Sequence[Tokens],
        scores: Callable[..., Any],
        penalty: float,
    ) -> Any:
        """By `_compute_rewards`, with a reward model whose hidden state is the score."""
        pad = self.world.vocabulary if self.own_pad else self.world.pad
        ids, mask, at = self.padded(prompts, completions, pad)
        t, data = self.trainer, {"input_ids": ids, "attention_mask": mask}

        def backbone(input_ids: Tensor, attention_mask: Tensor, **_: Any) -> Any:
            return SimpleNamespace(last_hidden_state=scores(input_ids, attention_mask.long())[..., None])

        keep = t.reward_funcs, t.args, t.processing_class
        t.processing_class = SimpleNamespace(pad_token_id=pad, eos_token_id=self.world.end)
        t.reward_funcs = SimpleNamespace(base_model_prefix="body", body=backbone, score=lambda x: x)
        t.args = copy.copy(t.args)
        t.args.missing_eos_penalty = penalty
        found = t._compute_rewards(data, data, at)[1]
        t.reward_funcs, t.args, t.processing_class = keep
        return found


class TrlNashMd(_Paired):
    module, name, config = "experimental.nash_md.nash_md_trainer", "NashMDTrainer", "NashMDConfig"
    roles = ("policy", "reference", "mixture")
    drawn = ("policy", "mixture")
    share = SHARE

    def common(self) -> dict[str, Any]:
        return {**super().common(), "mixture_coef": [self.share]}

    def scores(self, data: dict[str, Tensor], at: int) -> tuple[Tensor, Tensor]:
        return self.trainer._compute_logprobs(self.trainer.model, data, at)  # type: ignore[no-any-return]

    def generated(self, prompts: dict[str, Any]) -> tuple[Tensor, Tensor]:
        return self.trainer._generate_completions(self.trainer.model, prompts)  # type: ignore[no-any-return]


class TrlXpo(_Paired):
    module, name, config = "experimental.xpo.xpo_trainer", "XPOTrainer", "XPOConfig"
    drawn = ("policy", "reference")

    def scores(self, data: dict[str, Tensor], at: int) -> tuple[Tensor, Tensor]:
        said = self.trainer._compute_logprobs(self.trainer.model, data, data, at)
        return said[0], said[3]

    def generated(self, prompts: dict[str, Any]) -> tuple[Tensor, Tensor]:
        return self.trainer._generate_completions(prompts, self.trainer.model)  # type: ignore[no-any-return]
