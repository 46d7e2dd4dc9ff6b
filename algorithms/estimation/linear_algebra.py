"""Compiled kernels on Cholesky factors: rank-one updates and triangular solves at O(d^2), without calls into
LAPACK.

A positive definite matrix A is held as its lower factor L, A = L L^T, C-contiguous float64 (d, d); the strict
upper triangle of L is never read and never written. At the sizes of the lab (d <= 100) a call into LAPACK
costs as much as the arithmetic, and compiled callers cannot make one cheaply; hence these loops. The `_many`
forms work on a stack with the step h first. Inputs are not checked: these are inner loops, `gram.Gram` is the
checked door.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

# Re-association lets the dot products use vector registers; NaN and infinity keep their meaning.
_FAST = {"reassoc", "contract"}


@njit(cache=True, fastmath=_FAST)
def cholesky_update(L, x):
    """Replace L in place by the factor of L L^T + x x^T; x (d,) is not changed. O(d^2).

    A sweep of Givens rotations, row by row: rotation k turns (L[k, k], x[k]) into (r, 0). Rotations are
    orthogonal, so that rounding does not accumulate beyond that of a sum (no hyperbolic step is ever needed
    for an update).
    """
    d = L.shape[0]
    c = np.empty(d)
    s = np.empty(d)
    for i in range(d):
        row = L[i]
        carry = x[i]
        for k in range(i):
            kept = row[k]
            row[k] = c[k] * kept + s[k] * carry
            carry = c[k] * carry - s[k] * kept
        r = math.sqrt(row[i] * row[i] + carry * carry)
        c[i] = row[i] / r
        s[i] = carry / r
        row[i] = r


@njit(cache=True, fastmath=_FAST)
def solve_lower(L, b):
    """y (d,) with L y = b: forward substitution."""
    d = L.shape[0]
    y = np.empty(d)
    for i in range(d):
        row = L[i]
        total = 0.0
        for k in range(i):
            total += row[k] * y[k]
        y[i] = (b[i] - total) / row[i]
    return y


@njit(cache=True, fastmath=_FAST)
def solve_upper(L, b):
    """y (d,) with L^T y = b: backward substitution, along the rows of L."""
    d = L.shape[0]
    y = np.empty(d)
    for i in range(d):
        y[i] = b[i]
    for i in range(d - 1, -1, -1):
        row = L[i]
        value = y[i] / row[i]
        y[i] = value
        for k in range(i):
            y[k] -= value * row[k]
    return y


@njit(cache=True)
def solve_factored(L, b):
    """y (d,) with L L^T y = b."""
    return solve_upper(L, solve_lower(L, b))


@njit(cache=True, fastmath=_FAST)
def downdate_norms(squared, X, u, quadratic):
    """In place, squared[i] = ||X[i]||^2_{A^{-1}} becomes that of A + x x^T, from u = A^{-1} x and quadratic =
    x^T u.

    Sherman-Morrison: ||y||^2 -= (y^T u)^2 / (1 + x^T u). squared (n,), X (n, d). O(n d).
    """
    n, d = X.shape
    scale = 1.0 / (1.0 + quadratic)
    for i in range(n):
        row = X[i]
        product = 0.0
        for k in range(d):
            product += row[k] * u[k]
        # Rounding must not turn a vanishing norm negative.
        squared[i] = max(squared[i] - product * product * scale, 0.0)


@njit(cache=True)
def cholesky_update_many(L, x):
    """`cholesky_update` of L[h] (d, d) by x[h] (d,) for every h, in place; L (H, d, d), x (H, d)."""
    for h in range(L.shape[0]):
        cholesky_update(L[h], x[h])


@njit(cache=True)
def solve_lower_many(L, b):
    """(H, d): row h solves L[h] y = b[h]."""
    y = np.empty(b.shape)
    for h in range(L.shape[0]):
        y[h] = solve_lower(L[h], b[h])
    return y


@njit(cache=True)
def solve_upper_many(L, b):
    """(H, d): row h solves L[h]^T y = b[h]."""
    y = np.empty(b.shape)
    for h in range(L.shape[0]):
        y[h] = solve_upper(L[h], b[h])
    return y
