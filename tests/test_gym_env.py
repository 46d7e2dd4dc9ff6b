"""Gymnasium: the public checker on every registered world, seeding, masks, episodes' law, and what HideReward hides."""

import subprocess
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

import gymnasium
import numpy as np
import preflab.envs
import pytest
from gymnasium.utils.env_checker import check_env
from preflab.envs import (
    FeatureMap,
    FiniteMDP,
    FiniteMDPEnv,
    HideReward,
    deep_sea,
    random_linear_mdp,
    random_token_mdp,
)
from preflab.envs.registration import WORLDS, register_all
from preflab.envs.wrappers import RewardFreeMDP

ROOT = Path(__file__).resolve().parents[1]
SMALL = {"preflab/RandomLinearMDP-v0": {"mode": "concat"}, "preflab/TokenMDP-v0": {"prompts": 2, "seed": 3}}


def masked_model(horizon=3):
    """Action 1 is closed in state 0, action 0 in state 1; the initial law is on both."""
    rng = np.random.default_rng(0)
    mask = np.broadcast_to([[True, False, True], [False, True, True]], (horizon, 2, 3))
    return FiniteMDP.dense(
        rng.dirichlet(np.ones(2), size=(horizon, 2, 3)),
        rng.random((horizon, 2, 3)),
        [0.5, 0.5],
        action_mask=mask,
    )


# ---- the checker ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WORLDS)
@pytest.mark.parametrize("render_mode", [None, "ansi"])
def test_every_world_passes_the_checker_without_a_warning(name, render_mode):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = gymnasium.make(name, render_mode=render_mode, **SMALL.get(name, {}))
        check_env(env.unwrapped)
        check_env(HideReward(env))
    assert isinstance(env.unwrapped.model, FiniteMDP)


@pytest.mark.parametrize("name", WORLDS)
def test_a_random_walk_through_the_wrapped_world(name):
    """gymnasium.make's own passive checks on the way; the episode ends at the horizon, as a true end."""
    env = gymnasium.make(name)
    model = env.unwrapped.model
    for seed in range(3):
        _, info = env.reset(seed=seed)
        env.action_space.seed(seed)
        for h in range(model.horizon):
            assert info["step"] == h
            _, reward, terminated, truncated, info = env.step(env.action_space.sample())
            assert (terminated, truncated) == (h + 1 == model.horizon, False)
            assert isinstance(reward, float)


@pytest.mark.parametrize("observe_step", [True, False])
def test_masks_and_both_observations_pass_the_checker(observe_step):
    gymnasium.register(
        "Masked-v0",
        lambda **kwargs: FiniteMDPEnv(random_token_mdp(prompts=3), observe_step=observe_step, **kwargs),
    )
    try:
        check_env(gymnasium.make("Masked-v0").unwrapped)
    finally:
        del gymnasium.registry["Masked-v0"]


# ---- the environment -----------------------------------------------------------------------------


def play(env, seed, episodes=3):
    env.action_space.seed(seed)
    path = [env.reset(seed=seed)[0]]
    for _ in range(episodes):
        over = False
        while not over:
            observation, reward, over, _, _ = env.step(env.action_space.sample())
            path += [observation, reward]
        path.append(env.reset()[0])
    return [np.asarray(x).tolist() for x in path]


def test_seeding():
    model = random_linear_mdp(10, 3, 4, 5, 0)
    one, same, other = (play(FiniteMDPEnv(model), seed) for seed in (1, 1, 2))
    assert one == same
    assert one != other


def test_observations():
    uniform, layered = deep_sea(4), random_token_mdp(prompts=2)
    assert FiniteMDPEnv(uniform).observation_space == gymnasium.spaces.Discrete(4)
    both = FiniteMDPEnv(uniform, observe_step=True)
    assert both.observation_space == gymnasium.spaces.MultiDiscrete([5, 4])
    assert both.reset(seed=0)[0].tolist() == [0, 0]
    assert both.step(0)[0][0] == 1
    env = FiniteMDPEnv(layered)
    assert env.observation_space == gymnasium.spaces.MultiDiscrete([layered.horizon + 1, max(layered.sizes)])
    assert FiniteMDPEnv(layered, observe_step=False).observation_space.n == max(layered.sizes)
    assert env.unwrapped.model is layered


def test_law_of_episodes():
    """Visits under a random policy against `push` from the initial law, and the rewards of the table."""
    model = masked_model()
    env = FiniteMDPEnv(model)
    env.action_space.seed(0)
    env.reset(seed=0)
    counts = np.zeros((model.horizon, 2, 3))
    for _ in range(3000):
        s, info = env.reset()
        for h in range(model.horizon):
            a = int(env.action_space.sample(info["action_mask"]))
            counts[h, s, a] += 1
            t, reward, _, _, info = env.step(a)
            assert reward == model.reward[h][s, a]
            s = t
    law = model.initial
    for h in range(model.horizon):
        mu = law[:, None] * model.action_mask[h] / 2
        np.testing.assert_allclose(counts[h] / 3000, mu, atol=4 * 0.5 / np.sqrt(3000))
        law = model.kernel.push(h, mu)


def test_masks():
    model = masked_model()
    env = FiniteMDPEnv(model)
    for seed in range(10):
        state, info = env.reset(seed=seed)
        assert info["action_mask"].dtype == np.int8
        np.testing.assert_array_equal(info["action_mask"], model.action_mask[0][state])
        drawn = {int(env.action_space.sample()) for _ in range(40)}
        assert drawn == set(np.flatnonzero(model.action_mask[0][state]))
        assert int(env.action_space.sample(np.array([0, 1, 0], dtype=np.int8))) == 1
        assert int(env.action_space.sample(probability=np.array([0.0, 0.0, 1.0]))) == 2
        closed = 1 - state
        with pytest.raises(
            ValueError, match=rf"action {closed} is not available at step 0 in state {state}; choose"
        ):
            env.step(closed)
        assert env.step(2)[4]["step"] == 1  # the refused action has moved nothing
    assert "action_mask" not in FiniteMDPEnv(deep_sea(3)).reset(seed=0)[1]


def test_chosen_first_states():
    env = FiniteMDPEnv(masked_model())
    assert [env.reset(options={"state": s})[0] for s in (1, 0, 1)] == [1, 0, 1]
    for state in (-1, 2):
        with pytest.raises(ValueError, match=rf"options\['state'\] is {state}; expected 0\.\.1"):
            env.reset(options={"state": state})
    free, chosen = FiniteMDPEnv(masked_model()), FiniteMDPEnv(masked_model())
    first = free.reset(seed=5)[0]
    chosen.reset(seed=5, options={"state": first})
    assert [free.step(2)[0] for _ in range(3)] == [chosen.step(2)[0] for _ in range(3)]


def test_misuse():
    env = FiniteMDPEnv(deep_sea(2))
    with pytest.raises(gymnasium.error.ResetNeeded, match=r"call reset\(\)"):
        env.step(0)
    env.reset(seed=0)
    for action in (2, -1, 0.5, "left"):
        with pytest.raises(ValueError, match=r"at step 0 is not an integer in 0\.\.1"):
            env.step(action)
    env.step(0)
    env.step(np.int64(1))
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(0)
    with pytest.raises(ValueError, match="render_mode is 'human'"):
        FiniteMDPEnv(deep_sea(2), render_mode="human")


def test_rendering_states():
    env = FiniteMDPEnv(deep_sea(2, None), render_mode="ansi")
    assert env.render() == ""
    env.reset(seed=0)
    assert env.render() == "step 0/2: state 0"
    env.step(1)
    assert env.render() == "step 1/2: state 1"
    assert FiniteMDPEnv(deep_sea(2)).render() is None


def test_rendering_text_keeps_the_finished_response():
    env = gymnasium.make("preflab/TokenMDP-v0", render_mode="ansi", prompts=2)
    env.reset(seed=0, options={"state": 2})
    assert env.render() == "1: "
    for action in (0, 2, 3, 3):  # a, c, then the end, twice
        env.step(action)
    assert env.render() == "1: ac"


# ---- registration --------------------------------------------------------------------------------


def test_registering_twice_is_silent_and_keywords_reach_the_factory():
    register_all()
    env = gymnasium.make("preflab/RiverSwim-v0", n=9, horizon=3, observe_step=True)
    assert (env.unwrapped.model.sizes[0], env.unwrapped.model.horizon) == (9, 3)
    assert env.unwrapped.observe_step
    with pytest.raises(TypeError, match="bananas"):
        gymnasium.make("preflab/RiverSwim-v0", bananas=1)
    toy = gymnasium.make("preflab/ToyText-v0", env_id="CliffWalking-v1", horizon=4)
    assert toy.unwrapped.model.name == "CliffWalking-v1"


def test_make_by_module_name_from_a_bare_interpreter():
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'src')!r})\n"
        "import gymnasium\n"
        "print(gymnasium.make('preflab.envs:preflab/DeepSea-v0', size=3).unwrapped.model.name)\n"
        "print('scipy' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["DeepSea(size=3)", "True"]


def test_every_export_exists_where_its_module_does():
    for module, names in preflab.envs._EXPORTS.items():
        if find_spec(f"preflab.envs.{module}"):
            for name in names:
                assert hasattr(preflab.envs, name), f"{module}.{name}"
    assert set(preflab.envs.__all__) <= set(dir(preflab.envs))
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        preflab.envs.Nothing  # noqa: B018


# ---- HideReward ----------------------------------------------------------------------------------


@pytest.fixture
def hidden():
    """The world beneath carries statistics of returns in its info, which must not pass."""
    inner = gymnasium.wrappers.RecordEpisodeStatistics(gymnasium.make("preflab/RandomLinearMDP-v0"))
    return HideReward(inner), inner.unwrapped.model


def test_hidden_and_open_worlds_move_alike():
    name = "preflab/TokenMDP-v0"
    open_world, closed = gymnasium.make(name), HideReward(gymnasium.make(name))
    a, b = open_world.reset(seed=3), closed.reset(seed=3)
    assert a[0].tolist() == b[0].tolist()
    rewards = 0.0
    for _ in range(open_world.unwrapped.model.horizon):
        mask = a[-1]["action_mask"]
        action = int(np.flatnonzero(mask)[0])
        a, b = open_world.step(action), closed.step(action)
        assert a[0].tolist() == b[0].tolist()
        assert b[1] == 0.0
        assert a[2:4] == b[2:4]
        assert b[4].keys() == {"step", "action_mask"}
        rewards += a[1]
    assert rewards > 0


def test_info_carries_no_statistics(hidden):
    env, _ = hidden
    env.reset(seed=0)
    for _ in range(6):
        _, reward, over, _, info = env.step(0)
        assert (reward, set(info)) == (0.0, {"step"})
    assert over
    assert HideReward(env, keep=()).reset()[1] == {}


def test_no_attribute_leads_to_the_reward(hidden):
    env, model = hidden
    assert env.unwrapped is env
    for name in ("env", "reward", "theta", "return_queue"):
        assert not env.has_wrapper_attr(name)
        with pytest.raises(AttributeError):
            env.get_wrapper_attr(name)
    assert gymnasium.wrappers.TimeLimit(env, 3).unwrapped is env
    seen, queue = set(), [env]
    while queue:  # everything that can be reached by attributes, items and bound methods
        x = queue.pop()
        if id(x) in seen:
            continue
        seen.add(id(x))
        assert x is not model
        if isinstance(x, np.ndarray):
            assert not any(np.shares_memory(x, y) for y in (*model.reward, model.theta))
        elif isinstance(x, dict):
            queue += x.values()
        elif isinstance(x, (list, tuple)):
            queue += x
        else:
            queue += vars(x).values() if hasattr(x, "__dict__") and not isinstance(x, type) else []
            queue += [x.__self__] if hasattr(x, "__self__") else []
    assert len(seen) > 10


def test_the_visible_model(hidden):
    env, model = hidden
    view = env.model
    assert isinstance(view, RewardFreeMDP)
    assert isinstance(view, FiniteMDP)
    assert view.kernel is model.kernel
    assert view.features is model.features
    for name in ("reward", "theta", "returns"):
        assert not hasattr(view, name)
        with pytest.raises(AttributeError, match=f"{name} is hidden from the learner"):
            getattr(view, name)
    with pytest.raises(TypeError, match="not to be edited"):
        view.replace(name="x")
    sparse = view.to_sparse()
    assert isinstance(sparse, RewardFreeMDP)
    np.testing.assert_allclose(sparse.kernel.dense(0), model.kernel.dense(0))
    assert "sizes=(20, 20" in repr(view)
    guess = view.plain(reward=np.ones((6, 20, 4)))
    assert type(guess) is FiniteMDP
    assert (guess.reward[0][0, 0], guess.kernel) == (1.0, model.kernel)
    policy = [np.zeros(n, int) for n in model.sizes[:-1]]
    a, b = (m.rollout(policy, 5, np.random.default_rng(0)) for m in (view, model))
    np.testing.assert_array_equal(a.states, b.states)


def test_the_spec_remakes_a_hidden_world(hidden):
    env, _ = hidden
    again = env.spec.make()
    assert isinstance(again, HideReward)
    again.reset(seed=0)
    assert again.step(0)[1] == 0.0


def test_a_spec_that_holds_a_model_is_dropped():
    gymnasium.register("Held-v0", lambda model: FiniteMDPEnv(model), kwargs={"model": deep_sea(2)})
    try:
        assert HideReward(gymnasium.make("Held-v0")).spec is None
    finally:
        del gymnasium.registry["Held-v0"]


def test_worlds_without_a_model_or_a_spec():
    lake = HideReward(gymnasium.make("FrozenLake-v1"), keep=("prob",))
    assert lake.model is None
    assert lake.reset(seed=0)[1] == {"prob": 1}
    bare = HideReward(FiniteMDPEnv(deep_sea(2), render_mode="ansi"))
    assert bare.spec is None
    assert isinstance(bare.np_random, np.random.Generator)  # also before the first reset
    bare.reset(seed=1)
    assert bare.np_random_seed == 1
    assert bare.render() == "step 0/2: state 0"
    bare.close()


def test_features_stay_where_the_reward_goes():
    phi = FeatureMap(np.ones((2, 2, 2, 3)))
    view = RewardFreeMDP.of(deep_sea(2).replace(features=phi))
    assert view.features is phi
