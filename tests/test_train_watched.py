"""A run with exact numbers beside it: they are those of the weights, the run reaches the optimum, and it goes on."""

import json

import numpy as np
import pytest
from preflab.llm_bridge.lattice import LatticePolicy, lattice
from preflab.llm_bridge.policy import TransformerPolicy
from preflab.llm_bridge.tiny import tiny_model
from preflab.llm_bridge.training import summary
from preflab.llm_bridge.training.judges import PreferenceJudge, RewardJudge
from preflab.llm_bridge.training.records import Record
from preflab.llm_bridge.training.settings import TrainSettings
from preflab.llm_bridge.training.watched import Texts, Watch, read, stratified, train_watched

PROMPTS = [(1, 2), (3,)]
# All tokens but the end, and as many steps as in training: on this lattice nothing is left out.
WATCH = Watch(k=3, horizon=2, every=4, samples=4)


def tiny(seed=0):
    return TransformerPolicy(
        tiny_model(4, seed=seed, scale=0.5), end_ids=[0], pad_id=0, vocabulary=4, micro_batch=64
    )


JUDGE = RewardJudge("threes", lambda prompts, completions: [y.count(3) / 2 for y in map(list, completions)])


def options(**changes):
    given = {"steps": 12, "batch": 16, "horizon": 2, "learning_rate": 0.02, "checkpoint_every": 3}
    return TrainSettings(**given | {"sample_prompts": 2, "log_with": None, "device": "cpu"} | changes)


def run(folder, method="kl_policy_gradient", policy=None, judge=JUDGE, watch=WATCH, **changes):
    """The result, and lattice.json."""
    given = {"parameters": {"beta": 0.2}, "prompts": PROMPTS, "settings": options()} | changes
    result = train_watched(policy or tiny(), method, folder=folder, judge=judge, watch=watch, **given)
    return result, read(folder / "lattice.json")


def steps_of(folder):
    return [json.loads(line) for line in (folder / "lattice_steps.jsonl").read_text().splitlines()]


def test_the_numbers_are_those_of_the_weights(tmp_path):
    result, exact = run(tmp_path)
    whole = lattice(tiny(), PROMPTS, 3, 2)
    judged = summary.judge_lattice(whole, JUDGE, "kl_policy_gradient", {"beta": 0.2})
    assert exact["before"] == json.loads(json.dumps(summary.policy_numbers(judged)))
    after = summary.policy_numbers(judged, LatticePolicy(result.policy, whole))
    assert exact["after"]["value"] == pytest.approx(after["value"], abs=1e-12)
    assert exact["after"]["covered"] == pytest.approx(1, abs=1e-12)
    rows = steps_of(tmp_path)
    assert [row["step"] for row in rows] == [4, 8, 12]
    assert rows[-1]["value"] == exact["after"]["value"]
    assert exact["likeliest"]["after"][0]["probability"] > 0
    assert exact["best"][0]["policy"] > exact["best"][0]["reference"]


def test_a_run_comes_to_the_exact_optimum_of_its_lattice(tmp_path):
    settings = options(steps=150, batch=64, learning_rate=0.01, schedule="cosine", checkpoint_every=0)
    watch = Watch(k=3, horizon=2, every=0, samples=0)
    _, exact = run(tmp_path / "right", settings=settings, watch=watch)
    assert exact["before"]["distance"] > 0.3
    assert exact["after"]["distance"] < 0.01
    assert exact["after"]["value"] == pytest.approx(exact["optimum"]["value"], abs=0.03)
    # The control: a judge that likes the opposite is trained on, and the same optimum is held against it.
    other = RewardJudge("no threes", lambda prompts, completions: -JUDGE.rewards(prompts, completions))
    result, _ = run(tmp_path / "wrong", judge=other, settings=settings, watch=watch)
    whole = lattice(tiny(), PROMPTS, 3, 2)
    judged = summary.judge_lattice(whole, JUDGE, "kl_policy_gradient", {"beta": 0.2})
    assert summary.policy_numbers(judged, LatticePolicy(result.policy, whole))["distance"] > 1


class Killed(Exception):
    pass


@pytest.mark.parametrize("at", [2, 7, 10])
def test_a_run_that_was_stopped_ends_with_the_same_numbers(tmp_path, at):
    run(tmp_path / "whole")

    def stop(row):
        if row["step"] == at:
            raise Killed

    with pytest.raises(Killed):
        run(tmp_path / "part", on_step=stop)
    run(tmp_path / "part", resume=True)
    for name in ("lattice.json", "lattice_steps.jsonl", "evaluation.json", "samples.jsonl"):
        assert (tmp_path / "part" / name).read_text() == (tmp_path / "whole" / name).read_text(), name


def test_drawn_completions_are_judged_before_and_after(tmp_path):
    run(tmp_path, settings=options(steps=40))
    drawn = read(tmp_path / "evaluation.json")
    before, after = drawn["before"], drawn["after"]
    assert before["samples"] == after["samples"] == 8
    assert before["kl"] == pytest.approx(0, abs=1e-12)
    assert after["reward"] > before["reward"]
    gained = np.array(after["rewards"]) - np.array(before["rewards"])
    assert drawn["difference"]["reward"] == pytest.approx(gained.mean())
    assert 0 <= before["ended"] <= 1


def test_the_standard_error_is_that_of_the_mean_over_prompts():
    rng = np.random.default_rng(0)
    draws = rng.normal([[0.0], [5.0], [9.0]], [[1.0], [2.0], [0.5]], size=(20_000, 3, 6))
    means, errors = np.array([stratified(x) for x in draws[:4000]]).T
    assert means.std() == pytest.approx(np.sqrt((1 + 4 + 0.25) / 6) / 3, rel=0.05)
    assert np.sqrt((errors**2).mean()) == pytest.approx(means.std(), rel=0.05)
    assert draws[0].std(ddof=1) / np.sqrt(18) > 1.5 * errors[0]  # not that of all draws together
    assert np.isnan(stratified(np.zeros((2, 1)))[1])


def test_a_method_of_records_is_watched_with_or_without_a_judge(tmp_path):
    records = [Record((1, 2), (3, 3), (1, 0)), Record((3,), (3, 0), (2, 0)), Record((1, 2), (3, 0), (0,))]
    given = {"method": "dpo", "prompts": None, "records": records, "parameters": {"beta": 0.2}}
    _, exact = run(tmp_path / "with", **given)
    assert exact["after"]["value"] > exact["before"]["value"]
    assert exact["optimum"]["value"] > exact["before"]["value"]
    _, bare = run(tmp_path / "without", judge=None, **given)
    assert bare["after"]["kl"] == exact["after"]["kl"]
    assert "value" not in bare["after"]
    assert bare["optimum"] is None
    assert "reward" not in read(tmp_path / "without" / "evaluation.json")["after"]


def test_preferences_alone_will_do(tmp_path):
    judge = PreferenceJudge(
        "longer",
        lambda prompts, first, second: [
            (0.5, 0.8, 0.2)[np.sign(len(a) - len(b))] for a, b in zip(first, second, strict=True)
        ],
    )
    texts = Texts(prompts=["one two", "three"], pieces=["", "a", "b", "c"], decode=str)
    _, exact = run(tmp_path, method="nash_md", judge=judge, parameters={"tau": 0.2}, texts=texts)
    assert exact["optimum"]["name"] == "the regularised Nash equilibrium at tau = 0.2"
    assert exact["frontier"] is None
    assert exact["after"]["win_rate"] > 0.5
    assert exact["best"][0]["text"].startswith("one two")
    drawn = read(tmp_path / "evaluation.json")
    assert "reward" not in drawn["before"]
    assert "win_rate" in drawn["before"]
    assert "difference" not in drawn


def test_what_cannot_be_watched_is_said(tmp_path):
    with pytest.raises(ValueError, match="watch: k is 0; it must be at least 1"):
        Watch(k=0)
    (tmp_path / "lattice.json").write_text("{")
    with pytest.raises(ValueError, match=r"lattice\.json is damaged .*: delete it"):
        read(tmp_path / "lattice.json")
    (tmp_path / "lattice.json").write_text("[]")
    with pytest.raises(ValueError, match="holds no JSON object: delete it"):
        read(tmp_path / "lattice.json")
    with pytest.raises(MemoryError, match="what fits: k = 3 with horizon = 2"):
        run(tmp_path / "large", watch=Watch(k=3, horizon=9, memory=4000))
