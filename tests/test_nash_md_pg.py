"""Nash-MD-PG and Nash-EMA-PG against finite differences, samples, best responses and Newton's equilibrium."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from preflab.algorithms import nash_md_pg as pg
from preflab.algorithms.optimisation import PrefixTree, SoftmaxTable
from preflab.algorithms.planning.games import best_response, regularised_nash, regularised_preference
from preflab.algorithms.self_play import mixture
from preflab.envs import cyclic_game, random_game, random_token_mdp

seeds = st.integers(0, 10**6)


def drawn(seed, n=4):
    rng = np.random.default_rng(seed)
    game = random_game(n, rng, reference=0.8 * rng.dirichlet(np.ones(n)) + 0.2 / n)
    return game, rng


def tree(seed, horizon=2):
    model = random_token_mdp(2, horizon, seed=seed, concentration=3.0)
    game = random_game(model.n_leaves, seed, reference=model.leaf_probabilities())
    return PrefixTree(model.kernel), game, np.random.default_rng(seed)


@given(seeds, st.floats(0.05, 2), st.floats(0, 1))
def test_the_loss_on_win_rates_by_finite_differences(seed, tau, share):
    game, rng = drawn(seed)
    x = rng.normal(size=4)
    theta = torch.tensor(x, requires_grad=True)
    log_pi, mu = theta.log_softmax(0), torch.as_tensor(game.log_reference)
    m = pg.sequence_mixture(log_pi, mu, share).exp().detach().numpy()
    loss = pg.nash_md_pg_loss(log_pi, mu, torch.as_tensor(game.wins(m)), log_pi.detach().exp(), tau=tau)
    (g,) = torch.autograd.grad(loss, theta)

    def value(logits):
        law = np.exp(logits - np.logaddexp.reduce(logits))
        return regularised_preference(game, law / law.sum(), m / m.sum(), tau)

    wanted = [(value(x + 1e-5 * e) - value(x - 1e-5 * e)) / 2e-5 for e in np.eye(4)]
    np.testing.assert_allclose(-g.numpy(), wanted, atol=1e-8)


@given(seeds, st.floats(0, 1))
def test_both_mixtures_against_numpy(seed, share):
    table, game, rng = tree(seed)
    theta, reference = torch.tensor(rng.normal(size=table.size)), table.start(game.log_reference)
    log_pi = table.log_probabilities(theta)
    whole = pg.sequence_mixture(log_pi, torch.as_tensor(game.log_reference), share)
    law, _ = mixture(log_pi.numpy(), game.log_reference, share)
    np.testing.assert_allclose(whole.exp(), law, atol=1e-14)
    tokens = pg.token_mixture(table, theta, reference, share)
    assert tokens.exp().sum().item() == pytest.approx(1, abs=1e-12)
    # m_token prod z_h is in proportion to m_sequence
    log_z = [
        torch.logsumexp((1 - share) * p + share * q, 1)
        for p, q in zip(table.conditionals(theta), table.conditionals(reference), strict=True)
    ]
    along = table.along([z[:, None].expand(-1, 3) for z in log_z]).sum(1)
    np.testing.assert_allclose(np.ptp((tokens + along - whole).numpy()), 0, atol=1e-12)
    assert (along <= 1e-12).all()  # Hölder


def test_one_drawn_pair_has_the_moments_that_are_listed():
    table, game, rng = tree(3)
    theta = rng.normal(size=table.size)
    law = table.log_probabilities(torch.as_tensor(theta)).exp().numpy()
    m = rng.dirichlet(np.ones(len(game)))
    mean, variance, _ = pg.moments(table, theta, game, m, 0.4)
    n = 20_000
    y, other = rng.choice(len(law), size=n, p=law / law.sum()), rng.choice(len(law), size=n, p=m)
    scores = torch.autograd.functional.jacobian(table.log_probabilities, torch.as_tensor(theta)).numpy()
    c = game.P[y, other] - 0.5 - 0.4 * (np.log(law) - game.log_reference)[y]
    samples = c[:, None] * scores[y]
    assert (np.abs(samples.mean(0) - mean) <= 5 * samples.std(0) / math.sqrt(n) + 1e-12).all()
    assert samples.var(0).sum() == pytest.approx(variance, rel=0.05)


@given(seeds, st.floats(0.1, 1))
def test_no_constant_has_less_variance_than_the_best(seed, tau):
    table, game, rng = tree(seed, 1)
    theta, m = rng.normal(size=table.size), rng.dirichlet(np.ones(len(game)))
    best = pg.moments(table, theta, game, m, tau)[2]
    least = pg.moments(table, theta, game, m, tau, best)[1]
    for b in (0.0, 0.5, best + 0.01, best - 0.01):
        assert pg.moments(table, theta, game, m, tau, b)[1] >= least - 1e-12


def test_self_play_and_the_moving_average_end_at_the_equilibrium_of_a_cycle():
    game, table = cyclic_game((0.9, 0.8, 0.7)), SoftmaxTable(3)
    star = regularised_nash(game, 0.2).policy
    start = np.log([0.9, 0.05, 0.05])
    runs = [
        pg.NashMDPG(table, game, 0.2, eta=2.0, share=0.0, start=start),
        pg.NashEMAPG(table, game, 0.2, eta=2.0, decay=0.9, start=start),
    ]
    for run in runs:
        np.testing.assert_allclose(np.exp(run.settle().log_policy), star, atol=1e-10)
    np.testing.assert_allclose(runs[1].opponent(), star, atol=1e-10)


@pytest.mark.parametrize("kind", ["sequence", "token"])
def test_on_a_tree_it_ends_at_the_best_response_to_its_mixture(kind):
    table, game, _ = tree(1)
    run = pg.NashMDPG(table, game, 0.5, eta=2.0, share=0.3, mixture=kind).settle()
    response = best_response(game, run.opponent() / run.opponent().sum(), 0.5)
    np.testing.assert_allclose(np.exp(run.log_policy), response, atol=1e-10)


def test_a_run_goes_on_where_it_stopped():
    game, _ = drawn(2)
    for make in (
        lambda: pg.NashMDPG(SoftmaxTable(4), game, 0.3, eta=1.0, share=0.2),
        lambda: pg.NashEMAPG(SoftmaxTable(4), game, 0.3, eta=1.0, decay=0.7),
    ):
        whole, parts = make().advance(25), make().advance(10).advance(15)
        assert torch.equal(whole.theta, parts.theta)
        assert whole.t == parts.t == 25


def test_what_does_not_settle_is_an_error():
    game, _ = drawn(4)
    with pytest.raises(ArithmeticError, match="after 100 steps"):
        pg.NashMDPG(SoftmaxTable(4), game, 0.1, eta=1e-3, share=0.2).settle(max_steps=100)


def test_bad_input_is_named():
    game, _ = drawn(0)
    table = SoftmaxTable(4)
    with pytest.raises(ValueError, match="the game has 4: one prompt, as many responses"):
        pg.NashMDPG(SoftmaxTable(3), game, 1.0, eta=1.0, share=0.5)
    with pytest.raises(ValueError, match=r"share is 1\.5; it must lie in \[0, 1\]"):
        pg.NashMDPG(table, game, 1.0, eta=1.0, share=1.5)
    with pytest.raises(ValueError, match="mixture is 'word'"):
        pg.NashMDPG(table, game, 1.0, eta=1.0, share=0.5, mixture="word")
    with pytest.raises(ValueError, match="'token' needs a PrefixTree"):
        pg.NashMDPG(table, game, 1.0, eta=1.0, share=0.5, mixture="token")
    with pytest.raises(ValueError, match=r"decay is 1; it must lie in \[0, 1\)"):
        pg.NashEMAPG(table, game, 1.0, eta=1.0, decay=1)
    with pytest.raises(ValueError, match="tau is 0"):
        pg.nash_md_pg_loss(torch.zeros(1), torch.zeros(1), torch.zeros(1), tau=0)


def test_the_spec_reads_the_signature():
    assert pg.LOSS.inputs == ("policy", "reference", "wins", "weight")
    assert pg.LOSS.parameters == ("tau", "baseline")
