"""Cells on processes, in this process and on Ray; claims, controls and their verdicts; names and nearest names."""

import math
import multiprocessing
import sys
import threading
import types

import pytest
from preflab.theory import registry, runner
from preflab.theory.cells import Cell, canonical, decode
from preflab.theory.claim import Claim, Control, Judgement, Outcome, Plan
from preflab.theory.runner import expand, judge_claims, run_cells, run_claims
from preflab.theory.statistics import judge_identity
from preflab.theory.store import Store

QUICK = Plan(quick=True)


def draws(count, **parameters):
    return [Cell("claims._selftest:draw", parameters, seed) for seed in range(count)]


def other(function, seed=0):
    return Cell(f"claims._selftest:{function}", {}, seed)


def claim(**changes):
    fields = {
        "name": "paper.statement",
        "kind": "identity",
        "title": "t",
        "statement": "$x$",
        "cells": lambda plan: draws(2),
        "judge": lambda outcomes: judge_identity(
            [o["shift"] if "shift" in o.cell.parameters else 0 for o in outcomes]
        ),
        "controls": (Control("shifted", "shifted by one", lambda plan: draws(2, shift=1.0)),),
    }
    return Claim(**fields | changes)


# ---- cells ---------------------------------------------------------------------------------------------------


def test_neither_workers_nor_order_change_a_number(tmp_path):
    tables = []
    for name, jobs, cells in (("here", 0, draws(5)), ("one", 1, draws(5)), ("two", 2, draws(5)[::-1])):
        with Store.open(tmp_path / name) as store:
            assert run_cells(cells + cells, store, jobs=jobs) == {}
            tables.append(store.table())
    assert tables[0] == tables[1] == tables[2]
    assert len(tables[0]) == 5


def test_progress_counts_what_is_there_already(tmp_path):
    seen = []
    with Store.open(tmp_path) as store:
        run_cells(draws(2), store, jobs=0)
        run_cells(draws(5), store, jobs=0, progress=lambda done, total, cell: seen.append((done, total)))
        assert seen == [(2, 5), (3, 5), (4, 5), (5, 5), (5, 5)]
        seen.clear()
        run_cells(draws(5), store, jobs=2, progress=lambda done, total, cell: seen.append((done, total)))
        assert seen == [(5, 5)]


def test_a_cell_that_another_process_finished_meanwhile_is_not_run(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(runner, "run_one", lambda cell: ran.append(cell) or runner.Ended(cell, {"x": 1}, 0.0))
    with Store.open(tmp_path) as store:

        def other_process(done, total, cell):
            if cell is not None and len(ran) == 1:
                for each in draws(4):
                    store.put(each, {"x": 1}, 0.0)

        run_cells(draws(4), store, jobs=0, progress=other_process)
    assert len(ran) == 1


def test_errors_name_their_cells_and_leave_the_others_alone(tmp_path):
    cells = [other("fail", 7), other("die"), other("not_a_dict"), *draws(2)]
    with Store.open(tmp_path) as store:
        failures = run_cells(cells, store, jobs=2)
        assert set(failures) == set(cells[:3])
        assert "seed 7 was never going to work" in failures[cells[0]]
        assert "died (exit code 9" in failures[cells[1]]
        assert "returned a int" in failures[cells[2]]
        assert store.missing(cells) == cells[:3]


def test_workers_are_other_processes_with_one_thread(tmp_path):
    with Store.open(tmp_path) as store:
        run_cells([other("threads")], store, jobs=1)
        found = store.get(other("threads")).result
    assert found["threads"] == "1"
    assert found["pid"] != multiprocessing.current_process().pid


def test_what_workers_inherit_is_undone_here(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    monkeypatch.delenv("NUMBA_NUM_THREADS", raising=False)
    with runner._inherited_by_workers():
        assert runner.os.environ["OMP_NUM_THREADS"] == runner.os.environ["NUMBA_NUM_THREADS"] == "1"
    assert runner.os.environ["OMP_NUM_THREADS"] == "5"
    assert "NUMBA_NUM_THREADS" not in runner.os.environ


def test_workers_can_be_started_from_another_thread(tmp_path):
    failures = []

    def work():
        with Store.open(tmp_path) as store:
            failures.append(run_cells(draws(1), store, jobs=1))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert failures == [{}]


def test_an_interruption_keeps_what_is_finished_and_stops_the_workers(tmp_path):
    def interrupt(done, total, cell):
        if done == 2:
            raise KeyboardInterrupt

    with Store.open(tmp_path) as store:
        with pytest.raises(KeyboardInterrupt):
            run_cells(draws(30, pause=0.05), store, jobs=2, progress=interrupt)
        assert len(store) == 2
    assert not multiprocessing.active_children()


def test_a_worker_serves_until_its_pipe_closes():
    ours, theirs = multiprocessing.Pipe()
    good, stale = draws(1)[0], draws(2)[1]
    ours.send_bytes(runner._order(good))
    ours.send_bytes(canonical([stale.function, stale.parameters, stale.seed, "key of other code"]).encode())
    thread = threading.Thread(target=runner.serve, args=(theirs,))
    thread.start()
    answers = [decode(runner.json.loads(ours.recv_bytes())) for _ in range(2)]
    ours.close()
    thread.join(timeout=10)
    assert not thread.is_alive()
    assert canonical(answers[0]["result"]) == canonical(good.run())
    assert answers[1]["result"] is None
    assert "the code changed" in answers[1]["error"]


def test_jobs_are_counted_from_zero(tmp_path):
    with Store.open(tmp_path) as store, pytest.raises(ValueError, match="jobs is -1"):
        run_cells(draws(1), store, jobs=-1)


# ---- Ray, by a stand-in with the same calls ----------------------------------------------------------------------


class StandInRay(types.ModuleType):
    """Ray's calls as this project uses them, run in place; a lost worker for seed 13."""

    def __init__(self, running=False):
        super().__init__("ray")
        self.calls, self.running = [], running
        self.exceptions = types.SimpleNamespace(RayError=ArithmeticError)

    def is_initialized(self):
        return self.running

    def init(self, **options):
        self.calls.append(("init", options))

    def shutdown(self):
        self.calls.append(("shutdown", {}))

    def remote(self, **options):
        return lambda function: types.SimpleNamespace(remote=lambda cell: (len(self.calls), function, cell))

    def wait(self, references, num_returns):
        return references[-num_returns:], references[:-num_returns]

    def get(self, reference):
        if reference[2].seed == 13:
            raise ArithmeticError("node lost")
        return reference[1](reference[2])


@pytest.mark.parametrize(("running", "address"), [(False, ""), (False, "auto"), (True, "")])
def test_ray_gives_the_same_numbers(tmp_path, monkeypatch, running, address):
    ray = StandInRay(running)
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setenv("RAY_ADDRESS", address)
    lost = Cell("claims._selftest:draw", {}, 13)
    with Store.open(tmp_path / "ray") as store, Store.open(tmp_path / "here") as here:
        failures = run_cells([*draws(5), lost], store, jobs=2, backend="ray")
        run_cells(draws(5), here, jobs=0)
        assert store.table() == here.table()
    assert "node lost" in failures[lost]
    assert [name for name, _ in ray.calls] == ([] if running else ["init", "shutdown"])
    if not running:
        assert ("num_cpus" in ray.calls[0][1]) == (not address)


def test_without_ray_the_error_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with Store.open(tmp_path) as store, pytest.raises(ValueError, match="pip install ray"):
        run_cells(draws(1), store, backend="ray")


# ---- claims ----------------------------------------------------------------------------------------------------


def test_a_claim_is_verified_and_its_control_caught(tmp_path):
    with Store.open(tmp_path) as store:
        (result,) = run_claims([claim()], QUICK, store, jobs=0)
    assert result.ok
    assert (result.seeds, result.cells, result.unfinished) == (2, 4, 0)
    assert [(c.name, c.caught, c.verdict) for c in result.controls] == [("shifted", True, "refuted")]
    assert result.seconds > 0


def test_a_control_that_the_judge_verifies_is_not_caught(tmp_path):
    blind = claim(controls=(Control("same", "nothing", lambda plan: draws(2)),))
    with Store.open(tmp_path) as store:
        (result,) = run_claims([blind], QUICK, store, jobs=0)
    assert result.judgement.verdict == "verified"
    assert not result.controls[0].caught
    assert not result.ok


def test_cells_shared_between_claims_run_once():
    assert len(expand([claim(), claim(name="paper.other")], QUICK)) == 4


def test_a_control_that_crashes_is_not_caught(tmp_path):
    broken = claim(controls=(Control("crash", "crashes", lambda plan: [other("fail")]),))
    with Store.open(tmp_path) as store:
        (result,) = run_claims([broken], QUICK, store, jobs=0)
    control = result.controls[0]
    assert (control.caught, control.verdict, control.detail) == (False, None, "1 of 1 cells failed")
    assert "claims._selftest:fail(seed=0) failed" in result.errors[0]
    assert not result.ok


def test_a_claim_whose_cells_crash_is_inconclusive(tmp_path):
    with Store.open(tmp_path) as store:
        (result,) = run_claims([claim(cells=lambda plan: [*draws(1), other("fail")])], QUICK, store, jobs=0)
    assert result.judgement.verdict == "inconclusive"
    assert result.judgement.detail == "1 of 2 cells failed"
    assert math.isnan(result.judgement.statistic)
    assert result.unfinished == 1


def test_what_is_not_finished_is_said(tmp_path):
    with Store.open(tmp_path) as store:
        run_cells(draws(1), store, jobs=0)
        (result,) = judge_claims([claim()], QUICK, store)
    assert result.judgement.detail == "1 of 2 cells are not finished"
    assert result.controls[0].detail == "2 of 2 cells are not finished"


def test_a_judge_that_fails_is_reported_and_catches_nothing(tmp_path):
    def judge(outcomes):
        raise ZeroDivisionError("no seeds")

    with Store.open(tmp_path) as store:
        (result,) = run_claims([claim(judge=judge)], QUICK, store, jobs=0)
    assert result.judgement.verdict == "inconclusive"
    assert "ZeroDivisionError: no seeds" in result.judgement.detail
    assert not result.controls[0].caught
    assert "the judge of paper.statement failed" in result.errors[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"controls": ()}, "has no control"),
        ({"name": "paper"}, "paper.statement"),
        ({"kind": "guess"}, "not one of identity"),
        ({"controls": (Control("a", "", draws), Control("a", "", draws))}, "share a name"),
    ],
)
def test_a_claim_is_checked_when_it_is_made(changes, message):
    with pytest.raises(ValueError, match=message):
        claim(**changes)


def test_a_verdict_is_one_of_three():
    with pytest.raises(ValueError, match="not one of verified, refuted, inconclusive"):
        Judgement("likely", 0.0, 0.0, "")


def test_plans_and_outcomes():
    assert list(Plan(quick=True).seed_range(quick=2, full=9)) == [0, 1]
    assert len(Plan().seed_range(quick=2, full=9)) == 9
    assert len(Plan(seeds=5).seed_range(quick=2, full=9)) == 5
    with pytest.raises(ValueError, match="seeds is 0"):
        Plan(seeds=0)
    outcome = Outcome(draws(2, n=4)[1], {"x": 3})
    assert (outcome["x"], outcome["n"], outcome.seed) == (3, 4, 1)
    with pytest.raises(KeyError):
        outcome["y"]


# ---- names -------------------------------------------------------------------------------------------------------


def test_a_paper_or_a_statement_selects_claims():
    both = [c.name for c in registry.select_claims(["_example"])]
    assert both == ["_example.root_n", "_example.hoeffding"]
    picked = registry.select_claims(["_example.hoeffding", "_example", "_example.hoeffding"])
    assert [c.name for c in picked] == ["_example.hoeffding", "_example.root_n"]


def test_examples_are_not_listed_and_listed_claims_are_well_named():
    names = list(registry.load_claims())
    assert not [name for name in names if name.startswith("_")]
    assert [c.name for c in registry.select_claims()] == names


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("_example.rot_n", "_example.root_n"), ("_exmple", None), ("_example.hoefding", "_example.hoeffding")],
)
def test_a_wrong_name_gets_the_nearest(name, nearest):
    with pytest.raises(registry.UnknownName, match="there is no claim") as caught:
        registry.select_claims([name])
    assert (nearest in caught.value.suggestions) if nearest else "preflab list claims" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("query_rule", "pr_lsvi.query_rule"),
        ("pr_lsvi.qury_rule", "pr_lsvi.query_rule"),
        ("pr-lsvi.query_rule", "pr_lsvi.query_rule"),
        ("TokenMPD", "preflab/TokenMDP-v0"),
    ],
)
def test_the_last_part_of_a_name_is_enough_to_be_found(name, nearest):
    assert registry.nearest(name, ["pr_lsvi.query_rule", "preflab/TokenMDP-v0", "nash_md.rate"])[0] == nearest


def test_worlds_and_algorithms_by_name():
    worlds = registry.world_names()
    assert registry.find("env", "DeepSea", worlds) == registry.find("env", "preflab/DeepSea-v0", worlds)
    with pytest.raises(registry.UnknownName, match="did you mean preflab/DeepSea-v0"):
        registry.find("env", "DepSea", worlds)
    assert registry.load_algorithms()["pr_lsvi"].name == "pr_lsvi"


def test_every_loss_is_a_pure_function_of_tensors_and_named_after_its_module():
    losses = registry.load_losses()
    assert {"dpo", "ipo", "inpo", "sppo"} <= set(losses)
    for name, spec in losses.items():
        assert spec.loss.__module__ == f"preflab.algorithms.{name}"
        assert spec.inputs[0] == "policy"
        assert "weight" in spec.inputs
        assert spec.title
        assert spec.paper


@pytest.mark.parametrize(
    ("names", "message"),
    [(["other.name"], "must begin with paper"), (["paper.a", "paper.a"], "names two claims alike")],
)
def test_a_paper_names_its_claims_after_itself_and_apart(monkeypatch, names, message):
    module = types.SimpleNamespace(CLAIMS=[claim(name=name) for name in names])
    monkeypatch.setattr(registry.importlib, "import_module", lambda *_: module)
    with pytest.raises(ValueError, match=message):
        registry._claims_of("paper")
