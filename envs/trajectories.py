"""Batches of trajectories: what policies produce and annotators compare."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .kernels import Index


@dataclass(frozen=True, eq=False)
class Trajectories:
    """n trajectories of H steps: states (n, H) and actions (n, H), int64, indices within their layers."""

    states: Index
    actions: Index

    def __post_init__(self) -> None:
        for what in ("states", "actions"):
            object.__setattr__(self, what, np.atleast_2d(np.asarray(getattr(self, what), dtype=np.int64)))
        if self.states.shape != self.actions.shape:
            raise ValueError(f"states have shape {self.states.shape} but actions {self.actions.shape}")

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, index: slice | Index) -> Trajectories:
        return Trajectories(self.states[index], self.actions[index])

    @staticmethod
    def concatenate(parts: Sequence[Trajectories]) -> Trajectories:
        return Trajectories(
            np.concatenate([p.states for p in parts]), np.concatenate([p.actions for p in parts])
        )
