"""Compiled Bellman backups: expectation, maximum and argmax of one layer in one pass over its memory.

Sums run in the order of `kernel.expect`, so that the answer equals the generic backup's. out_q may be None.
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
    for s in range(n_states):
        best, choice = -np.inf, 0
        for a in range(n_actions):
            total = 0.0
            for k in range(indptr[row], indptr[row + 1]):
                total += data[k] * v[indices[k]]
            row += 1
            total += reward[s, a]
            if mask is not None:  # noqa: SIM102 - numba prunes this branch only when it stands alone
                if not mask[s, a]:
                    total = -np.inf
            if total > best:
                best, choice = total, a
            if out_q is not None:
                out_q[s, a] = total
        out_v[s] = best
        out_pi[s] = choice


@njit(cache=True, nogil=True)
def _tree_layer(reward, mask, v, last, out_v, out_pi, out_q):  # type: ignore[no-untyped-def]
    n_states, n_actions = reward.shape
    ended = v[0]
    child = 1
    for s in range(n_states):
        best, choice = -np.inf, 0
        leaf = last or s == 0
        for a in range(n_actions):
            value = reward[s, a]
            if leaf or a == n_actions - 1:
                value += ended
            else:
                value += v[child]
                child += 1
            if mask is not None:  # noqa: SIM102 - as above
                if not mask[s, a]:
                    value = -np.inf
            if value > best:
                best, choice = value, a
            if out_q is not None:
                out_q[s, a] = value
        out_v[s] = best
        out_pi[s] = choice


def csr_backup(kernel: CSRKernel) -> Callable[..., None]:
    def backup(h: int, reward: Any, mask: Any, v: Any, out_v: Any, out_pi: Any, out_q: Any) -> None:
        m = kernel.matrices[h]
        _csr_layer(m.indptr, m.indices, m.data, reward, mask, v, out_v, out_pi, out_q)

    return backup


def tree_backup(kernel: TreeKernel) -> Callable[..., None]:
    def backup(h: int, reward: Any, mask: Any, v: Any, out_v: Any, out_pi: Any, out_q: Any) -> None:
        _tree_layer(reward, mask, v, h + 1 == kernel.horizon, out_v, out_pi, out_q)

    return backup
