"""Exact dynamic programming against brute force, linear programming, simulation and a peer library."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from preflab.algorithms.planning import (
    bellman_residual,
    check_policy,
    dynamic,
    evaluate,
    expected_reward,
    greedy,
    occupancy,
    probabilities,
    restrict,
    state_occupancy,
    uniform_policy,
    value_iteration,
)
from preflab.envs import FiniteMDP


def random_mask(rng: np.random.Generator, n: int, n_actions: int) -> np.ndarray:
    mask = rng.random((n, n_actions)) < 0.6
    mask[np.arange(n), rng.integers(n_actions, size=n)] = True
    return mask


def random_mdp(
    seed: int, n_states: int = 4, n_actions: int = 3, horizon: int = 3, masked: bool = False
) -> FiniteMDP:
    """Rows with many zeros, so that the sparse form is sparse."""
    rng = np.random.default_rng(seed)
    P = rng.dirichlet(np.ones(n_states), size=(horizon, n_states, n_actions))
    P = np.where(P * n_states < 0.5, 0.0, P)
    P /= P.sum(-1, keepdims=True)
    mask = np.stack([random_mask(rng, n_states, n_actions) for _ in range(horizon)]) if masked else None
    return FiniteMDP.dense(
        P, rng.normal(size=(horizon, n_states, n_actions)), rng.dirichlet(np.ones(n_states)), action_mask=mask
    )


def random_tree(
    seed: int, roots: int = 2, branching: int = 2, horizon: int = 3, masked: bool = False
) -> FiniteMDP:
    rng = np.random.default_rng(seed)
    sizes = [1 + roots * branching**h for h in range(horizon)]
    reward = [rng.normal(size=(n, branching + 1)) for n in sizes]
    for r in reward:
        r[0] = 0.0
    mask = [random_mask(rng, n, branching + 1) for n in sizes] if masked else None
    initial = np.concatenate([[0.0], rng.dirichlet(np.ones(roots))])
    return FiniteMDP.tree(roots, branching, horizon, reward, initial, action_mask=mask)


def random_policy(model: FiniteMDP, seed: int, sharp: bool = False) -> list[np.ndarray]:
    """A stochastic policy; sharp ones put no mass on some available actions."""
    rng = np.random.default_rng(seed)
    weights = []
    for h in range(model.horizon):
        w = rng.exponential(size=(model.sizes[h], model.n_actions))
        if sharp:
            mask = None if model.action_mask is None else model.action_mask[h]
            best = (w if mask is None else np.where(mask, w, -1)).argmax(1)
            w[rng.random(w.shape) < 0.4] = 0.0
            w[np.arange(len(w)), best] = 1.0
        weights.append(w)
    return list(restrict(model, weights))


def deterministic_policies(model: FiniteMDP) -> Iterator[list[np.ndarray]]:
    choices = [
        np.flatnonzero(model.action_mask[h][s])
        if model.action_mask is not None
        else np.arange(model.n_actions)
        for h in range(model.horizon)
        for s in range(model.sizes[h])
    ]
    ends = np.cumsum(model.sizes[:-1])
    for flat in itertools.product(*choices):
        yield np.split(np.array(flat), ends[:-1])


def path_value(model: FiniteMDP, policy: list[np.ndarray]) -> float:
    """E[r(tau)] by enumeration of all paths: no dynamic programming at all."""
    P = [model.kernel.dense(h) for h in range(model.horizon)]
    pi = [p if p.ndim == 2 else np.eye(model.n_actions)[p] for p in policy]

    def walk(h: int, s: int, mass: float, earned: float) -> float:
        if mass == 0.0:
            return 0.0
        if h == model.horizon:
            return mass * earned
        return sum(
            walk(h + 1, t, mass * pi[h][s, a] * P[h][s, a, t], earned + model.reward[h][s, a])
            for a in range(model.n_actions)
            for t in range(model.sizes[h + 1])
        )

    return sum(walk(0, s, p, 0.0) for s, p in enumerate(model.initial))


models = st.builds(
    random_mdp,
    st.integers(0, 10**6),
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(1, 4),
    st.booleans(),
)
trees = st.builds(
    random_tree, st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.booleans()
)
quick = settings(max_examples=30, deadline=None)


def assert_layers_equal(x, y, tolerance=1e-12):
    assert len(x) == len(y)
    for a, b in zip(x, y, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance)


# ---- ground truth ----


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_value_iteration_is_the_best_of_all_deterministic_policies(seed, masked):
    for model in (random_mdp(seed, 2, 2, 3, masked), random_tree(seed, 1, 2, 2, masked)):
        values = [path_value(model, policy) for policy in deterministic_policies(model)]
        solution = value_iteration(model)
        assert solution.value == pytest.approx(max(values), abs=1e-12)
        assert path_value(model, list(solution.policy)) == pytest.approx(max(values), abs=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_evaluation_is_the_sum_over_paths(seed):
    for model in (random_mdp(seed, 3, 2, 3, masked=True), random_tree(seed, 2, 2, 3, masked=True)):
        policy = random_policy(model, seed, sharp=seed % 2 == 0)
        assert evaluate(model, policy).value == pytest.approx(path_value(model, policy), abs=1e-12)


@pytest.mark.parametrize("masked", [False, True])
def test_the_occupancy_linear_program_has_the_same_optimum(masked):
    cp = pytest.importorskip("cvxpy")
    model = random_mdp(3, 5, 3, 4, masked)
    d = [cp.Variable((5, 3), nonneg=True) for _ in range(4)]
    rows = [cp.sum(d[0], axis=1) == model.initial]
    for h in range(1, 4):
        inflow = sum(model.kernel.dense(h - 1)[:, a].T @ d[h - 1][:, a] for a in range(3))
        rows.append(cp.sum(d[h], axis=1) == inflow)
    if masked:
        rows += [d[h][~model.action_mask[h]] == 0 for h in range(4)]
    problem = cp.Problem(cp.Maximize(sum(cp.vdot(d[h], model.reward[h]) for h in range(4))), rows)
    problem.solve(solver=cp.CLARABEL)
    solution = value_iteration(model)
    assert problem.value == pytest.approx(solution.value, abs=1e-6)
    assert_layers_equal([x.value for x in d], occupancy(model, solution.policy), 1e-5)


def test_simulation_agrees_within_its_error():
    model = random_mdp(11, 6, 3, 5, masked=True)
    policy = random_policy(model, 5)
    n = 40_000
    tau = model.rollout(policy, n, np.random.default_rng(0))
    returns = model.returns(tau)
    assert abs(returns.mean() - evaluate(model, policy).value) < 5 * returns.std() / np.sqrt(n)
    d = occupancy(model, policy)
    for h in range(5):
        counts = np.zeros((6, 3))
        np.add.at(counts, (tau.states[:, h], tau.actions[:, h]), 1.0)
        assert (np.abs(counts / n - d[h]) < 5 * np.sqrt(d[h] / n) + 1e-12).all()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.filterwarnings("ignore:infinite horizon solution methods")
def test_quantecon_agrees(monkeypatch, fused):
    ddp = pytest.importorskip("quantecon.markov.ddp")
    monkeypatch.setattr(dynamic, "FUSED_PAIRS", 0 if fused else 10**9)
    one = random_mdp(2, 12, 4, 1)
    horizon = 6
    model = FiniteMDP.dense(
        [one.kernel.dense(0)] * horizon, [one.reward[0]] * horizon, one.initial
    ).to_sparse()
    V, sigma = ddp.backward_induction(ddp.DiscreteDP(one.reward[0], one.kernel.dense(0), 1.0), horizon)
    solution = value_iteration(model)
    np.testing.assert_allclose(solution.V, V, atol=1e-12)
    np.testing.assert_array_equal(solution.policy, sigma)


# ---- identities that hold for every model ----


@quick
@given(st.one_of(models, trees), st.integers(0, 10**6), st.booleans())
def test_certificates_and_identities(model, seed, sharp):
    solution, policy = value_iteration(model), random_policy(model, seed, sharp)
    evaluation = evaluate(model, policy)
    for answer in (solution, evaluation, evaluate(model, solution.policy)):
        assert answer.residual < 1e-12
        assert answer.identity_gap < 1e-12
        assert (answer.V[-1] == 0).all()
    assert evaluation.value <= solution.value + 1e-12
    assert evaluate(model, solution.policy).value == pytest.approx(solution.value, abs=1e-12)
    assert_layers_equal(greedy(solution.Q), solution.policy)
    d, mu = occupancy(model, policy), state_occupancy(model, policy)
    for h in range(model.horizon):
        assert d[h].sum() == pytest.approx(1, abs=1e-12)
        np.testing.assert_allclose(d[h].sum(1), mu[h], atol=1e-14)
        if model.action_mask is not None:
            illegal = ~model.action_mask[h]
            assert (d[h][illegal] == 0).all()
            assert np.isneginf(solution.Q[h][illegal]).all()
            assert np.isneginf(evaluation.Q[h][illegal]).all()
            assert np.isfinite(evaluation.Q[h][~illegal]).all()
    # the performance difference lemma: J(pi') - J(pi) = <d^pi', Q^pi - V^pi>
    other = random_policy(model, seed + 1)
    d = occupancy(model, other)
    advantage = sum(
        float((d[h] * np.where(d[h] > 0, evaluation.Q[h] - evaluation.V[h][:, None], 0.0)).sum())
        for h in range(model.horizon)
    )
    assert evaluate(model, other).value - evaluation.value == pytest.approx(advantage, abs=1e-11)


@quick
@given(st.one_of(models, trees), st.integers(0, 10**6))
def test_all_representations_give_the_same_answers(model, seed):
    policy = random_policy(model, seed, sharp=True)
    solution, evaluation, d = value_iteration(model), evaluate(model, policy), occupancy(model, policy)
    for same in (model.to_dense(), model.to_sparse()):
        assert_layers_equal(value_iteration(same).V, solution.V)
        assert_layers_equal(value_iteration(same).Q, solution.Q)
        assert_layers_equal(evaluate(same, policy).V, evaluation.V)
        assert_layers_equal(occupancy(same, policy), d)


@settings(max_examples=15, deadline=None)
@given(st.one_of(models.map(FiniteMDP.to_sparse), trees), st.booleans())
def test_fused_backups_equal_the_generic_one(model, q):
    before = dynamic.FUSED_PAIRS
    try:
        dynamic.FUSED_PAIRS = 10**9
        generic = value_iteration(model, q=q)
        dynamic.FUSED_PAIRS = 0
        fused = value_iteration(model, q=q)
    finally:
        dynamic.FUSED_PAIRS = before
    assert_layers_equal(fused.policy, generic.policy)
    assert_layers_equal(fused.V, generic.V, 0)
    if q:
        assert_layers_equal(fused.Q, generic.Q, 0)
    else:
        assert fused.Q is None
        assert generic.Q is None


@pytest.mark.parametrize("fused", [False, True])
def test_ties_go_to_the_lowest_available_action(monkeypatch, fused):
    monkeypatch.setattr(dynamic, "FUSED_PAIRS", 0 if fused else 10**9)
    mask = [np.ones((n, 3), dtype=bool) for n in (2, 3)]
    mask[1][1, 0] = False
    tree = FiniteMDP.tree(1, 2, 2, [np.zeros((2, 3)), np.zeros((3, 3))], action_mask=mask)
    for model in (tree, tree.to_sparse()):
        solution = value_iteration(model)
        assert_layers_equal(solution.policy, [[0, 0], [0, 1, 0]])
        assert_layers_equal(greedy([np.zeros((2, 3)), np.zeros((3, 3))], mask), solution.policy)
    stacked = np.zeros((2, 3, 3))
    np.testing.assert_array_equal(greedy(stacked), np.zeros((2, 3)))
    np.testing.assert_array_equal(
        greedy(stacked, np.broadcast_to([False, True, True], (2, 3, 3))), np.ones((2, 3))
    )


def test_a_reward_override_replaces_the_reward_and_nothing_else():
    model = random_mdp(1, masked=True)
    reward = np.random.default_rng(5).normal(size=model.reward.shape)
    other = model.replace(reward=reward)
    policy = random_policy(model, 0)
    assert value_iteration(model, reward).value == value_iteration(other).value
    assert value_iteration(model, reward).residual < 1e-12
    assert evaluate(model, policy, reward, q=False).value == evaluate(other, policy).value
    assert evaluate(model, policy, reward, q=False).Q is None
    assert expected_reward(model, occupancy(model, policy), reward) == pytest.approx(
        evaluate(other, policy).value, abs=1e-12
    )


def test_the_residual_sees_a_wrong_value():
    model = random_mdp(1, masked=True)
    solution = value_iteration(model)
    V = solution.V.copy()
    V[1, 2] += 1e-3
    assert bellman_residual(model, V) == pytest.approx(1e-3, rel=1e-6)
    V = solution.V.copy()
    V[-1] = 0.5
    assert bellman_residual(model, V) >= 0.5
    worse = [np.asarray(p) for p in solution.policy]
    assert bellman_residual(model, solution.V, policy=worse) < 1e-12


def test_uniform_models_give_stacked_arrays_and_trees_give_tuples():
    model, tree = random_mdp(0), random_tree(0)
    solution = value_iteration(model)
    assert solution.V.shape == (4, 4)
    assert solution.Q.shape == (3, 4, 3)
    assert solution.policy.shape == (3, 4)
    assert solution.policy.dtype == np.int64
    assert occupancy(model, solution.policy).shape == (3, 4, 3)
    assert uniform_policy(model).shape == (3, 4, 3)
    assert [len(v) for v in value_iteration(tree).V] == [3, 5, 9, 1]


def test_probabilities_of_any_policy():
    model = random_mdp(0, masked=True)
    solution = value_iteration(model)
    p = probabilities(model, solution.policy)
    assert_layers_equal(p.argmax(-1), solution.policy)
    assert (p.sum(-1) == 1).all()
    assert probabilities(model, p) is p
    mixed = [solution.policy[0], p[1], solution.policy[2]]  # the two kinds in one policy
    assert evaluate(model, mixed).value == pytest.approx(solution.value, abs=1e-12)
    assert (uniform_policy(model)[~model.action_mask] == 0).all()


# ---- bad input ----


def broken(change):
    model = random_mdp(0, 3, 2, 2)
    policy = np.full((2, 3, 2), 0.5)
    change(policy)
    return model, policy


def nan(p):
    p[1, 2, 0] = np.nan


def heavy(p):
    p[1, 2] = [0.5, 0.6]


def negative(p):
    p[1, 2] = [-0.5, 1.5]


@pytest.mark.parametrize("change", [nan, heavy, negative])
@pytest.mark.parametrize("as_list", [False, True])
def test_rows_that_are_no_laws_are_named(change, as_list):
    model, policy = broken(change)
    with pytest.raises(ValueError, match=r"policy\[h=1, s=2\] is not a probability vector"):
        evaluate(model, list(policy) if as_list else policy)


def test_bad_policies_are_named():
    model = random_mdp(0, 3, 2, 2)
    mask = np.ones((2, 3, 2), dtype=bool)
    mask[1, 2, 0] = False
    masked = model.replace(action_mask=mask)
    with pytest.raises(ValueError, match="3 layers but the horizon is 2"):
        evaluate(model, np.zeros((3, 3), dtype=int))
    with pytest.raises(ValueError, match=r"policy\[h=0, s=1\] is action 2; actions are 0..1"):
        evaluate(model, np.array([[0, 2, 0], [0, 0, 0]]))
    with pytest.raises(ValueError, match=r"policy\[h=1, s=0\] is action -1"):
        occupancy(model, [np.zeros(3, dtype=int), np.array([-1, 0, 0])])
    with pytest.raises(ValueError, match=r"policy\[h=1, s=2\] is action 0, which is unavailable"):
        evaluate(masked, np.zeros((2, 3), dtype=int))
    with pytest.raises(ValueError, match=r"policy\[h=1, s=2, a=0\] gives mass 0.5 to an unavailable action"):
        evaluate(masked, np.full((2, 3, 2), 0.5))
    with pytest.raises(ValueError, match=r"policy\[h=1, s=2, a=0\] gives mass 0.5"):
        evaluate(masked, list(np.full((2, 3, 2), 0.5)))
    with pytest.raises(TypeError, match=r"policy\[h=0\] has one entry per state but dtype float64"):
        evaluate(model, [np.zeros(3), np.zeros(3, dtype=int)])
    with pytest.raises(TypeError, match="policy has one entry per state"):
        evaluate(model, np.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"reference\[h=1\] has shape \(4,\)"):
        check_policy(model, [np.zeros(3, dtype=int), np.zeros(4, dtype=int)], "reference")
    with pytest.raises(ValueError, match=r"policy has shape \(2, 4\)"):
        evaluate(model, np.zeros((2, 4), dtype=int))


def test_bad_rewards_and_weights_are_named():
    model = random_mdp(0, 3, 2, 2)
    with pytest.raises(ValueError, match="reward has 1 layers but the horizon is 2"):
        value_iteration(model, np.zeros((1, 3, 2)))
    with pytest.raises(ValueError, match=r"reward\[h=0\] has shape \(3, 3\); expected \(3, 2\)"):
        value_iteration(model, np.zeros((2, 3, 3)))
    reward = np.zeros((2, 3, 2))
    reward[1, 2, 0] = np.nan
    with pytest.raises(ValueError, match=r"reward\[h=1, s=2, a=0\] is nan"):
        value_iteration(model, reward)
    with pytest.raises(ValueError, match=r"weights\[h=0, s=1\]"):
        restrict(model, np.array([[[1, 1], [0, 0], [1, 1]]] * 2))
    with pytest.raises(ValueError, match=r"weights\[h=0, s=0\]"):
        restrict(model, np.array([[[2, -1], [1, 1], [1, 1]]] * 2))
