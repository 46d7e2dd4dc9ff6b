"""The judges of the language world: the shipped scores made again, the majority by hand, where it runs in circles."""

from __future__ import annotations

import importlib.util
import json
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from preflab.algorithms.planning import exploitability, nash
from preflab.envs import PreferenceGame, judge_scores, load_language_world, random_token_mdp
from preflab.envs.judges import (
    JUDGES,
    SCORED,
    judged_annotator,
    judged_game,
    load_scores,
    majority,
    provenance,
)
from preflab.envs.tournaments import beats, condorcet_winner, cycles, is_preorder, smith_set


@pytest.fixture(scope="module")
def world():
    return load_language_world()


@pytest.fixture(scope="module")
def texts(world):
    return world.text(world.trajectories(np.arange(world.n_leaves)))


# ---- the shipped scores ---------------------------------------------------------------------------------------------


def test_the_scores_are_of_these_texts(world, texts):
    scores, about = load_scores(), provenance()
    assert tuple(scores) == SCORED == tuple(about["judges"])
    assert about["texts_sha256"] == judge_scores.fingerprint(texts)
    assert set(about["versions"]) == {"preflab", "wordfreq", "pyphen"}
    assert all(s.shape == (world.n_leaves,) and np.isfinite(s).all() for s in scores.values())
    assert 0 <= scores["real words"].min() <= scores["real words"].max() == 1
    np.testing.assert_array_equal(scores["length"], [len(text) for text in texts])


def test_the_packages_give_the_scores_again(texts):
    pytest.importorskip("wordfreq")
    pytest.importorskip("pyphen")
    found, shipped = judge_scores.score(texts[::5]), load_scores()
    for name in SCORED:
        np.testing.assert_array_equal(found[name], shipped[name][::5], err_msg=name)


def test_the_judges_by_hand():
    pytest.importorskip("wordfreq")
    pytest.importorskip("pyphen")
    real, ease, length = (make() for make in judge_scores.JUDGES.values())
    assert judge_scores.words("It's a well-known, ’80s hit; isn’t it?") == [
        "it's", "a", "well", "known", "s", "hit", "isn't", "it",
    ]  # fmt: skip
    assert real("The food was unfor") == 3 / 4
    assert real("The concert was abuccarnatory but good") == 5 / 6
    assert real("...") == ease("!") == 0.0
    assert ease("The food was good.") == pytest.approx(206.835 - 1.015 * 4 - 84.6)
    # two sentences of three words; "is good" has two and counts for none
    assert ease("The food was. It was nice. Is good") == pytest.approx(206.835 - 1.015 * 8 / 2 - 84.6)
    assert ease("It is excellent") == pytest.approx(206.835 - 1.015 * 3 - 84.6 * 5 / 3)
    assert length("abc d") == 5


def test_a_judge_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="wordfreq is not installed: pip install wordfreq"):
        judge_scores.real_words()
    with pytest.raises(ImportError, match="pyphen is not installed"):
        judge_scores.readability()


def test_the_command_rebuilds_the_file(tmp_path, capsys):
    pytest.importorskip("wordfreq")
    pytest.importorskip("pyphen")
    target = tmp_path / "judges.npz"
    assert judge_scores.main(["--out", str(target), "--check"]) == 0
    assert "length: 0 of 10920 texts differ" in capsys.readouterr().out
    again, shipped = load_scores(target), load_scores()
    for name in SCORED:
        np.testing.assert_array_equal(again[name], shipped[name])
    with pytest.raises(SystemExit):
        judge_scores.main([])
    assert "nothing to do" in capsys.readouterr().err
    assert judge_scores.main(["--out", str(target)]) == 0


def test_a_file_that_is_not_one_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"judge_scores --out FILE"):
        load_scores(tmp_path / "none.npz")
    damaged = tmp_path / "damaged.npz"
    damaged.write_bytes(b"PK nothing")
    with pytest.raises(ValueError, match=r"damaged\.npz is damaged"):
        load_scores(damaged)
    for fields, message in (
        ({"format": 9, "scores": np.zeros((2, 3))}, "format 9, newer than 1"),
        ({"format": 1, "scores": np.zeros((2, 4))}, r"scores of shape \(2, 4\); expected \(leaves, 3\)"),
        ({"format": 1}, "is damaged or has no judges' scores"),
    ):
        np.savez(damaged, **fields)
        with pytest.raises(ValueError, match=message):
            provenance(damaged)


# ---- the majority ---------------------------------------------------------------------------------------------------


@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 10**6))
def test_the_majority_by_hand(n, judges, seed):
    scores = np.random.default_rng(seed).integers(0, 3, (n, judges))
    share, strict = majority(scores), majority(scores, strict=True)
    for i in range(n):
        for j in range(n):
            ayes = sum(
                1.0 if a > b else 0.5 if a == b else 0.0 for a, b in zip(scores[i], scores[j], strict=True)
            )
            assert share[i, j] == pytest.approx(ayes / judges, abs=1e-15)
            assert strict[i, j] == (1.0 if 2 * ayes > judges else 0.5 if 2 * ayes == judges else 0.0)
    if judges == 1:
        assert is_preorder(PreferenceGame(share))


def test_a_judged_game(world, texts):
    scores = {"sentiment": world.gold} | load_scores()
    made = judged_game("The concert was")
    assert made.judges == JUDGES
    np.testing.assert_array_equal(
        made.leaves, np.flatnonzero(world.leaf_prompts == 4)
    )  # the reference can write all
    np.testing.assert_allclose(made.game.reference, world.leaf_probabilities()[made.leaves], rtol=1e-12)
    assert list(made.texts) == [texts[i] for i in made.leaves]
    for i, j in np.random.default_rng(0).integers(len(made.leaves), size=(200, 2)):
        a, b = (np.array([round(scores[name][made.leaves[k]], 6) for name in JUDGES]) for k in (i, j))
        assert made.game.P[i, j] == pytest.approx(((a > b) + (a == b) / 2).mean(), abs=1e-15)
    assert made.game.name == "Judges('The concert was', sentiment, real words, readability, length)"
    strict = judged_game(4, strict=True)
    np.testing.assert_array_equal(strict.game.P, 0.5 + np.sign(np.round(made.game.P - 0.5, 9)) / 2)
    one = judged_game(4, ["length"])
    np.testing.assert_array_equal(beats(one.game), one.scores[:, 0][:, None] > one.scores[:, 0])


@pytest.mark.parametrize("prompt", [3, 7])
def test_merged_answers_are_the_same_game(prompt):
    full, merged = judged_game(prompt), judged_game(prompt, merge=True)
    assert len(merged.game) == len(np.unique(full.scores, axis=0)) < len(full.game)
    assert cycles(merged.game).share == pytest.approx(cycles(full.game).share, rel=1e-10)
    position = {leaf: i for i, leaf in enumerate(full.leaves)}
    kept = [position[leaf] for leaf in merged.leaves]
    np.testing.assert_array_equal(full.game.P[np.ix_(kept, kept)], merged.game.P)
    for i in np.random.default_rng(0).integers(len(kept), size=20):
        twins = (full.scores == merged.scores[i]).all(axis=1)
        assert merged.game.reference[i] == pytest.approx(full.game.reference[twins].sum(), rel=1e-9)
        assert full.game.reference[kept[i]] == full.game.reference[twins].max()


def test_where_the_majority_runs_in_circles():
    """By brute force on the 40 likeliest answers to each prompt, and the circle that is likeliest of all."""
    shares = []
    for prompt in range(8):
        made = judged_game(prompt, merge=True)
        top = np.argsort(-made.game.reference)[:40]
        P, mu = made.game.P[np.ix_(top, top)], made.game.reference[top]
        D = P > 0.5
        circles = [
            mu[[i, j, k]].prod()
            for i, j, k in combinations(range(40), 3)
            if (D[i, j] and D[j, k] and D[k, i]) or (D[j, i] and D[k, j] and D[i, k])
        ]
        part = PreferenceGame(P, mu / mu.sum())
        assert cycles(part).count == len(circles)
        assert cycles(part).share == pytest.approx(6 * sum(circles) / mu.sum() ** 3, rel=1e-10)
        found = cycles(made.game)
        likely = made.game.reference[list(found.likely)].prod()
        assert likely >= max(circles) - 1e-18
        a, b, c = found.likely
        assert min(made.game.P[a, b], made.game.P[b, c], made.game.P[c, a]) > 0.5
        assert condorcet_winner(made.game) is None
        shares.append(found.share)
    assert 0.005 < min(shares) < 0.01 < max(shares) < 0.04


def test_what_the_circles_do_at_the_top():
    """On five of the eight prompts every answer is beaten, and the equilibrium has to mix; on the others some answer is
    beaten by none, though it beats not all: the circles there lie below it."""
    mixes = []
    for prompt in range(8):
        game = judged_game(prompt, merge=True, strict=True).game
        solution = nash(game)
        assert solution.exploitability <= 1e-9
        undefeated = np.flatnonzero(~beats(game).any(axis=0))
        assert set(undefeated) <= set(smith_set(game))
        if not len(undefeated):
            mixes.append(prompt)
            assert (solution.policy > 1e-6).sum() >= 3
            assert exploitability(game, np.eye(len(game))[np.argmax(solution.policy)]) == 0.5
    assert mixes == [0, 3, 4, 5, 6]


@pytest.mark.parametrize("strict", [False, True])
def test_the_annotator_answers_as_the_game(world, strict):
    made, annotator = judged_game(2, strict=strict), judged_annotator(0, strict=strict, budget=300)
    i, j = np.random.default_rng(0).integers(len(made.leaves), size=(2, 300))
    first, second = (world.trajectories(made.leaves[k]) for k in (i, j))
    P = annotator.probability(first, second)
    np.testing.assert_array_equal(P, made.game.P[i, j])
    answers = annotator.compare(first, second)
    assert set(answers[P == 1]) <= {1}
    assert set(answers[P == 0]) <= {0}
    with pytest.raises(
        ValueError, match="pair 0 compares answers to two prompts, 'The trip was' and 'The food was'"
    ):
        annotator.probability(first, world.trajectories(judged_game(0).leaves[j]))


def test_answers_that_the_reference_cannot_write_are_left_out():
    tree = random_token_mdp(vocabulary=2, horizon=2, prompts=2)
    reference = [layer.copy() for layer in tree.reference]
    reference[0][1] = [0.0, 0.5, 0.5]  # the first prompt's answers never begin with token 0
    tree = tree.replace(reference=reference)
    scores = {"a": np.arange(tree.n_leaves, dtype=float)}
    made = judged_game(0, ["a"], world=tree, scores=scores)
    assert (tree.leaf_probabilities()[made.leaves] > 0).all()
    assert len(made.leaves) == len(made.game) < tree.n_leaves / 2
    assert made.game.reference.sum() == pytest.approx(1)


def test_bad_input_is_refused():
    with pytest.raises(
        ValueError, match=r"prompt 'The fod was' is not one of .*; did you mean 'The food was'\?"
    ):
        judged_game("The fod was")
    with pytest.raises(ValueError, match="prompt is 8; the world's are numbered from 0 to 7"):
        judged_game(8)
    with pytest.raises(ValueError, match=r"judge 'lenght' is not one of .*; did you mean 'length'\?"):
        judged_game(0, ["lenght"])
    for judges in ([], ["length", "length"]):
        with pytest.raises(ValueError, match="at least one is needed, and each at most once"):
            judged_game(0, judges)
    with pytest.raises(ValueError, match="judge 'length' has 3 scores for 10920 leaves"):
        judged_game(0, ["length"], scores={"length": np.zeros(3)})
    for scores in (np.zeros(3), np.zeros((0, 2)), np.array([[np.nan]])):
        with pytest.raises(ValueError, match=r"expected finite numbers \(n, judges\)"):
            majority(scores)


def test_the_file_is_readable_json():
    assert json.dumps(provenance())
