"""Token MDPs: the tree, its leaves and texts, against enumeration by plain recursion."""

import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from preflab.envs.features import FeatureMap
from preflab.envs.kernels import DenseKernel, TreeKernel
from preflab.envs.token_mdp import ENDED, TokenMDP, default_vocabulary, prompt_law, random_token_mdp

worlds = st.builds(
    random_token_mdp,
    vocabulary=st.integers(1, 4),
    horizon=st.integers(1, 4),
    prompts=st.integers(1, 3),
    seed=st.integers(0, 2**31),
    d=st.integers(1, 5),
)


def by_recursion(world):
    """{(prompt, tokens): (probability, reward, features)} of every response, by walking the tree."""
    found = {}

    def walk(h, s, prompt, tokens, p, r, x):
        for a in range(world.n_actions):
            now = (
                p * world.reference[h][s, a],
                r + world.reward[h][s, a],
                x + world.features.phi[h][s, a],
            )
            written = tokens if a == world.branching else (*tokens, a)
            if a == world.branching or h == world.horizon - 1:
                assert (prompt, written, a) not in found
                found[prompt, written, a] = now
            else:
                walk(h + 1, 1 + (s - 1) * world.branching + a, prompt, written, *now)

    for prompt in range(world.roots):
        walk(0, 1 + prompt, prompt, (), 1.0, 0.0, np.zeros(world.features.d))
    return found


@settings(deadline=None, max_examples=40)
@given(worlds)
def test_leaves_agree_with_recursion(world):
    truth = by_recursion(world)
    trajectories = world.trajectories(np.arange(world.n_leaves))
    assert len(truth) == world.n_leaves
    probabilities, rewards = world.leaf_probabilities(), world.leaf_rewards
    features, prompts = world.leaf_features, world.leaf_prompts
    for i, (s, a) in enumerate(zip(trajectories.states, trajectories.actions, strict=True)):
        written = tuple(int(x) for h, x in enumerate(a) if s[h] > 0 and x < world.branching)
        ends = int(a[(s > 0).sum() - 1])
        p, r, x = truth[int(prompts[i]), written, ends]
        assert probabilities[i] == pytest.approx(p, rel=1e-12)
        assert rewards[i] == pytest.approx(r, abs=1e-12)
        np.testing.assert_allclose(features[i], x, atol=1e-12)


@settings(deadline=None, max_examples=40)
@given(worlds)
def test_identities(world):
    ids = np.arange(world.n_leaves)
    trajectories = world.trajectories(ids)
    assert np.array_equal(world.leaves(trajectories), ids)
    assert np.array_equal(world.leaf(*world.locate(ids)), ids)
    totals = np.bincount(world.leaf_prompts, world.leaf_probabilities())
    np.testing.assert_allclose(totals, 1.0, rtol=1e-12)
    np.testing.assert_allclose(world.returns(trajectories), world.leaf_rewards, atol=1e-12)
    np.testing.assert_allclose(world.leaf_features @ world.theta, world.leaf_rewards, atol=1e-12)
    np.testing.assert_allclose(world.features.of(trajectories), world.leaf_features, atol=1e-12)
    assert world.features.max_norm <= 1.0 + 1e-12
    np.testing.assert_allclose(world.leaf_features.sum(1), 1.0, rtol=1e-12)  # no length is favoured
    assert world.leaf_rewards.min() >= 0.0
    assert world.leaf_rewards.max() <= 1.0


@settings(deadline=None, max_examples=20)
@given(worlds, st.integers(0, 2**31))
def test_the_tree_is_the_dense_and_the_sparse_model(world, seed):
    rng = np.random.default_rng(seed)
    for other in (world.to_dense(), world.to_sparse()):
        for h in range(world.horizon):
            v, mu = rng.normal(size=world.sizes[h + 1]), rng.random((world.sizes[h], world.n_actions))
            np.testing.assert_allclose(other.kernel.expect(h, v), world.kernel.expect(h, v), atol=1e-12)
            np.testing.assert_allclose(other.kernel.push(h, mu), world.kernel.push(h, mu), atol=1e-12)


@settings(deadline=None, max_examples=20)
@given(worlds, st.integers(0, 2**31))
def test_rollouts_and_texts(world, seed):
    trajectories = world.rollout(world.reference, 50, np.random.default_rng(seed))
    ids = world.leaves(trajectories)
    again = world.trajectories(ids)  # the reference takes EOS after the end, as `trajectories` does
    assert np.array_equal(again.states, trajectories.states)
    assert np.array_equal(again.actions, trajectories.actions)
    for s, a, text in zip(trajectories.states, trajectories.actions, world.text(trajectories), strict=True):
        last = int((s > 0).sum()) - 1
        assert world.decode(last, int(s[last])) + world.action_text(last, int(s[last]), int(a[last])) == text


def test_planning_numbers_leaves_alike():
    from preflab.algorithms import planning

    world = random_token_mdp(vocabulary=3, horizon=3, prompts=2, seed=8)
    law = planning.sequence_law(world, world.reference)
    np.testing.assert_allclose(law.ravel(), world.leaf_probabilities(), rtol=1e-12)
    np.testing.assert_allclose(planning.leaf_returns(world).ravel(), world.leaf_rewards, atol=1e-12)


def test_smallest_example_of_the_papers():
    world = random_token_mdp(vocabulary=3, horizon=4)
    texts = world.text(world.trajectories(np.arange(world.n_leaves)))
    assert sum(len(t) == 4 for t in texts) == 81
    assert len(texts) == 1 + 3 + 9 + 27 * 4
    assert texts[:5] == ["", "a", "b", "c", "aa"]
    assert texts[-1] == "cccc"
    assert len(set(texts)) == len(texts)
    assert np.array_equal(world.action_mask[1][:2], [[False, False, False, True], [True] * 4])


def test_monte_carlo_agrees_with_the_leaves():
    world = random_token_mdp(vocabulary=2, horizon=3, prompts=2, seed=3)
    n = 200_000
    ids = world.leaves(world.rollout(world.reference, n, np.random.default_rng(5)))
    expected = world.leaf_probabilities() / 2
    seen = np.bincount(ids, minlength=world.n_leaves) / n
    assert np.abs(seen - expected).max() < 5 * math.sqrt(0.25 / n)


def test_response_reward_as_array_and_as_function():
    k, horizon = 3, 4

    def length_and_first(prompts, tokens):
        return (tokens >= 0).sum(1) + 10.0 * (tokens[:, 0] == 1) + 100.0 * prompts

    options = {"horizon": horizon, "vocabulary": ["x", "y", "z"], "prompts": ["A:", "B:"]}
    world = TokenMDP.from_response_reward(length_and_first, chunk=7, **options)
    texts = world.text(world.trajectories(np.arange(world.n_leaves)))
    wanted = [len(t) - 2 + 10.0 * (t[2:3] == "y") + 100.0 * (t[0] == "B") for t in texts]
    assert np.array_equal(world.leaf_rewards, wanted)
    assert all(not world.reward[h][:, :k].any() for h in range(horizon - 1))  # paid with the last action
    same = TokenMDP.from_response_reward(np.array(wanted), **options)
    assert all(np.array_equal(a, b) for a, b in zip(world.reward, same.reward, strict=True))
    assert np.array_equal(world.with_response_reward(-same.leaf_rewards).leaf_rewards, -same.leaf_rewards)
    np.testing.assert_allclose(world.reference[1][1:], 1 / (k + 1))


def test_gold_reward():
    world = random_token_mdp(seed=1)
    gold = np.random.default_rng(0).random(world.n_leaves)
    golden = world.replace(gold=gold).with_gold_reward()
    assert np.array_equal(golden.leaf_rewards, gold)
    assert golden.theta is None
    assert golden.features is world.features
    with pytest.raises(ValueError, match="has no gold reward"):
        world.with_gold_reward()


def test_per_prefix_tokens():
    table = ("no", "yes", "!", "?", "...")
    tokens = [np.array([[0, 1]]), np.array([[2, 3], [4, 2]])]
    world = TokenMDP.from_response_reward(
        np.zeros(1 + 2 * 3), horizon=2, tokens=tokens, vocabulary=table, prompts=["So: "]
    )
    texts = world.text(world.trajectories(np.arange(world.n_leaves)))
    assert texts == ["So: " + t for t in ("", "no", "yes", "no!", "no?", "yes...", "yes!")]
    assert world.decode(1, 2) == "So: yes"
    assert world.decode(0, 0) == ENDED
    assert world.decode(2, 0) == ENDED
    assert world.action_text(1, 0, 0) == ""


def test_responses_come_in_chunks():
    world = random_token_mdp(seed=2, prompts=2)
    parts = list(world.responses(chunk=17))
    assert max(len(ids) for ids, _ in parts) == 17
    assert np.array_equal(np.concatenate([ids for ids, _ in parts]), np.arange(world.n_leaves))
    rewards = np.concatenate([world.returns(t) for _, t in parts])
    np.testing.assert_allclose(rewards, world.leaf_rewards, atol=1e-12)


def test_another_policy_over_leaves():
    world = random_token_mdp(seed=4)
    stops = [np.tile(np.eye(4)[-1], (n, 1)) for n in world.sizes[:-1]]
    probabilities = world.leaf_probabilities(stops)
    assert probabilities[0] == 1.0
    assert not probabilities[1:].any()


def test_ten_million_leaves_need_no_table():
    """The last layers of reward and reference are all that is large: 16 bytes an action, a little for checks."""
    k, horizon = 10, 6  # a tenth of the size in the benchmark; the cost per leaf is the same
    tracemalloc.start()
    world = TokenMDP.from_response_reward(lambda x, y: (y >= 0).mean(1), horizon=horizon, vocabulary=k)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert world.n_leaves > 10**6
    assert peak < 60 * world.n_leaves
    assert world.leaf_rewards.max() == 1.0


def test_default_vocabulary():
    assert default_vocabulary(3) == ("a", "b", "c")
    assert default_vocabulary(30)[29] == "[29]"


def options(**changes):
    world = random_token_mdp(vocabulary=2, horizon=2)
    fields = {"kernel": world.kernel, "reward": world.reward, "initial": world.initial}
    return fields | changes


def edited(layers, h, index, value):
    layers = [np.array(x, dtype=type(value) if isinstance(value, int) else float) for x in layers]
    layers[h][index] = value
    return layers


TOKENS = [np.array([[0, 1]]), np.array([[0, 1], [1, 2]])]
REFERENCE = random_token_mdp(vocabulary=2, horizon=2).reference


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"kernel": DenseKernel([np.ones((1, 3, 1))]), "reward": [np.zeros((1, 3))], "initial": [1.0]},
            TypeError,
            "lives on a TreeKernel",
        ),
        ({"initial": np.array([0.5, 0.5])}, ValueError, r"initial\[0\] is 0.5"),
        ({"vocabulary": ("a",)}, ValueError, "vocabulary has 1 strings but each prefix has 2 tokens"),
        ({"prompts": ("a", "b")}, ValueError, "2 prompts but the tree has 1 roots"),
        ({"tokens": TOKENS[:1], "vocabulary": "abc"}, ValueError, "tokens has 1 layers"),
        ({"tokens": [TOKENS[0], TOKENS[0]], "vocabulary": "abc"}, ValueError, r"tokens\[h=1\] has shape"),
        ({"tokens": [t * 1.0 for t in TOKENS], "vocabulary": "abc"}, TypeError, "expected integers"),
        (
            {"tokens": edited(TOKENS, 1, (1, 0), 3), "vocabulary": "abc"},
            ValueError,
            r"tokens\[h=1, prefix=1, a=0\] is 3, outside the table of 3 strings",
        ),
        ({"reward": [np.ones((2, 3)), np.ones((3, 3))]}, ValueError, r"reward\[h=0, s=0\] is not 0"),
        (
            {"features": FeatureMap([np.ones((2, 3, 1)), np.ones((3, 3, 1))])},
            ValueError,
            r"phi\[h=0, s=0\] is not 0",
        ),
        ({"reference": REFERENCE[:1]}, ValueError, "reference has 1 layers"),
        ({"reference": [REFERENCE[0], REFERENCE[0]]}, ValueError, r"reference\[h=1\] has shape"),
        (
            {"reference": edited(REFERENCE, 1, (2, 0), 0.9)},
            ValueError,
            r"reference\[h=1\]\[2\] is not a prob",
        ),
        (
            {"reference": edited(REFERENCE, 1, 0, np.full(3, 1 / 3))},
            ValueError,
            r"must take EOS \(action 2\)",
        ),
        ({"gold": np.zeros(3)}, ValueError, "gold has shape"),
        ({"gold": np.array([np.nan] + 6 * [0.0])}, ValueError, r"gold\[leaf=0\] is nan"),
    ],
)
def test_bad_input(changes, error, message):
    with pytest.raises(error, match=message):
        TokenMDP(**options(**changes))


def test_bad_leaves():
    world = random_token_mdp()
    with pytest.raises(ValueError, match=r"leaf ids lie in 0\.\.120"):
        world.trajectories(121)
    with pytest.raises(ValueError, match="state 0 is 'ended'"):
        world.leaf(1, 0, 3)
    with pytest.raises(ValueError, match="only EOS"):
        world.leaf(1, 1, 0)
    with pytest.raises(ValueError, match="no state 9 in layer 0"):
        world.decode(0, 9)
    with pytest.raises(ValueError, match="chunk is 0"):
        next(world.responses(0))
    with pytest.raises(ValueError, match="d is 0"):
        random_token_mdp(d=0)
    with pytest.raises(ValueError, match="mode 'sum'"):
        _ = world.replace(features=None, theta=None).leaf_features
    with pytest.raises(ValueError, match="branching is 0"):
        TokenMDP.from_response_reward(np.zeros(1), horizon=2)
    with pytest.raises(ValueError, match="branching is 0"):
        TreeKernel(1, 0, 2)


def test_prompt_law_reaches_the_model():
    world = TokenMDP.from_response_reward(
        lambda x, y: 1.0 * x, horizon=2, vocabulary=2, prompts=["A", "B"], initial=np.array([0.25, 0.75])
    )
    assert np.array_equal(world.initial, prompt_law(2, np.array([0.25, 0.75])))
    trajectories = world.rollout(world.reference, 40_000, np.random.default_rng(0))
    assert world.returns(trajectories).mean() == pytest.approx(0.75, abs=0.02)
