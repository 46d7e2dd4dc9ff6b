r"""What is believed about a linear reward after some comparisons: a Gaussian posterior, or an ensemble of heads.

    RewardPosterior  PR-LSVI's: theta ~ N(theta_hat, sigma_r^2 Sigma_r^{-1}), theta_hat the preference MLE and
                     Sigma_r = lambda I + sum Delta Delta^T over the bought comparisons. The objects are those of
                     `algorithms.estimation` that the tabular algorithm uses: `OnlinePreferenceMLE`, `Gram`,
                     `disagreement`, `GaussianPosterior`.
    Ensemble         K "epistemic heads": each is the MAP estimate with a prior mean of its own (drawn once) and its own
                     weights of the comparisons (a bootstrap). A draw is a head at random.

    Voted            draws from the posterior, pairs measured by the heads: querying by ensemble variance, alone
    (`quadrature`)   the Bayesian posterior that all of them stand for, where two features are few enough for a grid

They answer the same three questions: a draw of theta, the expected disagreement of two draws about pairs (`gaps`, on
the scale of the reward, to be compared with eps), and theta, the point estimate whose policy is the answer. The
ensemble's prior is the posterior's before any comparison, N(0, sigma_r^2 / lambda I), and its point estimate is the
same, so that the two differ in nothing but how they represent what is not known.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike

from ...algorithms.estimation import (
    GaussianPosterior,
    Gram,
    OnlinePreferenceMLE,
    disagreement,
    fit_preferences,
)
from ...algorithms.pr_lsvi import Settings
from ...envs.kernels import Array
from ...envs.links import LOGISTIC, Link


class Ahead(Protocol):
    """A belief while the pairs of a batch are chosen, before any of their answers is known."""

    def gaps(self, differences: Array) -> Array: ...

    def count(self, difference: Array) -> None: ...


class Belief(Protocol):
    """theta (d,); draw; add answered comparisons; and `ahead`, which measures pairs."""

    @property
    def theta(self) -> Array: ...

    def draw(self, rng: np.random.Generator) -> Array: ...

    def ahead(self) -> Ahead: ...

    def add(self, differences: Array, wins: ArrayLike) -> None: ...

    def arrays(self) -> dict[str, Any]: ...


class RewardPosterior:
    """N(theta_hat, sigma^2 Sigma^{-1}) as in lines 3, 4 and 12 of PR-LSVI.

    mle    `OnlinePreferenceMLE` on the ball |theta| <= B, with a ridge where one is given (a departure)
    gram   `Gram`: Sigma
    """

    def __init__(
        self, dimension: int, settings: Settings, *, ridge: float = 0.0, link: Link = LOGISTIC
    ) -> None:
        self.sigma = settings.sigma_r
        self.mle = OnlinePreferenceMLE(
            dimension, radius=settings.B, ridge=ridge, link=link, growth=settings.mle_growth
        )
        self.gram = Gram(dimension, settings.lam)

    @property
    def theta(self) -> Array:
        return self.mle.theta

    @property
    def posterior(self) -> GaussianPosterior:
        """The law that `draw` draws from."""
        return GaussianPosterior.from_gram(self.theta, self.gram, self.sigma)

    def laplace(self, ridge: float | None = None) -> GaussianPosterior:
        """Laplace's approximation of the Bayesian posterior under the prior N(0, I / ridge).

        ridge: None = lambda / sigma^2, the prior that `draw` starts from. Since the logistic Phi' is at most 1/4, with
        sigma = 2 no direction is less certain here than sigma^2 Sigma^{-1} has it.
        """
        ridge = self.gram.regularisation / self.sigma**2 if ridge is None else ridge
        return GaussianPosterior.laplace(
            fit_preferences(
                self.mle.differences, self.mle.wins, ridge=ridge, link=self.mle.link, start=self.theta
            )
        )

    def draw(self, rng: np.random.Generator) -> Array:
        """Line 4: one theta."""
        return self.gram.draw(self.theta, self.sigma, rng=rng)

    def ahead(self) -> GramAhead:
        """Sigma does not depend on the answers, so within a batch it already counts the pairs that are bought."""
        return GramAhead(Gram.from_arrays(self.gram.arrays()), self.sigma)

    def add(self, differences: Array, wins: ArrayLike) -> None:
        """Lines 13 and 3, comparison by comparison; wins (n,) of 0 and 1."""
        for x, won in zip(differences, np.asarray(wins), strict=True):
            self.gram.update(x)
            self.mle.add(x, won)

    def arrays(self) -> dict[str, Any]:
        return {f"gram_{k}": v for k, v in self.gram.arrays().items()} | {
            f"mle_{k}": v for k, v in self.mle.arrays().items()
        }

    def restore(self, arrays: dict[str, Any]) -> None:
        """The inverse of `arrays`."""
        self.gram = Gram.from_arrays({k[5:]: v for k, v in arrays.items() if k.startswith("gram_")})
        self.mle = OnlinePreferenceMLE.from_arrays(
            {k[4:]: v for k, v in arrays.items() if k.startswith("mle_")}
        )


@dataclass
class GramAhead:
    """The disagreement of line 12 in closed form, (2 / sqrt(pi)) sigma ||Delta||_{Sigma^{-1}}."""

    gram: Gram
    sigma: float

    def gaps(self, differences: Array) -> Array:
        return np.array([disagreement(self.gram.norm(x), self.sigma) for x in differences])

    def count(self, difference: Array) -> None:
        self.gram.update(difference)


class Ensemble:
    """K heads theta_k = argmax sum_i w_ik log Phi(+-<Delta_i, theta>) - ridge/2 |theta - theta_k^0|^2.

    ridge = lambda / sigma_r^2; theta_k^0 ~ N(0, I / ridge) when `primed`, else 0; w_ik ~ Exp(1) when `bootstrap`, else
    1.
    Weights and priors come from `seed`, in the order of the comparisons, and from nothing else.

    centre       the MAP or MLE estimate of all comparisons, unweighted: `theta`, the same as the posterior's
    heads        (K, d)
    certificate  the largest gradient of a head's objective after the last fit
    """

    def __init__(
        self,
        dimension: int,
        settings: Settings,
        *,
        heads: int = 10,
        ridge: float = 0.0,
        bootstrap: bool = True,
        primed: bool = True,
        seed: int | np.random.SeedSequence = 0,
        link: Link = LOGISTIC,
    ) -> None:
        if heads < 2:
            raise ValueError(f"heads is {heads}; their disagreement needs at least 2")
        if not settings.sigma_r > 0:
            raise ValueError("sigma_r is 0; the heads' prior has the variance sigma_r^2 / lambda")
        self.link, self.bootstrap = link, bootstrap
        self.prior_precision = settings.lam / settings.sigma_r**2
        self.rng = np.random.default_rng(seed)
        deviation = self.prior_precision**-0.5 if primed else 0.0
        self.prior = deviation * self.rng.standard_normal((heads, dimension))
        self.heads = self.prior.copy()
        self.weights = np.empty((0, heads))
        self.certificate = 0.0
        self.mle = OnlinePreferenceMLE(
            dimension, radius=settings.B, ridge=ridge, link=link, growth=settings.mle_growth
        )

    @property
    def theta(self) -> Array:
        return self.mle.theta

    def draw(self, rng: np.random.Generator) -> Array:
        """A head at random."""
        return self.heads[rng.integers(len(self.heads))]

    def ahead(self) -> HeadsAhead:
        return HeadsAhead(self.heads)

    def add(self, differences: Array, wins: ArrayLike) -> None:
        """Take in comparisons, and fit every head."""
        wins = np.asarray(wins, dtype=np.float64)
        for x, won in zip(differences, wins, strict=True):
            self.mle.add(x, won)
        shape = (len(wins), len(self.heads))
        new = self.rng.exponential(size=shape) if self.bootstrap else np.ones(shape)
        self.weights = np.concatenate([self.weights, new])
        signed = self.mle.differences * (2 * self.mle.wins - 1)[:, None]
        self.heads, self.certificate = fit_heads(
            signed, self.weights, self.prior, self.prior_precision, start=self.heads, link=self.link
        )

    def arrays(self) -> dict[str, Any]:
        return {"heads": self.heads, "prior": self.prior, "weights": self.weights} | {
            f"mle_{k}": v for k, v in self.mle.arrays().items()
        }

    def restore(self, arrays: dict[str, Any]) -> None:
        """The inverse of `arrays`; the stream of the weights is the learner's to restore."""
        self.heads, self.prior, self.weights = (np.array(arrays[k]) for k in ("heads", "prior", "weights"))
        self.mle = OnlinePreferenceMLE.from_arrays(
            {k[4:]: v for k, v in arrays.items() if k.startswith("mle_")}
        )


class Voted:
    """The posterior draws and is the estimate; what is bought is where the heads of an ensemble disagree.

    It differs from `RewardPosterior` in the query rule, and in nothing else.
    """

    def __init__(self, posterior: RewardPosterior, ensemble: Ensemble) -> None:
        self.posterior, self.ensemble = posterior, ensemble

    @property
    def theta(self) -> Array:
        return self.posterior.theta

    def draw(self, rng: np.random.Generator) -> Array:
        return self.posterior.draw(rng)

    def ahead(self) -> HeadsAhead:
        return self.ensemble.ahead()

    def add(self, differences: Array, wins: ArrayLike) -> None:
        self.posterior.add(differences, wins)
        self.ensemble.add(differences, wins)

    def arrays(self) -> dict[str, Any]:
        parts = {"posterior": self.posterior.arrays(), "ensemble": self.ensemble.arrays()}
        return {f"{part}_{k}": v for part, arrays in parts.items() for k, v in arrays.items()}

    def restore(self, arrays: dict[str, Any]) -> None:
        """The inverse of `arrays`; the stream of the weights is the learner's to restore."""
        for part, belief in (("posterior_", self.posterior), ("ensemble_", self.ensemble)):
            belief.restore({k.removeprefix(part): v for k, v in arrays.items() if k.startswith(part)})


@dataclass(frozen=True)
class HeadsAhead:
    """The standard deviation of the margin over heads, times 2 / sqrt(pi): what two Gaussian draws would differ by."""

    heads: Array

    def gaps(self, differences: Array) -> Array:
        return np.asarray(disagreement((differences @ self.heads.T).std(axis=1, ddof=1), 1.0))

    def count(self, difference: Array) -> None:
        """Heads know nothing new before the answer."""


def fit_heads(
    signed: Array,
    weights: Array,
    prior: Array,
    precision: float,
    *,
    start: Array | None = None,
    link: Link = LOGISTIC,
    tolerance: float = 1e-9,
    iterations: int = 100,
) -> tuple[Array, float]:
    """All heads at once by Newton's method: (heads (K, d), largest gradient norm of a head's objective).

    signed   (n, d): Delta where the first was preferred, -Delta where the second was
    weights  (n, K) >= 0; prior  (K, d) means of N(., I / precision)
    """
    theta = prior.copy() if start is None else start.copy()
    d = prior.shape[1]
    scale = 1.0 + float(np.abs(signed).sum(axis=1).max(initial=0.0)) * float(
        weights.sum(axis=0).max(initial=0.0)
    )

    def objective(theta: Array) -> Array:
        fits = (weights * link.log(signed @ theta.T)).sum(axis=0)
        return fits - precision / 2 * ((theta - prior) ** 2).sum(axis=1)

    value = objective(theta)
    for _ in range(iterations):
        margins = signed @ theta.T
        gradient = (weights * link.dlog(margins)).T @ signed - precision * (theta - prior)
        norm = float(np.linalg.norm(gradient, axis=1).max())
        if norm <= tolerance * scale:
            return theta, norm
        curvature = np.maximum(-weights * link.d2log(margins), 0.0)
        hessian = (signed.T[None] * curvature.T[:, None]) @ signed + precision * np.eye(d)
        step = np.linalg.solve(hessian, gradient[..., None])[..., 0]
        slope, length = (gradient * step).sum(axis=1), np.ones(len(theta))
        while True:  # each head backtracks for itself
            moved = theta + length[:, None] * step
            moved_value = objective(moved)
            short = moved_value < value + 1e-4 * length * slope - 1e-12 * (1 + np.abs(value))
            if not short.any():
                break
            length = np.where(short, length / 2, length)
        theta, value = moved, moved_value
    raise ArithmeticError(
        f"a head's gradient is still {norm:.2g} after {iterations} Newton steps (wanted: {tolerance * scale:.2g})"
    )


def reward_settings(
    dimension: int,
    eps: float,
    *,
    c_r: float = 0.8,
    sigma_r: float | None = None,
    B: float | None = None,
    **changes: Any,
) -> Settings:
    """PR-LSVI's settings for features without transitions: sigma_r = c_r sqrt(d) as in `Settings.scaled`, B = sqrt(d).

    The value perturbation and the interpolation play no role, since a text's transitions are known.
    """
    given: dict[str, Any] = {
        "sigma_r": c_r * math.sqrt(dimension) if sigma_r is None else sigma_r,
        "sigma_P": 0.0,
        "eps": eps,
        "alpha_L": 0.0,
        "alpha_U": 1.0,
        "B": math.sqrt(dimension) if B is None else B,
        "transitions": "known",
    }
    return Settings(**(given | changes))
