"""Transition kernels of layered finite-horizon MDPs: dense, sparse (CSR) and tree.

Layer h = 0, ..., H holds the states 0, ..., S_h - 1; every layer has the same A actions; P_h(s' | s, a) leads from
layer h to layer h+1. A kernel offers three operations and every solver is written once, on those:

    expect(h, v)        (S P_h v)(s, a) = sum_s' P_h(s'|s,a) v(s'):   (..., S_{h+1}) -> (..., S_h, A)
    push(h, mu)         its adjoint, sum_{s,a} mu(s,a) P_h(s'|s,a):   (S_h, A) -> (S_{h+1},)
    sample(h, s, a, u)  the inverse-CDF draw of s' from uniforms u in [0, 1), elementwise over lanes
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

# float64 and int64; numpy's own annotations are too coarse for a checker to follow the dtype.
Array = NDArray[Any]
Index = NDArray[Any]

ROW_SUM_TOLERANCE = 1e-9


class Kernel(Protocol):
    """What every solver relies on (see the module docstring for the meaning and the shapes)."""

    @property
    def n_actions(self) -> int: ...
    @property
    def sizes(self) -> tuple[int, ...]: ...  # S_0, ..., S_H
    def expect(self, h: int, v: Array) -> Array: ...
    def push(self, h: int, mu: Array) -> Array: ...
    def sample(self, h: int, s: Index, a: Index, u: Array) -> Index: ...
    def dense(self, h: int) -> Array: ...  # (S_h, A, S_{h+1})


def _view(p: Array) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """What two arrays share when they are one: address, shape and strides (a transpose shares the address alone)."""
    return p.__array_interface__["data"][0], p.shape, p.strides


def _check_rows(h: int, n_actions: int, rows: Array, lowest: Array) -> None:
    """Raise with the place named when a row is not a probability vector; rows are (S*A,) sums and minima."""
    bad = ~((lowest >= 0) & (np.abs(rows - 1) <= ROW_SUM_TOLERANCE))  # NaN compares false, hence the negation
    if bad.any():
        i = int(np.flatnonzero(bad)[0])
        s, a = divmod(i, n_actions)
        if np.isnan(rows[i]):
            what = "contains NaN"
        elif lowest[i] < 0:
            what = f"contains a negative probability ({lowest[i]:.6g})"
        else:
            what = f"sums to {rows[i]:.10g}, not to 1"
        raise ValueError(f"P[h={h}, s={s}, a={a}] {what}; {int(bad.sum())} row(s) of this layer are affected")


def _check_chain(inner: Sequence[tuple[int, int, int]]) -> None:
    """Layers (S_h, A, S_{h+1}) must be non-empty and fit together."""
    if not inner:
        raise ValueError("horizon is 0: a finite-horizon model needs at least one layer of transitions")
    for h, (n, a, _) in enumerate(inner):
        if a == 0:
            raise ValueError(f"P[h={h}] has an empty action set; give at least one action")
        if n == 0:
            raise ValueError(f"P[h={h}] has no states; give at least one state per layer")
        if a != inner[0][1]:
            raise ValueError(
                f"P[h={h}] has {a} actions but P[h=0] has {inner[0][1]}; mask actions, do not drop them"
            )
        if h and n != inner[h - 1][2]:
            raise ValueError(f"P[h={h}] starts from {n} states but P[h={h - 1}] leads to {inner[h - 1][2]}")


@dataclass(frozen=True, eq=False)
class DenseKernel:
    """P as an array (H, S, A, S), or as a sequence of H arrays (S_h, A, S_{h+1}). May be a broadcast view over h."""

    P: Sequence[Array] | Array

    def __post_init__(self) -> None:
        layers = [np.asarray(p, dtype=np.float64) for p in self.P]
        for h, p in enumerate(layers):
            if p.ndim != 3:
                raise ValueError(f"P[h={h}] has shape {p.shape}; expected (S_h, A, S_next)")
        _check_chain([p.shape for p in layers])  # type: ignore[misc]
        checked = set()
        for h, p in enumerate(layers):
            if _view(p) not in checked:  # a stationary kernel given as a broadcast view is checked once
                checked.add(_view(p))
                _check_rows(h, p.shape[1], p.sum(-1).ravel(), p.min(-1, initial=np.inf).ravel())
        if isinstance(self.P, np.ndarray):
            object.__setattr__(self, "P", np.asarray(self.P, dtype=np.float64))
        else:
            object.__setattr__(self, "P", tuple(layers))

    @property
    def n_actions(self) -> int:
        return int(self.P[0].shape[1])

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        return tuple(int(p.shape[0]) for p in self.P) + (int(self.P[-1].shape[2]),)

    @cached_property
    def _cdf(self) -> Sequence[Array]:
        cumulative: dict[object, Array] = {}
        for p in self.P:
            if _view(p) not in cumulative:
                c = np.cumsum(p, axis=-1)
                c /= c[..., -1:]  # the last successor with mass ends exactly at 1
                cumulative[_view(p)] = c
        return [cumulative[_view(p)] for p in self.P]

    def expect(self, h: int, v: Array) -> Array:
        p = self.P[h]
        return (v @ p.reshape(-1, p.shape[2]).T).reshape(*v.shape[:-1], *p.shape[:2])

    def push(self, h: int, mu: Array) -> Array:
        p = self.P[h]
        return mu.reshape(-1) @ p.reshape(-1, p.shape[2])

    def sample(self, h: int, s: Index, a: Index, u: Array) -> Index:
        return np.asarray((self._cdf[h][s, a] <= np.asarray(u)[..., None]).sum(-1), dtype=np.int64)

    def dense(self, h: int) -> Array:
        return self.P[h]


@dataclass(frozen=True, eq=False)
class CSRKernel:
    """P as H CSR matrices (S_h * A, S_{h+1}), row s * A + a. The same matrix object may stand for many layers."""

    matrices: Sequence[sp.csr_array]
    n_actions: int

    def __post_init__(self) -> None:
        if self.n_actions < 1:
            raise ValueError("empty action set: n_actions must be at least 1")
        seen: dict[int, sp.csr_array] = {}
        layers = []
        matrices = tuple(self.matrices)  # held while their ids are in use, also when a generator made them
        for h, given in enumerate(matrices):
            if id(given) not in seen:
                m = sp.csr_array(given, dtype=np.float64, copy=True)  # the caller's matrix stays as it is
                if m.shape[0] % self.n_actions:
                    raise ValueError(
                        f"P[h={h}] has {m.shape[0]} rows, not a multiple of {self.n_actions} actions"
                    )
                m.sum_duplicates()
                lowest = np.asarray(m.min(axis=1).toarray()).ravel() if m.nnz else np.zeros(m.shape[0])
                _check_rows(h, self.n_actions, np.asarray(m.sum(axis=1)).ravel(), lowest)
                m.eliminate_zeros()
                seen[id(given)] = m
            layers.append(seen[id(given)])
        _check_chain([(m.shape[0] // self.n_actions, self.n_actions, m.shape[1]) for m in layers])
        object.__setattr__(self, "matrices", tuple(layers))

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        return (*(m.shape[0] // self.n_actions for m in self.matrices), self.matrices[-1].shape[1])

    @cached_property
    def _cumulative(self) -> dict[int, Array]:
        return {id(m): np.concatenate([[0.0], np.cumsum(m.data)]) for m in self.matrices}

    def expect(self, h: int, v: Array) -> Array:
        m = self.matrices[h]
        flat = m @ v if v.ndim == 1 else (m @ v.reshape(-1, v.shape[-1]).T).T
        return np.asarray(flat).reshape(*v.shape[:-1], self.sizes[h], self.n_actions)

    def push(self, h: int, mu: Array) -> Array:
        return np.asarray(self.matrices[h].T @ mu.reshape(-1))

    def sample(self, h: int, s: Index, a: Index, u: Array) -> Index:
        m = self.matrices[h]
        total = self._cumulative[id(m)]
        row = np.asarray(s) * self.n_actions + np.asarray(a)
        first, last = m.indptr[row].astype(np.int64), m.indptr[row + 1].astype(np.int64)
        target = total[first] + np.asarray(u) * (total[last] - total[first])
        position = np.clip(np.searchsorted(total, target, side="right") - 1, first, last - 1)
        return m.indices[position].astype(np.int64)

    def dense(self, h: int) -> Array:
        return self.matrices[h].toarray().reshape(self.sizes[h], self.n_actions, self.sizes[h + 1])


@dataclass(frozen=True, eq=False)
class TreeKernel:
    """The deterministic kernel of a prefix tree with an end action; it stores nothing.

    Layer h < H has state 0 = "ended" and states 1 + i, where i < roots * branching**h numbers the live prefixes in
    lexicographic order. Action a < branching appends: prefix i -> prefix i * branching + a. Action a = branching is
    the end action: it leads to "ended", which absorbs. At the last step every action ends, so S_H = 1.
    """

    roots: int
    branching: int
    horizon: int

    def __post_init__(self) -> None:
        for what in ("roots", "branching", "horizon"):
            if getattr(self, what) < 1:
                raise ValueError(f"{what} is {getattr(self, what)}: a prefix tree needs at least 1")

    @property
    def n_actions(self) -> int:
        return self.branching + 1

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        return (*(1 + self.roots * self.branching**h for h in range(self.horizon)), 1)

    def expect(self, h: int, v: Array) -> Array:
        q = np.empty((*v.shape[:-1], self.sizes[h], self.n_actions))
        q[...] = v[..., :1, None]
        if h + 1 < self.horizon:
            q[..., 1:, :-1] = v[..., 1:].reshape(*v.shape[:-1], -1, self.branching)
        return q

    def push(self, h: int, mu: Array) -> Array:
        if h + 1 == self.horizon:
            return np.array([mu.sum()])
        nu = np.empty(self.sizes[h + 1])
        nu[0] = mu[0].sum() + mu[1:, -1].sum()
        nu[1:] = mu[1:, :-1].reshape(-1)
        return nu

    def sample(self, h: int, s: Index, a: Index, u: Array) -> Index:
        s, a = np.asarray(s), np.asarray(a)
        ends = (s == 0) | (a == self.branching) | (h + 1 == self.horizon)
        return np.where(ends, 0, 1 + (s - 1) * self.branching + a).astype(np.int64)

    def dense(self, h: int) -> Array:
        p = np.zeros((self.sizes[h], self.n_actions, self.sizes[h + 1]))
        s, a = np.meshgrid(np.arange(self.sizes[h]), np.arange(self.n_actions), indexing="ij")
        p[s, a, self.sample(h, s, a, np.zeros(s.shape))] = 1.0
        return p
