"""Thousands of lanes of one model in lockstep, each with a random stream of its own.

A lane's trajectory depends on the seed and the lane's number alone, not on how many lanes run beside it, nor on how
they are split over simulators. All lanes stand at the same step h, for every episode has exactly H steps.

Random numbers: lane i runs SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) from a 64-bit start and with an odd
increment that are both hashed from (seed, i), so that two lanes are not shifts of one sequence. Draw n of a lane is a
function of (seed, i, n).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from .kernels import Array, CSRKernel, Index, TreeKernel
from .mdp import FiniteMDP, Layered
from .trajectories import Trajectories

Words = NDArray[np.uint64]

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(z: Words, scratch: Words) -> Words:
    """The finaliser of SplitMix64, a bijection of 64-bit words; z is overwritten and returned."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        np.right_shift(z, np.uint64(shift), out=scratch)
        np.bitwise_xor(z, scratch, out=z)
        np.multiply(z, np.uint64(factor), out=z)
    np.right_shift(z, np.uint64(31), out=scratch)
    return np.bitwise_xor(z, scratch, out=z)


class LaneStreams:
    """One stream of uniforms for each of the lanes first, ..., first + n - 1 of a seed."""

    def __init__(self, seed: int | np.random.SeedSequence, n: int, first: int = 0) -> None:
        sequence = seed if isinstance(seed, np.random.SeedSequence) else np.random.SeedSequence(seed)
        start, step = sequence.generate_state(2, np.uint64)
        # Weyl sequences, mixed twice: once for the lane, once with the root, as two seeds must not share lanes.
        lanes = (np.arange(first, first + n, dtype=np.uint64) + np.uint64(1)) * GOLDEN
        self._a, self._b = np.empty(n, dtype=np.uint64), np.empty(n, dtype=np.uint64)
        lanes = _mix(lanes, self._a)
        self.state = _mix(lanes ^ start, self._a)
        self.increment = _mix(lanes ^ step, self._a) | np.uint64(1)
        # An increment of nearly equal bits makes a weak sequence: spread it, as SplittableRandom does.
        flips = np.bitwise_count(self.increment ^ (self.increment >> np.uint64(1)))
        self.increment = np.where(flips < 24, self.increment ^ np.uint64(0xAAAAAAAAAAAAAAAA), self.increment)

    def uniform(self) -> Array:
        """The next draw of every lane in [0, 1), 53 bits: (n,)."""
        np.add(self.state, self.increment, out=self.state)
        np.copyto(self._a, self.state)
        bits = _mix(self._a, self._b)
        np.right_shift(bits, np.uint64(11), out=bits)
        return np.multiply(bits.view(np.int64), 2.0**-53, dtype=np.float64)


@dataclass(frozen=True, eq=False)
class _Table:
    """Rows of at most K successors: successor (rows * K,) and cdf (rows * K,), padded by infinity; K a power of two."""

    successor: Index
    cdf: Array
    width: int

    def draw(self, row: Index, u: Array) -> Index:
        """The first successor whose cumulative probability exceeds u, by bisection without branches: (n,)."""
        at = row * self.width if self.width > 1 else row
        half = self.width // 2
        while half:
            at += (self.cdf.take(at + (half - 1)) <= u) * half
            half //= 2
        return self.successor.take(at)


def _table(matrix: Any) -> _Table:
    """The padded table of a CSR matrix (rows, S')."""
    counts = np.diff(matrix.indptr)
    width = 1 << int(counts.max() - 1).bit_length()
    row = np.repeat(np.arange(len(counts)), counts)
    column = np.arange(len(row)) - np.repeat(matrix.indptr[:-1], counts)
    mass = np.zeros((len(counts), width))
    mass[row, column] = matrix.data
    cdf = np.cumsum(mass, axis=1)
    cdf /= cdf[:, -1:]
    cdf[np.arange(width) >= counts[:, None] - 1] = np.inf  # nothing lies beyond a row's last successor
    successor = np.zeros((len(counts), width), dtype=np.int64)
    successor[row, column] = matrix.indices
    return _Table(successor.ravel(), cdf.ravel(), width)


class Step(NamedTuple):
    """What one step of all lanes gives: the rewards (n,) and next states (n,); `ended`: these begin a new episode."""

    states: Index
    rewards: Array
    ended: bool


class BatchedSimulator:
    """`lanes` copies of a model, stepped together; at the horizon every lane starts a new episode at once.

    model       any FiniteMDP; dense and sparse kernels become padded successor tables, trees need none
    lanes       how many
    seed        int or SeedSequence; lane i's episodes are a function of (model, seed, first_lane + i, its actions)
    first_lane  the number of the first lane, to split one family of lanes over simulators

    `h` is the step that all lanes are at, `states` (lanes,) their states in layer h, `mask` the actions open to them.
    Equal models give equal trajectories, whether their kernel is dense, sparse or a tree.
    """

    def __init__(
        self, model: FiniteMDP, lanes: int, seed: int | np.random.SeedSequence, first_lane: int = 0
    ) -> None:
        if lanes < 1:
            raise ValueError(f"lanes is {lanes}; it must be at least 1")
        if first_lane < 0:
            raise ValueError(f"first_lane is {first_lane}; lanes are numbered from 0")
        self.model, self.lanes, self.first_lane = model, lanes, first_lane
        self._streams = LaneStreams(seed, lanes, first_lane)
        self._tables = _tables(model)
        start = np.cumsum(model.initial)
        self._start = start / start[-1]
        self._rewards = [np.ascontiguousarray(r).ravel() for r in model.reward]
        mask = model.action_mask
        self._masks = None if mask is None else [np.ascontiguousarray(m).ravel() for m in mask]
        self.h = 0
        self.states = self._first()

    def _first(self) -> Index:
        return np.searchsorted(self._start, self._streams.uniform(), side="right")

    @property
    def mask(self) -> NDArray[np.bool_]:
        """The actions that are available to each lane: (lanes, A)."""
        if self.model.action_mask is None:
            return np.ones((self.lanes, self.model.n_actions), dtype=np.bool_)
        return self.model.action_mask[self.h][self.states]

    def act(self, policy: Layered) -> Index:
        """Actions (lanes,) of a layered policy, (S_h,) integers or (S_h, A) probabilities, by the lanes' streams."""
        pi = policy[self.h]
        if pi.ndim == 1:
            return pi[self.states].astype(np.int64)
        cdf = np.cumsum(pi, axis=1)[self.states]
        u = self._streams.uniform() * cdf[:, -1]
        return (cdf <= u[:, None]).sum(axis=1)

    def step(self, actions: Index) -> Step:
        """Take one action (lanes,) in every lane. The states of the result are those to act on next."""
        h, a = self.h, np.asarray(actions)
        if a.shape != (self.lanes,) or a.dtype.kind not in "iu":
            raise ValueError(
                f"actions have shape {a.shape} and type {a.dtype}; expected ({self.lanes},) integers"
            )
        if a.min() < 0 or a.max() >= self.model.n_actions:
            lane = int(np.flatnonzero((a < 0) | (a >= self.model.n_actions))[0])
            raise ValueError(f"actions[{lane}] is {a[lane]}; expected 0..{self.model.n_actions - 1}")
        row = self.states * self.model.n_actions + a
        if self._masks is not None and not self._masks[h].take(row).all():
            lane = int(np.flatnonzero(~self._masks[h].take(row))[0])
            raise ValueError(
                f"action {a[lane]} is not available at step {h} in state {self.states[lane]} (lane {lane}); see .mask"
            )
        rewards = self._rewards[h].take(row)
        self.h = (h + 1) % self.model.horizon
        if self.h == 0:  # the last transition leads to layer H, which nobody acts on: no need to draw it
            self.states = self._first()
        elif self._tables is None:
            self.states = self.model.kernel.sample(h, self.states, a, self._streams.uniform())
        else:
            self.states = self._tables[h].draw(row, self._streams.uniform())
        return Step(self.states, rewards, self.h == 0)

    def rollout(self, policy: Layered) -> Trajectories:
        """One whole episode of every lane, from step 0: `lanes` trajectories."""
        if self.h:
            raise ValueError(f"the lanes are at step {self.h}; a rollout starts at step 0")
        states = np.empty((self.lanes, self.model.horizon), dtype=np.int64)
        actions = np.empty_like(states)
        for h in range(self.model.horizon):
            states[:, h] = self.states
            actions[:, h] = self.act(policy)
            self.step(actions[:, h])
        return Trajectories(states, actions)

    def checkpoint(self) -> dict[str, np.ndarray]:
        """Everything that the future depends on besides the model, as arrays (for `numpy.savez`, without pickles)."""
        return {
            "h": np.array(self.h),
            "states": self.states.copy(),
            "streams": self._streams.state.copy(),
            "increments": self._streams.increment.copy(),
        }

    def restore(self, saved: Any) -> None:
        """Go on from a `checkpoint` (a mapping; an opened .npz will do) of as many lanes of the same model."""
        wanted = {"states": np.int64, "streams": np.uint64, "increments": np.uint64}
        arrays: dict[str, np.ndarray] = {}
        for key, dtype in wanted.items():
            arrays[key] = np.array(saved[key], dtype=dtype)
            if arrays[key].shape != (self.lanes,):
                raise ValueError(
                    f"checkpoint['{key}'] has shape {arrays[key].shape}; this simulator has {self.lanes} lanes"
                )
        h = int(saved["h"])
        if not 0 <= h < self.model.horizon or not (arrays["states"] < self.model.sizes[h]).all():
            raise ValueError("the checkpoint belongs to another model: its step or states do not exist here")
        self.h, self.states = h, arrays["states"]
        self._streams.state, self._streams.increment = arrays["streams"], arrays["increments"]


def _tables(model: FiniteMDP) -> list[_Table] | None:
    """One table a layer, shared where layers share their matrix; None for a tree."""
    if isinstance(model.kernel, TreeKernel):
        return None
    kernel = model.kernel
    if not isinstance(kernel, CSRKernel):
        layers = (kernel.dense(h) for h in range(model.horizon))
        kernel = CSRKernel([sp.csr_array(p.reshape(-1, p.shape[2])) for p in layers], kernel.n_actions)
    distinct = {id(m): _table(m) for m in kernel.matrices}
    return [distinct[id(m)] for m in kernel.matrices]
