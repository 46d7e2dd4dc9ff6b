"""The graph of comparisons against a union-find written out, and what its errors say."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from preflab.algorithms.estimation import fit_preferences
from preflab.envs.comparison_graph import check_connected, components


def by_search(pairs, n):
    """Components as sets, by flooding from each response."""
    near = {i: {i} for i in range(n)}
    for a, b in pairs:
        near[a].add(b)
        near[b].add(a)
    found = []
    for start in range(n):
        group = {start}
        while (bigger := set().union(*(near[i] for i in group))) != group:
            group = bigger
        if group not in found:
            found.append(group)
    return found


@given(
    st.integers(1, 9).flatmap(
        lambda n: st.tuples(st.just(n), st.lists(st.tuples(*[st.integers(0, n - 1)] * 2)))
    )
)
def test_components_are_those_of_a_search(case):
    n, pairs = case
    found = components(pairs, n)
    assert sorted(sorted(g.tolist()) for g in found) == sorted(sorted(g) for g in by_search(pairs, n))
    assert [len(g) for g in found] == sorted((len(g) for g in found), reverse=True)
    assert all((np.diff(g) > 0).all() for g in found)
    first, second = (np.array([p[k] for p in pairs], dtype=int) for k in (0, 1))
    if len(found) == 1:
        check_connected(first, second, n)
    else:
        with pytest.raises(ValueError, match=f"has {len(found)} components"):
            check_connected(first, second, n)


def test_a_component_is_what_the_likelihood_cannot_see():
    """The fit's Hessian has one null direction for each component."""
    pairs = np.array([[0, 1], [1, 2], [2, 0], [3, 4], [5, 5]])
    one_hot = np.eye(6)
    hessian = fit_preferences(one_hot[pairs[:, 0]] - one_hot[pairs[:, 1]], np.full(5, 0.5)).hessian
    assert 6 - np.linalg.matrix_rank(hessian) == len(components(pairs, 6)) == 3


def test_the_error_names_the_members():
    with pytest.raises(
        ValueError, match=r"2 components: no comparison joins \{'d', 'e'\} to the other 3 responses, so"
    ):
        check_connected([0, 1, 3], [1, 2, 4], 5, names=list("abcde"))
    with pytest.raises(
        ValueError, match=r"3 components: .* \{3\} to the other 4 responses \(and 1 more such"
    ):
        check_connected([0, 1], [1, 2], 5)
    with pytest.raises(ValueError, match=r"\{0, 1, 2, 3, 4 and 2 more\} to the other 8 responses"):
        check_connected([*range(6), *range(7, 14)], [*range(1, 7), *range(8, 15)], 15)
    with pytest.raises(ValueError, match=r"2 components: no comparison joins \{1\}"):
        check_connected([], [], 2)
    check_connected([], [], 1)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="n is 0"):
        components([], 0)
    with pytest.raises(ValueError, match=r"comparison 1 is of \[2, 3\]; responses are numbered from 0 to 2"):
        components([[0, 1], [2, 3]], 3)
    with pytest.raises(ValueError, match=r"pairs has shape \(1, 3\) and type int64"):
        components([[0, 1, 2]], 3)
    with pytest.raises(ValueError, match="type float64"):
        components([[0.5, 1.0]], 3)
    with pytest.raises(ValueError, match=r"first has shape \(2,\) and second \(1,\)"):
        check_connected([0, 1], [1], 2)
    with pytest.raises(ValueError, match="1 names for 2 responses"):
        check_connected([0], [1], 2, names=["a"])
