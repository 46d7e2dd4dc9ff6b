"""How TRL's trainers are made to do a `Task` (levels 5 and 6), by their own configuration and their own `train`.

rows of a step   per_device_train_batch_size times gradient_accumulation_steps, in the order in which they are given
schedule         lr_scheduler_type, no warm-up;  optimiser  TRL's default (AdamW of torch), or optim="sgd"
off              weight_decay=0, max_grad_norm=0
resume           a checkpoint after half of the steps, an exception right after it, and a new trainer on the world's
                 models with train(resume_from_checkpoint=...)
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .runs import Task
    from .trl_whole import _Trl

OPTIMISERS: Mapping[str, Mapping[str, Any]] = {"adamw": {}, "sgd": {"optim": "sgd"}}


class _Interrupted(Exception):
    pass


def arguments_of(task: Task, seed: int, micro_batch: int | None) -> dict[str, Any]:
    """By the names of transformers' TrainingArguments. A micro-batch that does not divide the rows of a step: only the
    last one of an epoch may have fewer rows, so that a step must be an epoch."""
    rows = task.batch if micro_batch is None else min(micro_batch, task.batch)
    if task.batch % rows and len(task.comparisons) != task.batch:
        raise ValueError(
            f"steps of {task.batch} rows cannot be made in micro-batches of {rows}: transformers' Trainer has whole "
            f"micro-batches before the end of an epoch; a step that is an epoch has {task.batch} comparisons in all, "
            f"not {len(task.comparisons)}"
        )
    return {
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": -(-task.batch // rows),
        "max_steps": task.steps,
        "learning_rate": task.learning_rate,
        "lr_scheduler_type": task.schedule,
        **OPTIMISERS[task.optimiser],
        "weight_decay": 0.0,
        "max_grad_norm": 0.0,
        "seed": seed,
        "disable_tqdm": True,
        "logging_strategy": "no",
    }


def fit(
    adapter: _Trl,
    kind: Any,
    rows: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any],
    resume: bool,
    **given: Any,
) -> Any:
    """The trainer after training; `rows` are its dataset, `given` what its constructor is given besides."""
    import torch
    from transformers import PrinterCallback, TrainerCallback

    class Interrupt(TrainerCallback):  # type: ignore[misc]
        def on_save(self, *_: Any, **__: Any) -> None:
            raise _Interrupted

    def made(**saving: Any) -> Any:
        trainer = adapter.made(kind, rows, {**settings, **saving}, **given)
        trainer.remove_callback(PrinterCallback)
        torch.manual_seed(settings["seed"])  # the constructor does it, and `made` undoes it
        return trainer

    with torch.random.fork_rng():
        if not resume:
            trainer = made()
            trainer.train()
            return trainer
        half = settings["max_steps"] // 2
        folder = Path(adapter.folder) / "run"
        shutil.rmtree(folder, ignore_errors=True)
        saving = {"output_dir": str(folder), "save_strategy": "steps", "save_steps": half}
        first = made(**saving)
        first.add_callback(Interrupt)
        with suppress(_Interrupted):
            first.train()
        trainer = made(**{**saving, "save_strategy": "no"})
        torch.rand(7)  # another process, where random numbers are elsewhere
        trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{half}"))
        return trainer
