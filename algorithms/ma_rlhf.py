r"""Macro actions: generalised advantage estimation over groups of consecutive tokens.

Y. Chai, H. Sun, H. Fang, S. Wang, Y. Sun, H. Wu, "MA-RLHF: Reinforcement Learning from Human Feedback with Macro
Actions", ICLR 2025 (arXiv 2410.02743) and its code. All arrays are (B, T): B responses, T positions; `mask` is True on
the tokens of a response, which are contiguous in a row (prompt before, padding after); what lies outside is ignored.

  macro     (B, T) the number of the macro action that each token belongs to, -1 outside the mask     a termination:
            `fixed` (n-grams), `randomised`, `perplexity`, or `from_starts` (given boundaries, say of a parser)
  V_m       = sum_i sigma_i V_i over the macro's tokens, sigma of `token_weights`: "equal" (the paper's default), "unit"
            (last token), "position" (∝ 1/(i+1)); and "first", the value where the macro starts
  R_m       = sum_i gamma^i r_i (the paper's, "sum") or sum_i sigma_i r_i (the code's, "code")
  delta_m   = R_m + gamma^len V_{m+1} - V_m,    A_m = delta_m + gamma^len lam A_{m+1},    V = A = 0 after the last
  A_t = A_m and the critic's target A_m + V_m for every token t of m                                  `macro_gae`

n = 1 is `token_gae`; n >= T is REINFORCE over sequences. With the terminal reward alone, its credit at the first token
is lam^{ceil(T/n) - 1}. `last_alone` gives the last token a macro to itself, as the code does, so that "code" does not
average the terminal reward. discount = "macro" uses gamma once a macro in place of gamma^len (they agree at the
paper's gamma = 1).

Departures: boundaries are those of each row (the code takes those of row 0 for the batch); "first" is added. With
"first" and boundaries fixed in advance the baseline V_m does not depend on the macro's actions, and an exact critic
leaves the expected policy gradient what it is for tokens. With the paper's weightings V_m looks at states that the
actions have led to, and with `perplexity` or `last_alone` the boundary looks at the token itself: both bias the
gradient (`theory/claims/ma_rlhf.py` measures it). The policy's ratios stay per token; they are not part of this file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..envs.kernels import Array, Index
from .optimisation.losses import check_share

Mask = NDArray[np.bool_]
Weighting = Literal["equal", "unit", "position", "first"]
Aggregation = Literal["sum", "code"]
Discount = Literal["smdp", "macro"]

# ---- terminations ----------------------------------------------------------------------------------------------------


def check_mask(mask: ArrayLike) -> Mask:
    """(B, T) with one run of True in every row."""
    m = np.asarray(mask)
    if m.ndim != 2 or m.dtype != np.bool_:
        raise ValueError(f"mask has shape {m.shape} and type {m.dtype}; expected booleans (B, T)")
    runs = np.diff(m.astype(np.int8), axis=1, prepend=0) == 1
    bad = np.flatnonzero(runs.sum(axis=1) != 1)
    if len(bad):
        raise ValueError(
            f"mask[{bad[0]}] has {int(runs[bad[0]].sum())} runs of tokens; a response is one run"
        )
    return m


def _positions(mask: Mask) -> Index:
    """0, 1, ... along each response."""
    return np.cumsum(mask, axis=1) - 1


def from_starts(mask: ArrayLike, starts: ArrayLike, last_alone: bool = False) -> Index:
    """macro from the tokens at which a macro starts, (B, T) booleans; the first token always does."""
    m, s = check_mask(mask), np.asarray(starts, dtype=np.bool_)
    if s.shape != m.shape:
        raise ValueError(f"starts has shape {s.shape}; the mask has {m.shape}")
    position = _positions(m)
    s = m & (s | (position == 0))
    if last_alone:
        s = s | (m & (position == m.sum(axis=1, keepdims=True) - 1))
    return np.where(m, np.cumsum(s, axis=1) - 1, -1)


def fixed(mask: ArrayLike, n: int, last_alone: bool = False) -> Index:
    """n-grams: every macro has n tokens, the last what is left."""
    if int(n) != n or n < 1:
        raise ValueError(f"n is {n}; an n-gram has a whole number of tokens, at least 1")
    m = check_mask(mask)
    return from_starts(m, _positions(m) % int(n) == 0, last_alone)


def randomised(
    mask: ArrayLike,
    rng: np.random.Generator,
    lengths: Sequence[int] = (1, 2, 3, 5, 10),
    repeats: int = 1,
    last_alone: bool = False,
) -> Index:
    """Lengths in random order, each `repeats` times, shuffled for every row; then the rest is one macro."""
    bag = np.repeat(np.asarray(lengths, dtype=np.int64), repeats)
    if not len(bag) or bag.min() < 1:
        raise ValueError(
            f"lengths is {tuple(lengths)}, {repeats} times; at least one length, each >= 1, is needed"
        )
    m = check_mask(mask)
    ends = np.cumsum(rng.permuted(np.tile(bag, (len(m), 1)), axis=1), axis=1)
    return from_starts(m, (_positions(m)[:, :, None] == ends[:, None, :]).any(axis=2), last_alone)


def perplexity(mask: ArrayLike, log_probabilities: ArrayLike, last_alone: bool = False) -> Index:
    """A macro starts at every token whose perplexity exp(-log pi) is above that of the token before."""
    m, log_p = check_mask(mask), np.asarray(log_probabilities, dtype=np.float64)
    if log_p.shape != m.shape:
        raise ValueError(f"log_probabilities has shape {log_p.shape}; the mask has {m.shape}")
    rises = np.zeros(m.shape, dtype=np.bool_)
    rises[:, 1:] = log_p[:, 1:] < log_p[:, :-1]
    return from_starts(m, rises, last_alone)


# ---- sums over macros ------------------------------------------------------------------------------------------------


def _check_macro(macro: ArrayLike) -> Index:
    k = np.asarray(macro)
    if k.ndim != 2 or not np.issubdtype(k.dtype, np.integer):
        raise ValueError(
            f"macro has shape {k.shape} and type {k.dtype}; expected integers (B, T), see `fixed`"
        )
    return k


def macro_sum(x: ArrayLike, macro: Index) -> Array:
    """(B, M): the sum of x (B, T) over each macro; 0 for macros that a row does not have."""
    inside, rows = macro >= 0, np.broadcast_to(np.arange(len(macro))[:, None], macro.shape)
    width = int(macro.max()) + 1
    flat = rows[inside] * width + macro[inside]
    total = np.bincount(flat, weights=np.asarray(x, dtype=np.float64)[inside], minlength=len(macro) * width)
    return np.asarray(total.reshape(len(macro), width))


def lengths_of(macro: Index) -> Index:
    """(B, M): the number of tokens of each macro."""
    return macro_sum(np.ones(macro.shape), macro).astype(np.int64)


def _broadcast(x: Array, macro: Index) -> Array:
    """(B, T): x (B, M) for every token of each macro, 0 outside."""
    return np.where(macro >= 0, np.take_along_axis(x, np.maximum(macro, 0), axis=1), 0.0)


def _offsets(macro: Index) -> Index:
    """(B, T): 0, 1, ... within each macro."""
    length = lengths_of(macro)
    before = np.cumsum(length, axis=1) - length
    return np.where(
        macro >= 0, np.cumsum(macro >= 0, axis=1) - 1 - _broadcast(before.astype(float), macro), 0
    ).astype(np.int64)


def token_weights(macro: ArrayLike, weighting: Weighting) -> Array:
    """sigma (B, T): sums to 1 over the tokens of each macro."""
    k = _check_macro(macro)
    offset, length = _offsets(k), _broadcast(lengths_of(k).astype(float), k)
    if weighting == "equal":
        raw = np.ones(k.shape)
    elif weighting == "unit":
        raw = (offset == length - 1).astype(float)
    elif weighting == "first":
        raw = (offset == 0).astype(float)
    elif weighting == "position":
        raw = 1 / (offset + 1.0)
    else:
        raise ValueError(f"weighting is {weighting!r}; expected equal, unit, position or first")
    raw = np.where(k >= 0, raw, 0.0)
    return np.divide(raw, _broadcast(macro_sum(raw, k), k), out=np.zeros(k.shape), where=k >= 0)


# ---- advantages ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Advantages:
    """advantage, target (B, T), 0 outside the mask; by macro: rewards, values (B, M)."""

    advantage: Array
    target: Array
    rewards: Array
    values: Array


def _finite(x: ArrayLike, name: str, inside: Mask) -> Array:
    a = np.asarray(x, dtype=np.float64)
    if a.shape != inside.shape:
        raise ValueError(f"{name} has shape {a.shape}; the macros have {inside.shape}")
    a = np.where(inside, a, 0.0)
    if not np.isfinite(a).all():
        b, t = (int(i) for i in np.argwhere(~np.isfinite(a))[0])
        raise ValueError(f"{name}[{b}, {t}] is {a[b, t]}; it must be finite on the tokens of a response")
    return a


def macro_gae(
    rewards: ArrayLike,
    values: ArrayLike,
    macro: ArrayLike,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    weighting: Weighting = "equal",
    aggregation: Aggregation = "sum",
    discount: Discount = "smdp",
) -> Advantages:
    """Advantages of macro actions, for every token; values[b, t] is that of the prefix before token t."""
    k = _check_macro(macro)
    r, v = _finite(rewards, "rewards", k >= 0), _finite(values, "values", k >= 0)
    gamma, lam = check_share(gamma, "gamma"), check_share(lam, "lam")
    sigma = token_weights(k, weighting)
    if aggregation not in ("sum", "code") or discount not in ("smdp", "macro"):
        raise ValueError(f"aggregation {aggregation!r} is sum or code, discount {discount!r} smdp or macro")
    within = gamma ** _offsets(k) if discount == "smdp" else 1.0
    R, V = macro_sum(r * (within if aggregation == "sum" else sigma), k), macro_sum(v * sigma, k)
    ahead = gamma ** lengths_of(k).astype(float) if discount == "smdp" else np.full(R.shape, gamma)
    A = _gae(R, V, ahead, lam)
    return Advantages(_broadcast(A, k), _broadcast(A + V, k), R, V)


def token_gae(
    rewards: ArrayLike, values: ArrayLike, mask: ArrayLike, *, gamma: float = 1.0, lam: float = 0.95
) -> Array:
    """A_t = delta_t + gamma lam A_{t+1}, delta_t = r_t + gamma V_{t+1} - V_t: (B, T), 0 outside the mask."""
    m = check_mask(mask)
    r, v = _finite(rewards, "rewards", m), _finite(values, "values", m)
    return np.where(
        m, _gae(r, v, np.full(r.shape, check_share(gamma, "gamma")), check_share(lam, "lam")), 0.0
    )


def _gae(r: Array, v: Array, ahead: Array, lam: float) -> Array:
    """The recursion along axis 1; columns that a row does not have hold r = v = 0, so that they add nothing."""
    A, after, value = np.empty_like(r), np.zeros(len(r)), np.zeros(len(r))
    for t in reversed(range(r.shape[1])):
        after = r[:, t] + ahead[:, t] * value - v[:, t] + ahead[:, t] * lam * after
        value = v[:, t]
        A[:, t] = after
    return A
