"""Feature maps phi(s, a) of linear rewards, and the features of whole trajectories."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from .kernels import Array
from .trajectories import Trajectories

Mode = Literal["sum", "concat"]


@dataclass(frozen=True, eq=False)
class FeatureMap:
    """phi[h]: (S_h, A, d), and how a trajectory's features are put together.

    mode "sum":    phi(tau) = sum_h phi(s_h, a_h) in R^d; the reward parameter theta is shared by all steps.
    mode "concat": phi(tau) = (phi(s_1, a_1), ..., phi(s_H, a_H)) in R^{dH}; theta may depend on h.
    In both, r(tau) = <phi(tau), theta> with theta in R^dim.
    """

    phi: Sequence[Array] | Array
    mode: Mode = "sum"
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.mode not in ("sum", "concat"):
            raise ValueError(f"mode is {self.mode!r}; expected 'sum' or 'concat'")
        if not len(self.phi):
            raise ValueError("phi has no layers; give phi[h], of shape (S_h, A, d), for each step")
        for h, phi in enumerate(self.phi):
            if phi.ndim != 3 or phi.shape[2] != self.phi[0].shape[2]:
                raise ValueError(
                    f"phi[h={h}] has shape {phi.shape}; expected (S_h, A, {self.phi[0].shape[-1]})"
                )
            if not np.isfinite(phi).all():
                raise ValueError(f"phi[h={h}] contains NaN or infinity")

    @property
    def horizon(self) -> int:
        return len(self.phi)

    @property
    def d(self) -> int:
        return int(self.phi[0].shape[2])

    @property
    def dim(self) -> int:
        """Dimension of phi(tau) and of theta: d for "sum", d * H for "concat"."""
        return self.d if self.mode == "sum" else self.d * self.horizon

    @cached_property
    def max_norm(self) -> float:
        """max ||phi(s, a)||_2; the theory of linear MDPs wants at most 1."""
        return float(max(np.sqrt(np.einsum("sad,sad->sa", phi, phi)).max() for phi in self.phi))

    def per_step(self, theta: Array) -> Array:
        """theta (dim,) -> (H, d), the parameter that acts at each step."""
        theta = np.asarray(theta, dtype=np.float64)
        if theta.size != self.dim:
            raise ValueError(f"theta has shape {theta.shape}; mode {self.mode!r} wants {self.dim} numbers")
        return np.broadcast_to(theta.reshape(-1, self.d), (self.horizon, self.d))

    def rewards(self, theta: Array) -> list[Array]:
        """r[h]: (S_h, A) = <phi_h(s, a), theta_h>."""
        flat = zip(self.phi, self.per_step(theta), strict=True)  # one matrix-vector product a layer: BLAS
        return [(phi.reshape(-1, self.d) @ t).reshape(phi.shape[:2]) for phi, t in flat]

    def of(self, trajectories: Trajectories) -> Array:
        """phi(tau): (n, dim)."""
        s, a = trajectories.states, trajectories.actions
        steps = np.stack([phi[s[:, h], a[:, h]] for h, phi in enumerate(self.phi)], axis=1)
        return steps.sum(axis=1) if self.mode == "sum" else steps.reshape(len(s), -1)
