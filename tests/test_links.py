"""Links against 60-digit arithmetic, and the constants of the theory."""

import pickle

import mpmath as mp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from preflab.envs.links import LINKS, LOGISTIC, PROBIT, link

GRID = np.array(
    [-700, -300.5, -100, -37.7, -12, -8.001, -7.999, -5, -3, -0.7, 0, 1e-9, 0.7, 3, 8.5, 20, 36, 100, 700]
)


def exact(name, order, x):
    """The order-th derivative of log Phi (order 0..2), of Phi (3), or Phi (4), in 60 digits."""
    with mp.workdps(60):
        x = mp.mpf(float(x))
        if name == "logistic":
            value = 1 / (1 + mp.exp(-x))
            other = 1 / (1 + mp.exp(x))
            return [mp.log(value), other, -value * other, value * other, value][order]
        value = mp.erfc(-x / mp.sqrt(2)) / 2
        density = mp.npdf(x)
        m = density / value
        # at x = -700 x + m is a difference of numbers near 700 with 1e-3 left: 60 digits have room for it
        log = mp.log1p(-mp.erfc(x / mp.sqrt(2)) / 2) if x > 0 else mp.log(value)
        return [log, m, -m * (x + m), density, value][order]


@pytest.mark.parametrize("each", LINKS.values(), ids=LINKS)
@pytest.mark.parametrize(("order", "what"), list(enumerate(["log", "dlog", "d2log", "derivative", "value"])))
def test_every_function_keeps_relative_accuracy_in_both_tails(each, order, what):
    got = getattr(each, what)(GRID)
    for x, value in zip(GRID, got, strict=True):
        want = exact(each.name, order, x)
        if abs(want) < 1e-300:  # below the normal numbers nothing relative can be asked
            assert abs(value) <= 1e-300
        else:
            # exp(-x^2/2) itself carries x^2 ulps; everything else a few
            slack = 1e-13 * (
                1 + x * x / 20 if (each is PROBIT and x > 0) or what in ("derivative", "value") else 1
            )
            assert abs(mp.mpf(float(value)) / want - 1) < slack, (x, value, want)


@pytest.mark.parametrize("each", LINKS.values(), ids=LINKS)
def test_derivatives_are_those_of_the_logarithm(each):
    with mp.workdps(40):
        for x in (-4.0, -0.3, 0.0, 1.1, 5.0):
            d = [mp.diff(lambda y: _log(each.name, y), x, k) for k in (1, 2)]
            assert float(each.dlog(x)) == pytest.approx(float(d[0]), rel=1e-12)
            assert float(each.d2log(x)) == pytest.approx(float(d[1]), rel=1e-12)


def _log(name, y):
    return -mp.log(1 + mp.exp(-y)) if name == "logistic" else mp.log(mp.erfc(-y / mp.sqrt(2)) / 2)


@given(st.sampled_from(list(LINKS.values())), st.floats(-700, 700))
def test_symmetric_monotone_and_concave(each, x):
    assert each.value(x) + each.value(-x) == pytest.approx(1, abs=1e-15)
    assert 0 <= each.derivative(x) <= each.lipschitz * (1 + 1e-15)
    assert each.log(x) <= 0 <= each.dlog(x)
    assert each.d2log(x) <= 0
    assert np.isfinite([each.log(x), each.dlog(x), each.d2log(x)]).all()


@given(st.sampled_from(list(LINKS.values())), st.floats(1e-6, 1 - 1e-6))
def test_inverse(each, p):
    assert each.value(each.inverse(p)) == pytest.approx(p, rel=1e-9)


@given(st.sampled_from(list(LINKS.values())), st.floats(0, 20), st.floats(-1, 1))
def test_kappa_is_the_largest_inverse_slope(each, radius, fraction):
    assert each.kappa(radius) == pytest.approx(1 / each.derivative(radius), rel=1e-9)
    assert each.kappa(radius) * (1 + 1e-9) >= 1 / each.derivative(fraction * radius)


def test_kappa_of_the_papers():
    assert [round(LOGISTIC.kappa(r), n) for r, n in ((1, 2), (3, 1), (5, 1))] == [5.09, 22.1, 150.4]
    assert LOGISTIC.kappa(0) == 4
    assert PROBIT.kappa(0) == pytest.approx(np.sqrt(2 * np.pi), rel=1e-15)
    assert LOGISTIC.kappa(1000) == np.inf == PROBIT.kappa(100)
    for bad in (-1, np.nan):
        with pytest.raises(ValueError, match=r"radius of reward differences >= 0"):
            LOGISTIC.kappa(bad)


def test_link_by_name():
    assert link("probit") is PROBIT
    assert link(LOGISTIC) is LOGISTIC
    with pytest.raises(ValueError, match="'cauchy' is not one of logistic, probit"):
        link("cauchy")


def test_a_link_travels_to_another_process():
    assert [pickle.loads(pickle.dumps(each)) == each for each in LINKS.values()] == [True, True]
