"""IPO's, INPO's and SPPO's losses against worked numbers, closed forms and enumeration."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from preflab.algorithms.inpo import inpo_loss
from preflab.algorithms.ipo import ipo, ipo_loss, product_loss, square_loss
from preflab.algorithms.optimisation import Pairs, SoftmaxTable, fit, gather
from preflab.algorithms.optimisation.losses import margin
from preflab.algorithms.sppo import SPPO, sppo_loss
from preflab.envs import PreferenceGame, bradley_terry_game, random_game


def drawn(seed, n):
    rng = np.random.default_rng(seed)
    law = 0.9 * rng.dirichlet(np.ones(n)) + 0.1 / n
    return random_game(n, rng, reference=0.9 * rng.dirichlet(np.ones(n)) + 0.1 / n), law, rng


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def test_two_arms():
    game = PreferenceGame([[0.5, 0.8], [0.2, 0.5]])
    law = ipo(game, game.reference, 0.1)
    assert np.log(law[0] / law[1]) == pytest.approx(0.6 / 0.2, abs=1e-12)  # (P12 - P21) / (2 tau)
    assert law[0] == pytest.approx(0.9526, abs=1e-4)


def test_the_margin_of_a_certain_pair_is_finite():
    table = SoftmaxTable(2)
    pairs = Pairs([[0, 1]], [1.0], [1.0])
    p, w = pairs.tensors()
    flat = torch.zeros(1, 2, dtype=torch.float64)
    found = fit(lambda lp: ipo_loss(gather(lp, pairs), flat, p, w, tau=0.05), table, tolerance=1e-12)
    log_pi = table.log_probabilities(found.theta)
    assert float(log_pi[0] - log_pi[1]) == pytest.approx(1 / 0.1, abs=1e-9)


@given(st.integers(0, 10**6), st.integers(2, 6))
def test_the_product_form_is_the_sum_over_pairs(seed, n):
    game, law, rng = drawn(seed, n)
    log_pi, anchor, target = rng.normal(size=n), game.log_reference, rng.uniform(0.1, 3)
    d = log_pi - anchor
    by_hand = sum(
        law[i]
        * law[j]
        * (game.P[i, j] * (d[i] - d[j] - target) ** 2 + game.P[j, i] * (d[i] - d[j] + target) ** 2)
        for i in range(n)
        for j in range(n)
    )
    short = product_loss(tensor(d), tensor(law), tensor(game.wins(law)), target)
    assert short.item() == pytest.approx(by_hand, abs=1e-10)
    pairs, same = Pairs.population(game, law), law @ law
    p, w = pairs.tensors()
    listed = square_loss(margin(gather(tensor(log_pi), pairs), gather(tensor(anchor), pairs)), p, target, w)
    assert (1 - same) * listed.item() + same * target**2 == pytest.approx(by_hand, abs=1e-10)


def test_ipo_depends_on_the_pairs_where_a_reward_explains_all():
    game = bradley_terry_game([2.0, 0.0, -1.0])
    a, b = (ipo(game, law, 0.3) for law in ([0.8, 0.1, 0.1], [0.1, 0.1, 0.8]))
    assert np.abs(np.log(a[0] / a[1]) - np.log(b[0] / b[1])) > 0.1


@given(st.integers(0, 10**6))
def test_inpo_at_a_full_step_is_ipo_and_the_order_of_a_pair_does_not_matter(seed):
    rng = np.random.default_rng(seed)
    policy, reference, previous = tensor(rng.normal(size=(3, 5, 2)))
    p, tau = tensor(rng.random(5)), 0.4
    loss = inpo_loss(policy, reference, previous, p, tau=tau, eta=1 / tau)
    torch.testing.assert_close(loss, ipo_loss(policy, reference, p, tau=tau))
    torch.testing.assert_close(
        inpo_loss(policy.flip(1), reference.flip(1), previous.flip(1), 1 - p, tau=tau, eta=0.7),
        inpo_loss(policy, reference, previous, p, tau=tau, eta=0.7),
    )


def test_best_against_worst_of_several_is_another_law():
    """Spec of INPO: pairs that were chosen by their quality do not have the mirror step as their optimum."""
    game, law, _ = drawn(3, 3)
    value = game.wins(law)
    joint = np.zeros((3, 3))
    for draw in np.ndindex(3, 3, 3, 3):  # four responses iid from the law; the best and the worst are paired
        best, worst = max(draw, key=value.__getitem__), min(draw, key=value.__getitem__)
        joint[best, worst] += np.prod(law[list(draw)])
    found = []
    for pairs in (Pairs.population(game, law), Pairs.population(game, joint)):
        p, w = pairs.tensors()
        reference = gather(tensor(game.log_reference), pairs)
        table = SoftmaxTable(3)
        theta = fit(
            lambda lp, pairs=pairs, reference=reference, p=p, w=w: ipo_loss(
                gather(lp, pairs), reference, p, w, tau=0.5
            ),
            table,
            tolerance=1e-12,
        ).theta
        found.append(table.log_probabilities(theta).exp().numpy())
    np.testing.assert_allclose(found[0], ipo(game, law, 0.5), atol=1e-9)
    assert np.abs(found[1] - found[0]).max() > 0.01


def test_sppo_s_loss_with_the_true_normaliser_is_least_at_the_step():
    game, law, _ = drawn(0, 5)
    eta = 0.8
    step = SPPO(game, eta, law).advance(1)
    wins = game.wins(law)
    log_normaliser = np.log(law @ np.exp(eta * (wins - 0.5)))
    shifted = tensor(wins - log_normaliser / eta)
    assert (
        sppo_loss(tensor(step.log_policy), tensor(np.log(law)), shifted, tensor(law), eta=eta).item() < 1e-28
    )
    policy = tensor(step.log_policy).requires_grad_(True)
    assert sppo_loss(policy, tensor(np.log(law)), tensor(wins), eta=eta).item() > 1e-6


def test_bad_parameters_are_named():
    x = torch.zeros(1, 2)
    one = torch.ones(1)
    with pytest.raises(ValueError, match="tau is 0"):
        ipo_loss(x, x, one, tau=0)
    with pytest.raises(ValueError, match=r"eta tau is 2.0; it must lie in \[0, 1\]"):
        inpo_loss(x, x, x, one, tau=1, eta=2)
    with pytest.raises(ValueError, match="eta is -1"):
        inpo_loss(x, x, x, one, tau=1, eta=-1)
    with pytest.raises(ValueError, match="eta is nan"):
        sppo_loss(x, x, x, eta=float("nan"))
