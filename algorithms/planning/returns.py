r"""The exact law of the return, and what follows from it: win rates, best-of-n, pass@k.

`return_law` carries (state, return so far) forward and merges what coincides, so that its cost is governed
by the number of distinct returns: small where rewards are on a grid, the number of leaves on a generic
tree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from scipy.special import rel_entr

from ...envs import CSRKernel, FiniteMDP, Kernel, TreeKernel
from ...envs.kernels import Array, Index
from ...envs.mdp import Layered
from .policies import check_policy, check_reward, layer_probabilities
from .sequences import sequence_law, tree_of

MERGE = 1e-12  # returns closer than this, relative to the largest possible one, are the same up to rounding
_BLOCK = 1 << 20  # entries of the preference table held at a time


class PreferenceLink(Protocol):
    """`envs.links.Link`, as far as it is needed here."""

    def value(self, x: Any) -> Any: ...


@dataclass(frozen=True, eq=False)
class ReturnLaw:
    """A law of finite support: values (k,) increasing, masses (k,) positive with sum 1."""

    values: Array
    masses: Array

    @property
    def mean(self) -> float:
        return float(self.values @ self.masses)

    def tail(self, threshold: float) -> float:
        """P(R >= threshold); a return that misses the threshold by rounding alone reaches it."""
        reached = self.values >= threshold - MERGE * max(1.0, abs(threshold))
        return 1.0 if reached.all() else float(self.masses[reached].sum())


def _successors(kernel: Kernel, h: int, s: Index, a: Index) -> tuple[Index, Index, Array]:
    """All transitions out of n pairs (s, a): number of the pair, successor, probability."""
    if isinstance(kernel, TreeKernel):
        return np.arange(len(s)), kernel.sample(h, s, a, np.zeros(len(s))), np.ones(len(s))
    if isinstance(kernel, CSRKernel):
        m = kernel.matrices[h][s * kernel.n_actions + a].tocoo()
        return m.row.astype(np.int64), m.col.astype(np.int64), m.data
    p = kernel.dense(h)[s, a]
    pair, successor = np.nonzero(p)
    return pair, successor, p[pair, successor]


def _merge(state: Index, value: Array, mass: Array, tolerance: float) -> tuple[Index, Array, Array]:
    """Add up the atoms of one state whose values differ by rounding only; the mean is kept."""
    order = np.lexsort((value, state))
    state, value, mass = state[order], value[order], mass[order]
    new = np.concatenate([[True], (np.diff(state) != 0) | (np.diff(value) > tolerance)])
    first = np.flatnonzero(new)
    total = np.add.reduceat(mass, first)
    # relative to the first value of each group, so that equal values stay equal to the last bit
    shift = np.add.reduceat(mass * (value - value[first][np.cumsum(new) - 1]), first) / total
    return state[first], value[first] + shift, total


def return_law(
    model: FiniteMDP, policy: Layered, reward: Layered | None = None, *, start: int | None = None
) -> ReturnLaw:
    """The law of r(tau) under the policy, from the model's initial law or from the state `start`."""
    policy, rewards = check_policy(model, policy), check_reward(model, reward)
    tolerance = MERGE * max(float(sum(np.abs(r).max() for r in rewards)), np.finfo(float).tiny)
    if start is None:
        state = np.flatnonzero(model.initial)
        mass = model.initial[state]
    elif 0 <= start < model.sizes[0]:
        state, mass = np.array([start]), np.ones(1)
    else:
        raise ValueError(f"start is {start}; the first layer has the states 0..{model.sizes[0] - 1}")
    value = np.zeros(len(state))
    for h in range(model.horizon):
        pi = layer_probabilities(policy[h][state], model.n_actions)
        atom, action = np.nonzero(pi)
        s, v, m = state[atom], value[atom] + rewards[h][state[atom], action], mass[atom] * pi[atom, action]
        pair, successor, p = _successors(model.kernel, h, s, action)
        state, value, mass = _merge(successor, v[pair], m[pair] * p, tolerance)
    _, value, mass = _merge(np.zeros_like(state), value, mass, tolerance)
    return ReturnLaw(value, mass)


# ---- win rates ----

Preference = PreferenceLink | Callable[[Array, Array], Array] | np.ndarray


def win_rate(
    model: FiniteMDP, policy: Layered, other: Layered, preference: Preference, reward: Layered | None = None
) -> float:
    """P(a trajectory of `policy` beats one of `other`), drawn independently from the same first state.

    preference  a link Phi: Phi(R - R');
                or a function (R (m, 1), R' (1, n)) -> P(first preferred) (m, n) of the two returns;
                or, on a prefix tree, a table (L, L) or (roots, L, L) over responses: P(y preferred to y'),
                in the order of `sequences`.
    The double sum over the two laws runs in blocks, so that its memory does not grow with their product.
    """
    if isinstance(preference, np.ndarray):
        return _table_win_rate(model, policy, other, preference)
    if hasattr(preference, "value"):
        link = preference.value
        compare: Callable[[Array, Array], Array] = lambda x, y: link(x - y)  # noqa: E731
    elif callable(preference):
        compare = preference
    else:
        raise TypeError(
            f"preference is a {type(preference).__name__}; expected a link, a function or a table"
        )
    total = 0.0
    for s in np.flatnonzero(model.initial):
        first, second = (return_law(model, pi, reward, start=int(s)) for pi in (policy, other))
        total += float(model.initial[s]) * _expected_preference(first, second, compare)
    return total


def _expected_preference(
    first: ReturnLaw, second: ReturnLaw, compare: Callable[[Array, Array], Array]
) -> float:
    total = 0.0
    for rows in _blocks(len(first.values), len(second.values)):
        table = compare(first.values[rows, None], second.values[None, :])
        total += float(first.masses[rows] @ (table @ second.masses))
    return total


def _blocks(n: int, width: int) -> Iterator[slice]:
    step = max(1, _BLOCK // width)
    return (slice(i, i + step) for i in range(0, n, step))


def _table_win_rate(model: FiniteMDP, policy: Layered, other: Layered, table: np.ndarray) -> float:
    kernel = tree_of(model)
    first, second = sequence_law(model, policy), sequence_law(model, other)
    n = first.shape[1]
    if table.shape not in ((n, n), (kernel.roots, n, n)):
        raise ValueError(
            f"preference has shape {table.shape}; expected ({n}, {n}) or ({kernel.roots}, {n}, {n})"
        )
    if not (table.min() >= 0 and table.max() <= 1):
        raise ValueError("preference has entries outside [0, 1]; they must be probabilities")
    rates = [
        p @ (t @ q) for p, q, t in zip(first, second, np.broadcast_to(table, (len(first), n, n)), strict=True)
    ]
    return float(model.initial[1:] @ np.array(rates))


# ---- best of n, pass@k ----


def _check_count(n: int, what: str) -> int:
    if int(n) != n or n < 1:
        raise ValueError(f"{what} is {n}; it must be a whole number, at least 1")
    return int(n)


def best_of_n(law: ReturnLaw, n: int) -> ReturnLaw:
    """The law of the largest of n independent returns: P(max <= v) = F(v)^n."""
    n = _check_count(n, "n")
    below = np.concatenate([[0.0], np.cumsum(law.masses)])
    below /= below[-1]
    masses = np.diff(below**n)
    kept = masses > 0
    return ReturnLaw(law.values[kept], masses[kept])


def best_of_n_kl(law: ReturnLaw, n: int) -> float:
    """KL(best-of-n policy || base policy) for one prompt, ties among the n broken uniformly at random.

    The density ratio depends on the return alone, so that the KL is that of the two return laws. It is at
    most log n - (n-1)/n, with equality for continuous returns.
    """
    n = _check_count(n, "n")
    below = np.concatenate([[0.0], np.cumsum(law.masses)])
    below /= below[-1]
    return float(rel_entr(np.diff(below**n), np.diff(below)).sum())


def pass_at_k(
    model: FiniteMDP, policy: Layered, k: int, threshold: float, reward: Layered | None = None
) -> float:
    """P(at least one of k independent responses to the same prompt has a return >= threshold)."""
    k = _check_count(k, "k")
    total = 0.0
    for s in np.flatnonzero(model.initial):
        success = return_law(model, policy, reward, start=int(s)).tail(threshold)
        total += float(model.initial[s]) * (1.0 if success == 1.0 else -np.expm1(k * np.log1p(-success)))
    return total
