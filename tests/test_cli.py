"""The command line, in this process: exit codes, suggestions, JSON, what is refused before any work."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from preflab.theory import runner, single_run
from preflab.theory.store import FILE, SCHEMA, Store
from typer.testing import CliRunner

import preflab
from preflab import cli, terminal

ROOT = Path(preflab.__file__).resolve().parents[2]


def call(*arguments):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


@pytest.fixture(autouse=True)
def _wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")


# ---- help, version, list ---------------------------------------------------------------------------------------


def test_the_version_comes_without_numpy():
    code = """import runpy, sys
sys.argv = ["preflab", "--version"]
try:
    runpy.run_module("preflab", run_name="__main__")
finally:
    assert "numpy" not in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "src", capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"preflab {preflab.__version__}\n"


@pytest.mark.parametrize("command", [[], ["list"], ["verify"], ["run"], ["report"]])
def test_help_teaches_by_example(command):
    done = call(*command, "--help")
    assert done.exit_code == 0
    assert "preflab " in done.stdout.replace("Usage: preflab", "")


def test_lists_as_json():
    data = json.loads(call("list", "--json").stdout)
    assert set(data) == {"claims", "envs", "algorithms", "losses"}
    (dpo,) = [loss for loss in data["losses"] if loss["name"] == "dpo"]
    assert dpo["inputs"] == ["policy", "reference", "preferred", "weight"]
    assert dpo["parameters"] == ["beta", "label_smoothing"]
    assert "preflab/RandomLinearMDP-v0" in data["envs"]
    (spec,) = [a for a in data["algorithms"] if a["name"] == "pr_lsvi"]
    assert "eps" in spec["settings"]
    for claim in data["claims"]:
        assert set(claim) == {"claim", "kind", "title", "controls"}
        assert claim["controls"]
    assert set(json.loads(call("list", "envs", "--json").stdout)) == {"envs"}


def test_lists_as_tables():
    done = call("list")
    assert done.exit_code == 0
    for text in ("pr_lsvi", "preflab/DeepSea-v0", "dpo", "Claims, for: preflab verify CLAIM"):
        assert text in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["verfy"], "verify"),
        (["list", "worlds"], "claims"),
        (["verify", "--seeds", "0"], "'--seeds'"),
        (["verify", "--jobs", "-1"], "'--jobs'"),
        (["verify", "--backend", "slurm"], "ray"),
        (["verify", "_example.rotn"], "did you mean _example.root_n"),
        (["verify", "pr_lsvj"], "there is no claim 'pr_lsvj'"),
        (["run", "pr_lsv", "DeepSea"], "did you mean pr_lsvi"),
        (["run", "pr_lsvi", "DepSea"], "did you mean preflab/DeepSea-v0"),
    ],
)
def test_wrong_usage_exits_2_with_what_would_be_right(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = call(*arguments)
    assert done.exit_code == cli.USAGE
    assert message in done.stderr
    assert not list(tmp_path.iterdir())


# ---- verify and report -------------------------------------------------------------------------------------------


def verify(folder, *arguments):
    return call("verify", *arguments, "--quick", "--seeds", 5, "--jobs", 0, "--out", folder)


def test_verified_exits_0_and_goes_on_where_it_stood(tmp_path):
    done = verify(tmp_path, "_selftest.slow", "--json", tmp_path / "verdicts" / "v.json")
    assert done.exit_code == cli.OK, done.output
    assert "1 claim: 1 verified; 1 of 1 controls caught." in done.stdout
    assert f"Report: {tmp_path / 'report.html'}" in done.stdout
    assert "9 of 9 done, 0 left" in done.stderr
    written = json.loads((tmp_path / "verdicts" / "v.json").read_text())
    assert written == json.loads((tmp_path / "report.json").read_text())
    assert written["ok"] is True
    again = verify(tmp_path, "_selftest.slow", "--json", "-")
    assert "9 of them finished before" in again.stderr
    assert json.loads(again.stdout)["claims"] == written["claims"]
    assert "Report:" in again.stderr


@pytest.mark.parametrize(
    ("claim", "message"),
    [
        ("_selftest.broken", "seed 1 was never going to work"),
        ("_selftest.blind", "control nothing_broken was not caught"),
    ],
)
def test_a_failure_or_a_blind_judge_exits_1(tmp_path, claim, message):
    done = verify(tmp_path, claim)
    assert done.exit_code == cli.FAILED
    assert message in done.stdout
    assert json.loads((tmp_path / "report.json").read_text())["ok"] is False


def test_a_report_is_made_again_from_the_folder(tmp_path, monkeypatch):
    verify(tmp_path, "_selftest.slow")
    first = (tmp_path / "report.json").read_text()
    (tmp_path / "report.json").unlink()
    monkeypatch.setattr(runner, "run_one", lambda cell: pytest.fail("a report computes no cell"))
    done = call("report", tmp_path)
    assert done.exit_code == cli.OK, done.output
    assert (tmp_path / "report.json").read_text() == first


def test_a_report_of_an_unfinished_run_says_what_is_missing(tmp_path):
    verify(tmp_path, "_selftest.slow")
    with Store.open(tmp_path) as store, store._connection:
        store._connection.execute("DELETE FROM cells WHERE seed = 4")
    done = call("report", tmp_path, "--json", "-")
    assert done.exit_code == cli.FAILED
    (claim,) = json.loads(done.stdout)["claims"]
    assert (claim["verdict"], claim["detail"]) == ("inconclusive", "1 of 5 cells are not finished")


def test_a_report_does_not_mix_results_with_other_code(tmp_path):
    verify(tmp_path, "_selftest.slow")
    before = (tmp_path / "report.html").read_text()
    with Store.open(tmp_path) as store:
        store.note("request", store.noted("request") | {"code": "older"})
    done = call("report", tmp_path)
    assert done.exit_code == cli.USAGE
    assert "computed by other code" in done.stderr
    assert (tmp_path / "report.html").read_text() == before


def test_a_report_needs_results(tmp_path):
    assert "holds no results" in call("report", tmp_path).stderr
    with Store.open(tmp_path):
        pass
    done = call("report", tmp_path)
    assert done.exit_code == cli.USAGE
    assert "no verify asked" in done.stderr


def test_a_damaged_store_stops_the_command_and_the_next_one_starts_afresh(tmp_path):
    verify(tmp_path, "_selftest.slow")
    (tmp_path / FILE).write_bytes(b"garbage" * 1000)
    done = verify(tmp_path, "_selftest.slow")
    assert done.exit_code == cli.USAGE
    assert "set aside as store.damaged-" in done.stderr
    assert not (tmp_path / FILE).exists()
    (aside,) = tmp_path.glob("store.damaged-*.sqlite")
    assert aside.read_bytes() == b"garbage" * 1000
    assert verify(tmp_path, "_selftest.slow").exit_code == cli.OK
    assert aside.exists()


def test_a_newer_store_stops_the_command(tmp_path):
    with Store.open(tmp_path) as store:
        store._connection.execute(f"PRAGMA user_version = {SCHEMA + 1}")
    done = verify(tmp_path, "_selftest.slow")
    assert done.exit_code == cli.USAGE
    assert "newer preflab" in done.stderr


@pytest.mark.parametrize("option", ["--out", "--json"])
def test_what_cannot_be_written_is_refused_before_any_work(tmp_path, monkeypatch, option):
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runner, "run_one", lambda cell: pytest.fail("worked before looking"))
    done = call("verify", "_selftest.slow", "--jobs", 0, option, tmp_path / "file" / "x")
    assert done.exit_code == cli.USAGE
    assert "cannot write to" in done.stderr


def test_a_folder_is_no_json_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "is a folder" in call("verify", "_selftest.slow", "--json", tmp_path).stderr


def test_nothing_to_verify_is_an_error(tmp_path, monkeypatch):
    from preflab.theory import registry

    monkeypatch.setattr(registry, "load_claims", dict)
    done = verify(tmp_path)
    assert done.exit_code == cli.USAGE
    assert "no claims" in done.stderr


def test_ctrl_c_says_how_to_go_on(tmp_path, monkeypatch):
    def interrupt(cell):
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "run_one", interrupt)
    done = verify(tmp_path, "_selftest.slow")
    assert done.exit_code == cli.INTERRUPTED
    assert f"Finished cells are kept in {tmp_path}; the same command goes on from there." in done.stderr


def test_ray_without_ray_exits_2(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    done = verify(tmp_path, "_selftest.slow", "--backend", "ray")
    assert done.exit_code == cli.USAGE
    assert "pip install ray" in done.stderr


def test_the_bar_of_a_terminal_shows_done_and_left(monkeypatch):
    from rich.console import Console

    console = Console(force_terminal=True, width=120, record=True, highlight=False)
    monkeypatch.setattr(terminal, "make_console", lambda stderr=False: console)
    with terminal.progress_bar("cells") as advance:
        advance(0, 7, None)
        advance(3, 7, None)
    text = console.export_text()
    assert "3/7" in text
    assert "4 left" in text


def test_tables_are_wide_where_no_terminal_says_how_wide(monkeypatch):
    monkeypatch.delenv("COLUMNS")
    assert terminal.make_console().width == 140


# ---- run -----------------------------------------------------------------------------------------------------------

RUN = ("run", "pr_lsvi", "RandomLinearMDP", "--set", "eps=0.5", "--set", "env.horizon=3", "--set", "env.d=3")


def table(folder):
    with open(folder / "episodes.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_goes_on_and_equals_the_whole(tmp_path):
    parts, whole = tmp_path / "parts", tmp_path / "whole"
    assert call(*RUN, "--episodes", 60, "--out", parts).exit_code == 0
    more = call(*RUN, "--episodes", 130, "--out", parts, "--json")
    assert "going on from episode 60" in more.stderr
    done = call(*RUN, "--episodes", 130, "--out", whole)
    assert f"Results: {whole}" in done.stdout
    assert table(parts) == table(whole)
    totals = json.loads(more.stdout)
    rows = table(whole)
    assert totals["episodes"] == len(rows) == 130
    assert totals["regret"] == pytest.approx(sum(float(row["regret"]) for row in rows))
    assert totals["queries"] == sum(row["queried"] == "True" for row in rows)
    assert json.loads((whole / "run.json").read_text())["totals"] == totals
    assert sorted(p.name for p in whole.iterdir()) == ["episodes.csv", "regret.svg", "run.json", "run.npz"]


def test_a_run_without_a_folder_keeps_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = call(*RUN, "--episodes", 5)
    assert done.exit_code == 0
    assert "episodes: 5" in done.stdout
    assert not list(tmp_path.iterdir())


def test_a_folder_continues_only_its_own_run(tmp_path):
    call(*RUN, "--episodes", 5, "--out", tmp_path)
    done = call(*RUN, "--episodes", 5, "--seed", 1, "--out", tmp_path)
    assert done.exit_code == cli.USAGE
    assert "seed: 0 there, 1 asked" in done.stderr
    (tmp_path / "run.npz").write_bytes(b"garbage")
    assert "cannot be continued" in call(*RUN, "--episodes", 5, "--out", tmp_path).stderr
    (tmp_path / "run.json").write_text("garbage")
    assert "is not readable" in call(*RUN, "--episodes", 5, "--out", tmp_path).stderr


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_again(tmp_path):
    call(*RUN, "--episodes", 5, "--out", tmp_path)
    first = table(tmp_path)
    (tmp_path / "run.npz").unlink()
    assert call(*RUN, "--episodes", 5, "--out", tmp_path).exit_code == 0
    assert table(tmp_path) == first


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("esp=0.1", "did you mean eps"),
        ("eps", "not of the form key=value"),
        ("eps=0.5", "given twice"),
        ("sigma_r=big", "setting sigma_r is 'big'; expected a number"),
        ("transitions=knwon", "expected 'learned' or 'known'"),
        ("query_rate=true", "expected a number or null"),
        ("preset=theroy", "did you mean theory"),
        ("link=probit", "there is no setting 'link'"),
        ("alpha_L=9", "alpha_L = 9 must be below"),
        ("env.horizn=3", "cannot be made with"),
    ],
)
def test_a_wrong_setting_is_named(pair, message):
    done = call(*RUN, "--set", pair)
    assert done.exit_code == cli.USAGE
    assert message in done.stderr


def test_presets_and_plain_texts():
    assert call(*RUN, "--episodes", 2, "--set", "preset=theory", "--set", "query_rate=null").exit_code == 0
    assert "pr_lsvi needs --set eps=VALUE" in call("run", "pr_lsvi", "RandomLinearMDP").stderr


def test_ctrl_c_in_a_run(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(single_run, "advance", interrupt)
    done = call(*RUN, "--out", tmp_path)
    assert done.exit_code == cli.INTERRUPTED
    assert "last checkpoint" in done.stderr
    assert "Nothing was kept." in call(*RUN).stderr


# ---- settings of an algorithm without presets, records as a mapping -------------------------------------------------


def test_checkpoints_are_saved_on_the_way(tmp_path, monkeypatch):
    saved = []

    class State:
        def __init__(self):
            self.records = {"regret": np.zeros(0)}

        def advance(self, n):
            self.records = {"regret": np.append(self.records["regret"], np.ones(n))}

        def save(self, path):
            saved.append(len(self.records["regret"]))

    monkeypatch.setattr(single_run, "SAVE_SECONDS", 0.0)
    state = State()
    single_run.advance(state, 120, tmp_path)
    assert saved == [50, 100, 120]
    assert single_run.summarise(state) == {
        "episodes": 120,
        "regret": 120.0,
        "regret_per_episode_at_the_end": 1.0,
    }
    assert np.isnan(single_run.summarise(State())["regret_per_episode_at_the_end"])
    asked = single_run.Asked("a", "w", {}, {}, 0)
    single_run.write_run(asked, state, tmp_path)
    assert len(table(tmp_path)) == 120


def test_an_algorithm_without_presets_takes_its_dataclass(monkeypatch):
    from dataclasses import dataclass

    from preflab.algorithms.spec import AlgorithmSpec

    @dataclass(frozen=True)
    class Settings:
        rate: float
        steps: int = 3
        name: str = "x"
        flag: bool = False

    monkeypatch.setattr(sys.modules[__name__], "Settings", Settings, raising=False)
    spec = AlgorithmSpec("toy", "Toy", "none", Settings, None, None)
    assert single_run.make_settings(spec, None, {"rate": 1, "flag": True}) == Settings(1, flag=True)
    for given, message in (
        ({"rate": True}, "a number"),
        ({"rate": 1, "steps": 1.5}, "an integer"),
        ({}, "needs --set rate"),
    ):
        with pytest.raises(ValueError, match=message):
            single_run.make_settings(spec, None, given)
    with pytest.raises(ValueError, match="toy has: rate, steps, name, flag"):
        single_run.make_settings(spec, None, {"preset": "theory"})
    with pytest.raises(TypeError, match="must be a dataclass"):
        AlgorithmSpec("toy", "Toy", "none", dict, None, None)
