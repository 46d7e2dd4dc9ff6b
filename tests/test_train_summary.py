"""Exact numbers of a judge on a lattice: against enumeration by another route, and identities of the optimum."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from preflab.algorithms.planning import evaluate, sequence_gibbs
from preflab.envs.language_world import load_language_world, save_language_world
from preflab.llm_bridge.lattice import LatticePolicy, lattice
from preflab.llm_bridge.policy import TransformerPolicy
from preflab.llm_bridge.tiny import tiny_model
from preflab.llm_bridge.training import summary
from preflab.llm_bridge.training.judges import PreferenceJudge, RewardJudge

PROMPTS = [[1, 2], [3], [4, 4, 5]]


def reward(prompts, completions):
    """Something that depends on prompt, tokens, order and end."""
    return [
        np.sin(3.0 * sum(x) + sum((i + 1) * t for i, t in enumerate(y))) + 0.1 * len(y)
        for x, y in zip(prompts, completions, strict=True)
    ]


JUDGE = RewardJudge("sines", reward, scale=0.5)


def tiny(seed=0, vocabulary=6):
    return TransformerPolicy(tiny_model(vocabulary, seed=seed), end_ids=[0], pad_id=0, vocabulary=vocabulary)


@pytest.fixture(scope="module")
def narrow():
    """Two of five tokens a step."""
    return lattice(tiny(), PROMPTS, 2, 3)


@pytest.fixture(scope="module")
def judged(narrow):
    return summary.judge_lattice(narrow, JUDGE, "kl_policy_gradient", {"beta": 0.3})


def test_on_the_whole_vocabulary_the_numbers_are_those_of_scored_completions():
    whole = lattice(tiny(), PROMPTS, 5, 3)
    trained = tiny(seed=7)
    found = summary.policy_numbers(summary.judge_lattice(whole, JUDGE), LatticePolicy(trained, whole))
    prompts, completions = whole.completions()
    log_pi, log_mu = (p.log_probabilities(prompts, completions).detach().numpy() for p in (trained, tiny()))
    pi, r = np.exp(log_pi), np.array(reward(prompts, completions))
    assert found["covered"] == pytest.approx(1, abs=1e-12)
    assert found["value"] == pytest.approx(pi @ r / 3, abs=1e-12)
    assert found["kl"] == pytest.approx(pi @ (log_pi - log_mu) / 3, abs=1e-12)
    assert found["entropy"] == pytest.approx(-pi @ log_pi / 3, abs=1e-12)
    laws, mus, rs = (x.reshape(3, -1) for x in (pi, np.exp(log_mu), r))
    wins = [
        p @ (1 / (1 + np.exp(-(q[:, None] - q) / 0.5))) @ m for p, m, q in zip(laws, mus, rs, strict=True)
    ]
    assert found["win_rate"] == pytest.approx(np.mean(wins), abs=1e-12)


def test_covered_is_the_models_own_mass_of_the_lattice(narrow, judged):
    prompts, completions = narrow.completions()
    for policy, found in (
        (tiny(), summary.policy_numbers(judged)),
        (tiny(seed=7), summary.policy_numbers(judged, LatticePolicy(tiny(seed=7), narrow))),
    ):
        mass = policy.log_probabilities(prompts, completions).exp().detach().numpy().reshape(3, -1).sum(1)
        np.testing.assert_allclose(found["by_prompt"]["covered"], mass, atol=1e-12)
        assert 0 < found["covered"] < 0.9


def test_of_the_start_nothing_has_been_won(judged):
    found = summary.policy_numbers(judged)
    assert (found["kl"], found["win_rate"]) == (0, pytest.approx(0.5, abs=1e-15))
    again = summary.policy_numbers(judged, LatticePolicy(tiny(), judged.lattice))
    assert again["value"] == pytest.approx(found["value"], abs=1e-12)
    assert again["covered"] == pytest.approx(found["covered"], abs=1e-12)


# ---- optima ------------------------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(st.integers(0, 10_000))
def test_what_is_missing_to_the_optimum_is_beta_times_the_distance(judged_for_hypothesis, seed):
    judged, beta = judged_for_hypothesis, 0.3
    law = np.random.default_rng(seed).dirichlet(np.ones(judged.rewards.shape[1]), size=3)
    found, best = judged.numbers(law), judged.numbers(judged.optimum.law)
    missing = best["value"] - beta * best["kl"] - found["value"] + beta * found["kl"]
    assert missing == pytest.approx(beta * found["distance"], abs=1e-10)
    assert missing > 0
    other = summary.judge_lattice(judged.lattice, JUDGE, "kl_policy_gradient", {"beta": 2 * beta})
    wrong = other.numbers(law)["distance"]  # the control: the optimum of another beta
    assert abs(missing - beta * wrong) > 1e-3


@pytest.fixture(scope="module")
def judged_for_hypothesis(judged):
    return judged


def test_the_gibbs_law_is_the_planners(narrow, judged):
    world = narrow.world.with_response_reward(judged.rewards.reshape(-1))
    exact = sequence_gibbs(world, world.reference, 0.3)
    np.testing.assert_allclose(judged.optimum.law, exact.law, atol=1e-12)
    best = judged.numbers(judged.optimum.law)
    assert best["value"] - 0.3 * best["kl"] == pytest.approx(exact.value, abs=1e-12)
    of_preferences = summary.judge_lattice(narrow, JUDGE, "dpo", {"beta": 0.6})
    np.testing.assert_allclose(of_preferences.optimum.law, exact.law, atol=1e-12)  # r / (0.5 * 0.6) = r / 0.3


@pytest.mark.parametrize("method", summary.REGULARISED_NASH)
def test_the_regularised_equilibrium_is_its_own_best_response(narrow, method):
    judged = summary.judge_lattice(narrow, JUDGE, method, {"tau": 0.2})
    for game, law, kept in zip(judged.games, judged.optimum.law, judged.support, strict=True):
        response = game.reference * np.exp(game.wins(law[kept]) / 0.2)
        np.testing.assert_allclose(law[kept], response / response.sum(), atol=1e-9)
    assert judged.numbers(judged.optimum.law)["distance"] == pytest.approx(0, abs=1e-12)


def cycle(prompts, first, second):
    """Stone, scissors, paper by the length of the response modulo 3."""
    gap = [(len(a) - len(b)) % 3 for a, b in zip(first, second, strict=True)]
    return [(0.5, 0.9, 0.1)[g] for g in gap]


def test_a_judge_of_preferences_is_asked_pair_by_pair(narrow):
    judged = summary.judge_lattice(narrow, PreferenceJudge("cycle", cycle), "sppo", {"eta": 1.0})
    assert judged.rewards is None
    found = judged.numbers(judged.optimum.law)
    assert found["exploitability"] == pytest.approx(0, abs=1e-9)
    assert "value" not in found
    assert judged.numbers(judged.law())["exploitability"] > 0.01
    same = summary.judge_lattice(narrow, PreferenceJudge("sines", JUDGE.preferences))
    for mine, by_reward in zip(same.games, summary.judge_lattice(narrow, JUDGE).games, strict=True):
        np.testing.assert_allclose(mine.P, by_reward.P, atol=1e-15)
    assert summary.best_responses(same)[0]["wins"] > 0.5
    with pytest.raises(ValueError, match=r"315 pairs, more than 100: take a smaller k"):
        summary.judge_lattice(narrow, PreferenceJudge("cycle", cycle), pairs=100)


def test_where_no_closed_form_is_known_there_is_no_optimum(narrow):
    assert summary.judge_lattice(narrow, JUDGE, "iterative_dpo_previous", {"beta": 0.1}).optimum is None
    assert "distance" not in summary.policy_numbers(summary.judge_lattice(narrow, JUDGE))


def test_without_a_judge_there_is_still_kl(narrow):
    judged = summary.judge_lattice(narrow, None)
    found = summary.policy_numbers(judged, LatticePolicy(tiny(seed=7), narrow))
    assert set(found) == {"kl", "entropy", "covered", "by_prompt"}
    assert found["kl"] > 0.1
    assert summary.best_responses(judged) == []
    assert summary.frontier(judged) is None


def test_too_many_responses_for_a_matrix_leave_the_win_rate_out(narrow, monkeypatch):
    monkeypatch.setattr(summary, "MATRIX", 10)
    judged = summary.judge_lattice(narrow, JUDGE, "nash_md", {"tau": 0.1})
    assert judged.games is None
    assert judged.optimum is None
    assert "value" in judged.numbers(judged.law())


def test_no_policy_lies_above_the_frontier(judged):
    far, most = np.array(summary.frontier(judged)).T
    assert (np.diff(far) > 0).all()
    assert (np.diff(most) > 0).all()
    rng = np.random.default_rng(0)
    for sharp in (0.1, 1, 10):
        for _ in range(50):
            law = rng.dirichlet(np.full(judged.rewards.shape[1], sharp), size=3)
            found = judged.numbers(law)
            if found["kl"] < far[-1]:
                assert found["value"] <= np.interp(found["kl"], far, most) + 1e-3
    at = judged.numbers(judged.optimum.law)
    assert at["value"] == pytest.approx(np.interp(at["kl"], far, most), abs=2e-3)


# ---- what there is to read -----------------------------------------------------------------------------------------


def test_the_best_and_the_likeliest_response(judged):
    law = judged.law()
    for x, (best, likely) in enumerate(
        zip(summary.best_responses(judged, law), summary.likeliest(judged, law), strict=True)
    ):
        assert best["reward"] == judged.rewards[x].max()
        assert best["reference"] == best["policy"]
        assert likely["probability"] == law[x].max()
        assert likely["reward"] <= best["reward"]
        assert best["text"].startswith("[") or best["text"] == ""


def test_a_world_is_saved_with_the_judges_reward(judged, tmp_path):
    world = summary.as_language_world(judged.lattice, judged.rewards, {"model": "tiny"})
    save_language_world(world, tmp_path / "world.npz")
    again = load_language_world(tmp_path / "world.npz")
    assert again.provenance["model"] == "tiny"
    assert evaluate(again, again.reference).value == pytest.approx(summary.policy_numbers(judged)["value"])
    np.testing.assert_allclose(again.with_gold_reward().leaf_rewards, judged.rewards.reshape(-1))


def test_a_world_without_a_judge_pays_nothing(narrow, tmp_path):
    save_language_world(summary.as_language_world(narrow, None, {}), tmp_path / "world.npz")
    again = load_language_world(tmp_path / "world.npz")
    assert not again.leaf_rewards.any()
    lengths = (again.trajectories(np.arange(again.n_leaves)).actions == again.branching).any(1)
    np.testing.assert_array_equal(again.leaf_features[:, 0], lengths)
