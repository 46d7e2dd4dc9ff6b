"""The settings of a training run, all in one place and checked when they are made."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

Labels = Literal["draw", "soft", "argmax"]
Schedule = Literal["constant", "linear", "cosine"]

# A run may be continued with other values of these: they do not change the numbers of the steps made so far.
_FREE = frozenset({"steps", "checkpoint_every", "keep", "sample_prompts", "log_with", "device"})


@dataclass(frozen=True)
class TrainSettings:
    """How a method is run; what it optimises are its `parameters` (beta, tau, ...), given beside.

    steps           optimiser steps, all together
    batch           rows (comparisons, or single responses) a step, over all processes
    micro_batch     rows in one backward pass of one process; None = batch. It changes memory, not the gradient
    round_batches   iterative methods: batches of rows collected in a round
    epochs          iterative methods: passes over a round's rows, and earlier rounds' where the method keeps them
    group           responses (or comparisons) drawn for each prompt of a round, one after another
    horizon         largest number of tokens of a completion
    labels          of comparisons: "draw" from the judge's P(first > second), as in the papers; "soft", P itself, the
                    mean of the draws; "argmax", the likelier side with certainty, which is another objective;
                    None = the method's own
    baseline        methods of rewards: "others", the mean reward of the other rows of the prompt's group (of the round
                    where group = 1) is subtracted, which leaves the expected gradient as it is; "none"
    optimiser       "adamw" or "sgd", with learning_rate; weight_decay, adam_betas, adam_epsilon
    schedule        of the learning rate after `warmup` linear steps: "constant", or down to 0 at `steps` as a line or a
                    quarter of a cosine
    max_grad_norm   longer gradients are shortened to it; None = never
    seed            of labels, draws and shuffling
    mixed_precision "no" or "bf16", through accelerate
    device          "cpu", or None = what accelerate finds
    checkpoint_every, keep   steps from one checkpoint to the next (0 = only at the end), and how many are kept
    sample_prompts  so many of the first prompts are answered at the start and at the end, for the reader
    log_with        tracker of accelerate's; "auto" = tensorboard where it is installed; None = none
    """

    steps: int = 100
    batch: int = 16
    micro_batch: int | None = None
    round_batches: int = 8
    epochs: int = 1
    group: int = 1
    horizon: int = 32
    labels: Labels | None = None
    baseline: Literal["others", "none"] = "others"
    optimiser: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = 1e-5
    weight_decay: float = 0.0
    adam_betas: tuple[float, float] = (0.9, 0.999)
    adam_epsilon: float = 1e-8
    schedule: Schedule = "constant"
    warmup: int = 0
    max_grad_norm: float | None = None
    seed: int = 0
    mixed_precision: Literal["no", "bf16"] = "no"
    device: Literal["cpu"] | None = None
    checkpoint_every: int = 0
    keep: int = 2
    sample_prompts: int = 0
    log_with: str | None = "auto"

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "round_batches", "epochs", "group", "horizon", "keep"):
            _whole(name, getattr(self, name), 1)
        for name in ("warmup", "seed", "checkpoint_every", "sample_prompts"):
            _whole(name, getattr(self, name), 0)
        if self.micro_batch is not None:
            _whole("micro_batch", self.micro_batch, 1)
        if self.batch % self.group:
            raise ValueError(
                f"batch is {self.batch} and group {self.group}; a batch holds whole groups: make it a multiple"
            )
        for name in ("learning_rate", "adam_epsilon", "max_grad_norm"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} is {value}; it must be positive and finite")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay is {self.weight_decay}; it must be at least 0 and finite")
        betas = tuple(float(b) for b in self.adam_betas)
        if len(betas) != 2 or not all(0 <= b < 1 for b in betas):
            raise ValueError(f"adam_betas are {self.adam_betas}; they are two numbers in [0, 1)")
        object.__setattr__(self, "adam_betas", betas)
        choices: dict[str, tuple[Any, ...]] = {
            "labels": (None, *get_args(Labels)),
            "baseline": ("others", "none"),
            "optimiser": ("adamw", "sgd"),
            "schedule": get_args(Schedule),
            "mixed_precision": ("no", "bf16"),
            "device": (None, "cpu"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; it is one of {', '.join(map(repr, allowed))}"
                )

    def rate(self, step: int) -> float:
        """The learning rate of step 0, 1, ..., steps - 1."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / (self.warmup + 1)
        if self.schedule == "constant":
            return self.learning_rate
        share = (step - self.warmup) / max(1, self.steps - self.warmup)
        factor = 1 - share if self.schedule == "linear" else (1 + math.cos(math.pi * share)) / 2
        return self.learning_rate * factor

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self) | {"adam_betas": list(self.adam_betas)}

    def check_continues(self, earlier: Mapping[str, Any]) -> None:
        """ValueError that names the first setting in which this run differs from the `as_dict` of the earlier part."""
        now = self.as_dict()
        for field in fields(self):
            name = field.name
            fixed = name not in _FREE or (name == "steps" and self.schedule != "constant")
            if fixed and now[name] != earlier.get(name):
                raise ValueError(
                    f"the run in this folder has {name} = {earlier.get(name)!r}, and now it is {now[name]!r}: "
                    "take the earlier value, or another folder"
                )


def _whole(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} is {value!r}; it is a whole number of at least {least}")
