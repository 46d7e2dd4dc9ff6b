"""Soft value iteration, exact KL, and the laws over responses and returns."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from preflab.algorithms.planning import (
    ReturnLaw,
    best_of_n,
    best_of_n_kl,
    evaluate,
    leaf_blocks,
    leaf_returns,
    leaf_tokens,
    leaf_trajectories,
    occupancy,
    pass_at_k,
    regularised_value,
    restrict,
    return_law,
    returns,
    sequence_gibbs,
    sequence_law,
    soft_maximum,
    soft_value_iteration,
    state_kl,
    trajectory_kl,
    uniform_policy,
    value_iteration,
    win_rate,
)
from preflab.envs import FiniteMDP
from preflab.envs.links import LOGISTIC, PROBIT


def random_mask(rng, n, n_actions):
    mask = rng.random((n, n_actions)) < 0.6
    mask[np.arange(n), rng.integers(n_actions, size=n)] = True
    return mask


def random_mdp(seed, n_states=4, n_actions=3, horizon=3, masked=False):
    rng = np.random.default_rng(seed)
    P = rng.dirichlet(np.ones(n_states), size=(horizon, n_states, n_actions))
    mask = np.stack([random_mask(rng, n_states, n_actions) for _ in range(horizon)]) if masked else None
    return FiniteMDP.dense(
        P, rng.normal(size=(horizon, n_states, n_actions)), rng.dirichlet(np.ones(n_states)), action_mask=mask
    )


def random_tree(seed, roots=2, branching=2, horizon=3, masked=False, idle=0.0):
    rng = np.random.default_rng(seed)
    sizes = [1 + roots * branching**h for h in range(horizon)]
    reward = [rng.normal(size=(n, branching + 1)) for n in sizes]
    for r in reward:
        r[0] = idle
    mask = [random_mask(rng, n, branching + 1) for n in sizes] if masked else None
    initial = np.concatenate([[0.0], rng.dirichlet(np.ones(roots))])
    return FiniteMDP.tree(roots, branching, horizon, reward, initial, action_mask=mask)


def random_policy(model, seed, zeros=False):
    """zeros: no mass on some of the available actions."""
    rng = np.random.default_rng(seed)
    weights = []
    for h in range(model.horizon):
        w = rng.exponential(size=(model.sizes[h], model.n_actions))
        if zeros:
            mask = np.ones(w.shape, dtype=bool) if model.action_mask is None else model.action_mask[h]
            kept = np.where(mask, w, -1).argmax(1)
            w[rng.random(w.shape) < 0.4] = 0.0
            w[np.arange(len(w)), kept] = 1.0
        weights.append(w)
    return restrict(model, weights)


models = st.builds(
    random_mdp, st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.booleans()
)
trees = st.builds(
    random_tree,
    st.integers(0, 10**6),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 4),
    st.booleans(),
    st.sampled_from([0.0, 0.25]),
)
seeds = st.integers(0, 10**6)
quick = settings(max_examples=30, deadline=None)


def path_kl(model, policy, reference):
    """KL by enumeration of all paths, from their full probabilities."""
    P = [model.kernel.dense(h) for h in range(model.horizon)]

    def walk(h, s, p, q):
        if p == 0:
            return 0.0
        if h == model.horizon:
            return np.inf if q == 0 else p * np.log(p / q)
        return sum(
            walk(h + 1, t, p * policy[h][s, a] * P[h][s, a, t], q * reference[h][s, a] * P[h][s, a, t])
            for a in range(model.n_actions)
            for t in range(model.sizes[h + 1])
        )

    return sum(walk(0, s, p, p) for s, p in enumerate(model.initial))


# ---- KL ----


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_kl_is_the_sum_over_paths(seed, zeros):
    for model in (random_mdp(seed, 3, 2, 3, masked=True), random_tree(seed, 2, 2, 2, masked=True)):
        policy, reference = random_policy(model, seed, zeros), random_policy(model, seed + 9)
        assert trajectory_kl(model, policy, reference) == pytest.approx(
            path_kl(model, policy, reference), abs=1e-12
        )
        assert trajectory_kl(model, reference, policy) == pytest.approx(
            path_kl(model, reference, policy), abs=1e-12
        )
        assert trajectory_kl(model, policy, policy) == 0


def test_support_failure_is_infinite_only_where_it_is_reached():
    # one state 0 from which action 0 goes to 1 and action 1 to 2; the reference dies in state 2 only
    P = np.zeros((2, 3, 2, 3))
    P[0, 0, 0, 1] = P[0, 0, 1, 2] = 1
    P[0, 1:, :, 0] = P[1, :, :, 0] = 1
    model = FiniteMDP.dense(P, np.zeros((2, 3, 2)))
    reference = np.full((2, 3, 2), 0.5)
    reference[1, 2] = [1.0, 0.0]
    left, right = np.zeros((2, 3), dtype=int), np.zeros((2, 3), dtype=int)
    left[1, 2] = right[1, 2] = right[0, 0] = 1  # both would fail in state 2, only `right` goes there
    assert trajectory_kl(model, left, reference) == pytest.approx(2 * np.log(2))
    assert trajectory_kl(model, right, reference) == np.inf
    assert np.isinf(state_kl(model, left, reference)[1, 2])
    assert regularised_value(model, right, reference, 0.1) == -np.inf
    assert regularised_value(model, right, reference, 0.0) == 0.0
    assert trajectory_kl(model, left, left) == 0
    assert trajectory_kl(model, left, right) == np.inf
    with pytest.raises(ValueError, match="beta is -1"):
        regularised_value(model, left, reference, -1)


# ---- the soft optimum ----


@quick
@given(st.one_of(models, trees), seeds, st.floats(-1, 2), st.booleans())
def test_soft_optimum_certificates_and_gap_identity(model, seed, log_beta, zeros):
    beta = 10**log_beta
    reference, policy = random_policy(model, seed, zeros), random_policy(model, seed + 1)
    soft = soft_value_iteration(model, reference, beta)
    scale = 1 + beta
    assert soft.residual < 1e-12 * scale
    assert soft.identity_gap < 1e-11 * scale
    for h in range(model.horizon):
        assert (soft.policy[h][np.asarray(reference[h]) == 0] == 0).all()
        np.testing.assert_allclose(soft.policy[h].sum(1), 1, atol=1e-14)
        if model.action_mask is not None:
            assert np.isneginf(soft.Q[h][~model.action_mask[h]]).all()
    # J_beta(pi*) - J_beta(pi) = beta KL(pi || pi*), also where both sides are infinite
    attained = regularised_value(model, policy, reference, beta)
    divergence = trajectory_kl(model, policy, soft.policy)
    assert np.isfinite(divergence) == np.isfinite(attained)
    if np.isfinite(attained):
        assert soft.value - attained == pytest.approx(beta * divergence, abs=1e-11 * scale, rel=1e-11)
    assert soft_value_iteration(model, reference, beta, q=False).Q is None


@pytest.mark.parametrize("seed", range(3))
def test_envelope_theorem(seed):
    """The value's gradient in the reward is the occupancy of the optimum; in beta it is -KL."""
    model = random_mdp(seed, masked=True)
    reference = random_policy(model, seed)
    beta, step = 0.7, 1e-5
    soft = soft_value_iteration(model, reference, beta)
    d = occupancy(model, soft.policy)
    rng = np.random.default_rng(seed)
    direction = rng.normal(size=model.reward.shape)
    up, down = (
        soft_value_iteration(model, reference, beta, model.reward + e * direction).value
        for e in (step, -step)
    )
    assert (up - down) / (2 * step) == pytest.approx(float((d * direction).sum()), abs=1e-8)
    up, down = (soft_value_iteration(model, reference, beta + e).value for e in (step, -step))
    assert (up - down) / (2 * step) == pytest.approx(-trajectory_kl(model, soft.policy, reference), abs=1e-8)


def test_limits_in_beta():
    model = random_mdp(4, masked=True)
    reference = random_policy(model, 1)
    best = value_iteration(model)
    for beta in (1e-4, 1e-9, 1e-300):
        soft = soft_value_iteration(model, reference, beta)
        assert abs(soft.value - best.value) <= max(1e-14, 20 * beta)
        np.testing.assert_array_equal(soft.policy.argmax(-1), best.policy)
    plain = evaluate(model, reference)
    cold = soft_value_iteration(model, reference, np.inf)
    np.testing.assert_allclose(cold.policy, reference, atol=1e-15)
    assert cold.value == pytest.approx(plain.value, abs=1e-13)
    assert cold.residual < 1e-13
    assert cold.identity_gap < 1e-13
    for beta in (1e6, 1e12, 1e100):  # a large beta loses no digits: the gap is O(1 / beta)
        soft = soft_value_iteration(model, reference, beta)
        assert plain.value - 1e-13 <= soft.value <= plain.value + 10 / beta + 1e-13
    # support of the reference limits the optimum
    narrow = np.zeros(model.reward.shape)
    np.put_along_axis(narrow, model.action_mask.argmax(-1)[..., None], 1.0, axis=-1)
    assert soft_value_iteration(model, narrow, 1e-9).value == pytest.approx(
        evaluate(model, model.action_mask.argmax(-1)).value, abs=1e-12
    )
    assert soft_value_iteration(model, model.action_mask.argmax(-1), 1.0).value == pytest.approx(
        evaluate(model, model.action_mask.argmax(-1)).value, abs=1e-12
    )


def test_soft_maximum_is_stable():
    v, pi = soft_maximum(np.array([[1e308, -1e308, -np.inf]]), np.array([[0.5, 0.5, 0.0]]), 1e-3)
    assert v[0] == pytest.approx(1e308)
    np.testing.assert_array_equal(pi, [[1, 0, 0]])
    v, _ = soft_maximum(np.array([[0.0, 1.0]]), np.array([[1 - 1e-20, 1e-20]]), 1e-2)  # a tiny reference mass
    assert v[0] == pytest.approx(1.0 + 1e-2 * np.log(1e-20 + np.exp(-100.0)), abs=1e-14)


@pytest.mark.parametrize("beta", [0, -1.0, np.nan])
def test_temperature_must_be_positive(beta):
    model = random_tree(0)
    for solve in (soft_value_iteration, sequence_gibbs):
        with pytest.raises(ValueError, match="temperature must be positive"):
            solve(model, uniform_policy(model), beta)


def test_a_reference_must_be_legal():
    model = random_tree(0, masked=True)
    with pytest.raises(ValueError, match=r"reference\[h=.*unavailable action"):
        soft_value_iteration(model, [np.full((n, 3), 1 / 3) for n in model.sizes[:-1]], 1.0)


# ---- responses ----


@quick
@given(trees, seeds, st.floats(-1, 2), st.booleans())
def test_sequence_gibbs_is_the_soft_policy(model, seed, log_beta, zeros):
    beta, reference = 10**log_beta, random_policy(model, seed, zeros)
    soft, gibbs = soft_value_iteration(model, reference, beta), sequence_gibbs(model, reference, beta)
    np.testing.assert_allclose(sequence_law(model, soft.policy), gibbs.law, atol=1e-12)
    assert gibbs.value == pytest.approx(soft.value, abs=1e-12 * (1 + beta))
    np.testing.assert_allclose(gibbs.values, soft.V[0][1:], atol=1e-12 * (1 + beta))
    # straight from the definition
    ref = sequence_law(model, reference)
    weights = ref * np.exp((gibbs.returns - gibbs.returns.max()) / beta)
    np.testing.assert_allclose(gibbs.law, weights / weights.sum(1, keepdims=True), atol=1e-12)
    np.testing.assert_allclose(ref.sum(1), 1, atol=1e-13)


def test_sequence_gibbs_in_the_limits():
    model = random_tree(5, masked=True)
    reference = random_policy(model, 5)
    cold = sequence_gibbs(model, reference, 1e-9)
    assert cold.value == pytest.approx(value_iteration(model).value, abs=1e-7)
    np.testing.assert_allclose(
        sequence_gibbs(model, reference, np.inf).law, sequence_law(model, reference), atol=1e-15
    )


@quick
@given(trees, seeds)
def test_leaf_law_and_returns_give_the_value_and_the_kl(model, seed):
    policy, reference = random_policy(model, seed, zeros=True), random_policy(model, seed + 1)
    p, q = sequence_law(model, policy), sequence_law(model, reference)
    rho = model.initial[1:]
    assert float(rho @ (p * leaf_returns(model)).sum(1)) == pytest.approx(
        evaluate(model, policy).value, abs=1e-12
    )
    # trajectories also choose (freely) after the end; make that choice equal to compare
    policy, reference = list(policy), list(reference)
    for h in range(model.horizon):
        reference[h] = np.vstack([policy[h][:1], reference[h][1:]])
    with np.errstate(divide="ignore", invalid="ignore"):
        kl = np.where(p > 0, p * np.log(p / q), 0.0).sum(1)
    assert trajectory_kl(model, policy, reference) == pytest.approx(float(rho @ kl), abs=1e-12)


@quick
@given(trees)
def test_leaf_trajectories_are_the_leaves(model):
    kernel = model.kernel
    tau = leaf_trajectories(model)
    np.testing.assert_allclose(model.returns(tau), leaf_returns(model).ravel(), atol=1e-13)
    n_leaves = leaf_blocks(kernel)[-1].stop
    assert len(tau) == kernel.roots * n_leaves
    assert len({(tuple(s), tuple(a)) for s, a in zip(tau.states, tau.actions, strict=True)}) == len(tau)
    for h in range(kernel.horizon - 1):  # they follow the kernel
        following = kernel.sample(h, tau.states[:, h], tau.actions[:, h], np.zeros(len(tau)))
        np.testing.assert_array_equal(following, tau.states[:, h + 1])
    for i, actions in enumerate(tau.actions):
        tokens = tuple(itertools.takewhile(lambda a: a < kernel.branching, actions[tau.states[i] > 0]))
        assert leaf_tokens(kernel, i % n_leaves) == tuple(tokens)


def test_responses_need_a_tree_that_means_responses():
    tree = random_tree(0)
    with pytest.raises(TypeError, match="need a prefix tree, but the kernel is a CSRKernel"):
        sequence_law(tree.to_sparse(), uniform_policy(tree))
    with pytest.raises(ValueError, match=r"initial\[0\] is 0.5"):
        leaf_returns(tree.replace(initial=np.array([0.5, 0.5, 0.0])))
    with pytest.raises(ValueError, match=r"leaf is 15; a prompt has the leaves 0..14"):
        leaf_tokens(tree.kernel, 15)
    with pytest.raises(ValueError, match="leaf is -1"):
        leaf_tokens(tree.kernel, -1)
    reward = [r.copy() for r in tree.reward]
    reward[1][0, 0] = 1.0
    with pytest.raises(ValueError, match=r"reward\[h=1, s=0\] depends on the action"):
        leaf_returns(tree, reward)


# ---- returns ----


@quick
@given(st.one_of(models, trees), seeds)
def test_return_law_has_the_mean_and_is_the_same_in_all_representations(model, seed):
    policy = random_policy(model, seed, zeros=True)
    law = return_law(model, policy)
    assert law.mean == pytest.approx(evaluate(model, policy).value, abs=1e-11)
    assert law.masses.sum() == pytest.approx(1, abs=1e-12)
    assert (law.masses > 0).all()
    assert (np.diff(law.values) > 0).all()
    for same in (model.to_sparse(), model.to_dense()):
        other = return_law(same, policy)
        np.testing.assert_allclose(other.values, law.values, atol=1e-11)
        np.testing.assert_allclose(other.masses, law.masses, atol=1e-12)


def test_return_law_of_a_coin_is_binomial_and_merges_rounding():
    horizon = 10
    P = np.ones((horizon, 1, 2, 1))
    reward = np.broadcast_to([0.0, 0.1], (horizon, 1, 2))
    law = return_law(FiniteMDP.dense(P, reward), np.full((horizon, 1, 2), 0.5))
    assert len(law.values) == horizon + 1
    from scipy.stats import binom

    np.testing.assert_allclose(law.masses, binom.pmf(np.arange(11), 10, 0.5), atol=1e-14)
    np.testing.assert_allclose(law.values, np.arange(11) / 10, atol=1e-13)
    assert law.tail(0.3) == pytest.approx(
        binom.sf(2, 10, 0.5), abs=1e-14
    )  # 0.3 is the sum of three times 0.1


def test_return_law_agrees_with_simulation():
    model = random_mdp(3, 3, 2, 3)
    policy = random_policy(model, 3)
    law = return_law(model, policy, start=1)
    n = 20_000
    sample = np.sort(model.returns(model.rollout(policy, n, np.random.default_rng(1), np.ones(n, dtype=int))))
    exact = np.cumsum(law.masses)
    empirical = np.searchsorted(sample, law.values + 1e-9, side="right") / n
    assert np.abs(exact - empirical).max() < 2.0 / np.sqrt(
        n
    )  # Dvoretzky-Kiefer-Wolfowitz: below 1e-3 by chance
    with pytest.raises(ValueError, match="start is 3"):
        return_law(model, policy, start=3)


# ---- win rates ----


@pytest.mark.parametrize("link", [LOGISTIC, PROBIT], ids=["logistic", "probit"])
@pytest.mark.parametrize("masked", [False, True])
def test_win_rate_by_link_function_and_table(link, masked, monkeypatch):
    model = random_tree(7, 3, 2, 3, masked)
    policy, other = random_policy(model, 1), random_policy(model, 2, zeros=True)
    R = leaf_returns(model)
    table = link.value(R[:, :, None] - R[:, None, :])
    p, q = sequence_law(model, policy), sequence_law(model, other)
    expected = sum(  # the definition, term by term
        model.initial[1 + x] * p[x, i] * q[x, j] * table[x, i, j]
        for x in range(3)
        for i in range(R.shape[1])
        for j in range(R.shape[1])
    )
    for preference in (link, lambda a, b: link.value(a - b), table):
        assert win_rate(model, policy, other, preference) == pytest.approx(expected, abs=1e-12)
    assert win_rate(model.to_sparse(), policy, other, link) == pytest.approx(expected, abs=1e-12)
    assert win_rate(model, policy, other, link) + win_rate(model, other, policy, link) == pytest.approx(
        1, abs=1e-12
    )
    assert win_rate(model, policy, policy, link) == pytest.approx(0.5, abs=1e-12)
    whole = win_rate(model, policy, other, link)
    monkeypatch.setattr(returns, "_BLOCK", 16)  # many blocks, a narrow one last
    assert win_rate(model, policy, other, link) == pytest.approx(whole, abs=1e-14)


def test_win_rate_compares_responses_to_the_same_prompt():
    # two prompts, rewards 0 and 100 whatever is said: across prompts one would always win
    reward = [np.array([[0, 0], [0, 0], [100, 100.0]])]
    model = FiniteMDP.tree(2, 1, 1, reward)
    uniform = uniform_policy(model)
    assert win_rate(model, uniform, uniform, lambda x, y: np.heaviside(x - y, 0.5)) == 0.5
    assert win_rate(model, uniform, uniform, np.array([[0.5, 1], [0, 0.5]])) == 0.5


def test_win_rate_agrees_with_simulation():
    model = random_mdp(5, 3, 2, 3)
    policy, other = random_policy(model, 1), random_policy(model, 2)
    rng = np.random.default_rng(0)
    n = 20_000
    start = rng.choice(3, size=n, p=model.initial)
    x, y = (model.returns(model.rollout(pi, n, rng, start)) for pi in (policy, other))
    chance = LOGISTIC.value(x - y)
    assert abs(chance.mean() - win_rate(model, policy, other, LOGISTIC)) < 5 * chance.std() / np.sqrt(n)


def test_bad_preferences_are_refused():
    model = random_tree(0)
    uniform = uniform_policy(model)
    with pytest.raises(
        ValueError, match=r"preference has shape \(2, 2\); expected \(15, 15\) or \(2, 15, 15\)"
    ):
        win_rate(model, uniform, uniform, np.full((2, 2), 0.5))
    with pytest.raises(ValueError, match=r"outside \[0, 1\]"):
        win_rate(model, uniform, uniform, np.full((15, 15), 1.5))
    with pytest.raises(TypeError, match="preference is a str"):
        win_rate(model, uniform, uniform, "logistic")


# ---- best of n, pass@k ----


@settings(max_examples=40, deadline=None)
@given(seeds, st.integers(1, 8), st.integers(1, 6))
def test_best_of_n_by_enumeration(seed, n, size):
    rng = np.random.default_rng(seed)
    law = ReturnLaw(np.sort(rng.normal(size=size)), rng.dirichlet(np.ones(size)))
    best = best_of_n(law, n)
    assert best.masses.sum() == pytest.approx(1, abs=1e-12)
    kl = best_of_n_kl(law, n)
    assert -1e-12 <= kl <= np.log(n) - (n - 1) / n + 1e-12
    if n <= 4:
        exact = np.zeros(size)
        for draw in itertools.product(range(size), repeat=n):
            exact[max(draw)] += np.prod(law.masses[list(draw)])
        assert best.mean == pytest.approx(float(exact @ law.values), abs=1e-12)
        assert kl == pytest.approx(float((exact * np.log(exact / law.masses)).sum()), abs=1e-11)


def test_best_of_n_kl_reaches_its_bound_for_fine_laws():
    law = ReturnLaw(np.arange(1e6), np.full(10**6, 1e-6))
    for n in (2, 16):
        assert best_of_n_kl(law, n) == pytest.approx(np.log(n) - (n - 1) / n, abs=1e-4)
    assert best_of_n_kl(law, 1) == 0


def test_pass_at_k():
    model = random_tree(3, 2, 2, 2)
    policy = random_policy(model, 0)
    R, p = leaf_returns(model), sequence_law(model, policy)
    threshold = float(np.median(R))
    success = (p * (threshold <= R)).sum(1)
    for k in (1, 3):
        expected = float(model.initial[1:] @ (1 - (1 - success) ** k))
        assert pass_at_k(model, policy, k, threshold) == pytest.approx(expected, abs=1e-12)
    assert pass_at_k(model, policy, 2, R.min()) == 1
    assert pass_at_k(model, policy, 2, R.max() + 1) == 0
    for k in (0, 1.5):
        with pytest.raises(ValueError, match="it must be a whole number, at least 1"):
            pass_at_k(model, policy, k, threshold)
