"""Backward induction against a peer and against the memory traffic of the same work, in one run.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_planning.py

prints, for medians over repetitions:
    sparse   S=10^4, A=10, 10 successors, H=50: value_iteration / quantecon's backward_induction, wanted <= 1
    tree     3 x 10^7 leaves: value_iteration / (reading each reward and writing each value once), wanted <= 3
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import scipy.sparse as sp

sys.path.insert(0, str(Path(__file__).parents[2] / "src"))
from preflab.algorithms.planning import soft_value_iteration, uniform_policy, value_iteration
from preflab.envs import FiniteMDP


def medians(repetitions: int, *work: Callable[[], Any]) -> list[float]:
    """Seconds of each, measured in turns, so that a busy machine is busy for all; one warm-up each."""
    for f in work:
        f()
    seconds: list[list[float]] = [[] for _ in work]
    for _ in range(repetitions):
        for f, record in zip(work, seconds, strict=True):
            start = time.perf_counter()
            f()
            record.append(time.perf_counter() - start)
    return [median(record) for record in seconds]


def sparse(n_states: int = 10_000, n_actions: int = 10, successors: int = 10, horizon: int = 50) -> None:
    from quantecon.markov.ddp import DiscreteDP, backward_induction

    rng = np.random.default_rng(0)
    pairs = n_states * n_actions
    columns = rng.integers(n_states, size=(pairs, successors), dtype=np.int32)
    mass = rng.dirichlet(np.ones(successors), size=pairs)
    rows = np.repeat(np.arange(pairs, dtype=np.int32), successors)
    matrix = sp.csr_array((mass.ravel(), (rows, columns.ravel())), shape=(pairs, n_states))
    reward = rng.random((n_states, n_actions))
    model = FiniteMDP.sparse([matrix] * horizon, n_actions, np.broadcast_to(reward, (horizon, *reward.shape)))
    states, actions = np.divmod(np.arange(pairs), n_actions)
    warnings.filterwarnings("ignore", message="infinite horizon")
    peer = DiscreteDP(reward.ravel(), sp.csr_matrix(matrix), 1.0, states, actions)
    ours = value_iteration(model, q=False)
    theirs, _ = backward_induction(peer, horizon)
    assert np.abs(ours.V - theirs).max() < 1e-10
    lean, full, other = medians(
        7,
        lambda: value_iteration(model, q=False),
        lambda: value_iteration(model),
        lambda: backward_induction(peer, horizon),
    )
    print(
        f"sparse S={n_states} A={n_actions} H={horizon}: {lean * 1e3:.0f} ms ({full * 1e3:.0f} ms with Q), "
        f"quantecon {other * 1e3:.0f} ms; ratio {lean / other:.2f} ({full / other:.2f} with Q)"
    )


def tree(roots: int, branching: int, horizon: int) -> None:
    rng = np.random.default_rng(0)
    reward = [rng.random((1 + roots * branching**h, branching + 1)) for h in range(horizon)]
    model = FiniteMDP.tree(roots, branching, horizon, reward)
    leaves = roots * sum(branching**h for h in range(horizon + 1))
    out = [np.empty(len(r)) for r in reward]
    values = [np.zeros(len(r)) for r in reward]
    choices = [np.zeros(len(r), dtype=np.int64) for r in reward]

    def floor() -> float:
        total = 0.0
        for r, v, o in zip(reward, values, out, strict=True):
            total += r.sum()
            np.copyto(o, v)
        return total

    def whole_floor() -> float:
        """Also the policy, and into memory that is allocated anew: all that a solver must return."""
        total = 0.0
        kept = []
        for r, v, c in zip(reward, values, choices, strict=True):
            total += r.sum()
            kept.append((v.copy(), c.copy()))
        return total

    solve, bare, whole = medians(7, lambda: value_iteration(model, q=False), floor, whole_floor)
    print(
        f"tree {roots} x {branching}^{horizon} ({leaves:.2e} leaves): {solve * 1e3:.0f} ms, floor "
        f"{bare * 1e3:.0f} ms (rewards read, values written), {whole * 1e3:.0f} ms (and the policy, in new "
        f"memory); ratio {solve / bare:.2f}, {solve / whole:.2f}"
    )
    reference = uniform_policy(model)
    (soft,) = medians(1, lambda: soft_value_iteration(model, reference, 0.1, q=False))
    print(f"  soft value iteration on it: {soft:.2f} s")


if __name__ == "__main__":
    sparse()
    tree(1, 31, 5)
    tree(1, 4, 12)
    tree(2, 4, 12)
