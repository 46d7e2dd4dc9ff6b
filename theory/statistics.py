"""The statistics of verdicts: intervals, tests, and the judges built from them. The seed is the unit
throughout.

Every judge answers with three values. "verified" and "refuted" each need evidence at the declared level;
what the data cannot decide is "inconclusive". A family of m judgements is corrected by Bonferroni: level 1 -
alpha becomes 1 - alpha / m.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy import special  # not scipy.stats: every worker would wait for its import

from .claim import Judgement, Verdict


@dataclass(frozen=True)
class Interval:
    """A point estimate with a two-sided confidence interval at `level`."""

    estimate: float
    low: float
    high: float
    level: float = 0.95

    def __str__(self) -> str:
        return f"{self.estimate:.4g} [{self.low:.4g}, {self.high:.4g}]"


@dataclass(frozen=True)
class Slope(Interval):
    """y ~ exp(intercept) x^estimate over `window`, from `seeds` curves."""

    intercept: float = 0.0
    window: tuple[float, float] = (0.0, math.inf)
    seeds: int = 0


def bonferroni(level: float, family: int) -> float:
    """The level of each of `family` statements that makes all of them hold jointly at `level`."""
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; it must lie strictly between 0 and 1")
    if family < 1:
        raise ValueError(f"family is {family}; it must be at least 1")
    return 1 - (1 - level) / family


def holm(p_values: ArrayLike) -> np.ndarray:
    """Holm's adjusted p-values (n,): rejecting those <= alpha keeps the family-wise error at alpha."""
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    adjusted = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    out = np.empty_like(p)
    out[order] = adjusted
    return out


def clopper_pearson(k: int, n: int, level: float = 0.95) -> Interval:
    """The exact interval for a success probability after k successes in n independent trials."""
    if n < 1 or not 0 <= k <= n:
        raise ValueError(f"{k} successes in {n} trials: need n >= 1 and 0 <= k <= n")
    tail = (1 - bonferroni(level, 1)) / 2
    low = 0.0 if k == 0 else float(special.betaincinv(k, n - k + 1, tail))
    high = 1.0 if k == n else float(special.betainccinv(k + 1, n - k, tail))
    return Interval(k / n, low, high, level)


def expanded_tail(n: int, level: float) -> float:
    """The tail probability at which a percentile bootstrap of n units has the width of a t interval.

    The plain percentile interval of n units is too short by sqrt((n-1)/n) and by normal-for-t quantiles;
    this moves its percentiles outwards by exactly that (for the mean of n normal units it reproduces the t
    interval).
    """
    half = (1 - level) / 2
    return float(special.ndtr(math.sqrt(n / (n - 1)) * special.stdtrit(n - 1, half)))


def slope_loglog(
    x: ArrayLike,
    Y: ArrayLike,
    window: tuple[float, float] | None = None,
    *,
    level: float = 0.95,
    resamples: int = 4000,
    seed: int = 0,
) -> Slope:
    """The exponent p of mean(Y) ~ c x^p by least squares in log-log over a declared window, seeds as the
    unit.

    x       (n,) abscissae (T, or eps), positive
    Y       (seeds, n) one curve a seed; curves are averaged over seeds before the logarithm is taken
    window  (low, high): only low <= x <= high enters; None = all
    The interval is a bootstrap over seeds (percentiles expanded for their small number: `expanded_tail`),
    deterministic given `seed`. A resampled mean that is not positive has no logarithm: ValueError.
    """
    level = bonferroni(level, 1)
    x, Y = np.asarray(x, dtype=np.float64), np.atleast_2d(np.asarray(Y, dtype=np.float64))
    if Y.shape[1:] != x.shape:
        raise ValueError(f"x has shape {x.shape} and Y {Y.shape}; expected (n,) and (seeds, n)")
    low, high = window if window is not None else (float(x.min()), float(x.max()))
    inside = (x >= low) & (x <= high)
    n_seeds = len(Y)
    if inside.sum() < 2 or n_seeds < 2:
        raise ValueError(f"{inside.sum()} points in the window and {n_seeds} seeds; need at least 2 of each")
    x, Y = x[inside], Y[:, inside]
    if not (x > 0).all() or not np.isfinite(Y).all():
        raise ValueError("a log-log slope needs x > 0 and finite Y")
    log_x = np.log(x)
    centred = log_x - log_x.mean()
    weight = centred / (centred @ centred)  # slope = <weight, log y>
    picks = np.random.default_rng(seed).multinomial(n_seeds, np.full(n_seeds, 1 / n_seeds), size=resamples)
    means = np.concatenate([Y.mean(axis=0)[None], picks @ Y / n_seeds])
    if not (means > 0).all():
        raise ValueError("a mean over (resampled) seeds is not positive in the window; it has no logarithm")
    slopes = np.log(means) @ weight
    tail = expanded_tail(n_seeds, level)
    ends = np.quantile(slopes[1:], [tail, 1 - tail])
    intercept = float(np.log(means[0]).mean() - slopes[0] * log_x.mean())
    return Slope(
        float(slopes[0]), float(ends[0]), float(ends[1]), level, intercept, (float(low), float(high)), n_seeds
    )


def sign_flip_test(differences: ArrayLike, *, seed: int = 0, exact_up_to: int = 18) -> float:
    """One-sided p-value of mean(differences) > 0 against laws symmetric about 0, by flipping signs.

    Exact (all 2^n sign patterns) up to n = exact_up_to; beyond that 2^18 random patterns, with the observed
    one counted in, so that the test keeps its level. n = 4 cannot reach 0.05; n = 5 can (1/32).
    """
    d = np.asarray(differences, dtype=np.float64)
    if d.ndim != 1 or not len(d) or not np.isfinite(d).all():
        raise ValueError(f"differences must be a non-empty vector of finite numbers, got shape {d.shape}")
    slack = 1e-12 * np.abs(d).sum()  # patterns that tie in exact arithmetic
    if len(d) <= exact_up_to:
        sums = np.zeros(1)
        for magnitude in np.abs(d):
            sums = np.concatenate([sums - magnitude, sums + magnitude])
        return float((sums >= d.sum() - slack).mean())
    rng, rounds, at_least = np.random.default_rng(seed), 64, 1
    for _ in range(rounds):
        signs = rng.integers(0, 2, size=(4096, len(d)), dtype=np.int8) * 2 - 1
        at_least += int((signs @ np.abs(d) >= d.sum() - slack).sum())
    return at_least / (rounds * 4096 + 1)


# ---- judges --------------------------------------------------------------------------------------------


def _verdict(verified: bool, refuted: bool) -> Verdict:
    return "verified" if verified else "refuted" if refuted else "inconclusive"


def judge_identity(errors: ArrayLike, tolerance: float = 1e-9) -> Judgement:
    """Every |error| is at most `tolerance`. A NaN refutes; no measurement at all is inconclusive."""
    e = np.abs(np.asarray(errors, dtype=np.float64)).ravel()
    if not len(e):
        return Judgement("inconclusive", math.nan, tolerance, "nothing was measured")
    worst = float(np.max(e))  # NaN wins
    detail = f"largest error {worst:.3g} over {len(e)} measurements (tolerance {tolerance:.3g})"
    verdict = _verdict(worst <= tolerance, not worst <= tolerance)
    return Judgement(verdict, worst, tolerance, detail, {"measurements": len(e)})


def judge_inequality(slack: ArrayLike, tolerance: float = 0.0) -> Judgement:
    """left <= right in every run, given slack = right - left: the smallest slack is at least -tolerance."""
    s = np.asarray(slack, dtype=np.float64).ravel()
    if not len(s):
        return Judgement("inconclusive", math.nan, -tolerance, "nothing was measured")
    worst = float(np.min(s))  # NaN wins
    broken = int((~(s >= -tolerance)).sum())
    detail = f"broken in {broken} of {len(s)} runs; smallest slack {worst:.4g}"
    return Judgement(
        _verdict(not broken, broken > 0), worst, -tolerance, detail, {"runs": len(s), "broken": broken}
    )


def judge_probability(
    successes: int, n: int, promised: float, *, level: float = 0.95, family: int = 1
) -> Judgement:
    """An event has probability at least `promised` (= 1 - delta), from n independent seeds.

    verified when the Clopper-Pearson interval lies at or above `promised`, refuted when it lies below it,
    inconclusive when it holds it. n must be large enough for an answer: all of n successes verify 0.9 from n
    = 36 on.
    """
    if not 0 <= promised < 1:
        raise ValueError(f"promised is {promised}; no sample verifies a certain event: use judge_inequality")
    if n == 0:
        return Judgement("inconclusive", math.nan, promised, "nothing was measured")
    interval = clopper_pearson(successes, n, bonferroni(level, family))
    detail = (
        f"{successes} of {n}: frequency {interval.estimate:.4g}, {interval.level:.4g} interval "
        f"[{interval.low:.4g}, {interval.high:.4g}], promised at least {promised:.4g}"
    )
    numbers = {"successes": int(successes), "n": int(n), "low": interval.low, "high": interval.high}
    verdict = _verdict(interval.low >= promised, interval.high < promised)
    return Judgement(verdict, interval.estimate, promised, detail, numbers | {"level": interval.level})


def judge_rate(
    slope: Interval,
    expected: float,
    slack: float = 0.1,
    *,
    sense: Literal["equal", "at_most", "at_least"] = "equal",
) -> Judgement:
    """An exponent equals (or is at most, at least) `expected`, up to `slack`.

    With the band B = [expected - slack, expected + slack], open to one side for at_most and at_least:
    verified when the interval lies in B, refuted when it misses B, inconclusive when it straddles an end of
    B.
    """
    if slack < 0 or sense not in ("equal", "at_most", "at_least"):
        raise ValueError(f"slack {slack} must be >= 0 and sense {sense!r} one of equal, at_most, at_least")
    low = -math.inf if sense == "at_most" else expected - slack
    high = math.inf if sense == "at_least" else expected + slack
    verdict = _verdict(low <= slope.low and slope.high <= high, slope.high < low or slope.low > high)
    words = {"equal": "", "at_most": "at most ", "at_least": "at least "}[sense]
    detail = (
        f"exponent {slope} at level {slope.level:.4g}; expected {words}{expected:.4g} (slack {slack:.3g})"
    )
    numbers = {
        "low": slope.low,
        "high": slope.high,
        "expected": expected,
        "slack": slack,
        "level": slope.level,
    }
    return Judgement(verdict, slope.estimate, expected, detail, numbers)


def judge_ordering(
    differences: ArrayLike, *, margin: float = 0.0, level: float = 0.95, family: int = 1
) -> Judgement:
    """The first method beats the second, from differences (n,) = first - second, paired over n seeds.

    One-sided sign-flip tests of difference - margin, one in each direction, each at (1 - level) / family.
    """
    d = np.asarray(differences, dtype=np.float64).ravel()
    if not len(d):
        return Judgement("inconclusive", math.nan, margin, "nothing was measured")
    if not np.isfinite(d).all():
        return Judgement("inconclusive", math.nan, margin, "a difference is not finite")
    alpha = 1 - bonferroni(level, family)
    better, worse = sign_flip_test(d - margin), sign_flip_test(margin - d)
    mean, spread = float(d.mean()), float(d.std(ddof=1)) if len(d) > 1 else math.nan
    wins = int((d > margin).sum())
    detail = (
        f"mean difference {mean:.4g}, better on {wins} of {len(d)} seeds, "
        f"p = {better:.3g} (alpha {alpha:.3g})"
    )
    numbers = {
        "p_better": better,
        "p_worse": worse,
        "alpha": alpha,
        "effect": (mean - margin) / spread if spread > 0 else math.nan,
        "wins": wins,
        "n": len(d),
    }
    return Judgement(_verdict(better <= alpha, worse <= alpha), mean, margin, detail, numbers)


def all_of(parts: Mapping[str, Judgement] | Sequence[tuple[str, Judgement]]) -> Judgement:
    """A statement with several parts: verified when all are, refuted when one is, else inconclusive.

    The statistic and the threshold are those of the worst part (the first refuted, else the first
    inconclusive, else the first); `numbers` holds every part under its name.
    """
    named = dict(parts)
    if not named:
        return Judgement("inconclusive", math.nan, math.nan, "nothing was measured")
    order = ("refuted", "inconclusive", "verified")
    worst = min(named.values(), key=lambda part: order.index(part.verdict))
    detail = "; ".join(f"{name}: {part.detail}" + f" ({part.verdict})" for name, part in named.items())
    numbers = {
        name: {"verdict": part.verdict, "statistic": part.statistic, "threshold": part.threshold}
        | dict(part.numbers)
        for name, part in named.items()
    }
    return Judgement(worst.verdict, worst.statistic, worst.threshold, detail, numbers)


def conjunction(parts: Mapping[str, Callable[[float], Judgement]], level: float = 0.95) -> Judgement:
    """`all_of` for statistical parts, each a judge at a given confidence level.

    Verified when every part is, each at `level`: an intersection-union test, whose error is at most 1 - level
    without a correction. Refuted when one part is at `level` corrected for the number of parts (Bonferroni).
    """
    corrected = bonferroni(level, max(len(parts), 1))
    judged = {}
    for name, judge in parts.items():
        judgement = judge(level)
        judged[name] = judge(corrected) if judgement.verdict == "refuted" else judgement
    return all_of(judged)
