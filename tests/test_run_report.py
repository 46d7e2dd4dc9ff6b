"""The page of a training run: from a finished folder, an unfinished one, a bare one; what is damaged is named."""

import base64
import html.parser
import json
import re
import shutil
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from preflab.llm_bridge import run_report
from preflab.llm_bridge.policy import TransformerPolicy
from preflab.llm_bridge.tiny import tiny_model
from preflab.llm_bridge.training.judges import RewardJudge
from preflab.llm_bridge.training.loop import train
from preflab.llm_bridge.training.records import Record
from preflab.llm_bridge.training.settings import TrainSettings
from preflab.llm_bridge.training.watched import Texts, Watch, train_watched

PROMPTS = [(1, 2), (3,)]
JUDGE = RewardJudge("threes", lambda prompts, completions: [list(y).count(3) / 2 for y in completions])


def settings(steps):
    return TrainSettings(
        steps=steps, batch=8, horizon=2, learning_rate=0.02, sample_prompts=2, log_with=None, device="cpu"
    )


def tiny():
    return TransformerPolicy(tiny_model(4, scale=0.5), end_ids=[0], pad_id=0, vocabulary=4)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    texts = Texts(
        prompts=["<b>one</b>\ntwo", "three"], pieces=["", "a", "b", "<c>"], decode=lambda y: f"<i>{y}"
    )
    train_watched(
        tiny(),
        "kl_policy_gradient",
        folder=folder,
        judge=JUDGE,
        prompts=PROMPTS,
        settings=settings(9),
        parameters={"beta": 0.2},
        watch=Watch(k=2, horizon=2, every=3, samples=3),
        texts=texts,
    )
    (folder / "asked.json").write_text(json.dumps({"model": "tiny & small", "judge": "threes"}))
    return folder


@pytest.fixture
def folder(finished, tmp_path):
    """A copy to break."""
    return shutil.copytree(finished, tmp_path / "run")


class Links(html.parser.HTMLParser):
    """What a browser would fetch, and that every tag is closed."""

    def __init__(self, page):
        super().__init__()
        self.fetched, self.open, self.text = [], [], ""
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag != "a":
            self.fetched += [attributes[name] for name in ("src", "href", "data") if name in attributes]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def page_of(folder):
    return run_report.write_run_report(folder).read_text(encoding="utf-8")


def data_of(folder):
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def test_the_page_asks_the_network_for_nothing(folder):
    page = page_of(folder)
    links = Links(page)
    assert len(links.fetched) == 2
    assert not re.search(r"@import|url\(|<script|<link", page)
    for link in links.fetched:
        kind, _, code = link.partition(",")
        assert kind == "data:image/svg+xml;base64"
        svg = base64.b64decode(code).decode()
        assert all(
            x.startswith(("#", "data:")) for x in re.findall(r'(?:xlink:href|href|src)="([^"]*)"', svg)
        )
        assert ET.fromstring(svg).tag.endswith("svg")


def test_the_page_says_what_the_folder_holds(folder):
    text = Links(page_of(folder)).text
    exact = json.loads((folder / "lattice.json").read_text())
    for name in ("value", "kl", "win_rate", "distance", "covered"):
        assert f"{exact['after'][name]:.4f}" in text
    assert f"{exact['optimum']['value']:.4f}" in text
    for words in (
        "kl_policy_gradient on tiny & small",
        "finished",
        "9 of 9 steps",
        f"{exact['before']['value']:.3f} → {exact['after']['value']:.3f}",
        "2 prompts, at each prefix the 2 likeliest tokens",
        "14 responses",
        "the Gibbs law, reference times exp(reward / 0.2)",
        "<b>one</b>\ntwo",  # texts of a model are no markup
        "<i>[",
        "learning_rate",
        "What these numbers mean, and what not",
    ):
        assert words in text
    assert "<i>[" not in page_of(folder)


def test_the_json_holds_the_same(folder):
    page_of(folder)
    data = data_of(folder)
    assert data["finished"] is True
    assert data["steps"] == 9
    assert data["exact"] == json.loads((folder / "lattice.json").read_text())
    assert [row["step"] for row in data["exact_steps"]] == [3, 6, 9]
    assert len(data["metrics"]) == 9
    assert len(data["samples"]) == 2
    assert data["samples"][0]["step"] == 9
    assert data["drawn"]["after"]["reward"] >= 0
    assert data["run"]["parameters"] == {"beta": 0.2}


def keep_lines(path, n):
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:n]))


def test_an_unfinished_run_has_a_page(folder):
    keep_lines(folder / "metrics.jsonl", 4)
    keep_lines(folder / "samples.jsonl", 2)
    keep_lines(folder / "lattice_steps.jsonl", 1)
    exact = json.loads((folder / "lattice.json").read_text())
    del exact["after"], exact["likeliest"]["after"]
    (folder / "lattice.json").write_text(json.dumps(exact))
    drawn = json.loads((folder / "evaluation.json").read_text())
    (folder / "evaluation.json").write_text(json.dumps({"before": drawn["before"]}))
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "los')  # being written
    text = Links(page_of(folder)).text
    assert "unfinished" in text
    assert "4 of 9 steps" in text
    assert "after step 3" in text
    assert "not yet" in text
    assert data_of(folder)["finished"] is False


def test_before_the_first_step_there_is_a_page(folder):
    for name in (
        "metrics.jsonl",
        "samples.jsonl",
        "lattice_steps.jsonl",
        "evaluation.json",
        "lattice.json",
        "asked.json",
    ):
        (folder / name).unlink()
    links = Links(page_of(folder))
    assert links.fetched == []
    assert "kl_policy_gradient on TinyModel" in links.text
    assert "0 of 9 steps." in links.text
    assert "Exactly, on the lattice" not in links.text


@pytest.mark.parametrize("method", ["nash_md", "kl_policy_gradient"])
def test_a_run_that_nobody_watched_has_a_page(tmp_path, method):
    train(tiny(), method, prompts=PROMPTS, judge=JUDGE, settings=settings(3), folder=tmp_path)
    links = Links(page_of(tmp_path))
    assert len(links.fetched) == (1 if method == "nash_md" else 2)  # nash_md's batches have no reward to draw
    assert "3 of 3 steps." in links.text


def test_a_method_of_records_shows_the_first_of_the_drawn_completions(tmp_path):
    def folder(name, decode, samples=3):
        train_watched(
            tiny(),
            "dpo",
            folder=tmp_path / name,
            judge=JUDGE,
            records=[Record((1, 2), (3, 3), (1, 0)), Record((3,), (3, 0), (2, 0))],
            settings=settings(2),
            watch=Watch(k=2, horizon=2, every=0, samples=samples),
            texts=Texts(prompts=["one two", "three"], decode=decode) if decode else Texts(decode=None),
        )
        page_of(tmp_path / name)
        return data_of(tmp_path / name)

    data = folder("texts", lambda y: f"<{list(y)}>")
    pairs, drawn = data["samples"], data["drawn"]
    assert [row["prompt"] for row in pairs] == ["one two", "three"]
    assert pairs[1]["before"] == f"<{drawn['before']['shown'][1]['completion']}>"
    assert pairs[1]["reward_after"] == drawn["after"]["rewards"][1][0]
    for side in ("before", "after"):
        for row, rewards in zip(drawn[side]["shown"], drawn[side]["rewards"], strict=True):
            assert rewards[0] == JUDGE.rewards([row["prompt"]], [row["completion"]])[0]
    assert [row["step"] for row in pairs] == [2, 2]
    assert folder("ids", None)["samples"][0]["prompt"] == "1 2"
    assert folder("none", None, samples=0)["samples"] == []


def titles(figure):
    return [axes.get_title(loc="left") or axes.get_title() for axes in figure.axes]


def test_a_run_on_preferences_shows_its_win_rate_where_batches_have_no_reward(tmp_path, finished):
    train_watched(
        tiny(),
        "nash_md",
        folder=tmp_path,
        judge=JUDGE,
        prompts=PROMPTS,
        settings=settings(4),
        watch=Watch(k=2, horizon=2, every=2, samples=0),
    )
    run = run_report.read_run(tmp_path)
    figure = run_report.reward_against_kl(run)
    assert titles(figure) == ["Exactly, on the lattice", "Exactly, over the steps"]
    x, y = figure.axes[1].lines[0].get_data()
    np.testing.assert_array_equal(x, [0, 2, 4])
    np.testing.assert_array_equal(y, [0.5, *(row["win_rate"] for row in run.exact_steps)])
    assert figure.axes[1].lines[1].get_ydata()[0] == run.exact["optimum"]["win_rate"]
    assert all(
        "reward" in row for row in run.samples
    )  # the judge has rewards, though the method asks for none
    of_rewards = run_report.reward_against_kl(run_report.read_run(finished))
    assert titles(of_rewards) == ["Exactly, on the lattice", "Of the batches"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("run.json", "{", r"run\.json is damaged"),
        ("run.json", "[]", r"run\.json is damaged: it holds no object"),
        ("run.json", '{"asked": {}}', "is not of a training run"),
        ("run.json", '{"method": "dpo", "settings": {}}', "is not of a training run"),
        (
            "metrics.jsonl",
            '{"step": 1}\n{"loss": 2}\n',
            r"metrics\.jsonl, line 2 is damaged: '{\"loss\": 2}'",
        ),
        ("metrics.jsonl", "nonsense\n", r"metrics\.jsonl, line 1 is damaged"),
        ("samples.jsonl", '{"step": "one"}\n', r"samples\.jsonl, line 1 is damaged"),
        ("lattice.json", "3", r"lattice\.json is damaged"),
    ],
)
def test_what_is_damaged_is_named_and_the_old_page_stays(folder, name, text, message):
    before = page_of(folder)
    (folder / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        run_report.write_run_report(folder)
    assert (folder / "report.html").read_text(encoding="utf-8") == before


def test_a_folder_of_something_else_is_told_apart(tmp_path, finished):
    assert run_report.is_run_folder(finished)
    assert not run_report.is_run_folder(tmp_path)
    (tmp_path / "run.json").write_text('{"asked": {"algorithm": "pr_lsvi"}}')
    assert not run_report.is_run_folder(tmp_path)
    with pytest.raises(ValueError, match=r"holds no run\.json"):
        run_report.read_run(tmp_path / "nowhere")


def test_the_moving_mean_is_that_of_the_last_values():
    x = np.array([1.0, np.nan, 3.0, 5.0])
    np.testing.assert_allclose(run_report.moving_mean(x, 2), [1, 1, 3, 4])
    np.testing.assert_allclose(run_report.moving_mean(x), x)  # of few values: themselves
    assert np.isnan(run_report.moving_mean([np.nan, 2.0], 1)[0])
    long = np.random.default_rng(0).normal(size=100)
    assert run_report.moving_mean(long)[50] == pytest.approx(long[41:51].mean())
