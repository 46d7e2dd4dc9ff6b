"""Exploration worlds: optima in closed form against backward induction and enumeration, and the tables by hand."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from preflab.envs import combination_lock, deep_sea, river_swim
from preflab.envs.exploration import combination_lock_optimum, deep_sea_optimum, toy_text

seeds = st.integers(0, 2**32 - 1)
slips = st.sampled_from([0.0, 0.1, 0.9])


def optimum(model):
    v = np.zeros(model.sizes[-1])
    for h in range(model.horizon - 1, -1, -1):
        v = (model.reward[h] + np.einsum("sat,t->sa", model.kernel.dense(h), v)).max(axis=1)
    return float(model.initial @ v)


def random_policy_value(model):
    v = np.zeros(model.sizes[-1])
    for h in range(model.horizon - 1, -1, -1):
        v = (model.reward[h] + np.einsum("sat,t->sa", model.kernel.dense(h), v)).mean(axis=1)
    return float(model.initial @ v)


def best_open_loop(model):
    """The best return over all action sequences of a deterministic world, by enumeration."""
    best = -np.inf
    for actions in product(range(model.n_actions), repeat=model.horizon):
        s, total = int(model.initial.argmax()), 0.0
        for h, a in enumerate(actions):
            total += model.reward[h][s, a]
            s = int(model.kernel.dense(h)[s, a].argmax())
        best = max(best, total)
    return best


def test_river_swim_by_hand():
    model = river_swim(4, 7)
    P = model.kernel.dense(3)
    np.testing.assert_allclose(P[:, 0], [[1, 0, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]])
    np.testing.assert_allclose(
        P[:, 1], [[0.4, 0.6, 0, 0], [0.05, 0.6, 0.35, 0], [0, 0.05, 0.6, 0.35], [0, 0, 0.4, 0.6]]
    )
    assert (model.horizon, model.sizes[0], np.sum(model.reward[0] > 0)) == (7, 4, 2)
    assert (model.reward[2][0, 0], model.reward[2][3, 1]) == (0.005, 1.0)
    two = river_swim(2, 1).kernel.dense(0)[:, 1]
    np.testing.assert_allclose(two, [[0.4, 0.6], [0.4, 0.6]])


def test_river_swim_tempts_to_the_left_and_pays_on_the_right():
    """Short of the right bank's reach, staying left is best: 0.005 a step; with time, swimming right wins."""
    assert optimum(river_swim(6, 5)) == pytest.approx(0.025)
    assert optimum(river_swim(6, 40)) > 40 * 0.005 * 10


@given(st.integers(1, 8), st.none() | seeds, slips, st.sampled_from([0.0, 0.01, 0.8]))
def test_deep_sea_optimum(size, seed, slip, cost):
    model = deep_sea(size, seed, slip, cost)
    assert optimum(model) == pytest.approx(deep_sea_optimum(size, slip, cost), abs=1e-12)
    if slip == 0 and size <= 6:
        assert best_open_loop(model) == pytest.approx(deep_sea_optimum(size, slip, cost), abs=1e-12)


def test_deep_sea_facts():
    assert deep_sea_optimum(10) == pytest.approx(0.99)
    assert deep_sea_optimum(10, cost=3.0) == 0.0  # not worth the trip: go left
    plain = deep_sea(5, None)
    np.testing.assert_array_equal(plain.kernel.dense(0)[2].argmax(axis=1), [1, 3])
    np.testing.assert_array_equal(plain.kernel.dense(0)[4].argmax(axis=1), [3, 4])
    assert plain.reward[4][4].tolist() == [0.0, pytest.approx(1 - 0.002)]
    # Blind walking pays for half the steps and finds the treasure once in 2^size.
    assert random_policy_value(plain) == pytest.approx(2.0**-5 - 0.005)
    scrambled = deep_sea(10, 0)
    right = scrambled.kernel.dense(3)[5].argmax(axis=1)
    assert sorted(right.tolist()) == [4, 6]
    meaning = [deep_sea(10, 0).reward[h].argmin(axis=1) for h in range(9)]
    assert 20 < np.sum(meaning) < 70  # neither action is right everywhere
    np.testing.assert_array_equal(deep_sea(10, 0).kernel.P, scrambled.kernel.P)
    assert (deep_sea(10, 1).kernel.P != scrambled.kernel.P).any()


@given(st.integers(1, 6), st.integers(1, 4), seeds, slips)
def test_combination_lock_optimum(horizon, n_actions, seed, slip):
    model = combination_lock(horizon, n_actions, seed, slip)
    assert optimum(model) == pytest.approx(combination_lock_optimum(horizon, slip), abs=1e-12)
    blind = combination_lock_optimum(horizon, slip) / n_actions**horizon
    assert random_policy_value(model) == pytest.approx(blind, abs=1e-12)
    if slip == 0 and n_actions**horizon <= 300:
        assert best_open_loop(model) == 1.0


def test_lock_codes_depend_on_the_seed():
    codes = [combination_lock(12, 4, s).kernel.P[:, 0, :, 0].argmax(axis=1) for s in (0, 0, 1)]
    np.testing.assert_array_equal(codes[0], codes[1])
    assert (codes[0] != codes[2]).any()
    assert len(set(codes[0].tolist())) > 1


def test_toy_text():
    model = toy_text("FrozenLake-v1", 6, is_slippery=False)
    assert (optimum(model), model.horizon, model.name) == (1.0, 6, "FrozenLake-v1")


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: river_swim(1, 5), "n is 1; it must be at least 2"),
        (lambda: river_swim(5, 0), "horizon is 0"),
        (lambda: deep_sea(0), "size is 0"),
        (lambda: deep_sea(3, slip=1.0), r"slip is 1.0; it must lie in \[0, 1\)"),
        (lambda: combination_lock(0), "horizon is 0"),
        (lambda: combination_lock(3, 0), "n_actions is 0"),
        (lambda: combination_lock(3, slip=-0.1), "slip is -0.1"),
    ],
)
def test_bad_sizes(build, words):
    with pytest.raises(ValueError, match=words):
        build()
