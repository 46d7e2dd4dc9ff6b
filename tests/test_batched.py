"""The batched simulator: its law, one stream per lane, its state, and bad input."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from preflab.envs import BatchedSimulator, FiniteMDP, random_linear_mdp, random_token_mdp
from preflab.envs.batched import LaneStreams
from preflab.envs.exploration import toy_text
from scipy import stats

seeds = st.integers(0, 2**64 - 1)


def world(seed=0, horizon=4):
    """Sparse rows of different lengths, random initial law."""
    rng = np.random.default_rng(seed)
    P = rng.dirichlet(np.full(7, 0.5), size=(horizon, 7, 3)) * (rng.random((horizon, 7, 3, 7)) < 0.5)
    P[..., 0] += P.sum(-1) == 0
    P /= P.sum(-1, keepdims=True)
    return FiniteMDP.dense(P, rng.random((horizon, 7, 3)), rng.dirichlet(np.ones(7)))


def random_policy(model, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.dirichlet(np.ones(model.n_actions), size=n) for n in model.sizes[:-1]]


def occupancy(model, policy):
    law, result = model.initial, []
    for h in range(model.horizon):
        result.append(law[:, None] * policy[h])
        law = model.kernel.push(h, result[-1])
    return result


# ---- streams -------------------------------------------------------------------------------------


def splitmix(state, increment):
    """One draw in Python integers."""
    mask = 2**64 - 1
    state = z = (state + increment) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return state, (z ^ (z >> 31)) >> 11


@given(seeds, st.integers(0, 2**40))
def test_streams_are_splitmix64(seed, first):
    streams = LaneStreams(seed, 3, first)
    state, increment = [int(x) for x in streams.state], [int(x) for x in streams.increment]
    assert all(x % 2 for x in increment)
    for _ in range(5):
        u = streams.uniform()
        for lane in range(3):
            state[lane], bits = splitmix(state[lane], increment[lane])
            assert u[lane] == bits * 2.0**-53


def test_known_output_of_splitmix64():
    """The first outputs for seed 1234567 with the standard increment (Vigna's reference implementation)."""
    state, known = 1234567, [6457827717110365317, 3203168211198807973, 9817491932198370423]
    for want in known:
        state, bits = splitmix(state, 0x9E3779B97F4A7C15)
        assert bits == want >> 11


@pytest.mark.parametrize("seed", [0, 1, 2**63])
def test_uniformity_and_independence(seed):
    streams = LaneStreams(seed, 1000)
    u = np.stack([streams.uniform() for _ in range(200)])
    assert 0 <= u.min() < u.max() < 1
    cells = np.bincount((u * 256).astype(int).ravel(), minlength=256)
    assert stats.chisquare(cells).pvalue > 1e-4
    serial = np.histogram2d(u[:-1].ravel(), u[1:].ravel(), bins=16)[0].ravel()  # along a lane
    across = np.histogram2d(u[:, :-1].ravel(), u[:, 1:].ravel(), bins=16)[0].ravel()  # between neighbours
    assert stats.chisquare(serial).pvalue > 1e-4
    assert stats.chisquare(across).pvalue > 1e-4
    lane_means = (u.mean(axis=0) - 0.5) * np.sqrt(12 * 200)
    assert stats.kstest(lane_means, "norm").pvalue > 1e-4
    assert len(np.unique(u)) == u.size


def test_seeds_and_lanes_do_not_share_streams():
    a, b = LaneStreams(0, 500), LaneStreams(1, 500)
    assert len({*a.state.tolist(), *b.state.tolist()}) == 1000
    assert len({*a.increment.tolist(), *b.increment.tolist()}) == 1000
    again = LaneStreams(np.random.SeedSequence(0), 500)
    np.testing.assert_array_equal(again.state, a.state)


# ---- the law -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model",
    [
        world(),
        world().to_sparse(),
        random_linear_mdp(30, 3, 4, 4, 0),
        random_token_mdp(prompts=2),
        toy_text(horizon=6),
    ],
    ids=["dense", "sparse", "wide", "tree", "lake"],
)
def test_visits_follow_the_occupancy(model):
    policy = random_policy(model)
    if model.action_mask is not None:
        policy = [
            p * m / (p * m).sum(axis=1, keepdims=True) for p, m in zip(policy, model.action_mask, strict=True)
        ]
    sim = BatchedSimulator(model, 20_000, 1)
    t = sim.rollout(policy)
    for h, mu in enumerate(occupancy(model, policy)):
        counts = np.bincount(t.states[:, h] * model.n_actions + t.actions[:, h], minlength=mu.size)
        mu = mu.ravel()
        assert not counts[mu == 0].any()
        common = mu > 5 / 20_000
        observed, expected = (
            np.append(counts[common], counts[~common].sum()),
            np.append(mu[common], mu[~common].sum()),
        )
        keep = expected > 0
        assert stats.chisquare(observed[keep], 20_000 * expected[keep] / expected[keep].sum()).pvalue > 1e-5


@given(st.integers(0, 2**32 - 1))
def test_each_transition_is_the_kernels_own_inverse_cdf(seed):
    model = world(seed)
    sim = BatchedSimulator(model, 50, seed)
    shadow = LaneStreams(seed, 50)
    rng = np.random.default_rng(seed)
    s = np.searchsorted(np.cumsum(model.initial), shadow.uniform(), side="right")
    for i in range(2 * model.horizon):
        np.testing.assert_array_equal(sim.states, s)
        h, a = i % model.horizon, rng.integers(3, size=50)
        assert sim.h == h
        step = sim.step(a)
        np.testing.assert_array_equal(step.rewards, model.reward[h][s, a])
        assert step.ended == (h + 1 == model.horizon)
        u = shadow.uniform()
        s = (
            np.searchsorted(np.cumsum(model.initial), u, side="right")
            if step.ended
            else model.kernel.sample(h, s, a, u)
        )
        np.testing.assert_array_equal(step.states, s)


@pytest.mark.parametrize("model", [world(), random_token_mdp(prompts=3)], ids=["dense", "tree"])
def test_equal_models_give_equal_trajectories(model):
    policy = random_policy(model)
    if model.action_mask is not None:
        policy = [
            p * m / (p * m).sum(axis=1, keepdims=True) for p, m in zip(policy, model.action_mask, strict=True)
        ]
    runs = [BatchedSimulator(m, 200, 5).rollout(policy) for m in (model, model.to_dense(), model.to_sparse())]
    for other in runs[1:]:
        np.testing.assert_array_equal(other.states, runs[0].states)
        np.testing.assert_array_equal(other.actions, runs[0].actions)


def test_deterministic_policies_and_single_steps():
    model = world(horizon=1)
    sim = BatchedSimulator(model, 10, 0)
    assert (sim.act([np.full(7, 2)]) == 2).all()
    step = sim.step(np.full(10, 2))
    assert (step.ended, sim.h) == (True, 0)


# ---- lanes ---------------------------------------------------------------------------------------


@given(seeds, st.integers(1, 19), st.integers(1, 3))
def test_a_lane_does_not_depend_on_its_company(seed, cut, episodes):
    model = world()
    policy = random_policy(model)

    def run(lanes, first):
        sim = BatchedSimulator(model, lanes, seed, first)
        return np.concatenate([sim.rollout(policy).states for _ in range(episodes)], axis=1)

    whole = run(20, 0)
    np.testing.assert_array_equal(np.concatenate([run(cut, 0), run(20 - cut, cut)]), whole)


@given(seeds, st.integers(0, 10), st.integers(0, 10))
def test_a_restored_simulator_goes_on_bit_for_bit(seed, before, after):
    model = random_token_mdp(prompts=2).replace(action_mask=None)
    actions = np.random.default_rng(0).integers(model.n_actions, size=(20, 8))
    sim = BatchedSimulator(model, 8, seed)
    for a in actions[:before]:
        sim.step(a)
    saved = sim.checkpoint()
    kept = {k: v.copy() for k, v in saved.items()}
    straight = [sim.step(a) for a in actions[before : before + after]]
    for k, v in saved.items():
        np.testing.assert_array_equal(v, kept[k])  # the future does not reach into a checkpoint
    other = BatchedSimulator(model, 8, 0)
    other.restore(saved)
    assert other.h == before % model.horizon
    for a, want in zip(actions[before:], straight, strict=False):
        got = other.step(a)
        np.testing.assert_array_equal(got.states, want.states)
        np.testing.assert_array_equal(got.rewards, want.rewards)


def test_a_checkpoint_goes_through_a_file_without_pickles(tmp_path):
    model = world()
    sim = BatchedSimulator(model, 5, 3)
    sim.step(np.zeros(5, dtype=int))
    np.savez(tmp_path / "lanes.npz", **sim.checkpoint())
    other = BatchedSimulator(model, 5, 4)
    with np.load(tmp_path / "lanes.npz", allow_pickle=False) as saved:
        other.restore(saved)
    np.testing.assert_array_equal(other.step(np.ones(5, int)).states, sim.step(np.ones(5, int)).states)


def test_results_of_a_step_are_not_overwritten_by_the_next():
    sim = BatchedSimulator(world(), 30, 0)
    steps = [sim.step(np.zeros(30, dtype=int)) for _ in range(9)]
    assert len({id(s.states) for s in steps}) == 9
    assert not any(np.shares_memory(a.states, b.states) for a in steps for b in steps if a is not b)
    assert not any(np.shares_memory(a.rewards, b.rewards) for a in steps for b in steps if a is not b)


# ---- masks and bad input -------------------------------------------------------------------------


def masked():
    mask = np.ones((4, 7, 3), dtype=bool)
    mask[1, :, 2] = False
    return world().replace(action_mask=mask)


def test_masks():
    sim = BatchedSimulator(masked(), 6, 0)
    assert sim.mask.all()
    sim.step(np.full(6, 2))
    np.testing.assert_array_equal(sim.mask, [[True, True, False]] * 6)
    before = sim.checkpoint()
    with pytest.raises(ValueError, match=r"action 2 is not available at step 1 in state \d \(lane 4\)"):
        sim.step(np.array([0, 1, 0, 1, 2, 2]))
    for k, v in sim.checkpoint().items():
        np.testing.assert_array_equal(v, before[k])
    assert BatchedSimulator(world(), 2, 0).mask.shape == (2, 3)


@pytest.mark.parametrize(
    ("actions", "words"),
    [
        (np.zeros(5, int), r"actions have shape \(5,\)"),
        (np.zeros(6), "type float64"),
        (np.array([0, 0, 3, 0, 0, 0]), r"actions\[2\] is 3; expected 0\.\.2"),
        (np.array([0, 0, 0, -1, 0, 0]), r"actions\[3\] is -1"),
    ],
)
def test_bad_actions(actions, words):
    with pytest.raises(ValueError, match=words):
        BatchedSimulator(world(), 6, 0).step(actions)


def test_other_bad_input():
    with pytest.raises(ValueError, match="lanes is 0"):
        BatchedSimulator(world(), 0, 0)
    with pytest.raises(ValueError, match="first_lane is -1"):
        BatchedSimulator(world(), 1, 0, -1)
    sim = BatchedSimulator(world(), 4, 0)
    with pytest.raises(ValueError, match=r"shape \(5,\); this simulator has 4 lanes"):
        sim.restore(BatchedSimulator(world(), 5, 0).checkpoint())
    saved = sim.checkpoint()
    for change in ({"h": np.array(4)}, {"states": np.full(4, 7)}):
        with pytest.raises(ValueError, match="another model"):
            sim.restore(saved | change)
    sim.step(np.zeros(4, int))
    with pytest.raises(ValueError, match="a rollout starts at step 0"):
        sim.rollout(random_policy(world()))
