"""The exact world of conformance: the mean over its batches is the expectation, and its targets are right."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from preflab.llm_bridge.conformance import TARGETS, total
from preflab.llm_bridge.conformance.conform import _bench
from preflab.llm_bridge.conformance.world import GROUP, TOTAL, exact_world
from scipy.special import expit, log_softmax

WORLD = exact_world(0)
LOG_REF, LOG_PREVIOUS, LOG_BEST = (
    np.log(c / TOTAL) for c in (WORLD.reference, WORLD.previous, WORLD.optimum)
)


def bench(name, **parameters):
    return _bench(name, tuple(TARGETS[name].checked(parameters).items()), 0)


@given(st.integers(0, 10**6))
@settings(max_examples=20)
def test_the_tokens_of_a_completion_add_up_to_the_trees_log_probability(seed):
    theta = torch.tensor(np.random.default_rng(seed).normal(size=WORLD.size) * 3)
    one = WORLD.completions(WORLD.token_log_probabilities(theta), np.arange(2 * WORLD.responses))
    expected = WORLD.table.log_probabilities(theta[: WORLD.table.size])
    torch.testing.assert_close(total(one.policy, one.mask), expected)
    assert one.policy.isfinite().all()
    assert (one.policy[~one.mask] < 0).all()  # prompt and padding hold numbers that a right loss must not use


def test_sequences_have_prompts_completions_and_padding_of_unequal_lengths():
    one = WORLD.completions(
        WORLD.token_log_probabilities(torch.as_tensor(WORLD.start)), np.arange(2 * WORLD.responses)
    )
    lengths = one.mask.sum(1).numpy()
    assert set(lengths) == {1, 2, 3}
    assert lengths.tolist() == WORLD.table.lengths.tolist()
    first = one.mask.long().argmax(1)
    assert set(first.tolist()) == set(WORLD.prompt_lengths)
    for ids, mask in zip(one.ids, one.mask, strict=True):
        inside, after = ids[mask].tolist(), ids[mask.nonzero()[-1, 0] + 1 :]
        assert WORLD.end not in inside[:-1]
        assert (inside[-1] == WORLD.end) or len(inside) == 3
        assert len(after) >= 1
        assert (after == WORLD.end).all()  # padding is the end token
    rows = {
        (i // WORLD.responses, *ids[m].tolist())
        for i, (ids, m) in enumerate(zip(one.ids, one.mask, strict=True))
    }
    assert len(rows) == 2 * WORLD.responses


@pytest.mark.parametrize("general", [False, True])
def test_rows_of_pairs_are_the_population(general):
    chosen, rejected = WORLD.pair_rows(general)
    n, L = 2 * WORLD.responses, WORLD.responses
    found = np.zeros((n, n))
    np.add.at(found, (chosen, rejected), 1 / len(chosen))
    expected = np.zeros((n, n))
    for x, (m, P) in enumerate(zip(WORLD.previous, WORLD.preferences(general), strict=True)):
        expected[x * L : (x + 1) * L, x * L : (x + 1) * L] = np.outer(m, m) * (1 - np.eye(L)) * P
    np.testing.assert_allclose(found, expected / expected.sum(), atol=1e-15)
    pairs = WORLD.population(general)
    for (i, j), p, w in zip(pairs.index, pairs.preferred, pairs.weight, strict=True):
        assert found[i, j] + found[j, i] == pytest.approx(w, abs=1e-15)
        assert found[i, j] == pytest.approx(w * p, abs=1e-15)
    assert len(chosen) % 4 == 0  # micro-batches of one size


def test_any_two_members_of_a_group_are_independent_draws_of_the_policy():
    rows = WORLD.group_rows(WORLD.policy)
    law = (WORLD.policy / TOTAL / 2).reshape(-1)
    L = WORLD.responses
    for a, b in ((0, 1), (0, 2), (1, 2)):
        joint = np.zeros((2 * L, 2 * L))
        np.add.at(joint, (rows[:, a], rows[:, b]), 1 / len(rows))
        for x in range(2):
            part, one = joint[x * L : (x + 1) * L, x * L : (x + 1) * L], law[x * L : (x + 1) * L]
            np.testing.assert_allclose(part, 2 * np.outer(one, one), atol=1e-15)
    assert rows.shape == (2 * TOTAL**2, GROUP)


def test_rewards_and_games_have_the_optimum_that_they_are_made_from():
    beta, tau, share = 0.3, 0.1, 0.25
    gibbs = log_softmax(LOG_REF + WORLD.reward_of(beta) / beta, axis=1)
    np.testing.assert_allclose(gibbs, LOG_BEST, atol=1e-12)
    game = WORLD.game_of(tau, share)
    np.testing.assert_allclose(game + game.transpose(0, 2, 1), 1, atol=1e-12)
    assert (game > 0).all()
    assert (game < 1).all()
    mixture = np.exp(log_softmax((1 - share) * LOG_BEST + share * LOG_REF, axis=1))
    wins = np.einsum("xij,xj->xi", game, mixture)
    np.testing.assert_allclose(log_softmax(LOG_REF + wins / tau, axis=1), LOG_BEST, atol=1e-12)
    other = np.einsum("xij,xj->xi", game, WORLD.policy / TOTAL)
    assert np.ptp(other - wins, axis=1).min() > 0.01  # who the opponent is matters
    with pytest.raises(ValueError, match="needs tau <="):
        WORLD.game_of(10.0, share)


# ---- targets -----------------------------------------------------------------------------------------------------


def by_hand(name, log_pi):
    """The target's value at log_pi (2, L), written down once more in NumPy, at the default parameters."""
    P = WORLD.preferences(name in ("ipo", "inpo", "sppo"))
    h = (log_pi - LOG_REF)[:, :, None] - (log_pi - LOG_REF)[:, None, :]
    g = (log_pi - LOG_PREVIOUS)[:, :, None] - (log_pi - LOG_PREVIOUS)[:, None, :]
    mu = WORLD.previous[:, :, None] * WORLD.previous[:, None, :] * (1 - np.eye(WORLD.responses)) * P
    mu = mu / mu.sum()  # of (winner, loser)
    dpo = -(mu * np.log(expit(0.1 * h))).sum()
    if name == "dpo":
        return dpo
    if name == "ipo":
        return (mu * (h - 5.0) ** 2).sum()
    if name == "inpo":
        return (mu * (0.2 * h + 0.8 * g - 1.0) ** 2).sum()
    if name == "rpo":
        return dpo - 0.05 * (mu * log_pi[:, :, None]).sum()
    if name == "vpo":
        return dpo - 0.05 * (np.exp(LOG_REF) * log_pi).sum() / 2
    if name == "xpo":
        joint = np.exp(LOG_PREVIOUS)[:, :, None] * np.exp(LOG_REF)[:, None, :] / 2  # of (y, y~)
        logistic = -P * np.log(expit(0.1 * h)) - (1 - P) * np.log(expit(-0.1 * h))
        return (joint * (logistic + 0.001 * log_pi[:, None, :])).sum()
    if name == "sppo":
        wins = np.einsum("xij,xj->xi", P, np.exp(LOG_PREVIOUS))
        return (np.exp(LOG_PREVIOUS) * (log_pi - LOG_PREVIOUS - wins + 0.5) ** 2).sum() / 2
    kl = (np.exp(log_pi) * (log_pi - LOG_REF)).sum() / 2
    if name == "kl":
        return kl
    if name == "kl_policy_gradient":
        return 0.1 * kl - (np.exp(log_pi) * WORLD.reward_of(0.1)).sum() / 2
    here = bench(name).here.theta[: WORLD.table.size]
    fixed = WORLD.table.log_probabilities(here).numpy().reshape(2, -1)
    mixture = np.exp(log_softmax(0.75 * fixed + 0.25 * LOG_REF, axis=1))
    wins = np.einsum("xij,xj->xi", WORLD.game_of(0.1, 0.25), mixture)
    return 0.1 * kl - (np.exp(log_pi) * wins).sum() / 2


@pytest.mark.parametrize("name", TARGETS)
def test_exact_gradients_are_those_of_formulas_written_down_again(name):
    b = bench(name)
    theta, n = b.here.theta, WORLD.table.size

    def value(x):
        return by_hand(name, WORLD.table.log_probabilities(x[:n]).numpy().reshape(2, -1))

    exact = b.exact(b.here).gradient
    for direction in np.random.default_rng(1).normal(size=(3, WORLD.size)):
        step = 1e-5 * torch.as_tensor(direction)
        slope = (value(theta + step) - value(theta - step)) / 2e-5
        assert exact @ direction == pytest.approx(slope, rel=1e-6, abs=1e-8)
    assert not exact[n:].any()


@pytest.mark.parametrize("name", TARGETS)
def test_the_known_optimum_is_a_minimum(name):
    b = bench(name)
    best, law = b.exact(b.optimum), np.exp(b.setting.optimum).reshape(2, -1)
    assert np.abs(best.gradient).max() < 1e-9
    np.testing.assert_allclose(law.sum(1), 1, atol=1e-12)
    if name != "nash_md_pg":  # whose function holds the opponent fixed
        assert best.value < min(b.exact(b.reference).value + 1e-15, b.exact(b.here).value)


def test_targets_take_their_own_parameters():
    assert TARGETS["dpo"].checked({"beta": 1}) == {"beta": 1.0, "label_smoothing": 0.0}
    with pytest.raises(ValueError, match="ipo has no parameter 'beta'; it takes tau"):
        TARGETS["ipo"].checked({"beta": 1})
    with pytest.raises(ValueError, match="kl has no parameter 'beta'; it takes no parameters"):
        TARGETS["kl"].checked({"beta": 1})
    with pytest.raises(ValueError, match=r"sign is 2\.0"):
        bench("vpo", sign=2)
    with pytest.raises(ValueError, match=r"beta is -1\.0"):
        bench("dpo", beta=-1)
