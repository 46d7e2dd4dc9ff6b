"""Compiled Bellman backups: expectation, maximum and argmax of one layer in one pass over its memory.

Sums run in the order of `kernel.expect`, so that the answers equal those of the generic backup. out_q may be None.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit

from ...envs import CSRKernel, TreeKernel


@njit(cache=True, nogil=True)
def _csr_layer(indptr, indices, data, reward, mask, v, out_v, out_pi, out_q):  # type: ignore[no-untyped-def]
    n_states, n_actions = reward.shape
    row = 0
    first = indptr[0]
    for s in range(n_states):
        best, choice = -np.inf, 0
        for a in range(n_actions):
            row += 1
            last = indptr[row]
            total = 0.0
            for k in range(first, last):
                total += data[k] * v[indices[k]]
            first = last
            total += reward[s, a]
            if mask is not None:  # noqa: SIM102 - numba prunes this branch only when it stands alone
                if not mask[s, a]:
                    total = -np.inf
            better = total > best
            best = total if better else best
            choice = a if better else choice
            if out_q is not None:
                out_q[s, a] = total
        out_v[s] = best
        out_pi[s] = choice


@njit(cache=True, nogil=True)
def _ended_rows(reward, mask, ended, n_states, out_v, out_pi, out_q):  # type: ignore[no-untyped-def]
    """The first n_states rows, where every action leads to the ended state, whose value is `ended`."""
    n_actions = reward.shape[1]
    for s in range(n_states):
        best, choice = -np.inf, 0
        for a in range(n_actions):
            value = reward[s, a] + ended
            if mask is not None:  # noqa: SIM102 - as above
                if not mask[s, a]:
                    value = -np.inf
            better = value > best  # selections instead of jumps: random rewards defeat the branch prediction
            best = value if better else best
            choice = a if better else choice
            if out_q is not None:
                out_q[s, a] = value
        out_v[s] = best
        out_pi[s] = choice


@njit(cache=True, nogil=True)
def _live_rows(reward, mask, v, out_v, out_pi, out_q):  # type: ignore[no-untyped-def]
    """Rows 1, 2, ...: actions lead to the next `branching` entries of v in turn, the last action to v[0]."""
    n_states, n_actions = reward.shape
    branching = n_actions - 1
    ended = v[0]
    child = 1
    for s in range(1, n_states):
        best, choice = -np.inf, 0
        for a in range(branching):
            value = reward[s, a] + v[child + a]
            if mask is not None:  # noqa: SIM102 - as above
                if not mask[s, a]:
                    value = -np.inf
            better = value > best
            best = value if better else best
            choice = a if better else choice
            if out_q is not None:
                out_q[s, a] = value
        child += branching
        value = reward[s, branching] + ended
        if mask is not None:  # noqa: SIM102 - as above
            if not mask[s, branching]:
                value = -np.inf
        if out_q is not None:
            out_q[s, branching] = value
        better = value > best
        out_v[s] = value if better else best
        out_pi[s] = branching if better else choice


def csr_backup(kernel: CSRKernel) -> Callable[..., None]:
    def backup(h: int, reward: Any, mask: Any, v: Any, out_v: Any, out_pi: Any, out_q: Any) -> None:
        m = kernel.matrices[h]
        # seen as unsigned, the indices are spared the treatment of negative ones
        indptr, indices = (x.view(f"u{x.itemsize}") for x in (m.indptr, m.indices))
        _csr_layer(indptr, indices, m.data, reward, mask, v, out_v, out_pi, out_q)

    return backup


def tree_backup(kernel: TreeKernel) -> Callable[..., None]:
    def backup(h: int, reward: Any, mask: Any, v: Any, out_v: Any, out_pi: Any, out_q: Any) -> None:
        last = h + 1 == kernel.horizon
        _ended_rows(reward, mask, v[0], len(reward) if last else 1, out_v, out_pi, out_q)
        if not last:
            _live_rows(reward, mask, v, out_v, out_pi, out_q)

    return backup
