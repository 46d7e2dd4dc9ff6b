"""Tables, comparisons, the shared pieces of losses, and the optimiser, each against another route."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from preflab.algorithms.dpo import dpo_loss, dpo_solution
from preflab.algorithms.inpo import INPO, inpo_loss
from preflab.algorithms.optimisation import Pairs, PrefixTree, SoftmaxTable, fit, fit_pairs, gather, minimise
from preflab.algorithms.optimisation.losses import average, check_positive, check_share, logistic_loss, margin
from preflab.algorithms.planning import sequence_law
from preflab.envs import bradley_terry_game, random_game, random_token_mdp
from scipy.special import log_expit

SHAPES = [(2, 1, 1), (3, 2, 1), (2, 3, 2), (1, 4, 3)]


def theta_of(table, seed=0):
    return torch.tensor(np.random.default_rng(seed).normal(size=table.size))


@pytest.mark.parametrize(("k", "horizon", "prompts"), SHAPES)
def test_a_tree_is_the_policy_of_its_token_mdp(k, horizon, prompts):
    world = random_token_mdp(k, horizon, prompts=prompts)
    table = PrefixTree(world.kernel)
    theta = theta_of(table)
    law = table.log_probabilities(theta).exp().numpy()
    assert law.shape == (world.n_leaves,)
    np.testing.assert_allclose(law, sequence_law(world, table.policy(theta)).ravel(), atol=1e-14)
    np.testing.assert_allclose(law.reshape(prompts, -1).sum(axis=1), 1, atol=1e-13)


@pytest.mark.parametrize(("k", "horizon", "prompts"), SHAPES)
def test_tokens_add_up_to_responses(k, horizon, prompts):
    world = random_token_mdp(k, horizon, prompts=prompts)
    table = PrefixTree(world.kernel)
    theta = theta_of(table)
    tokens = table.token_log_probabilities(theta)
    torch.testing.assert_close(tokens.sum(1), table.log_probabilities(theta), atol=1e-13, rtol=0)
    used = (tokens != 0).sum(1).numpy()
    np.testing.assert_array_equal(used, table.lengths)
    trajectories = world.trajectories(np.arange(world.n_leaves))
    np.testing.assert_array_equal(table.lengths, (trajectories.states > 0).sum(axis=1))


@pytest.mark.parametrize("make", [lambda w: PrefixTree(w.kernel), lambda w: SoftmaxTable(40, 2)])
def test_a_table_starts_at_any_law(make):
    world = random_token_mdp(3, 3, prompts=2)
    table = make(world)
    rows = np.log(np.random.default_rng(3).dirichlet(np.ones(table.responses), size=2))
    found = table.log_probabilities(table.start(rows)).numpy().reshape(2, -1)
    np.testing.assert_allclose(found, rows, atol=1e-12)
    uniform = table.log_probabilities(table.start())
    assert torch.isfinite(uniform).all()
    with pytest.raises(ValueError, match=r"log_law\[prompt 1, response 2\] is -inf"):
        table.start(np.where(np.arange(2 * table.responses) == table.responses + 2, -np.inf, 0.0))
    with pytest.raises(ValueError, match="the law has 3 entries"):
        table.start(np.zeros(3))


@given(st.integers(0, 10**6), st.integers(2, 7))
def test_the_population_is_the_expectation_over_drawn_pairs(seed, n):
    rng = np.random.default_rng(seed)
    game = random_game(n, rng, reference=rng.dirichlet(np.ones(n)))
    pairs = Pairs.population(game)
    value = rng.normal(size=(n, n))  # any function of (winner, loser)
    mu, P = game.reference, game.P
    drawn = sum(
        mu[i] * mu[j] * (P[i, j] * value[i, j] + P[j, i] * value[j, i])
        for i in range(n)
        for j in range(n)
        if i != j
    )
    i, j = pairs.index.T
    listed = pairs.weight @ (pairs.preferred * value[i, j] + (1 - pairs.preferred) * value[j, i])
    assert listed * (1 - mu @ mu) == pytest.approx(drawn, abs=1e-12)
    joint = Pairs.population(game, np.outer(mu, mu))
    np.testing.assert_allclose(joint.weight, pairs.weight, atol=1e-14)


def test_samples_are_counted_and_tend_to_the_population():
    game = bradley_terry_game([0.0, 1.0, -1.0])
    pairs = Pairs.sampled(game, 40_000, np.random.default_rng(0))
    exact = Pairs.population(game)
    np.testing.assert_array_equal(pairs.index, exact.index)
    np.testing.assert_allclose(pairs.preferred, exact.preferred, atol=0.02)
    np.testing.assert_allclose(pairs.weight, exact.weight, atol=0.02)
    counted = Pairs.counted([[1, 0], [0, 1], [2, 2], [0, 1]], [1, 1, 1, 0])
    assert counted.index.tolist() == [[0, 1]]
    assert counted.preferred.tolist() == [pytest.approx(1 / 3)]
    with pytest.raises(ValueError, match="between two different responses"):
        Pairs.counted([[1, 1]], [1])


@pytest.mark.parametrize(
    ("index", "preferred", "weight", "message"),
    [
        ([[0, 1]], [1.5], [1], r"comparison 0 of \[0, 1\] has preferred 1.5"),
        ([[0, 1], [0, 2]], [1, 1], [1, 0], "comparison 1"),
        ([[-1, 0]], [1], [1], "numbers of responses"),
        ([[0, 1]], [1, 0], [1], r"are not \(m, 2\)"),
    ],
)
def test_bad_comparisons_are_named(index, preferred, weight, message):
    with pytest.raises(ValueError, match=message):
        Pairs(index, preferred, weight)


def test_the_logistic_loss_is_exact_far_out():
    x = torch.tensor([-800.0, -30.0, -25.0, 0.0, 21.0, 25.0, 30.0, 800.0], dtype=torch.float64)
    for p in (0.0, 0.3, 1.0):
        exact = -(p * log_expit(x.numpy()) + (1 - p) * log_expit(-x.numpy()))
        np.testing.assert_allclose(
            logistic_loss(x, torch.tensor(p, dtype=torch.float64)).numpy(), exact, rtol=1e-14
        )


def test_shapes_and_parameters_are_checked():
    x = torch.zeros(3, 2)
    with pytest.raises(ValueError, match="comparisons are"):
        margin(x, torch.zeros(3))
    with pytest.raises(ValueError, match="comparisons are"):
        margin(torch.zeros(3, 3), torch.zeros(3, 3))
    with pytest.raises(ValueError, match=r"weight has shape \(2,\)"):
        average(torch.zeros(3), torch.ones(2))
    with pytest.raises(ValueError, match="beta is 0"):
        check_positive(0, "beta")
    with pytest.raises(ValueError, match=r"share is 1.5; it must lie in \[0, 1\]"):
        check_share(1.5, "share")
    assert check_share(0.5, "share") == 0.5
    assert average(torch.tensor([1.0, 3.0])) == 2


def test_the_reference_is_a_constant():
    policy = torch.zeros(4, 2, dtype=torch.float64, requires_grad=True)
    reference = torch.zeros(4, 2, dtype=torch.float64, requires_grad=True)
    dpo_loss(policy, reference, torch.ones(4), beta=0.5).backward()
    assert policy.grad is not None
    assert reference.grad is None


def test_minimise_reaches_a_known_minimum_along_flat_directions_too():
    A = torch.tensor([[1.0, 2.0, 0.0], [2.0, 4.0, 0.0], [0.0, 0.0, 3.0]], dtype=torch.float64)  # rank 2
    b = A @ torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64)
    found = minimise(
        lambda x: 0.5 * x @ A @ x - b @ x + 7, torch.zeros(3, dtype=torch.float64), tolerance=1e-13
    )
    assert found.gradient <= 1e-13
    torch.testing.assert_close(A @ found.theta, b, atol=1e-12, rtol=0)


def test_newton_polishes_what_values_cannot_see():
    # near its minimum 1 + x^4/4 + x^2/2 differs from 1 by less than rounding for |x| < 1e-8
    def f(x):
        return 1 + (x**4).sum() / 4 + (x**2).sum() / 2

    found = minimise(f, torch.tensor([3.0, -2.0], dtype=torch.float64), tolerance=1e-15, max_iterations=4)
    assert found.theta.abs().max() <= 1e-15


def test_what_is_not_reached_is_an_error():
    with pytest.raises(ArithmeticError, match="above the tolerance"):
        minimise(lambda x: x.sum(), torch.zeros(2, dtype=torch.float64), max_iterations=3, newton_steps=1)


def test_a_tree_and_a_table_share_their_optimum():
    world = random_token_mdp(2, 3, seed=4)
    rng, n = np.random.default_rng(0), world.n_leaves
    i = np.array([(a, b) for a in range(n) for b in range(a + 1, n)])
    r = 3 * world.leaf_rewards
    pairs = Pairs(i, 1 / (1 + np.exp(r[i[:, 1]] - r[i[:, 0]])), rng.random(len(i)))
    p, w = pairs.tensors()
    reference = torch.as_tensor(world.leaf_log_probabilities())
    anchor = gather(reference, pairs)

    def loss(log_pi):
        return dpo_loss(gather(log_pi, pairs), anchor, p, w, beta=0.7)

    tree, table = PrefixTree(world.kernel), SoftmaxTable(n)
    direct = minimise(lambda t: loss(tree.log_probabilities(t)), tree.start(), tolerance=1e-12)
    for shape in (tree, table):
        found = fit(loss, shape, reference.numpy(), importance=pairs.importance(n), tolerance=1e-13)
        assert found.gradient <= 1e-12
        torch.testing.assert_close(
            shape.log_probabilities(found.theta), tree.log_probabilities(direct.theta), atol=1e-9, rtol=0
        )


def test_importance_makes_rare_responses_as_quick_as_frequent_ones():
    n = 300
    law = np.logspace(0, -9, n)
    law /= law.sum()
    target = torch.tensor(np.random.default_rng(0).normal(size=n))
    weight = torch.tensor(law)

    def loss(log_pi):  # least where log pi = target + constant
        d = log_pi - target
        return weight @ (d - weight @ d) ** 2

    found = fit(loss, SoftmaxTable(n), importance=law, tolerance=1e-15)
    log_pi = SoftmaxTable(n).log_probabilities(found.theta)
    torch.testing.assert_close(log_pi, target.log_softmax(0), atol=1e-9, rtol=0)
    assert found.iterations < 20
    with pytest.raises(ArithmeticError):
        fit(loss, SoftmaxTable(n), tolerance=1e-15, max_iterations=20)
    with pytest.raises(ValueError, match=r"importance has shape \(2,\); expected \(300,\)"):
        fit(loss, SoftmaxTable(n), importance=np.ones(2))


def test_importance_of_a_response_is_the_weight_of_its_pairs():
    pairs = Pairs([[0, 1], [1, 3]], [1, 0], [0.25, 0.75])
    np.testing.assert_allclose(pairs.importance(5), [0.25, 1.0, 0.25, 0.75, 0.25])


def test_comparisons_are_fitted_in_one_call():
    game = bradley_terry_game([1.0, 0.0, -0.5], reference=[0.2, 0.3, 0.5])
    log_pi, found = fit_pairs(dpo_loss, Pairs.population(game), game.log_reference, tolerance=1e-12, beta=0.5)
    np.testing.assert_allclose(log_pi, dpo_solution([1, 0, -0.5], game.log_reference, 0.5)[1], atol=1e-9)
    assert found.gradient <= 1e-12
    law = np.array([0.5, 0.25, 0.25])
    step, _ = fit_pairs(
        inpo_loss,
        Pairs.population(game, law),
        game.log_reference,
        others={"previous": np.log(law)},
        tolerance=1e-12,
        tau=0.3,
        eta=0.8,
    )
    np.testing.assert_allclose(np.exp(step), INPO(game, 0.3, 0.8, law).advance(1).policy, atol=1e-10)


def test_what_comparisons_leave_open_is_named():
    pairs = Pairs([[0, 1], [2, 3]], [0.7, 0.6], [1, 1])
    flat = np.log(np.full(4, 0.25))
    with pytest.raises(ValueError, match=r"2 components: no comparison joins \{'c', 'd'\}"):
        fit_pairs(dpo_loss, pairs, flat, names=("a", "b", "c", "d"), beta=1.0)
    log_pi, _ = fit_pairs(dpo_loss, pairs, flat, unidentified=True, beta=1.0, tolerance=1e-12)
    assert log_pi[0] - log_pi[1] == pytest.approx(np.log(0.7 / 0.3), abs=1e-9)
    dead = np.log([0.5, 0.25, 0.25, 1e-300]) - [0, 0, 0, np.inf]
    for names, who in ((None, "response 3"), (("a", "b", "c", "d"), "response 'd'")):
        with pytest.raises(ValueError, match=f"comparison 1 is of {who}, which the reference gives no mass"):
            fit_pairs(dpo_loss, pairs, dead, names=names, beta=1.0)


def test_a_tree_needs_a_tree():
    with pytest.raises(TypeError, match="the kernel is a DenseKernel; a prefix tree is a TokenMDP's"):
        PrefixTree(random_token_mdp(2, 2).to_dense().kernel)
