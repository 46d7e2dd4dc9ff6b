"""FiniteMDP, feature maps and trajectories: one model in three representations, its sampling, and bad input."""

from typing import ClassVar

import gymnasium
import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st
from preflab.envs import FeatureMap, FiniteMDP, Trajectories

H, S, A = 3, 4, 2
seeds = st.integers(0, 2**32 - 1)


def backward_induction(kernel, reward, mask=None):
    """V* and Q* from plain arrays: the tests' own solver."""
    v = np.zeros(kernel[-1].shape[2])
    Q = []
    for h in range(len(kernel) - 1, -1, -1):
        Q.insert(0, reward[h] + np.einsum("sat,t->sa", kernel[h], v))
        v = (Q[0] if mask is None else np.where(mask[h], Q[0], -np.inf)).max(axis=1)
    return v, Q


def optimal_value(model):
    v, _ = backward_induction(
        [model.kernel.dense(h) for h in range(model.horizon)], model.reward, model.action_mask
    )
    return float(model.initial @ v)


def expected_return(model, policy):
    """sum_h <mu_h, r_h> with mu by `push`."""
    law, total = model.initial, 0.0
    for h in range(model.horizon):
        pi = policy[h] if policy[h].ndim == 2 else np.eye(model.n_actions)[policy[h]]
        mu = law[:, None] * pi
        total += float((mu * model.reward[h]).sum())
        law = model.kernel.push(h, mu)
    return total


def random_model(seed, **rest):
    rng = np.random.default_rng(seed)
    P = rng.dirichlet(np.full(S, 0.4), size=(H, S, A))
    return FiniteMDP.dense(P, rng.random((H, S, A)), rng.dirichlet(np.ones(S)), **rest)


def random_policy(model, seed):
    rng = np.random.default_rng(seed)
    return [rng.dirichlet(np.ones(model.n_actions), size=n) for n in model.sizes[:-1]]


def small_tree(seed=0):
    rng = np.random.default_rng(seed)
    sizes = (3, 5, 9)
    return FiniteMDP.tree(2, 2, 3, [rng.random((n, 3)) for n in sizes], name="tree")


# ---- one model, three representations ------------------------------------------------------------


@given(seeds, st.booleans())
def test_representations_agree_on_value_and_law(seed, tree):
    model = small_tree(seed) if tree else random_model(seed)
    policy = random_policy(model, seed)
    for other in (model.to_dense(), model.to_sparse(), model.to_sparse().to_dense()):
        assert type(other) is FiniteMDP
        assert other.sizes == model.sizes
        assert optimal_value(other) == pytest.approx(optimal_value(model), abs=1e-12)
        assert expected_return(other, policy) == pytest.approx(expected_return(model, policy), abs=1e-12)


@given(seeds, st.booleans())
def test_rollouts_of_the_same_seed_agree_across_representations(seed, tree):
    model = small_tree(seed) if tree else random_model(seed)
    policy = random_policy(model, seed)
    runs = [
        m.rollout(policy, 20, np.random.default_rng(seed))
        for m in (model, model.to_dense(), model.to_sparse())
    ]
    for other in runs[1:]:
        np.testing.assert_array_equal(other.states, runs[0].states)
        np.testing.assert_array_equal(other.actions, runs[0].actions)


@pytest.mark.parametrize("deterministic", [True, False])
def test_mean_return_of_rollouts(deterministic):
    model = random_model(3)
    policy = random_policy(model, 4)
    if deterministic:
        policy = [p.argmax(axis=1) for p in policy]
    returns = model.returns(model.rollout(policy, 40_000, np.random.default_rng(5)))
    assert returns.mean() == pytest.approx(expected_return(model, policy), abs=4 * returns.std() / 200)


def test_rollout_from_chosen_states():
    model = random_model(0)
    start = np.array([3, 1, 1])
    t = model.rollout([np.zeros(S, int)] * H, 3, np.random.default_rng(0), start=start)
    np.testing.assert_array_equal(t.states[:, 0], start)
    assert not t.actions.any()


def test_shapes_and_names():
    model, tree = random_model(0, name="x"), small_tree()
    assert (model.horizon, model.n_actions, model.sizes, model.uniform, model.name) == (
        H,
        A,
        (S,) * (H + 1),
        True,
        "x",
    )
    assert isinstance(model.reward, np.ndarray)
    assert (tree.sizes, tree.uniform) == ((3, 5, 9, 1), False)
    assert isinstance(tree.reward, tuple)
    assert isinstance(tree.layered([np.zeros(3)] * 3), tuple)
    assert model.layered([np.zeros(S)] * H).shape == (H, S)
    np.testing.assert_allclose(tree.initial, [0, 0.5, 0.5])
    assert model.replace(name="y").name == "y"


def test_initial_may_be_a_state():
    P, r = np.full((1, 2, 1, 2), 0.5), np.zeros((1, 2, 1))
    np.testing.assert_array_equal(FiniteMDP.dense(P, r, 1).initial, [0, 1])
    np.testing.assert_array_equal(FiniteMDP.tree(2, 1, 1, [np.zeros((3, 2))], 2).initial, [0, 0, 1])
    with pytest.raises(ValueError, match=r"initial state 2 is not in 0\.\.1"):
        FiniteMDP.dense(P, r, 2)


def test_sparse_constructor():
    dense = random_model(1)
    matrices = [sp.csr_array(p.reshape(-1, S)) for p in dense.kernel.P]
    model = FiniteMDP.sparse(matrices, A, dense.reward, dense.initial)
    assert optimal_value(model) == pytest.approx(optimal_value(dense), abs=1e-12)


# ---- bad input -----------------------------------------------------------------------------------


def good(**changes):
    base = {"P": np.full((H, S, A, S), 0.25), "reward": np.zeros((H, S, A)), "initial": np.full(S, 0.25)}
    return base | changes


def with_entry(array, place, value):
    array = np.array(array)
    array[place] = value
    return array


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"P": np.empty((0, S, A, S)), "reward": []}, "horizon is 0"),
        ({"P": np.empty((H, S, 0, S)), "reward": np.empty((H, S, 0))}, "empty action set"),
        ({"reward": np.zeros((2, S, A))}, "reward has 2 layers but the horizon is 3"),
        ({"reward": np.zeros((H, S, 3))}, r"reward\[h=0\] has shape \(4, 3\)"),
        ({"reward": with_entry(np.zeros((H, S, A)), (1, 2, 1), np.nan)}, r"reward\[h=1, s=2, a=1\] is nan"),
        ({"action_mask": np.ones((2, S, A), bool)}, "action_mask has 2 layers"),
        (
            {"action_mask": with_entry(np.ones((H, S, A), bool), (1, 3), False)},
            r"action_mask\[h=1, s=3\] leaves an empty action set",
        ),
        ({"initial": np.full(3, 1 / 3)}, r"initial has shape \(3,\)"),
        ({"initial": np.full(S, 0.2)}, "initial is not a probability vector: sum 0.8"),
        ({"initial": np.array([1.5, -0.5, 0, 0])}, "smallest entry -0.5"),
        ({"initial": np.array([np.nan, 1, 0, 0])}, "not a probability vector"),
        ({"features": FeatureMap(np.zeros((H, S, 3, 2)))}, r"phi\[h=0\] has shape \(4, 3, 2\)"),
        ({"features": FeatureMap(np.zeros((2, S, A, 2)))}, "phi has 2 layers but the horizon is 3"),
        ({"features": FeatureMap(np.zeros((4, S, A, 2)))}, "phi has 4 layers but the horizon is 3"),
        ({"theta": np.zeros(2)}, "theta is given without features"),
        (
            {"features": FeatureMap(np.ones((H, S, A, 1))), "theta": [0.5]},
            r"reward\[h=0, s=0, a=0\] differs from <phi, theta> by 0.5",
        ),
    ],
)
def test_bad_models_are_named(changes, words):
    with pytest.raises(ValueError, match=words):
        FiniteMDP.dense(**good(**changes))


def test_check_distribution_names_the_row():
    from preflab.envs.mdp import check_distribution

    check_distribution(np.array([[0.5, 0.5], [1.0, 0.0]]), "pi")
    with pytest.raises(ValueError, match=r"pi\[1\] is not a probability vector: sum 1.1"):
        check_distribution(np.array([[0.5, 0.5], [1.0, 0.1]]), "pi")
    with pytest.raises(ValueError, match=r"pi\[1, 0\].*smallest entry -0.1"):
        check_distribution(np.array([[[0.5, 0.5]], [[1.1, -0.1]]]), "pi")


# ---- features and trajectories -------------------------------------------------------------------


@given(seeds, st.sampled_from(["sum", "concat"]), st.booleans())
def test_return_is_linear_in_trajectory_features(seed, mode, tree):
    rng = np.random.default_rng(seed)
    base = small_tree(seed) if tree else random_model(seed)
    features = FeatureMap([rng.normal(size=(n, base.n_actions, 3)) for n in base.sizes[:-1]], mode)
    theta = rng.normal(size=features.dim)
    model = base.replace(reward=features.rewards(theta), features=features, theta=theta)
    t = model.rollout(random_policy(model, seed), 10, rng)
    assert features.of(t).shape == (10, 3 * (1 if mode == "sum" else model.horizon))
    np.testing.assert_allclose(features.of(t) @ theta, model.returns(t), atol=1e-10)


def test_feature_map_facts():
    phi = np.zeros((H, S, A, 2))
    phi[1, 2, 0] = 3, 4
    total, joined = FeatureMap(phi), FeatureMap(phi, "concat")
    assert (total.d, total.dim, joined.dim, total.horizon, total.max_norm) == (2, 2, 6, H, 5.0)
    np.testing.assert_array_equal(total.per_step([1, 2]), [[1, 2]] * H)
    np.testing.assert_array_equal(joined.per_step(np.arange(6)), np.arange(6).reshape(3, 2))
    np.testing.assert_array_equal(joined.per_step(np.arange(6).reshape(3, 2)), np.arange(6).reshape(3, 2))


@pytest.mark.parametrize(("mode", "size"), [("sum", 6), ("sum", 1), ("concat", 2), ("concat", 4)])
def test_a_theta_of_the_wrong_size_is_refused(mode, size):
    with pytest.raises(ValueError, match="wants"):
        FeatureMap(np.zeros((H, S, A, 2)), mode).per_step(np.zeros(size))


@pytest.mark.parametrize(
    ("phi", "mode", "words"),
    [
        (np.zeros((H, S, A, 2)), "mean", "mode is 'mean'; expected 'sum' or 'concat'"),
        ([], "sum", "no layers"),
        ([np.zeros((S, A))], "sum", r"phi\[h=0\]"),
        ([np.zeros((S, A, 2)), np.zeros((S, A, 3))], "sum", r"phi\[h=1\].*expected \(S_h, A, 2\)"),
        ([np.zeros((S, A, 2)), np.full((S, A, 2), np.nan)], "sum", r"phi\[h=1\] contains NaN"),
    ],
)
def test_bad_feature_maps(phi, mode, words):
    with pytest.raises(ValueError, match=words):
        FeatureMap(phi, mode)


def test_trajectories():
    t = Trajectories([[0, 1], [2, 3]], [[1, 0], [0, 1]])
    assert (len(t), t.states.dtype, len(Trajectories([0, 1], [1, 1]))) == (2, np.int64, 1)
    np.testing.assert_array_equal(t[1:].states, [[2, 3]])
    np.testing.assert_array_equal(Trajectories.concatenate([t, t[:1]]).actions, [[1, 0], [0, 1], [1, 0]])
    with pytest.raises(ValueError, match=r"\(2, 2\) but actions \(1, 2\)"):
        Trajectories([[0, 1], [2, 3]], [[1, 0]])


# ---- Gymnasium's toy-text tables -----------------------------------------------------------------

TOYS = [
    ("FrozenLake-v1", {"is_slippery": False}),
    ("FrozenLake-v1", {"is_slippery": True}),
    ("CliffWalking-v1", {}),
    ("Taxi-v4", {}),
]


def table_value(env, horizon, start):
    """Backward induction on env.P itself: nothing is earned after a terminated transition."""
    table = env.unwrapped.P
    v = np.zeros(len(table))
    for _ in range(horizon):
        v = np.array(
            [
                max(
                    sum(p * (r + (0.0 if over else v[t])) for p, t, r, over in row)
                    for row in table[s].values()
                )
                for s in range(len(table))
            ]
        )
    return start @ v


@pytest.mark.parametrize(("name", "kwargs"), TOYS)
def test_from_gymnasium_has_the_value_of_the_table(name, kwargs):
    env = gymnasium.make(name, **kwargs)
    model = FiniteMDP.from_gymnasium(env, 12)
    start = env.unwrapped.initial_state_distrib
    assert optimal_value(model) == pytest.approx(table_value(env, 12, start), abs=1e-10)
    assert model.name == name
    assert model.sizes == (len(env.unwrapped.P) + 1,) * 13


def test_known_optima():
    def value(name, horizon, **kwargs):
        return optimal_value(FiniteMDP.from_gymnasium(gymnasium.make(name, **kwargs), horizon))

    assert value("FrozenLake-v1", 6, is_slippery=False) == 1.0  # six moves to the goal
    assert value("FrozenLake-v1", 5, is_slippery=False) == 0.0
    assert value("CliffWalking-v1", 13) == -13.0  # up, eleven to the right, down
    assert value("CliffWalking-v1", 12) == -12.0
    # Long horizon: the share of episodes that the slippery lake lets through, 14/17 (known for the 4 x 4 map).
    assert value("FrozenLake-v1", 2000, is_slippery=True) == pytest.approx(14 / 17, abs=1e-6)


@pytest.mark.parametrize(("name", "kwargs"), TOYS)
def test_from_gymnasium_against_gymnasium_itself(name, kwargs):
    """Mean return of the uniformly random policy, capped at 8 steps, by Gymnasium's own step function."""
    env = gymnasium.make(name, **kwargs)
    model = FiniteMDP.from_gymnasium(env, 8)
    exact = expected_return(
        model, [np.full((n, model.n_actions), 1 / model.n_actions) for n in model.sizes[:-1]]
    )
    rng = np.random.default_rng(11)
    env.reset(seed=11)
    returns = []
    for _ in range(1500):
        env.reset()
        total = 0.0
        for _ in range(8):
            _, r, over, _, _ = env.step(int(rng.integers(model.n_actions)))
            total += float(r)
            if over:
                break
        returns.append(total)
    assert np.mean(returns) == pytest.approx(exact, abs=4.5 * np.std(returns) / np.sqrt(1500) + 1e-9)


class Chain(gymnasium.Env):
    """Two states, a table, and neither a spec nor an initial law."""

    action_space = gymnasium.spaces.Discrete(1)
    observation_space = gymnasium.spaces.Discrete(2)
    # Two outcomes with the same successor must add up.
    P: ClassVar = {
        0: {0: [(0.5, 1, 1.0, False), (0.25, 1, 3.0, False), (0.25, 0, 0.0, True)]},
        1: {0: [(1.0, 1, 0.0, False)]},
    }

    def reset(self, *, seed=None, options=None):
        return 0, {}


def test_from_gymnasium_without_spec_or_initial_law():
    model = FiniteMDP.from_gymnasium(Chain(), 1)
    assert model.name == "Chain"
    np.testing.assert_array_equal(model.initial, [1, 0, 0])
    np.testing.assert_allclose(model.kernel.dense(0)[0, 0], [0, 0.75, 0.25])
    assert model.reward[0][0, 0] == pytest.approx(1.25)


def test_from_gymnasium_refuses_what_it_cannot_represent():
    with pytest.raises(ValueError, match="horizon is 0"):
        FiniteMDP.from_gymnasium(Chain(), 0)
    with pytest.raises(TypeError, match="no transition table"):
        FiniteMDP.from_gymnasium(gymnasium.make("Blackjack-v1"), 5)
    with pytest.raises(ValueError, match="fickle passenger"):
        FiniteMDP.from_gymnasium(gymnasium.make("Taxi-v4", fickle_passenger=True), 5)
