r"""The pessimistic MLE: among candidate policies, the one whose value is best under the worst plausible reward.

B. Zhu, J. Jiao, M. I. Jordan, "Principled Reinforcement Learning with Human Feedback from Pairwise or K-wise
Comparisons", ICML 2023 (arXiv 2301.11270). The reward is <phi, theta*>; n comparisons with the feature differences
D_i = phi(first) - phi(second), (n, d):

  theta_hat = argmax over |theta_j| <= B of the Bradley-Terry likelihood                       `box_mle`
  Sigma     = (1/n) sum_i D_i D_i^T + ridge I              the mean form: radii scale as 1/sqrt(n)    `design`
  Theta     = {theta : ||theta - theta_hat||_Sigma <= f}   plausible rewards, f = radius
  pi_PE     = argmax_pi min_{theta in Theta} <theta, E_pi phi - v>
            = argmax_pi <theta_hat, E_pi phi - v> - f ||E_pi phi - v||_{Sigma^-1}               `pessimistic`

A candidate enters as E_{s ~ rho} phi(s, pi(s)), a row (d,). v is any reference vector (features of a common response);
comparisons leave a constant of the reward free, and v takes it out of the penalty: without it every candidate pays for
the free direction alike, and pessimism is lost. radius = 0 is the greedy MLE.

Guarantee: if theta* lies in Theta, `lower` bounds every <theta*, E_pi phi - v> from below, and the choice loses at most
2 f ||E_{pi*} phi - v||_{Sigma^-1}. The constants with which f covers theta* are the paper's; here f is an argument.
Departures: the paper's ball |theta| <= B with <1, theta> = 0 is a box here, as in its failure instance
(`estimation.fit_preferences` has the ball); the minimum over candidates is by enumeration.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.linalg import cho_factor, cho_solve
from scipy.optimize import minimize
from scipy.special import expit, log_expit

from ..envs.kernels import Array
from .estimation.preferences import merge_repeated
from .optimisation.losses import check_positive


@dataclass(frozen=True, eq=False)
class BoxFit:
    """theta (d,), a maximiser over the box; residual = |theta - clip(theta + gradient of the mean log-likelihood)|_inf,
    0 at the maximisers alone (differences that the data leave free are not determined)."""

    theta: Array
    residual: float


def box_mle(
    differences: ArrayLike, wins: ArrayLike, counts: ArrayLike | None = None, box: float = 1.0
) -> BoxFit:
    """The Bradley-Terry MLE over |theta_j| <= box; differences (q, d), the first of pair i won wins_i of counts_i."""
    D, w, n = merge_repeated(differences, wins, counts)
    if not len(D):
        raise ValueError("nothing was compared: every difference or every count is 0")
    check_positive(box, "box")
    total = n.sum()

    def loss(theta: Array) -> tuple[float, Array]:
        m = D @ theta
        value = -(w @ log_expit(m) + (n - w) @ log_expit(-m)) / total
        return float(value), D.T @ (n * expit(m) - w) / total

    options = {"maxiter": 2000, "ftol": 0.0, "gtol": 1e-12}
    bounds = [(-box, box)] * D.shape[1]
    theta = minimize(
        loss, np.zeros(D.shape[1]), jac=True, method="L-BFGS-B", bounds=bounds, options=options
    ).x
    step = np.clip(theta - loss(theta)[1], -box, box) - theta
    return BoxFit(theta, float(np.abs(step).max()))


def design(differences: ArrayLike, counts: ArrayLike | None = None, ridge: float = 0.0) -> Array:
    """Sigma (d, d) = sum_i n_i D_i D_i^T / sum_i n_i + ridge I."""
    D = np.asarray(differences, dtype=np.float64)
    n = np.ones(len(D)) if counts is None else np.asarray(counts, dtype=np.float64)
    if not n.sum() > 0 or not ridge >= 0:
        raise ValueError(
            f"{n.sum():g} comparisons and ridge {ridge}; at least one and a ridge >= 0 are needed"
        )
    return (D * n[:, None]).T @ D / n.sum() + ridge * np.eye(D.shape[1])


@dataclass(frozen=True, eq=False)
class Choice:
    """index of the chosen candidate; lower (k,) = the pessimistic value of each, relative to v; penalty (k,)."""

    index: int
    lower: Array
    penalty: Array


def pessimistic(
    theta_hat: ArrayLike, candidates: ArrayLike, v: ArrayLike, sigma: ArrayLike, radius: float
) -> Choice:
    """pi_PE among candidates (k, d), with the reference vector v (d,) and sigma (d, d) positive definite."""
    theta, X = np.asarray(theta_hat, dtype=np.float64), np.asarray(candidates, dtype=np.float64)
    if X.ndim != 2 or X.shape[1:] != theta.shape or not len(X):
        raise ValueError(f"candidates has shape {X.shape}; expected (k, {theta.size}), one row a policy")
    if not 0 <= radius < np.inf:
        raise ValueError(f"radius is {radius}; it must be at least 0 and finite (0 is the greedy choice)")
    X = X - np.asarray(v, dtype=np.float64)
    try:
        factor = cho_factor(np.asarray(sigma, dtype=np.float64))
    except np.linalg.LinAlgError:
        raise ValueError(
            "sigma is singular: comparisons leave a direction free; give `design` a ridge > 0"
        ) from None
    penalty = radius * np.sqrt(np.einsum("kd,dk->k", X, cho_solve(factor, X.T)))
    lower = X @ theta - penalty
    return Choice(int(np.argmax(lower)), lower, penalty)


def set_norm(x: ArrayLike, sigma: ArrayLike) -> float:
    """||x||_sigma = sqrt(x^T sigma x): how far theta_hat - theta* reaches out of the confidence set of radius 1."""
    x = np.asarray(x, dtype=np.float64)
    return float(np.sqrt(x @ np.asarray(sigma) @ x))
