"""Reports and figures: one page that asks the network for nothing, and JSON with the promised fields."""

import base64
import html.parser
import json
import math
import os
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from preflab.theory import figures, report
from preflab.theory.claim import Plan
from preflab.theory.registry import select_claims
from preflab.theory.runner import run_claims
from preflab.theory.statistics import Slope, slope_loglog
from preflab.theory.store import Store

PLAN = Plan(quick=True, seeds=6)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Verified, verified with a blind control, and failed claims, with a figure and without."""
    with Store.open(tmp_path_factory.mktemp("store")) as store:
        store._connection.execute("PRAGMA synchronous = OFF")
        verified = run_claims(select_claims(["_example.root_n"]), Plan(quick=True), store, jobs=0)
        return verified + run_claims(select_claims(["_selftest"]), PLAN, store, jobs=0)


class Links(html.parser.HTMLParser):
    """Everything in a page that a browser would fetch, and the tags left open."""

    def __init__(self, page):
        super().__init__()
        self.fetched, self.anchors, self.ids, self.open = [], [], set(), []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.ids.add(attributes.get("id"))
        if tag == "a":
            self.anchors.append(attributes["href"])
        else:
            self.fetched += [attributes[name] for name in ("src", "href", "data") if name in attributes]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_asks_the_network_for_nothing(results):
    page = report.as_page(results, PLAN)
    links = Links(page)
    assert not links.open
    assert links.fetched
    assert all(link.startswith("data:image/svg+xml;base64,") for link in links.fetched)
    assert all(anchor.startswith("#") and anchor[1:] in links.ids for anchor in links.anchors)
    assert not re.search(r"@import|url\(|<script|<link", page)
    for link in links.fetched:
        svg = base64.b64decode(link.partition(",")[2]).decode()
        references = re.findall(r'(?:xlink:href|href|src)="([^"]*)"', svg)
        assert all(reference.startswith(("#", "data:")) for reference in references)
        assert ET.fromstring(svg).tag.endswith("svg")


def test_the_page_says_everything(results):
    page = report.as_page(results, PLAN)
    for text in (
        "_example.root_n",
        "verified",
        "inconclusive",
        "1 of 1 missed",
        "heads with probability 0.7",
    ):
        assert text in page
    assert "central limit theorem" in page
    assert "seed 1 was never going to work" in page
    assert "quick settings, 6 seeds" in page
    assert "numpy" in page
    assert page.count('alt="figure of _example.root_n"') == 1
    assert "4 claims: 3 verified, 1 inconclusive; 3 of 4 controls caught." in page


def test_the_json_has_the_promised_fields(results):
    data = json.loads(report.to_json(report.as_data(results, PLAN)), parse_constant=pytest.fail)
    assert data["ok"] is False
    assert len(data["claims"]) == 4
    for claim in data["claims"]:
        for name, kinds in {
            "claim": str,
            "kind": str,
            "verdict": str,
            "statistic": (float, type(None)),
            "threshold": (float, type(None)),
            "seeds": int,
            "seconds": float,
            "controls": list,
        }.items():
            assert isinstance(claim[name], kinds), name
        assert claim["verdict"] in ("verified", "refuted", "inconclusive")
        for control in claim["controls"]:
            assert isinstance(control["name"], str)
            assert isinstance(control["caught"], bool)
    by_name = {claim["claim"]: claim for claim in data["claims"]}
    assert by_name["_selftest.broken"]["statistic"] is None
    assert by_name["_selftest.slow"]["seeds"] == 6
    assert by_name["_selftest.blind"]["controls"][0]["caught"] is False


def test_text_of_claims_cannot_break_the_page(results):
    from dataclasses import replace

    nasty = "<script>alert(1)</script> & $x<y$ and $\\nosuchcommand{x}$"
    bad = replace(results[0], claim=replace(results[0].claim, title=nasty))
    page = report.as_page([bad], PLAN)
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "<code>\\nosuchcommand{x}</code>" in page
    assert 'alt="x&lt;y"' in page


def test_a_figure_that_fails_does_not_cost_the_report(results):
    from dataclasses import replace

    def draw(outcomes, judgement):
        raise IndexError("nothing to draw")

    bad = replace(results[0], claim=replace(results[0].claim, figure=draw))
    page = report.as_page([bad], PLAN)
    assert "the figure of _example.root_n failed: IndexError: nothing to draw" in page


def test_files_appear_whole_or_not_at_all(results, tmp_path, monkeypatch):
    page = report.write_report(results, PLAN, tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["report.html", "report.json"]
    before = page.read_text()

    def no_rename(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", no_rename)
    with pytest.raises(OSError, match="disk full"):
        report.write_text(page, "half")
    assert page.read_text() == before
    assert sorted(os.listdir(tmp_path)) == ["report.html", "report.json"]


def test_numbers_are_shown_short():
    assert [report.number(x) for x in (0.123456, math.nan, math.inf, 3, "a", True)] == [
        "0.1235",
        "–",
        "inf",
        "3",
        "a",
        "True",
    ]
    assert report.number(np.arange(10.0)) == "0, 1, 2, 3, 4, 5, 6, 7, …"
    assert report.number(np.float64(0.5)) == "0.5"
    assert list(report.flat({"a": {"b": 1}, "c": 2})) == [("a / b", 1), ("c", 2)]
    assert report.finite({"a": (np.nan, np.float32(1), [np.inf]), 1: "x"}) == {
        "a": [None, 1.0, [None]],
        "1": "x",
    }


def test_one_claim_is_not_many(results):
    assert report.summary(results[:1]) == "1 claim: 1 verified; 1 of 1 controls caught."
    assert report.plan_words(Plan()) == "full settings, seeds as each claim asks"


# ---- figures -------------------------------------------------------------------------------------------------


def curve(seeds=5):
    x = np.geomspace(10, 1000, 8)
    Y = x**0.5 * np.random.default_rng(0).lognormal(0, 0.1, (seeds, 8))
    return x, Y


def test_a_loglog_figure_draws_the_mean_the_fit_and_its_interval():
    x, Y = curve()
    slope = slope_loglog(x, Y, window=(50, 1000))
    figure = figures.loglog(
        [figures.Curve("active", x, Y, slope), figures.Curve("one", x, Y[:1])], x="T", y="R", reference=0.5
    )
    axes = figure.axes[0]
    mean, fit, single, guide = axes.lines
    assert mean.get_ydata() == pytest.approx(Y.mean(0))
    assert single.get_ydata() == pytest.approx(Y[0])
    ends = fit.get_xdata()
    assert ends == pytest.approx([50, 1000])
    assert np.diff(np.log(fit.get_ydata())) / np.diff(np.log(ends)) == pytest.approx(slope.estimate)
    assert np.diff(np.log(guide.get_ydata())) / np.diff(np.log(x)) == pytest.approx(0.5)
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert legend[0] == f"active  (slope {slope.estimate:.2f} [{slope.low:.2f}, {slope.high:.2f}])"
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")


def test_means_carry_their_t_interval():
    from scipy import stats

    _, Y = curve()
    mean, error = figures.mean_and_error(Y, 0.9)
    low, high = stats.t.interval(0.9, 4, loc=Y.mean(0), scale=stats.sem(Y))
    assert mean - error == pytest.approx(low)
    assert mean + error == pytest.approx(high)


@pytest.mark.parametrize("log", [True, False])
def test_a_front_shows_both_errors_in_order_of_cost(log):
    _, Y = curve()
    figure = figures.front(
        [figures.Front("active", Y[:, ::-1], 1 / Y), figures.Front("passive", Y, 2 / Y)],
        x="labels",
        y="R",
        log=log,
    )
    lines = [container[0] for container in figure.axes[0].containers]
    assert all((np.diff(line.get_xdata()) > 0).all() for line in lines)
    assert len(figure.axes[0].containers) == 2
    assert figure.axes[0].get_xscale() == ("log" if log else "linear")


def test_frequencies_and_paired_differences():
    axes = figures.frequencies([("a", 9, 10), ("b", 1, 10)], 0.9, x="frequency").axes[0]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["a (9/10)", "b (1/10)"]
    axes = figures.paired([3.0, 1.0, 2.0], x="saved").axes[0]
    assert axes.lines[-1].get_xdata() == pytest.approx([1, 2, 3])


def test_equal_figures_are_equal_text():
    def draw():
        x, Y = curve()
        return figures.data_uri(
            figures.loglog([figures.Curve("a", x, Y, Slope(0.5, 0.4, 0.6))], x="T", y="R")
        )

    assert draw() == draw()


def test_a_formula_stands_on_its_baseline():
    _, flat_height, flat_depth = figures.math_uri("$x$")
    _, height, depth = figures.math_uri(r"$\frac{x_g}{y_g}$")
    assert height > flat_height
    assert depth > flat_depth > 0
    with pytest.raises(ValueError):
        figures.math_uri(r"$\nosuchcommand$")
