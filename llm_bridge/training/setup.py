"""What stays the same through a run: the policies, the method, the optimiser, the judge, the processes."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..policy import Scored, TokenPolicy, Tokens, TransformerPolicy, adapter_off, frozen_copy
from .methods import Method
from .settings import TrainSettings

if TYPE_CHECKING:
    from torch import Tensor

    from .judges import Judge


@dataclass(frozen=True, eq=False)
class Setup:
    """policy samples and is what the caller gave; trained is the same weights as accelerate runs them."""

    method: Method
    parameters: Mapping[str, float]
    settings: TrainSettings
    policy: TransformerPolicy
    trained: TransformerPolicy
    reference: Scored
    prompts: Sequence[Tokens]
    judge: Judge | None
    accelerator: Any
    optimiser: Any
    weights: Mapping[str, Any]  # the trainable parameters, by name

    @property
    def bare_optimiser(self) -> Any:
        """torch's, below accelerate's wrapper."""
        return getattr(self.optimiser, "optimizer", self.optimiser)

    def block(self, n: int) -> range:
        """Which of n rows this process works on: blocks of equal size, but for the last."""
        share = -(-n // self.accelerator.num_processes)
        first = min(n, share * self.accelerator.process_index)
        return range(first, min(n, first + share))


def trainable(policy: TransformerPolicy) -> dict[str, Any]:
    """The parameters that take gradients, by name; ValueError where there are none."""
    model = policy.model
    if not hasattr(model, "named_parameters"):
        raise ValueError(
            f"{type(model).__name__} is no torch module, so that its weights are not known: wrap it in one "
            "(a table: table_policy(..., trainable=True))"
        )
    found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not found:
        raise ValueError(
            f"no weight of {type(model).__name__} takes gradients: call requires_grad_() on those to train"
        )
    return found


def default_reference(policy: TransformerPolicy) -> TransformerPolicy:
    """The policy as it is now: without its adapter where that starts as zero, else a frozen copy."""
    return adapter_off(policy) if _has_zero_adapter(policy.model) else frozen_copy(policy)


def _has_zero_adapter(model: Any) -> bool:
    """A peft model whose adapter changes nothing yet: LoRA's second factors are zero."""
    if not hasattr(model, "disable_adapter"):
        return False
    second = [p for name, p in model.named_parameters() if p.requires_grad and "lora_B" in name]
    others = [
        n for n, p in model.named_parameters() if p.requires_grad and not _LORA.intersection(n.split("."))
    ]
    return bool(second) and not others and not any(p.detach().any() for p in second)


_LORA = frozenset({"lora_A", "lora_B"})


def make_setup(
    policy: TransformerPolicy,
    method: Method,
    parameters: Mapping[str, float],
    settings: TrainSettings,
    *,
    reference: Scored | None,
    prompts: Sequence[Tokens],
    judge: Judge | None,
    folder: Path | None,
    accelerator: Any = None,
) -> Setup:
    weights = trainable(policy)
    ref = default_reference(policy) if reference is None else reference
    if {"mixture", "reference"} & set(method.draws) and not isinstance(ref, TokenPolicy):
        raise ValueError(
            f"{method.name} draws from the reference, so {type(ref).__name__} will not do: give a model"
        )
    if accelerator is None:
        accelerator = make_accelerator(settings, folder)
    _check_accelerator(accelerator)
    model, optimiser = accelerator.prepare(policy.model, _optimiser(weights, settings))
    _move(ref, accelerator.device)
    bare = replace(policy, model=accelerator.unwrap_model(model))
    return Setup(
        method=method,
        parameters=parameters,
        settings=settings,
        policy=bare,
        trained=replace(policy, model=model),
        reference=ref,
        prompts=prompts,
        judge=judge,
        accelerator=accelerator,
        optimiser=optimiser,
        weights=trainable(bare),  # sharding replaces them
    )


def _check_accelerator(accelerator: Any) -> None:
    """ValueError where the weights would not be parameters by their names any more."""
    name = accelerator.distributed_type.value
    if name == "FSDP" and not accelerator.is_fsdp2:
        raise ValueError(
            "FSDP 1 lays the weights end to end, so that they have no names: give "
            "Accelerator(fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2))"
        )
    if name in ("DEEPSPEED", "MEGATRON_LM"):
        raise ValueError(
            f"the loop does not run under {name}, which keeps the weights and the optimiser to itself: use accelerate "
            "with DDP, or with FSDP 2 where the model does not fit on one device"
        )


def make_accelerator(settings: TrainSettings, folder: Path | None) -> Any:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    made = AcceleratorState._shared_state.get("_mixed_precision")
    if made is not None and made != settings.mixed_precision:
        raise ValueError(
            f"accelerate already runs with mixed_precision {made!r} in this process and keeps to it; the settings have "
            f"{settings.mixed_precision!r}: use a process for each, or give train an accelerator"
        )
    log_with = settings.log_with
    if log_with == "auto":
        log_with = "tensorboard" if importlib.util.find_spec("tensorboard") else None
    if folder is None:
        log_with = None
    return Accelerator(
        cpu=settings.device == "cpu",
        mixed_precision=settings.mixed_precision,
        log_with=log_with,
        project_dir=None if folder is None else str(folder),
    )


def _optimiser(weights: Mapping[str, Any], settings: TrainSettings) -> Any:
    from torch.optim import SGD, AdamW

    if settings.optimiser == "sgd":
        return SGD(weights.values(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    return AdamW(
        weights.values(),
        lr=settings.learning_rate,
        betas=settings.adam_betas,
        eps=settings.adam_epsilon,
        weight_decay=settings.weight_decay,
    )


def _move(reference: Any, device: Any) -> None:
    model = getattr(reference, "model", None)
    if model is not None and hasattr(model, "to") and not hasattr(model, "disable_adapter"):
        model.to(device)


# ---- weights in shards (FSDP 2): each process holds a part of each; for the whole, all must ask together -----------


def full(x: Any) -> Any:
    """All of a tensor that may be in shards."""
    return x.full_tensor() if _in_shards(x) else x


def like(x: Any, whole: Tensor) -> Any:
    """`whole`, in shards where x is."""
    if not _in_shards(x):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole.to(x.device), x.device_mesh, x.placements)


def class_name(model: Any) -> str:
    """FSDP makes a class of its own mixin and the model's class; it is the latter that says which model it is."""
    made = type(model)
    return (made.__bases__[-1] if hasattr(model, "set_reshard_after_forward") else made).__name__


def _in_shards(x: Any) -> bool:
    return hasattr(x, "full_tensor")


@contextmanager
def whole_weights(setup: Setup) -> Iterator[None]:
    """All weights on each process for a while, so that it may call the model as often as it likes, alone.

    Outside, a call of a model in shards waits for the same call of all others. All processes come in together.
    """
    parts = [m for m in setup.policy.model.modules() if hasattr(m, "set_reshard_after_forward")]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
            again = setup.accelerator.state.fsdp_plugin.reshard_after_forward
            part.set_reshard_after_forward(bool(again), recurse=False)


@contextmanager
def lent_weights(setup: Setup, values: Mapping[str, Tensor] | None = None) -> Iterator[None]:
    """`whole_weights`, of other values where some are given."""
    with nullcontext() if values is None else weights_as(setup.weights, values), whole_weights(setup):
        yield


@contextmanager
def weights_as(weights: Mapping[str, Any], values: Mapping[str, Tensor]) -> Iterator[None]:
    """The parameters hold other values for a while, without a copy; in shards, by one."""
    if any(map(_in_shards, weights.values())):
        import torch

        before = {name: p.detach().clone() for name, p in weights.items()}
        with torch.no_grad():
            for name, p in weights.items():
                p.copy_(values[name])
        try:
            yield
        finally:
            with torch.no_grad():
                for name, p in weights.items():
                    p.copy_(before[name])
        return
    kept = {name: p.data for name, p in weights.items()}
    for name, p in weights.items():
        p.data = values[name]
    try:
        yield
    finally:
        for name, p in weights.items():
            p.data = kept[name]


Callback = Callable[[dict[str, Any]], None]
