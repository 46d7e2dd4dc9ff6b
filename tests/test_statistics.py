"""The statistics of verdicts against scipy, closed forms and simulated coverage; each judge in all its verdicts."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from preflab.theory.claim import Judgement
from preflab.theory.statistics import (
    Interval,
    all_of,
    bonferroni,
    clopper_pearson,
    conjunction,
    expanded_tail,
    holm,
    judge_identity,
    judge_inequality,
    judge_ordering,
    judge_probability,
    judge_rate,
    sign_flip_test,
    slope_loglog,
)
from scipy import stats


@given(st.integers(1, 200).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.floats(0.5, 0.999))
def test_clopper_pearson_is_scipys_exact_interval(kn, level):
    k, n = kn
    peer = stats.binomtest(k, n).proportion_ci(confidence_level=level, method="exact")
    ours = clopper_pearson(k, n, level)
    assert (ours.low, ours.high) == pytest.approx((peer.low, peer.high), abs=1e-10)
    assert ours.low <= ours.estimate == k / n <= ours.high


def test_clopper_pearson_inverts_the_binomial_tails():
    interval = clopper_pearson(7, 20, 0.9)
    assert stats.binom.sf(6, 20, interval.low) == pytest.approx(0.05)
    assert stats.binom.cdf(7, 20, interval.high) == pytest.approx(0.05)


@pytest.mark.parametrize(("k", "n"), [(-1, 3), (4, 3), (0, 0)])
def test_impossible_counts_are_refused(k, n):
    with pytest.raises(ValueError, match="successes in"):
        clopper_pearson(k, n)


def test_corrections_for_a_family():
    assert bonferroni(0.95, 10) == pytest.approx(0.995)
    # Holm (1979) by hand: 3 p1 = .03, 2 p2 = .06, 1 p3 = .04 -> raised to .06
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    with pytest.raises(ValueError, match="level"):
        bonferroni(1.0, 2)
    with pytest.raises(ValueError, match="family"):
        bonferroni(0.9, 0)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_rejects_what_the_step_down_procedure_rejects(p):
    alpha, rejected = 0.05, set()
    for step, i in enumerate(np.argsort(p, kind="stable")):
        if p[i] * (len(p) - step) > alpha:
            break
        rejected.add(i)
    assert set(np.flatnonzero(holm(p) <= alpha)) == rejected


# ---- slopes ------------------------------------------------------------------------------------------------


def test_a_power_law_gives_its_exponent_and_constant():
    x = np.geomspace(10, 1000, 9)
    slope = slope_loglog(x, np.tile(3 * x**0.7, (4, 1)))
    assert slope.estimate == pytest.approx(0.7)
    assert (slope.low, slope.high) == pytest.approx((0.7, 0.7))
    assert math.exp(slope.intercept) == pytest.approx(3)
    assert (slope.window, slope.seeds) == ((10, 1000), 4)


def test_the_fit_is_that_of_scipy_on_the_mean_curve_within_the_window():
    rng = np.random.default_rng(1)
    x = np.arange(1.0, 30)
    Y = x**1.3 * rng.lognormal(0, 0.4, size=(7, 29))
    inside = (x >= 5) & (x <= 20)
    peer = stats.linregress(np.log(x[inside]), np.log(Y.mean(0)[inside]))
    ours = slope_loglog(x, Y, window=(5, 20))
    assert (ours.estimate, ours.intercept) == pytest.approx((peer.slope, peer.intercept))
    assert slope_loglog(x, Y, window=(5, 20)) == ours  # deterministic


@pytest.mark.parametrize("n", [6, 15])
def test_the_slopes_interval_covers_as_often_as_it_says(n):
    rng, x, hits, rounds = np.random.default_rng(n), np.geomspace(1, 100, 6), 0, 400
    for i in range(rounds):
        exponent = 0.5 + 0.1 * rng.normal(size=(n, 1))  # each seed its own exponent
        Y = x**exponent * np.exp(0.2 * rng.normal(size=(n, 6)))
        truth = stats.linregress(np.log(x), 0.5 * np.log(x) + 0.005 * np.log(x) ** 2).slope  # of log E[Y]
        interval = slope_loglog(x, Y, level=0.9, resamples=400, seed=i)
        hits += interval.low <= truth <= interval.high
    assert 0.84 <= hits / rounds <= 0.96


def test_the_expanded_tail_gives_the_t_interval_of_a_mean():
    n, level = 8, 0.95
    width = -stats.norm.ppf(expanded_tail(n, level)) * math.sqrt((n - 1) / n)
    assert width == pytest.approx(stats.t.ppf(0.975, n - 1))


@pytest.mark.parametrize(
    ("x", "Y", "message"),
    [
        ([1, 2], [[1, 2, 3]], "shape"),
        ([1, 2], [[1, 2]], "1 seeds"),
        ([0, 2], [[1, 2], [1, 2]], "x > 0"),
        ([1, 2], [[1, np.nan], [1, 2]], "finite"),
        ([1, 2], [[-1, 2], [0, 2]], "not positive"),
    ],
)
def test_a_slope_that_does_not_exist_is_refused(x, Y, message):
    with pytest.raises(ValueError, match=message):
        slope_loglog(x, Y)


# ---- the sign-flip test ------------------------------------------------------------------------------------


@given(st.lists(st.floats(-5, 5).map(lambda v: round(v, 2)), min_size=1, max_size=8))
def test_the_sign_flip_test_is_the_enumeration(d):
    d = np.array(d)
    signs = np.array(list(itertools.product([-1, 1], repeat=len(d))))
    assert sign_flip_test(d) == pytest.approx(((signs * np.abs(d)).sum(1) >= d.sum() - 1e-9).mean())


def test_the_sign_flip_test_agrees_with_scipy_and_with_its_own_sampled_form():
    d = np.random.default_rng(3).normal(0.4, 1, size=12)
    peer = stats.permutation_test(
        (d,),
        lambda x, axis: x.mean(axis),
        permutation_type="samples",
        alternative="greater",
        n_resamples=np.inf,
        vectorized=True,
    )
    assert sign_flip_test(d) == pytest.approx(peer.pvalue)
    assert sign_flip_test(d, exact_up_to=0) == pytest.approx(peer.pvalue, abs=0.005)


@pytest.mark.parametrize("exact", [18, 0])
def test_the_sign_flip_test_keeps_its_level(exact):
    rng = np.random.default_rng(7)
    rounds = 300 if exact else 40
    rejected = sum(sign_flip_test(rng.normal(size=9), exact_up_to=exact) <= 0.1 for _ in range(rounds))
    assert stats.binomtest(rejected, rounds, 0.1).pvalue > 0.001


@pytest.mark.parametrize("d", [[], [[1.0]], [math.nan]])
def test_differences_that_cannot_be_tested_are_refused(d):
    with pytest.raises(ValueError, match="differences"):
        sign_flip_test(d)


# ---- judges ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("errors", "verdict"),
    [([1e-10, -9e-10], "verified"), ([0, 2e-9], "refuted"), ([math.nan, 0], "refuted"), ([], "inconclusive")],
)
def test_identity(errors, verdict):
    assert judge_identity(errors).verdict == verdict


@pytest.mark.parametrize(
    ("slack", "verdict"),
    [([0, 1], "verified"), ([1, -0.1], "refuted"), ([math.nan], "refuted"), ([], "inconclusive")],
)
def test_inequality(slack, verdict):
    judgement = judge_inequality(slack)
    assert judgement.verdict == verdict
    if verdict == "refuted":
        assert judgement.numbers["broken"] == 1


@pytest.mark.parametrize(
    ("k", "n", "verdict"),
    [
        (36, 36, "verified"),
        (35, 35, "inconclusive"),
        (80, 100, "refuted"),
        (88, 100, "inconclusive"),
        (0, 0, "inconclusive"),
    ],
)
def test_probability(k, n, verdict):
    assert judge_probability(k, n, 0.9).verdict == verdict


def test_a_family_makes_a_probability_harder_to_decide():
    assert judge_probability(36, 36, 0.9, family=5).verdict == "inconclusive"
    with pytest.raises(ValueError, match="judge_inequality"):
        judge_probability(3, 3, 1.0)


def test_a_true_promise_is_rarely_refuted_and_a_broken_one_rarely_verified():
    law = stats.binom(60, 0.9)
    refuted = sum(law.pmf(k) for k in range(61) if judge_probability(k, 60, 0.9).verdict == "refuted")
    verified = sum(
        law.pmf(k) for k in range(61) if judge_probability(k, 60, 0.9 + 1e-12).verdict == "verified"
    )
    assert refuted <= 0.025
    assert verified <= 0.025


@pytest.mark.parametrize(
    ("low", "high", "equal", "at_most", "at_least"),
    [
        (0.45, 0.55, "verified", "verified", "verified"),
        (0.2, 0.3, "refuted", "verified", "refuted"),
        (0.7, 0.9, "refuted", "refuted", "verified"),
        (0.5, 0.7, "inconclusive", "inconclusive", "verified"),
        (0.3, 0.5, "inconclusive", "verified", "inconclusive"),
    ],
)
def test_rate(low, high, equal, at_most, at_least):
    interval = Interval((low + high) / 2, low, high)
    for sense, verdict in (("equal", equal), ("at_most", at_most), ("at_least", at_least)):
        assert judge_rate(interval, 0.5, 0.1, sense=sense).verdict == verdict
    with pytest.raises(ValueError, match="slack"):
        judge_rate(interval, 0.5, -1)


@pytest.mark.parametrize(
    ("d", "verdict"),
    [
        ([1, 2, 1, 3, 2], "verified"),
        ([-1, -2, -1, -3, -2], "refuted"),
        ([1, 2, 1, 3], "inconclusive"),
        ([1, -2, 1, -1, 1], "inconclusive"),
        ([], "inconclusive"),
        ([math.inf, 1], "inconclusive"),
    ],
)
def test_ordering(d, verdict):
    assert judge_ordering(d).verdict == verdict


def test_ordering_with_a_margin_a_family_and_a_single_seed():
    d = [1, 2, 1, 3, 2]
    assert judge_ordering(d, margin=2.5).verdict == "inconclusive"
    assert judge_ordering(d, margin=4).verdict == "refuted"
    assert judge_ordering(d, family=3).verdict == "inconclusive"
    assert math.isnan(judge_ordering([1.0]).numbers["effect"])


def test_a_statement_with_parts_is_as_good_as_its_worst():
    good, bad, open_ = judge_identity([0]), judge_identity([1]), judge_identity([])
    assert all_of({"a": good, "b": good}).verdict == "verified"
    assert all_of({"a": good, "b": open_}).verdict == "inconclusive"
    worst = all_of([("a", good), ("b", open_), ("c", bad)])
    assert (worst.verdict, worst.statistic) == ("refuted", 1.0)
    assert worst.numbers["a"]["verdict"] == "verified"
    assert "c: largest error 1" in worst.detail
    assert all_of({}).verdict == "inconclusive"


def test_an_interval_reads_well():
    assert str(Interval(0.5, 0.25, 0.75)) == "0.5 [0.25, 0.75]"


def test_a_conjunction_needs_every_part_at_the_level_and_corrects_refutations():
    levels = []

    def part(verdicts):
        def judge(level):
            levels.append(level)
            return Judgement(verdicts[level], 0.0, 0.0, "")

        return judge

    corrected = bonferroni(0.95, 2)
    good = part({0.95: "verified"})
    weak = part({0.95: "refuted", corrected: "inconclusive"})
    bad = part({0.95: "refuted", corrected: "refuted"})
    assert conjunction({"a": good, "b": good}).verdict == "verified"
    assert set(levels) == {0.95}
    assert conjunction({"a": good, "b": weak}).verdict == "inconclusive"
    assert conjunction({"a": good, "b": bad}).verdict == "refuted"
    assert set(levels) == {0.95, corrected}
    assert conjunction({}).verdict == "inconclusive"


def test_the_error_of_a_conjunction_is_at_most_its_level():
    """Both parts at the edge of being false: verified together in at most 5 % of the experiments."""
    rng = np.random.default_rng(0)
    n, p, repeats = 200, 0.8, 2000
    hits = rng.binomial(n, p, size=(repeats, 2))
    at = {int(k): judge_probability(int(k), n, p).verdict for k in np.unique(hits)}
    both = np.mean([at[int(a)] == "verified" and at[int(b)] == "verified" for a, b in hits])
    either = np.mean([at[int(a)] == "verified" for a, _ in hits])
    assert both <= either <= 0.05
