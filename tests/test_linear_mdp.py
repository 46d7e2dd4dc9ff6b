"""Linear MDPs: what they promise for all sizes and seeds, the hard family by hand, and warnings with their reason."""

import re
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from preflab.envs import (
    AssumptionWarning,
    FiniteMDP,
    LinearMDP,
    hypercube_mdp,
    random_linear_mdp,
    tabular_linear_mdp,
)
from preflab.envs.linear_mdp import hypercube_actions, hypercube_optimum

seeds = st.integers(0, 2**32 - 1)
small = st.integers(1, 5)
modes = st.sampled_from(["sum", "concat"])


def optimum(model):
    """V* by backward induction on plain arrays."""
    v = np.zeros(model.sizes[-1])
    for h in range(model.horizon - 1, -1, -1):
        v = (model.reward[h] + np.einsum("sat,t->sa", model.kernel.dense(h), v)).max(axis=1)
    return float(model.initial @ v)


@given(small, small, small, small, seeds, modes)
def test_random_family_keeps_every_assumption(n_states, n_actions, d, horizon, seed, mode):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = random_linear_mdp(n_states, n_actions, d, horizon, seed, mode)
    assert model.broken_assumptions() == []
    assert model.sizes == (n_states,) * (horizon + 1)
    assert (model.phi >= 0).all()
    np.testing.assert_allclose(model.phi.sum(-1), 1.0, atol=1e-12)
    assert np.min(model.reward) >= 0
    assert np.max(model.reward) <= 1
    for h in range(horizon):
        P = model.kernel.dense(h)
        np.testing.assert_allclose(P, np.einsum("sad,dt->sat", model.phi, model.mu[h]), atol=1e-12)
        np.testing.assert_allclose(P.sum(-1), 1.0, atol=1e-12)
        np.testing.assert_allclose(model.reward[h], model.phi @ model.thetas[h], atol=1e-12)
    assert model.thetas.shape == (horizon, d)
    assert model.theta.shape == ((d,) if mode == "sum" else (d * horizon,))
    again = random_linear_mdp(n_states, n_actions, d, horizon, seed, mode)
    np.testing.assert_array_equal(again.mu, model.mu)


@given(seeds, modes)
def test_value_of_any_policy_is_linear_in_phi(seed, mode):
    """Q^pi_h = <phi, theta_h + mu_h V^pi_{h+1}>: what makes the MDP linear, by policy evaluation on plain arrays."""
    model = random_linear_mdp(5, 3, 4, 4, seed, mode)
    policy = np.random.default_rng(seed).dirichlet(np.ones(3), size=(4, 5))
    v = np.zeros(5)
    for h in range(3, -1, -1):
        Q = model.reward[h] + np.einsum("sat,t->sa", model.kernel.dense(h), v)
        np.testing.assert_allclose(Q, model.phi @ (model.thetas[h] + model.mu[h] @ v), atol=1e-12)
        v = (policy[h] * Q).sum(axis=1)


def test_sum_shares_theta_and_concat_does_not():
    total, joined = (random_linear_mdp(4, 2, 3, 5, 0, mode) for mode in ("sum", "concat"))
    assert (total.features.dim, joined.features.dim, total.d) == (3, 15, 3)
    assert (total.thetas == total.thetas[0]).all()
    assert not (joined.thetas == joined.thetas[0]).all()
    assert (np.asarray(total.reward) == np.asarray(total.reward)[0]).all()


@pytest.mark.parametrize("what", ["n_states", "n_actions", "d", "horizon"])
def test_random_family_refuses_empty_sizes(what):
    sizes = {"n_states": 2, "n_actions": 2, "d": 2, "horizon": 2} | {what: 0}
    with pytest.raises(ValueError, match=f"{what} is 0"):
        random_linear_mdp(**sizes, seed=0)


# ---- the hard family -----------------------------------------------------------------------------


def test_hypercube_by_hand():
    """The released setting: k = 4, delta = 0.3, ||xi||_1 = 0.2, five states, three steps."""
    model = hypercube_mdp()
    assert model.sizes == (5, 5, 5, 5)
    assert (model.n_actions, model.d, model.horizon, model.features.mode) == (16, 4, 3, "concat")
    actions = hypercube_actions(4)
    assert len({tuple(a) for a in actions}) == 16
    assert set(np.unique(actions)) == {-1.0, 1.0}
    for i, a in enumerate(actions):
        p = 0.3 + 0.05 * a.sum()
        np.testing.assert_allclose(model.phi[0, i], [1 - p, 0, 0, p])
        np.testing.assert_allclose(model.phi[2, i], [0, 0, 1 - p, p])
        np.testing.assert_allclose(model.kernel.dense(0)[0, i], [0, 0.999 * (1 - p), 0, 0.001 * (1 - p), p])
        np.testing.assert_allclose(model.kernel.dense(1)[1, i], [0, 0, 0.999 * (1 - p), 0.001 * (1 - p), p])
        for h in range(3):
            np.testing.assert_allclose(model.kernel.dense(h)[3, i], np.eye(5)[3])
            np.testing.assert_allclose(model.kernel.dense(h)[4, i], np.eye(5)[4])
            np.testing.assert_allclose(model.reward[h][:, i], [0] * 5 if h == 0 else [p, p, p, 0, 1])


@given(
    st.integers(1, 5),
    st.floats(0.05, 0.95),
    st.floats(0, 1),
    st.sampled_from([0.0, 0.001, 0.5, 1.0]),
)
def test_hypercube_optimum_and_simplex(k, delta, share, fail):
    xi_norm = share * min(delta, 1 - delta)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = hypercube_mdp(k, delta, xi_norm, fail)
    assert (model.phi >= 0).all()
    np.testing.assert_allclose(model.phi.sum(-1), 1.0, atol=1e-12)
    assert optimum(model) == pytest.approx(hypercube_optimum(delta, xi_norm, fail), abs=1e-12)


def test_hypercube_beyond_the_simplex_is_refused():
    hypercube_mdp(xi_norm=0.3)  # the edge, which the paper runs
    with pytest.raises(ValueError, match=r"xi_norm is 0.31.*min\(delta, 1 - delta\) = 0.3"):
        hypercube_mdp(xi_norm=0.31)
    with pytest.raises(ValueError, match="k is 0"):
        hypercube_mdp(k=0)
    with pytest.raises(ValueError, match="fail is 2"):
        hypercube_mdp(fail=2)


def test_no_shared_theta_fits_the_hard_family():
    """Least squares of the rewards on phi summed over steps leaves a residual; with a theta a step it leaves none."""
    model = hypercube_mdp()
    phi, r = model.phi.reshape(-1, 4), np.reshape(model.reward, (3, -1))
    shared = np.linalg.lstsq(np.tile(phi, (3, 1)), r.ravel(), rcond=None)[1]
    assert shared > 0.1
    for h in range(3):
        theta = np.linalg.lstsq(phi, r[h], rcond=None)[0]
        np.testing.assert_allclose(phi @ theta, r[h], atol=1e-12)


# ---- tabular as one-hot --------------------------------------------------------------------------


@given(seeds, st.booleans())
def test_tabular_is_the_same_model(seed, sparse):
    rng = np.random.default_rng(seed)
    P, r = rng.dirichlet(np.ones(3), size=(2, 3, 2)), rng.random((2, 3, 2))
    mask = np.ones((2, 3, 2), dtype=bool)
    mask[0, 1, 1] = False
    model = FiniteMDP.dense(P, r, rng.dirichlet(np.ones(3)), action_mask=mask)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one_hot = tabular_linear_mdp(model.to_sparse() if sparse else model)
    assert (one_hot.d, one_hot.features.dim) == (6, 12)
    np.testing.assert_allclose(one_hot.kernel.P, P, atol=1e-15)
    np.testing.assert_array_equal(one_hot.reward, r)
    np.testing.assert_array_equal(one_hot.action_mask, mask)
    np.testing.assert_array_equal(one_hot.initial, model.initial)
    np.testing.assert_array_equal(one_hot.phi.reshape(6, 6), np.eye(6))


def test_tabular_in_mode_sum_needs_a_stationary_reward():
    P, r = np.full((2, 2, 1, 2), 0.5), np.array([[0.1], [0.9]])
    model = FiniteMDP.dense(P, np.stack([r, r]))
    np.testing.assert_array_equal(tabular_linear_mdp(model, "sum").theta, [0.1, 0.9])
    with pytest.raises(ValueError, match="depends on h; use mode='concat'"):
        tabular_linear_mdp(FiniteMDP.dense(P, np.stack([r, 1 - r])), "sum")
    with pytest.raises(ValueError, match="equal sizes"):
        tabular_linear_mdp(FiniteMDP.tree(1, 2, 2, [np.zeros((2, 3)), np.zeros((3, 3))]))


# ---- bad input and broken assumptions ------------------------------------------------------------

E2 = np.eye(2)


def factors(**changes):
    """S = 2, A = 1, d = 2, H = 3: states are their own features."""
    base = {
        "phi": E2[:, None],
        "mu": np.stack([E2] * 3),
        "theta": np.array([0.2, 0.8]),
        "initial": np.array([1.0, 0.0]),
    }
    return base | changes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"theta": np.array([2.0, 0.0])}, r"max \|\|theta_h\|\| = 2 exceeds sqrt\(d\) = 1.41421"),
        ({"theta": np.array([-0.5, 0.0])}, r"rewards lie in \[-0.5, 0\], not in \[0, 1\]"),
        ({"theta": np.array([1.25, 0.0])}, r"rewards lie in \[0, 1.25\]"),
        (
            {"phi": 1.5 * E2[:, None], "mu": np.stack([E2 / 1.5] * 3)},
            r"max \|\|phi\(s,a\)\|\| = 1.5 exceeds 1",
        ),
        ({"phi": E2[:, None] / 4, "mu": np.stack([4 * E2] * 3)}, r"\|mu_h\|\(S\) \|\| = 5.65685 exceeds"),
    ],
)
def test_a_broken_assumption_is_named_and_the_world_is_built(changes, words):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        model = LinearMDP(**factors(**changes), name="w")
    assert {w.category for w in seen} == {AssumptionWarning}
    assert [str(w.message) for w in seen] == [f"w: {reason}" for reason in model.broken_assumptions()]
    assert sum(re.search(words, str(w.message)) is not None for w in seen) == 1


def test_the_warning_points_at_the_caller_and_names_the_world():
    with pytest.warns(AssumptionWarning, match="^here: rewards") as seen:
        LinearMDP(**factors(theta=np.array([1.25, 0.0])), name="here")
    assert seen[0].filename == __file__


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"phi": E2}, r"phi has shape \(2, 2\)"),
        ({"phi": np.empty((2, 0, 2))}, r"phi has shape \(2, 0, 2\)"),
        ({"mu": np.empty((0, 2, 2))}, "horizon is 0|no layers"),
        ({"mu": np.ones((3, 3, 2))}, r"mu has shape \(3, 3, 2\); expected \(H, d=2, S=2\)"),
        ({"mu": E2}, r"mu has shape \(2, 2\)"),
        ({"mu": np.stack([E2, 0.9 * E2, E2])}, r"P\[h=1, s=0, a=0\] sums to 0.9"),
        ({"mu": np.stack([E2, E2, np.array([[1.5, -0.5], [0, 1]])])}, r"P\[h=2, s=0, a=0\].*negative"),
        ({"theta": np.zeros((3, 2))}, r"theta has shape \(3, 2\); mode 'sum' wants .* \(2,\)"),
        ({"theta": np.zeros(2), "mode": "concat"}, r"mode 'concat' wants .* \(3, 2\)"),
        ({"theta": np.array([np.nan, 0])}, "finite"),
        ({"mode": "mean"}, "expected 'sum' or 'concat'"),
        ({"initial": np.array([0.5, 0.4])}, "initial is not a probability vector"),
    ],
)
def test_bad_factors(changes, words):
    with pytest.raises(ValueError, match=words):
        LinearMDP(**factors(**changes))


def test_signed_factors_that_cancel_to_rounding_are_probabilities():
    phi = np.array([[[1.0, 0.0]], [[1.0, 0.1]]])
    mu = np.array([[0.3, 0.7], [-3.0, 3.0]])
    assert (phi @ mu).min() < 0  # 0.3 - 0.1 * 3
    with pytest.warns(AssumptionWarning):
        model = LinearMDP(**factors(phi=phi, mu=np.stack([mu] * 3), theta=np.zeros(2)))
    np.testing.assert_array_equal(model.kernel.dense(0)[1, 0], [0, 1])


def test_a_linear_mdp_can_be_replaced_and_densified():
    model = random_linear_mdp(3, 2, 2, 2, 0)
    assert isinstance(model.replace(name="x"), LinearMDP)
    assert type(model.to_sparse()) is FiniteMDP
    np.testing.assert_allclose(model.to_sparse().theta, model.theta)
