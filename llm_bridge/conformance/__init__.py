"""Conformance: does a trainer do what it names? Answered by enumeration on exact worlds.

A loss, by its expected gradient and its fixed point (levels 1 and 4):

    from preflab.llm_bridge.conformance import assert_conforms
    assert_conforms(my_loss, against="dpo", beta=0.1)

A whole trainer, by what it draws, scores and learns (levels 2, 3, 5 and 6):

    from preflab.llm_bridge.conformance import assert_trainer_conforms
    assert_trainer_conforms(MyAdapter)

`batch` and `whole` are the adapter protocols, `conform` and `conform_trainer` say what is measured, `catalogue`,
`laws`, `scores`, `runs` and `invariance` what can be found, `targets` and `runs` what a trainer can be held to. torch
is imported when something is called, not with the package.
"""

from .batch import Completions, PairBatch, SampleBatch, TrainerLoss, total
from .conform import TrainerError, assert_conforms, conform
from .conform_trainer import assert_trainer_conforms, conform_trainer
from .models import ModelWorld, model_world
from .report import Check, Match, Report
from .runs import OBJECTIVES, Comparison, Task
from .targets import TARGETS, Target
from .whole import WholeTrainer, is_whole

__all__ = [
    "OBJECTIVES",
    "TARGETS",
    "Check",
    "Comparison",
    "Completions",
    "Match",
    "ModelWorld",
    "PairBatch",
    "Report",
    "SampleBatch",
    "Target",
    "Task",
    "TrainerError",
    "TrainerLoss",
    "WholeTrainer",
    "assert_conforms",
    "assert_trainer_conforms",
    "conform",
    "conform_trainer",
    "is_whole",
    "model_world",
    "total",
]
