"""Ranked factors against the tree written out, a closed form by integration, and as an annotator."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from preflab.envs import random_token_mdp
from preflab.envs.lexicographic import LexicographicComparator, lexicographic_weights, uniform_cycle_share
from preflab.envs.tournaments import beats, cycles, is_preorder
from scipy.integrate import dblquad

values = st.integers(-3, 3)


def tree(a, b, order, margins):
    """The paper's walk, factor by factor."""
    for column, d in zip(order, margins, strict=True):
        if a[column] - b[column] > d:
            return 1.0
        if a[column] - b[column] < -d:
            return 0.0
    return 0.5


@given(
    st.lists(st.tuples(values, values, values), min_size=1, max_size=7),
    st.permutations(range(3)),
    st.lists(st.sampled_from([0.0, 1.0, 1.5]), min_size=3, max_size=3),
    st.integers(1, 3),
)
def test_the_tree(z, order, margins, levels):
    order, margins = tuple(order[:levels]), tuple(margins[:levels])
    comparator = LexicographicComparator(order, margins)
    P = comparator.game(z).P
    for (i, a), (j, b) in product(enumerate(z), enumerate(z)):
        assert P[i, j] == comparator.compare(a, b) == tree(a, b, order, margins)
    if not any(margins):
        assert is_preorder(comparator.game(z))


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_whole_numbers_in_mixed_radix(ranges):
    grid = np.array(list(product(*map(range, ranges))))
    total = grid @ lexicographic_weights(ranges)
    np.testing.assert_array_equal(total, np.arange(len(grid)))  # `product` counts in this very order
    game = LexicographicComparator(tuple(range(len(ranges)))).game(grid)
    np.testing.assert_array_equal(beats(game), total[:, None] > total)


def test_units_are_standard_deviations():
    z = np.array([[0.0, 1.0], [0.0, 2.0], [0.0, 6.0]])
    plain = LexicographicComparator.measured(z, (1, 0), (0.5, 0.0))
    assert plain.units == (pytest.approx(z[:, 1].std()), 1.0)  # a factor that does not vary never decides
    assert plain.compare(z[0], z[1]) == 0.5
    assert plain.compare(z[2], z[1]) == 1.0
    weighted = LexicographicComparator.measured(z, (1,), (0.5,), law=[0.5, 0.5, 0.0])
    assert weighted.units == (0.5,)
    assert weighted.compare(z[0], z[1]) == 0.0


@pytest.mark.parametrize("d", [0.0, 0.1, 0.3, 0.5, 0.8, 1.0])
def test_the_share_of_circles_by_integration(d):
    """6 times the area, weighted by 1 - a - b, of the gaps (a, b) with a, b <= d < a + b <= 1; a sixth of it."""
    area, _ = dblquad(
        lambda b, a: 1 - a - b, 0, d, lambda a: max(d - a, 0), lambda a: max(min(d, 1 - a), d - a, 0)
    )
    assert uniform_cycle_share(d) == pytest.approx(area, abs=1e-8)


def test_a_circle():
    z = np.array([[0.0, 2.0], [0.25, 1.0], [0.5, 0.0]])
    game = LexicographicComparator((0, 1), (0.3, 0.0)).game(z, reference=[0.2, 0.3, 0.5], name="circle")
    assert cycles(game).count == 1
    assert game.name == "circle"
    assert cycles(LexicographicComparator((0, 1)).game(z)).count == 0


def test_as_an_annotator():
    model = random_token_mdp(vocabulary=2, horizon=2)
    comparator = LexicographicComparator((0, 1))

    def factors(trajectories):
        live = (trajectories.states > 0).sum(axis=1)
        return np.column_stack([live, trajectories.actions[:, 0]])

    annotator = comparator.annotator(model, 0, factors, budget=1000)
    leaves = np.arange(model.n_leaves)
    first, second = (model.trajectories(x.ravel()) for x in np.meshgrid(leaves, leaves, indexing="ij"))
    P = annotator.probability(first, second).reshape(len(leaves), -1)
    np.testing.assert_array_equal(P, comparator.game(factors(model.trajectories(leaves))).P)
    answers = annotator.compare(first, second).reshape(P.shape)
    np.testing.assert_array_equal(answers[P != 0.5], P[P != 0.5])
    assert annotator.count == len(leaves) ** 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LexicographicComparator(()), r"order is \(\); it names at least one column"),
        (lambda: LexicographicComparator((0, 0)), "each at most once"),
        (lambda: LexicographicComparator((0, -1)), "at least one column"),
        (lambda: LexicographicComparator((0, 1), (0.1,)), "there are 1 margins for 2 levels"),
        (
            lambda: LexicographicComparator((0,), (-0.1,)),
            r"margins\[0\] is -0.1; it must be finite and at least 0",
        ),
        (
            lambda: LexicographicComparator((0,), (0.1,), (0.0,)),
            r"units\[0\] is 0.0; it must be finite and positive",
        ),
        (lambda: LexicographicComparator((0,), (np.inf,)), "finite"),
        (
            lambda: LexicographicComparator((2,)).compare([1, 2], [1, 2]),
            "order names column 2; z has 2 columns",
        ),
        (
            lambda: LexicographicComparator((0,)).game([1.0, 2.0]),
            r"z has shape \(2,\); expected \(n, factors\)",
        ),
        (
            lambda: LexicographicComparator((0,)).game([[1.0], [np.nan]]),
            r"z\[1, 0\] is nan; factors are finite",
        ),
        (lambda: LexicographicComparator((0,)).game([]), r"z has shape \(0,\); expected \(\.\.\., factors\)"),
        (lambda: lexicographic_weights([2, 0]), r"ranges is \[2, 0\]; expected whole numbers"),
        (lambda: lexicographic_weights([2**30, 2**30]), r"exceeds 2\^53"),
        (lambda: uniform_cycle_share(1.5), r"margin is 1.5; .* in \[0, 1\]"),
    ],
)
def test_bad_input_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
