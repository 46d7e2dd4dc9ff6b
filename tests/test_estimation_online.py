"""The online preference MLE against the exact one, and its bit-for-bit continuation."""

import io

import numpy as np
import pytest
from preflab.algorithms.estimation import Gram, OnlinePreferenceMLE, fit_preferences
from preflab.envs.links import LOGISTIC, PROBIT


def stream(q, d=6, seed=0, link=LOGISTIC, norm=2.0):
    rng = np.random.default_rng(seed)
    theta = rng.normal(size=d)
    theta *= norm / np.linalg.norm(theta)
    D = rng.normal(size=(q, d))
    D /= np.linalg.norm(D, axis=1, keepdims=True)
    return D, (rng.random(q) < link.value(D @ theta)).astype(int), theta


@pytest.mark.parametrize("link", [LOGISTIC, PROBIT], ids=lambda x: x.name)
@pytest.mark.parametrize("settings", [{"radius": 2.5}, {"ridge": 0.5}, {"radius": 1.5}], ids=str)
def test_close_to_the_exact_fit_in_units_of_the_ellipsoid(link, settings):
    """Never further than sqrt(d) / 10 in the norm of Sigma, where the estimation error is about 1.5 sqrt(d)."""
    d = 6
    worst = []
    for seed in range(2):
        D, won, _ = stream(500, d, seed, link)
        online, gram = OnlinePreferenceMLE(d, link=link, **settings), Gram(d)
        for t in range(500):
            online.add(D[t], won[t])
            gram.update(D[t])
            if t % 11 == 0:
                exact = fit_preferences(D[: t + 1], won[: t + 1], link=link, start=online.theta, **settings)
                worst.append(gram.weighted_norm(online.theta - exact.theta) / np.sqrt(d))
    assert max(worst) < 0.1
    assert np.mean(worst) < 0.01


def test_without_refits_the_bound_above_would_fail():
    """The control of the test above: an estimate that is not kept up to date is caught."""
    D, won, _ = stream(500)
    online, gram = OnlinePreferenceMLE(6, radius=2.5), Gram(6)
    for t in range(500):
        gram.update(D[t])
        if t < 250:
            online.add(D[t], won[t])
    exact = fit_preferences(D, won, radius=2.5)
    assert gram.weighted_norm(online.theta - exact.theta) / np.sqrt(6) > 0.1


def test_growth_zero_is_the_exact_fit_throughout():
    D, won, _ = stream(60)
    online = OnlinePreferenceMLE(6, radius=2.0, growth=0.0)
    for t in range(60):
        online.add(D[t], won[t])
        exact = fit_preferences(D[: t + 1], won[: t + 1], radius=2.0)
        np.testing.assert_allclose(online.theta, exact.theta, atol=1e-6)
        assert online.refits == online.fitted == t + 1
    assert online.gradient_norm < 1e-8
    assert online.multiplier == pytest.approx(exact.multiplier, abs=1e-8)


def test_the_number_of_refits_is_logarithmic():
    D, won, _ = stream(2000, d=2)
    online = OnlinePreferenceMLE(2, radius=2.0, growth=0.1)
    at = {}
    for t in range(2000):
        online.add(D[t], won[t])
        at[t + 1] = online.refits
    # Beyond 1 / growth every refit waits for at least growth * count - 1 more comparisons.
    for q in (250, 500, 1000):
        assert at[2 * q] - at[q] <= np.log(2) / np.log(1.1) * 1.15 + 1
    assert online.count == 2000
    assert online.differences.shape == (2000, 2)
    np.testing.assert_array_equal(online.wins, won)


@pytest.mark.parametrize("settings", [{"radius": 2.0}, {"ridge": 1.0, "link": PROBIT}], ids=["ball", "ridge"])
@pytest.mark.parametrize("cut", [0, 16, 53])
def test_continues_bit_for_bit_through_a_file(settings, cut):
    D, won, _ = stream(120)
    whole = OnlinePreferenceMLE(6, **settings)
    for t in range(120):
        whole.add(D[t], won[t])
    first = OnlinePreferenceMLE(6, **settings)
    for t in range(cut):
        first.add(D[t], won[t])
    file = io.BytesIO()
    np.savez(file, **first.arrays())
    file.seek(0)
    with np.load(file, allow_pickle=False) as arrays:
        second = OnlinePreferenceMLE.from_arrays(arrays)
    for t in range(cut, 120):
        second.add(D[t], won[t])
    for name, array in whole.arrays().items():
        np.testing.assert_array_equal(second.arrays()[name], array, err_msg=name)


def test_stays_in_the_ball_between_refits():
    online = OnlinePreferenceMLE(2, radius=1.0, growth=1.0)
    for t in range(100):
        online.add([1.0, 0.1 * (-1) ** t], 1)  # separable: always at the boundary
        assert np.linalg.norm(online.theta) <= 1 + 1e-12
    assert online.refits < 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dimension": 0}, "dimension is 0"),
        ({"radius": None}, "give radius= or ridge="),
        ({"radius": -1.0}, "radius is -1"),
        ({"ridge": np.inf}, "ridge is inf"),
        ({"growth": 1.5}, "growth is 1.5"),
    ],
)
def test_bad_settings(change, message):
    with pytest.raises(ValueError, match=message):
        OnlinePreferenceMLE(**{"dimension": 2, "radius": 1.0, **change})


def test_bad_comparisons_change_nothing():
    online = OnlinePreferenceMLE(2, radius=1.0)
    online.add([1.0, 0.0], True)
    kept = online.arrays()
    for difference, won, message in [
        ([1.0], 1, r"comparison 1: .* shape \(2,\)"),
        ([1.0, np.nan], 1, "comparison 1: .* finite"),
        ([1.0, 0.0], 2, "comparison 1: won must be 1 .* got 2"),
        ([1.0, 0.0], -1, "comparison 1: won"),
    ]:
        with pytest.raises(ValueError, match=message):
            online.add(difference, won)
    for name, array in online.arrays().items():
        np.testing.assert_array_equal(array, kept[name])


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("wins", np.zeros(3), r"wins has shape \(3,\); \(1,\) goes with 1 comparisons"),
        ("theta", np.zeros(3), "theta has shape"),
        ("counters", np.array([5, 1, 1]), r"counters\[0\] is 5, but differences has 1 rows"),
        ("link", np.array("cauchit"), "link 'cauchit' is not one of logistic, probit"),
    ],
)
def test_damaged_state(name, value, message):
    online = OnlinePreferenceMLE(2, radius=1.0)
    online.add([1.0, 0.0], 1)
    with pytest.raises(ValueError, match=message):
        OnlinePreferenceMLE.from_arrays({**online.arrays(), name: value})
