"""The graph of comparisons: which responses are compared with which, and what that leaves open.

Comparisons determine a reward only up to a constant on each connected component: with two components, a number may be
added to every reward of one and no comparison says otherwise. A comparison of a response with itself says nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from .kernels import Index

SHOWN = 5  # members of a component that an error names


def components(pairs: ArrayLike, n: int) -> list[Index]:
    """The connected components of n responses, given the m pairs that were compared: (m, 2) numbers in 0, ..., n - 1.

    Each is an increasing array of members; the largest comes first, equal ones in the order of their first member.
    A response that was never compared is a component by itself.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    edges = _checked(pairs, n)
    graph = coo_array((np.ones(len(edges), dtype=bool), (edges[:, 0], edges[:, 1])), shape=(n, n))
    count, label = connected_components(graph, directed=False)
    order = np.argsort(label, kind="stable")  # members of a label stay increasing
    groups = np.split(order.astype(np.int64), np.cumsum(np.bincount(label, minlength=count))[:-1])
    return sorted(groups, key=lambda group: (-len(group), int(group[0])))


def check_connected(first: ArrayLike, second: ArrayLike, n: int, names: Sequence[str] | None = None) -> None:
    """ValueError when the comparisons of first[i] and second[i] (m,) leave a component unidentified, with its members.

    names  of the n responses for the error, None = their numbers
    """
    a, b = np.asarray(first), np.asarray(second)
    if a.shape != b.shape or a.ndim != 1:
        raise ValueError(
            f"first has shape {a.shape} and second {b.shape}; both must be (m,), an entry a comparison"
        )
    if names is not None and len(names) != n:
        raise ValueError(f"there are {len(names)} names for {n} responses")
    groups = components(np.column_stack([a, b]), n)
    if len(groups) == 1:
        return
    lost = groups[1]
    shown = ", ".join(repr(str(names[i])) if names is not None else str(i) for i in lost[:SHOWN])
    more = f" and {len(lost) - SHOWN} more" if len(lost) > SHOWN else ""
    others = f" (and {len(groups) - 2} more such components)" if len(groups) > 2 else ""
    raise ValueError(
        f"the comparison graph has {len(groups)} components: no comparison joins {{{shown}{more}}} to the other "
        f"{n - len(lost)} responses{others}, so that the level of their rewards is unidentified; compare one of them "
        "with one of the others, leave them out, or regularise"
    )


def _checked(pairs: ArrayLike, n: int) -> Index:
    if n < 1:
        raise ValueError(f"n is {n}; there must be at least one response")
    edges = np.asarray(pairs)
    if not edges.size:
        edges = np.zeros((0, 2), dtype=np.int64)
    if edges.ndim != 2 or edges.shape[1] != 2 or edges.dtype.kind not in "iu":
        raise ValueError(
            f"pairs has shape {edges.shape} and type {edges.dtype}; expected (m, 2) whole numbers"
        )
    outside = ((edges < 0) | (edges >= n)).any(axis=1)
    if outside.any():
        k = int(np.flatnonzero(outside)[0])
        raise ValueError(
            f"comparison {k} is of {edges[k].tolist()}; responses are numbered from 0 to {n - 1}"
        )
    return edges.astype(np.int64)
