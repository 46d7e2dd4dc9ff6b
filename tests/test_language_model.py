"""The parts of the distillation that need no network: projection, features, and what is asked of a tokenizer."""

from __future__ import annotations

import numpy as np
import pytest
from preflab.envs import language_model as lm
from preflab.envs.token_mdp import random_token_mdp
from scipy.stats import kendalltau


class Letters:
    """A tokenizer of single letters, with a special token and half a character."""

    strings = ("a", "b", " ", "\ufffd", "<end>")
    all_special_ids = (4,)

    def __len__(self):
        return len(self.strings)

    def decode(self, ids, clean_up_tokenization_spaces):
        return "".join(self.strings[i] for i in ids)

    def batch_decode(self, rows, clean_up_tokenization_spaces):
        return [self.decode(row, clean_up_tokenization_spaces) for row in rows]

    def apply_chat_template(self, chat, tokenize, add_generation_prompt):
        return "".join(f"[{turn['role']}]{turn['content']}" for turn in chat) + "[assistant]"

    def __call__(self, text, add_special_tokens):
        return {"input_ids": [ord(c) for c in text]}


MODEL = lm.LanguageModel(model=None, tokenizer=Letters(), end_ids=(4,))


def data(seed, noise):
    rng = np.random.default_rng(seed)
    prompts = np.repeat(np.arange(3), 40)
    features = rng.standard_normal((120, 4))
    theta, intercepts = rng.standard_normal(4), rng.standard_normal(3)
    gold = features @ theta + intercepts[prompts] + noise * rng.standard_normal(120)
    return gold, features, prompts, rng.random(120), theta, intercepts


def test_projection_recovers_a_linear_reward_and_says_that_nothing_is_left():
    gold, features, prompts, law, theta, intercepts = data(0, 0.0)
    fit = lm.project(gold, features, prompts, law)
    np.testing.assert_allclose(fit.theta, theta, atol=1e-12)
    np.testing.assert_allclose(fit.intercepts, intercepts, atol=1e-12)
    assert fit.r2_uniform == pytest.approx(1)
    assert fit.r2_reference == pytest.approx(1)
    assert fit.largest < 1e-12
    assert fit.agreement == pytest.approx(1)
    assert fit.regret == 0


def test_projection_is_least_squares_with_an_intercept_for_each_prompt():
    gold, features, prompts, law, *_ = data(1, 0.7)
    fit = lm.project(gold, features, prompts, law)
    design = np.column_stack([features, prompts[:, None] == np.arange(3)]).astype(float)
    coefficients = np.linalg.lstsq(design, gold, rcond=None)[0]
    np.testing.assert_allclose(np.concatenate([fit.theta, fit.intercepts]), coefficients, atol=1e-10)
    left = gold - design @ coefficients
    means = np.array([gold[prompts == x].mean() for x in range(3)])
    assert fit.r2_uniform == pytest.approx(1 - (left @ left) / ((gold - means[prompts]) ** 2).sum())
    assert fit.largest == pytest.approx(np.abs(left).max())
    assert fit.mean == pytest.approx(np.abs(left).mean())
    linear = features @ fit.theta
    groups = [np.flatnonzero(prompts == x) for x in range(3)]
    assert fit.agreement == pytest.approx(np.mean([kendalltau(gold[g], linear[g])[0] for g in groups]))
    assert fit.regret == pytest.approx(np.mean([gold[g].max() - gold[g][linear[g].argmax()] for g in groups]))
    assert 0 < fit.r2_reference < 1
    said = fit.report()
    assert said["intercepts"] == list(fit.intercepts)
    assert said["r2_uniform"] == fit.r2_uniform


def test_features_of_tokens_add_up_to_those_of_the_text():
    tree = random_token_mdp(vocabulary=3, horizon=4, prompts=2, seed=3)

    def count(text):
        return np.array([text.count("a"), len(text) ** 2, 0.0])

    phi = lm.feature_layers(tree, count)
    assert [p.shape for p in phi] == [(n, 4, 3) for n in tree.sizes[:-1]]
    leaves = tree.trajectories(np.arange(tree.n_leaves))
    s, a = leaves.states, leaves.actions
    total = sum(phi[h][s[:, h], a[:, h]] * (s[:, h] > 0)[:, None] for h in range(4))
    for text, start, got, ends in zip(tree.text(leaves), s[:, 0], total, (a == 3) & (s > 0), strict=True):
        expected = count(text) - count(tree.prompts[start - 1])
        expected[-1] = ends.any()  # the last feature is "ends here"
        np.testing.assert_allclose(got, expected)


def test_the_chat_template_comes_before_the_opening():
    ids = lm.context(MODEL, lm.Question("Good?", "It is"))
    assert "".join(map(chr, ids)) == "[user]Good?[assistant]It is"


def test_special_tokens_blanks_and_parts_of_characters_are_not_used():
    strings = lm.pieces(MODEL)
    assert tuple(strings) == Letters.strings
    assert lm.unusable(MODEL, strings) == [2, 3, 4]


def test_the_probability_kept_is_an_average_over_what_the_reference_writes():
    tree = random_token_mdp(vocabulary=2, horizon=3, prompts=2, seed=5)
    sizes = [n - 1 for n in tree.sizes[:-1]]
    even = lm.Enumeration((), (), tuple(np.full(n, 0.6) for n in sizes), ())
    assert lm._mean_kept(tree, even) == pytest.approx(0.6)
    kept = tuple(np.random.default_rng(0).random(n) for n in sizes)
    paths = tree.rollout(tree.reference, 40_000, np.random.default_rng(1))
    seen = [kept[h][paths.states[paths.states[:, h] > 0, h] - 1] for h in range(3)]
    sampled = np.concatenate(seen)
    assert lm._mean_kept(tree, lm.Enumeration((), (), kept, ())) == pytest.approx(
        sampled.mean(), abs=6 * sampled.std() / np.sqrt(len(sampled))
    )
