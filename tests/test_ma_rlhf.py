"""Macro actions against loops over tokens in the paper's words, and hand-worked cases."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from preflab.algorithms import ma_rlhf as ma

seeds, grams, unit = st.integers(0, 10**6), st.integers(1, 9), st.floats(0, 1)
WEIGHTINGS = ["equal", "unit", "position", "first"]


def drawn(seed, B=4, T=11):
    rng = np.random.default_rng(seed)
    first, length, t = rng.integers(0, 4, size=B), rng.integers(1, T - 3, size=B), np.arange(T)
    mask = (t >= first[:, None]) & (t < (first + length)[:, None])
    return mask, np.where(mask, rng.normal(size=(2, B, T)), np.nan), rng


def by_hand(r, v, pieces, gamma, lam, weighting, aggregation, discount):
    """Advantages of one response: loops over macros, the last first."""
    advantage, A, V_next = np.zeros(len(r)), 0.0, 0.0
    for piece in reversed(pieces):
        n = len(piece)
        w = {
            "equal": np.full(n, 1 / n),
            "unit": np.eye(n)[-1],
            "first": np.eye(n)[0],
            "position": 1 / np.arange(1, n + 1) / (1 / np.arange(1, n + 1)).sum(),
        }[weighting]
        V = w @ v[piece]
        each = gamma if discount == "smdp" else 1.0
        R = w @ r[piece] if aggregation == "code" else sum(each**i * r[t] for i, t in enumerate(piece))
        step = gamma**n if discount == "smdp" else gamma
        A = R + step * V_next - V + step * lam * A
        advantage[piece], V_next = A, V
    return advantage


@given(
    seeds, grams, unit, unit, st.sampled_from(WEIGHTINGS), st.sampled_from(["sum", "code"]),
    st.sampled_from(["smdp", "macro"]), st.booleans(),
)  # fmt: skip
def test_advantages_by_hand(seed, n, gamma, lam, weighting, aggregation, discount, alone):
    mask, (r, v), _ = drawn(seed)
    macro = ma.fixed(mask, n, alone)
    found = ma.macro_gae(
        r, v, macro, gamma=gamma, lam=lam, weighting=weighting, aggregation=aggregation, discount=discount
    )
    for b, inside in enumerate(mask):
        t = np.flatnonzero(inside)
        body = len(t) - 1 if alone else len(t)
        pieces = [list(range(i, min(i + n, body))) for i in range(0, body, n)] + (
            [[len(t) - 1]] if alone else []
        )
        expected = by_hand(r[b, t], v[b, t], pieces, gamma, lam, weighting, aggregation, discount)
        np.testing.assert_allclose(found.advantage[b, t], expected, atol=1e-12)
        np.testing.assert_array_equal(
            macro[b, t], np.repeat(np.arange(len(pieces)), [len(p) for p in pieces])
        )
        assert (found.advantage[b, ~inside] == 0).all()
        assert (found.target[b, ~inside] == 0).all()
        values = found.values[b, macro[b, t]]
        np.testing.assert_allclose(found.target[b, t], expected + values, atol=1e-12)


@given(seeds, unit, unit)
def test_one_token_macros_are_tokens_to_the_last_bit(seed, gamma, lam):
    mask, (r, v), _ = drawn(seed)
    token = ma.token_gae(r, v, mask, gamma=gamma, lam=lam)
    for weighting in WEIGHTINGS:
        for aggregation in ("sum", "code"):
            found = ma.macro_gae(
                r, v, ma.fixed(mask, 1), gamma=gamma, lam=lam, weighting=weighting, aggregation=aggregation
            )
            np.testing.assert_array_equal(found.advantage, token)


@given(seeds, grams)
def test_rows_do_not_see_each_other(seed, n):
    mask, (r, v), _ = drawn(seed)
    whole = ma.macro_gae(r, v, ma.fixed(mask, n)).advantage
    for b in range(len(mask)):
        row = slice(b, b + 1)
        np.testing.assert_array_equal(
            ma.macro_gae(r[row], v[row], ma.fixed(mask[row], n)).advantage, whole[row]
        )


@given(seeds)
def test_random_lengths_are_the_shuffled_bag(seed):
    mask, rng = np.ones((5, 40), dtype=bool), np.random.default_rng(seed)
    lengths = ma.lengths_of(ma.randomised(mask, rng, repeats=1))
    for row in lengths:
        assert sorted(row[:5]) == [1, 2, 3, 5, 10]
        assert row[5] == 40 - 21
    assert len({tuple(row) for row in lengths}) > 1


def test_terminations_by_hand():
    mask = np.array([[False, True, True, True, True, False], [True, True, False, False, False, False]])
    np.testing.assert_array_equal(ma.fixed(mask, 3), [[-1, 0, 0, 0, 1, -1], [0, 0, -1, -1, -1, -1]])
    np.testing.assert_array_equal(
        ma.fixed(mask, 9, last_alone=True), [[-1, 0, 0, 0, 1, -1], [0, 1, -1, -1, -1, -1]]
    )
    log_p = np.log([[0.9, 0.5, 0.6, 0.2, 0.2, 0.1], [0.5, 0.4, 0.1, 0.1, 0.1, 0.1]])
    np.testing.assert_array_equal(ma.perplexity(mask, log_p), [[-1, 0, 0, 1, 1, -1], [0, 1, -1, -1, -1, -1]])
    starts = np.zeros((2, 6), dtype=bool)
    starts[0, [0, 2]] = True  # position 0 is no token
    np.testing.assert_array_equal(
        ma.from_starts(mask, starts), [[-1, 0, 1, 1, 1, -1], [0, 0, -1, -1, -1, -1]]
    )


def test_credit_over_512_tokens():
    mask, rewards = np.ones((1, 512), dtype=bool), np.zeros((1, 512))
    rewards[0, -1] = 1.0
    by_n = {n: ma.macro_gae(rewards, np.zeros((1, 512)), ma.fixed(mask, n)).advantage[0, 0] for n in (1, 5)}
    assert by_n[1] == pytest.approx(4e-12, rel=0.1)
    assert by_n[5] == pytest.approx(0.0053, rel=0.02)


def test_bad_input_is_refused():
    mask = np.ones((1, 3), dtype=bool)
    with pytest.raises(ValueError, match=r"mask has shape \(1, 3\) and type float64; expected booleans"):
        ma.fixed(np.ones((1, 3)), 1)
    for row, runs in (([True, False, True], 2), ([False] * 3, 0)):
        with pytest.raises(ValueError, match=rf"mask\[0\] has {runs} runs of tokens"):
            ma.fixed(np.array([row]), 1)
    for n in (0, 1.5):
        with pytest.raises(ValueError, match="a whole number of tokens, at least 1"):
            ma.fixed(mask, n)
    with pytest.raises(ValueError, match=r"lengths is \(\), 1 times; at least one length"):
        ma.randomised(mask, np.random.default_rng(0), lengths=())
    with pytest.raises(ValueError, match=r"starts has shape \(1, 2\); the mask has \(1, 3\)"):
        ma.from_starts(mask, [[True, False]])
    with pytest.raises(ValueError, match=r"log_probabilities has shape \(1, 2\)"):
        ma.perplexity(mask, [[0.0, 0.0]])
    with pytest.raises(ValueError, match=r"macro has shape \(3,\) and type int64; expected integers"):
        ma.token_weights(np.arange(3), "equal")
    macro, zero = ma.fixed(mask, 2), np.zeros((1, 3))
    with pytest.raises(ValueError, match="weighting is 'mean'; expected equal, unit, position or first"):
        ma.macro_gae(zero, zero, macro, weighting="mean")
    with pytest.raises(ValueError, match="aggregation 'mean' is sum or code, discount 'smdp' smdp or macro"):
        ma.macro_gae(zero, zero, macro, aggregation="mean")
    with pytest.raises(ValueError, match=r"rewards has shape \(1, 2\); the macros have \(1, 3\)"):
        ma.macro_gae(zero[:, :2], zero, macro)
    with pytest.raises(ValueError, match=r"values\[0, 1\] is nan; it must be finite on the tokens"):
        ma.macro_gae(zero, [[0.0, np.nan, 0.0]], macro)
    for name in ("gamma", "lam"):
        with pytest.raises(ValueError, match=rf"{name} is 1.5; it must lie in \[0, 1\]"):
            ma.macro_gae(zero, zero, macro, **{name: 1.5})
