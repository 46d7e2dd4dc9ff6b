"""Verify, killed, interrupted and doubled, as a user does it: real processes on one folder.

The cells of `_selftest.slow` write a line into a journal whenever they are executed, so that a finished cell which is
executed again is seen.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from preflab.theory.claims._selftest import JOURNAL
from preflab.theory.store import FILE, Store

import preflab

SOURCE = Path(preflab.__file__).resolve().parents[1]
SEEDS, CELLS = 12, 16  # the claim's, and with its control's
CLAIM = "_selftest.slow"

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals and process groups are POSIX's")


def start(out, journal, *more, claim=CLAIM):
    command = [
        sys.executable,
        "-m",
        "preflab",
        "verify",
        claim,
        "--seeds",
        str(SEEDS),
        "--jobs",
        "2",
        "--out",
        str(out),
    ]
    environment = os.environ | {
        "PYTHONPATH": str(SOURCE),
        JOURNAL: str(journal),
        "PYTHONWARNINGS": "error",
        "COLUMNS": "200",
    }
    return subprocess.Popen(
        [*command, *more],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a process group of its own, as a terminal's job has
    )


def end(process, code=0):
    out, err = process.communicate(timeout=90)
    assert process.returncode == code, err + out
    return out, err


def lines(journal):
    return journal.read_text().split("\n")[:-1] if journal.exists() else []


def wait_for(condition, process=None, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        assert process is None or process.poll() is None, process.communicate()
        time.sleep(0.01)


def table(out):
    with Store.open(out) as store:
        return store.table()


def finished(out):
    """What the journal calls the finished cells."""
    rows = table(out) if (out / FILE).exists() else []
    return {f"{json.loads(parameters).get('shift', 0.0)} {seed}" for _, _, parameters, seed, _ in rows}


def verdicts(out):
    claims = json.loads((out / "report.json").read_text())["claims"]
    return [{name: value for name, value in claim.items() if name != "seconds"} for claim in claims]


def group_is_gone(process):
    """No live process of the group is left (a zombie that nobody collects is not alive, where /proc tells)."""
    states = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, group = stat.read_text().rpartition(")")[2].split()[:3]
        except OSError:  # it ended meanwhile
            continue
        if int(group) == process.pid:
            states.append(state)
    if Path("/proc/self/stat").exists():
        return all(state in "ZX" for state in states)
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    end(start(folder / "out", folder / "journal"))
    assert len(lines(folder / "journal")) == CELLS
    return folder / "out"


def test_killed_at_any_moment_it_ends_with_the_same_numbers_and_repeats_nothing(tmp_path, undisturbed):
    out, rng = tmp_path / "out", random.Random(5)
    moments = [0, 1, 3]  # before the first cell, and after so many more
    for attempt, more in enumerate(moments):
        journal, before = tmp_path / f"journal-{attempt}", finished(out)
        process = start(out, journal)
        if more:
            wait_for(lambda: len(lines(journal)) >= more, process)  # noqa: B023
        time.sleep(rng.random() * 0.3)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        wait_for(lambda: group_is_gone(process))  # noqa: B023  (workers end by themselves)
        assert not before & set(lines(journal))
    before = finished(out)
    assert 0 < len(before) < CELLS
    _, err = end(start(out, tmp_path / "last"))
    assert f"{len(before)} of them finished before" in err
    assert not before & set(lines(tmp_path / "last"))
    assert len(lines(tmp_path / "last")) == CELLS - len(before)
    assert table(out) == table(undisturbed)
    assert verdicts(out) == verdicts(undisturbed)


def test_ctrl_c_keeps_the_finished_cells_and_stops_every_process(tmp_path, undisturbed):
    out, journal = tmp_path / "out", tmp_path / "journal"
    process = start(out, journal)
    wait_for(lambda: (out / FILE).exists() and len(lines(journal)) >= 6, process)
    os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to the whole group
    _, err = end(process, code=130)
    assert "Finished cells are kept" in err
    assert "Traceback" not in err
    wait_for(lambda: group_is_gone(process))
    kept = finished(out)
    assert kept
    end(start(out, tmp_path / "again"))
    assert not kept & set(lines(tmp_path / "again"))
    assert table(out) == table(undisturbed)


def test_two_processes_on_one_folder_share_the_work(tmp_path, undisturbed):
    out, journals = tmp_path / "out", [tmp_path / "one", tmp_path / "two"]
    processes = [start(out, journal) for journal in journals]
    for process in processes:
        end(process)
    assert table(out) == table(undisturbed)
    assert verdicts(out) == verdicts(undisturbed)
    executed = [*lines(journals[0]), *lines(journals[1])]
    assert set(executed) == finished(undisturbed)
    assert len(executed) < 2 * CELLS  # at most what was under way in both at a time is done twice
    assert sorted(path.name for path in out.iterdir()) == ["report.html", "report.json", FILE]
