"""PRO's loss against loops over the formula, Plackett-Luce laws, closed forms; masks, ties and bad input."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from preflab.algorithms.optimisation import SoftmaxTable, minimise
from preflab.algorithms.pro import LOSS, mean_scores, pro_loss, pro_solution, ranking_loss
from preflab.envs import FiniteMDP
from preflab.envs.ranking import PlackettLuce
from scipy.special import expit, logsumexp


def tensor(values):
    return torch.as_tensor(np.array(values, dtype=float, order="C"))


def authors_stages(s, r, skip=False):
    """Stage by stage as in the authors' code, without their 1e-10; exp is written out."""
    total = 0.0
    for k in range(len(s) - 1):
        gaps = r[k] - r[k + 1 :]
        best = gaps.max()
        negatives = [math.exp(x * g) for x, g in zip(s[k + 1 :], gaps, strict=True) if g > 0 or not skip]
        total += math.log(math.exp(s[k] * best) + sum(negatives)) - s[k] * best
    return total


@given(st.integers(0, 10**6), st.integers(1, 6), st.booleans(), st.booleans())
def test_the_ranking_loss_is_the_authors(seed, n, tied, skip):
    rng = np.random.default_rng(seed)
    s = rng.uniform(-4, 0, size=(3, n))
    r = np.sort(rng.integers(0, 3, size=(3, n)) if tied else rng.normal(size=(3, n)), axis=1)[:, ::-1]
    ours = ranking_loss(tensor(s), tensor(r), ties="skip" if skip else "keep").numpy()
    by_hand = [authors_stages(*row, skip=skip) for row in zip(s, r, strict=True)]
    np.testing.assert_allclose(ours, by_hand, atol=1e-12)


def test_a_tie_adds_one_to_its_stage_or_nothing():
    s, r = tensor([[-1.0, -2.0]]), tensor([[0.5, 0.5]])
    assert ranking_loss(s, r).item() == pytest.approx(math.log(2), abs=1e-15)
    assert ranking_loss(s, r, ties="skip").item() == 0
    s, r = tensor([[-1.0, -2.0, -3.0]]), tensor([[1.0, 1.0, 0.0]])
    kept = math.log(math.exp(-1) + 1 + math.exp(-3)) + 1
    dropped = math.log(math.exp(-1) + math.exp(-3)) + 1
    last = math.log(math.exp(-2) + math.exp(-3)) + 2
    assert ranking_loss(s, r).item() == pytest.approx(kept + last, abs=1e-14)
    assert ranking_loss(s, r, ties="skip").item() == pytest.approx(dropped + last, abs=1e-14)
    assert ranking_loss(s, r, temperature="none", ties="skip").item() == pytest.approx(
        dropped + last, abs=1e-14
    )


@given(st.integers(0, 10**6))
def test_two_responses_are_logistic_and_one_is_free(seed):
    rng = np.random.default_rng(seed)
    s, r = rng.normal(size=2), np.sort(rng.normal(size=2))[::-1]
    x = tensor(s[None]).requires_grad_(True)
    loss = ranking_loss(x, tensor(r[None]))
    loss.backward(torch.ones(1, dtype=torch.float64))
    T = r[0] - r[1]
    assert loss.item() == pytest.approx(-math.log(expit(T * (s[0] - s[1]))), abs=1e-10)
    slope = T * expit(T * (s[1] - s[0]))
    np.testing.assert_allclose(x.grad.numpy(), [[-slope, slope]], atol=1e-12)
    assert pro_loss(tensor([[[-1.0, -2.0]]]), tensor([[0.3]])).item() == 0


def test_without_temperatures_it_is_the_law_of_the_ranking_annotator():
    rng, n = np.random.default_rng(3), 5
    s = rng.normal(size=n)
    bandit = FiniteMDP.dense(np.ones((1, 1, n, 1)), s[None, None])
    annotator = PlackettLuce(bandit, 0)
    arms = bandit.rollout(np.zeros((1, 1), dtype=int), n, rng)
    arms.actions[:, 0] = np.arange(n)
    order = rng.permutation(n)
    loss = ranking_loss(tensor(s[order][None]), tensor(np.arange(n, 0, -1)[None]), temperature="none")
    assert -loss.item() == pytest.approx(annotator.log_probability(arms, order), abs=1e-12)


def test_equal_gaps_are_not_plackett_luce_from_three_on():
    s, r = tensor([[-1.0, -0.5, -2.0]]), tensor([[3.0, 2.0, 1.0]])
    tempered, plain = (ranking_loss(s, r, temperature=t).item() for t in ("gap", "none"))
    assert abs(tempered - plain) > 0.1
    assert ranking_loss(s[:, :2], r[:, :2]).item() == pytest.approx(
        ranking_loss(s[:, :2], r[:, :2], temperature="none").item(), abs=1e-15
    )


def test_masks_mean_for_scores_and_sum_for_imitation():
    tokens = [[-0.5, -1.0, -1.5], [-2.0], [-0.3, -0.7]]
    padded = np.full((1, 3, 4), -np.inf)  # what stands in the padding does not matter
    mask = np.zeros((1, 3, 4), dtype=bool)
    for i, x in enumerate(tokens):
        padded[0, i, : len(x)], mask[0, i, : len(x)] = x, True
    r = tensor([[2.0, 1.0, -1.0]])
    np.testing.assert_allclose(
        mean_scores(tensor(padded), torch.as_tensor(mask)).numpy(), [[-1.0, -2.0, -0.5]], atol=1e-15
    )
    loss = pro_loss(tensor(padded), r, None, torch.as_tensor(mask), sft_weight=0.1)
    assert loss.item() == pytest.approx(
        authors_stages(np.array([-1, -2, -0.5]), r[0].numpy()) + 0.1 * 4 * 3, abs=1e-12
    )
    whole = tensor(np.random.default_rng(0).normal(size=(2, 3, 4)) - 2)
    r = tensor([[2, 1, 0], [5, 1, 0]])
    torch.testing.assert_close(
        pro_loss(whole, r), pro_loss(whole, r, None, torch.ones(2, 3, 4, dtype=torch.bool))
    )
    weight = tensor([0.25, 0.75])
    rows = [pro_loss(whole[i : i + 1], r[i : i + 1]).item() for i in range(2)]
    assert pro_loss(whole, r, weight).item() == pytest.approx(0.25 * rows[0] + 0.75 * rows[1], abs=1e-12)


def test_far_scores_do_not_overflow():
    s, r = tensor([[-900.0, -1.0]]), tensor([[2.0, 0.0]])
    assert ranking_loss(s, r).item() == pytest.approx(2 * 899)


@given(st.integers(0, 10**6), st.integers(2, 6))
def test_the_solution_is_a_law_whose_mean_scores_are_the_reward(seed, n):
    rng = np.random.default_rng(seed)
    r, length = 5 * rng.normal(size=n), rng.integers(1, 9, size=n)
    log_pi = pro_solution(r, length)
    assert logsumexp(log_pi) == pytest.approx(0, abs=1e-11)
    assert np.ptp(log_pi / length - r) <= 1e-11


def test_on_responses_of_one_token_the_solution_is_a_softmax_and_the_loss_finds_it():
    r = np.array([1.0, 0.2, -0.3, -1.0])
    np.testing.assert_allclose(pro_solution(r, np.ones(4)), r - logsumexp(r), atol=1e-12)
    orders = np.array(list(itertools.permutations(range(4))))
    p = [math.exp(-authors_plain(r[o])) for o in orders]
    table, at = SoftmaxTable(4), torch.as_tensor(orders)
    places = torch.arange(4, 0, -1.0, dtype=torch.float64).expand(24, 4)
    found = minimise(
        lambda t: pro_loss(
            table.log_probabilities(t)[at][..., None], places, tensor(p), sft_weight=0, temperature="none"
        ),
        table.start(),
        tolerance=1e-12,
    )
    np.testing.assert_allclose(
        table.log_probabilities(found.theta).numpy(), pro_solution(r, np.ones(4)), atol=1e-9
    )
    entropy = -sum(x * math.log(x) for x in p)
    assert found.value == pytest.approx(entropy, abs=1e-12)


def authors_plain(s):
    return sum(logsumexp(s[k:]) - s[k] for k in range(len(s)))


def test_bad_input_is_named():
    s = torch.zeros(2, 3).double()
    tokens, r = torch.zeros(2, 3, 4).double(), tensor([[2, 1, 0], [2, 3, 0]])
    with pytest.raises(
        ValueError, match=r"rewards\[1\] go from 2 to 3 at places 0 and 1: sort every ranking"
    ):
        ranking_loss(s, r)
    with pytest.raises(ValueError, match="sort every ranking"):
        pro_loss(tokens, tensor([[2, 1, math.nan], [2, 1, 0]]))
    with pytest.raises(ValueError, match=r"rewards have shape \(2,\); expected one a response, \(2, 3\)"):
        ranking_loss(s, tensor([1, 0]))
    for options in ({"temperature": "score"}, {"ties": "drop"}):
        with pytest.raises(ValueError, match="expected 'gap' or 'none', and 'keep' or 'skip'"):
            ranking_loss(s, tensor([[2, 1, 0]] * 2), **options)
    with pytest.raises(ValueError, match=r"sft_weight is -1; it must be at least 0"):
        pro_loss(tokens, r, sft_weight=-1)
    with pytest.raises(ValueError, match=r"mask has shape \(2, 4\); expected \(2, 3, 4\)"):
        pro_loss(tokens, r, None, torch.ones(2, 4, dtype=torch.bool))
    empty = torch.ones(2, 3, 4, dtype=torch.bool)
    empty[1, 2] = False
    with pytest.raises(ValueError, match=r"mask\[1, 2\] has no token"):
        pro_loss(tokens, r, None, empty)
    with pytest.raises(ValueError, match="lengths at least 1"):
        pro_solution([1.0, 0.0], [1, 0])


def test_the_spec_reads_the_signature():
    assert LOSS.inputs == ("policy", "rewards", "weight", "mask")
    assert LOSS.parameters == ("sft_weight", "temperature", "ties")
