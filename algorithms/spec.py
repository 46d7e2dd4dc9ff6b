"""What a method offers to the command line: `preflab run ALGORITHM ENV`.

An algorithm module exposes one `ALGORITHM = AlgorithmSpec(...)`. Its runs are continued, saved and loaded by
the `Run` protocol; a run of N then M episodes equals a run of N+M, bit for bit, also through save and load.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np


class Run(Protocol):
    """The state of a run. `records` holds one row an episode as equal-length arrays, `regret` (exact) among
    them."""

    @property
    def records(self) -> Mapping[str, np.ndarray] | np.ndarray: ...

    def advance(self, episodes: int) -> Any: ...

    def save(self, path: Path) -> Any: ...


@dataclass(frozen=True)
class AlgorithmSpec:
    """A method by name.

    name      as in the module: "pr_lsvi"
    settings  a dataclass; its fields are the keys of `--set key=value`
    start     (model, annotator, settings, seed) -> Run
    load      (path, model, annotator) -> Run, from a file that `Run.save` wrote
    presets   name -> (model, **changed fields) -> settings, chosen by `--set preset=name`; the first is the
              default. Empty: settings(**changed fields)
    """

    name: str
    title: str
    paper: str
    settings: type
    start: Callable[[Any, Any, Any, int], Run]
    load: Callable[[Path, Any, Any], Run]
    presets: Mapping[str, Callable[..., Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not dataclasses.is_dataclass(self.settings):
            raise TypeError(f"algorithm {self.name}: settings must be a dataclass, got {self.settings!r}")

    @property
    def setting_names(self) -> tuple[str, ...]:
        return tuple(f.name for f in dataclasses.fields(self.settings) if f.init)


@dataclass(frozen=True)
class LossSpec:
    """A policy-optimisation loss by name: a pure function in the form of `optimisation.losses`.

    An algorithm module with a loss exposes one `LOSS = LossSpec(...)`. The loss's positional arguments are tensors, its
    keyword-only ones the paper's parameters.
    """

    name: str
    title: str
    paper: str
    loss: Callable[..., Any]

    @property
    def inputs(self) -> tuple[str, ...]:
        """The tensors that the loss takes, in order."""
        return self._names(inspect.Parameter.POSITIONAL_OR_KEYWORD)

    @property
    def parameters(self) -> tuple[str, ...]:
        return self._names(inspect.Parameter.KEYWORD_ONLY)

    def _names(self, kind: Any) -> tuple[str, ...]:
        given = inspect.signature(self.loss).parameters.values()
        return tuple(p.name for p in given if p.kind is kind)
