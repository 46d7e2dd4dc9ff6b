r"""The best Bradley-Terry reward of a preference game that need not have one, for a given law of the comparisons.

With w_ij the probability that a comparison is between i and j (unordered, i != j), the population likelihood is

    maximise  F(r) = sum_{i<j} w_ij [P_ij log sigma(r_i - r_j) + P_ji log sigma(r_j - r_i)],

and the *misfit* is what stays between P and the fit, sum_{i<j} w_ij KL(P_ij, sigma(r_i - r_j)). At the maximum

    sum_j w_ij (P_ij - sigma(r_i - r_j)) = 0          for every i:

each response wins as often under the fit as in truth, against what it is compared with. When both responses of a
comparison are iid from a law mu, w_ij = 2 mu_i mu_j, the left side over 2 mu_i increases in P(i > mu) and decreases in
r_i: the reward orders the responses as P(. > mu) does, their win rate against the data. Where P is not Bradley-Terry's
the reward therefore depends on the law of the comparisons (Munos et al., ICML 2024, arXiv 2312.00886, appendix A).

A maximum exists when wins lead from every response to every other. Else, where all pairs are compared, the groups
within which they do (strongly connected components) are ranked, each member of a higher one preferred with certainty:
the supremum of F is approached as the groups move apart, and is the sum of their own maxima.

Newton's method with backtracking, in coordinates in which a response's weight drops out of the conditioning, so that
references as small as 1e-17 do no harm. The certificate is the largest |sum_j w_ij (P_ij - sigma(r_i - r_j))| / sum_j
w_ij over responses i.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.linalg import cho_factor, cho_solve
from scipy.special import expit, log_expit, xlogy

from ...envs.comparison_graph import check_connected
from ...envs.kernels import Array, Index
from ...envs.preference_games import PreferenceGame, check_law
from .preferences import SeparableDataError

_CERTIFIED = 1e-11  # Newton's method ends when the win rate of every response agrees up to this, ...
_ENOUGH = 1e-9  # ... or up to this after all its steps, when rounding allows no more
_STEPS = 100


@dataclass(frozen=True, eq=False)
class BradleyTerryFit:
    """What `fit_bradley_terry` returns.

    reward      r (n,), of weighted mean 0 within each group
    group       (n,) the rank of the response's group: 0 = the best; all 0 when the maximum exists (`finite`)
    misfit      the smallest KL divergence a comparison, 0 when P is Bradley-Terry's
    certificate the largest difference between a response's win rate within its group and the fitted one
    iterations  of Newton's method, over all groups
    """

    reward: Array
    group: Index
    misfit: float
    certificate: float
    iterations: int

    @property
    def finite(self) -> bool:
        """Is the likelihood's maximum attained?"""
        return not self.group.any()

    @property
    def best(self) -> int:
        """The response with the highest reward (the first of equal ones)."""
        return int(np.argmax(np.where(self.group == 0, self.reward, -np.inf)))


def fit_bradley_terry(game: PreferenceGame, law: ArrayLike | None = None) -> BradleyTerryFit:
    """The reward that maximises the likelihood of all comparisons of a game, infinitely many, drawn from a law.

    law  (n,): both responses are iid from it; (n, n): the joint law of (first, second); None = iid from the reference.
         Comparisons of a response with itself say nothing and are left out.
    ValueError when the law leaves a component of the comparisons' graph unidentified, SeparableDataError when there is
    no maximum and not all pairs are compared, so that the groups have no order.
    """
    n = len(game)
    w = _weights(game.reference if law is None else law, n)
    complete = np.count_nonzero(w) == n * (n - 1)
    if not complete:
        first, second = np.nonzero(w)
        check_connected(first, second, n, game.names)
    groups = _groups(game.P, w)
    if len(groups) > 1 and not complete:
        may_lose = (game.P.T > 0) & (w > 0)
        top = next(g for g in groups if not np.delete(may_lose[g], g, axis=1).any())
        raise SeparableDataError(
            f"the likelihood has no maximum: response {game.names[top[0]]} is in a group that never loses to the "
            "others it is compared with, and not all pairs are compared; give the law mass on all pairs"
        )
    reward, group = np.zeros(n), np.zeros(n, dtype=np.int64)
    misfit, certificate, iterations = 0.0, 0.0, 0
    for rank, members in enumerate(groups):
        block = np.ix_(members, members)
        r, lost, error, steps = _fit(game.P[block], w[block], game.name)
        reward[members], group[members] = r, rank
        misfit, certificate, iterations = misfit + lost, max(certificate, error), iterations + steps
    if n > 1:
        misfit /= float(w.sum()) / 2
    return BradleyTerryFit(reward, group, misfit, certificate, iterations)


def _weights(law: ArrayLike, n: int) -> Array:
    """w (n, n), symmetric, 0 on the diagonal."""
    mu = np.asarray(law, dtype=np.float64)
    if mu.shape == (n, n):
        joint = check_law(mu.reshape(-1), n * n, "law").reshape(n, n)
    else:
        joint = np.outer(check_law(mu, n, "law"), mu)
    w = joint + joint.T
    np.fill_diagonal(w, 0.0)
    return w


def _groups(P: Array, w: Array) -> list[Index]:
    """The strongly connected components of "i may win against j", the best first (when all pairs are compared)."""
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import connected_components

    may_win = csr_array((P > 0) & (w > 0))
    count, label = connected_components(may_win, connection="strong")
    members = [np.flatnonzero(label == k) for k in range(count)]
    # of two components one beats the other with certainty: the better one reaches more responses
    reach = may_win.sum(axis=1)
    return sorted(members, key=lambda group: -float(np.max(reach[group])))


def _fit(P: Array, w: Array, name: str) -> tuple[Array, float, float, int]:
    """Newton's method for one group: the reward, sum_{i<j} w KL, the certificate and the steps."""
    n = len(P)
    r, weight = np.zeros(n), w.sum(axis=1)
    if n == 1:
        return r, 0.0, 0.0, 0
    share = weight / weight.sum()
    scale = np.sqrt(share)

    def value(r: Array) -> float:
        return float((w * P * log_expit(r[:, None] - r)).sum())  # each pair once, from the winner's side

    current = value(r)
    for step in range(_STEPS + 1):
        fitted = expit(r[:, None] - r)
        gradient = (w * (P - fitted)).sum(axis=1)
        error = float(np.abs(gradient / weight).max())
        if error <= (_CERTIFIED if step < _STEPS else _ENOUGH):
            break
        curvature = w * fitted * fitted.T
        H = np.diag(curvature.sum(axis=1)) - curvature
        H /= weight.sum() * np.outer(scale, scale)
        H += np.outer(scale, scale)  # the constant, which nothing determines: null direction `scale`
        move = cho_solve(cho_factor(H), gradient / (weight.sum() * scale)) / scale
        move -= share @ move
        slope, length = float(gradient @ move), 1.0
        while (moved := value(r + length * move)) < current + 1e-4 * length * slope - 1e-15 * abs(current):
            length /= 2
        r, current = r + length * move, moved
    else:
        raise ArithmeticError(
            f"{name}: win rates are off by {error:.2g} after {_STEPS} steps of Newton's method"
        )
    entropy = float((w * xlogy(P, P)).sum())
    return r - share @ r, float(max(entropy - current, 0.0)), error, step
