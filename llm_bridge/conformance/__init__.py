"""Conformance: is a trainer's loss the objective that it names? Answered by enumeration on an exact world.

    from preflab.llm_bridge.conformance import assert_conforms
    assert_conforms(my_loss, against="dpo", beta=0.1)

`batch` is the adapter protocol, `conform` says what is measured, `catalogue` what can be found, `targets` what a
trainer can be held to. torch is imported when a loss is called, not with the package.
"""

from .batch import Completions, PairBatch, SampleBatch, TrainerLoss, total
from .conform import TrainerError, assert_conforms, conform
from .report import Check, Match, Report
from .targets import TARGETS, Target

__all__ = [
    "TARGETS",
    "Check",
    "Completions",
    "Match",
    "PairBatch",
    "Report",
    "SampleBatch",
    "Target",
    "TrainerError",
    "TrainerLoss",
    "assert_conforms",
    "conform",
    "total",
]
