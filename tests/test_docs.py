"""The pages are true: their code runs and prints what they say, their commands and links exist, their examples work.

In a python block the comment behind a `print` (or, for a loop, the comment lines below it) is what is printed. "about"
in front of it allows numbers to be off by a quarter, for runs in which a rounding can change what follows. A console
block holds `$ preflab ...` and, if it was run for the page, what that prints, where numbers may be off likewise.
"""

import ast
import contextlib
import importlib.util
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import gymnasium
import pytest
import typer.main
from preflab.envs.registration import WORLDS
from preflab.llm_bridge.training.methods import METHODS, find_method
from preflab.theory import registry

from preflab.cli import app

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
NUMBER = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?(?:e-?\d+)?")
EXAMPLE_FILES = (
    "envs/two_doors.py",
    "algorithms/explore_then_commit.py",
    "algorithms/exponential_po.py",
    "theory/claims/explore_then_commit.py",
    "tests/test_two_doors.py",
    "tests/test_explore_then_commit.py",
    "tests/test_exponential_po.py",
)


def name_of(page):
    return page.relative_to(ROOT).as_posix()


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


def console(text):
    """(command, printed) of every `$` line; `printed` is what stands below it, "" if nothing does."""
    found = []
    for block in blocks(text, "console"):
        for part in re.split(r"^\$ ", block, flags=re.M)[1:]:
            command, _, printed = part.partition("\n")
            found.append((command, printed))
    return found


def number(text):
    return float(text.replace(",", ""))


def agrees(shown, printed, tolerance):
    """The same words, and the same numbers up to a relative tolerance."""
    shown, printed = shown.split(), printed.split()
    if [NUMBER.sub("#", word) for word in shown] != [NUMBER.sub("#", word) for word in printed]:
        return False
    pairs = zip(NUMBER.findall(" ".join(shown)), NUMBER.findall(" ".join(printed)), strict=True)
    return all(number(b) == pytest.approx(number(a), rel=tolerance, abs=0) for a, b in pairs)


@pytest.mark.parametrize(
    ("shown", "printed", "tolerance", "same"),
    [
        ("regret: 100.5", "regret:  100.5", 0, True),
        ("regret: 100", "regret: 120", 0.25, True),
        ("regret: 100", "regret: 130", 0.25, False),
        ("V* 0.5239", "V* 0.5238", 0, False),
        ("regret: 100", "queries: 100", 0.25, False),
        ("1 of 2", "1 of 2 of 3", 0.25, False),
    ],
)
def test_the_comparison_of_outputs_can_fail(shown, printed, tolerance, same):
    assert agrees(shown, printed, tolerance) is same


# ---- python blocks ---------------------------------------------------------------------------------------------


def expected_lines(block):
    """What a block says that it prints: comments behind prints, and comment lines at its left margin."""
    printing = {
        node.end_lineno
        for node in ast.walk(ast.parse(block))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print"
    }
    lines = []
    for i, line in enumerate(block.splitlines(), 1):
        code, _, comment = line.partition("  # ")
        if line.startswith("# "):
            lines.append(line[2:])
        elif i in printing and code != line:
            lines.append(comment)
    return lines


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CONTRIBUTING.md"], ids=name_of)
def test_python_blocks_run_and_print_what_they_say(page):
    names = {}
    for block in blocks(page.read_text(encoding="utf-8"), "python"):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(block, name_of(page), "exec"), names)
        shown, said = expected_lines(block), printed.getvalue().splitlines()
        assert len(shown) == len(said), f"{shown} is not {said}"
        for expected, line in zip(shown, said, strict=True):
            about = expected.startswith("about ")
            assert agrees(expected.removeprefix("about "), line, 0.25 if about else 0), f"{expected} | {line}"


def test_the_readme_has_an_example():
    assert "PRLSVI(" in "".join(blocks((ROOT / "README.md").read_text(encoding="utf-8"), "python"))


# ---- commands --------------------------------------------------------------------------------------------------

COMMANDS = [
    pytest.param(command, printed, id=f"{name_of(page)}: {command}")
    for page in PAGES
    for command, printed in console(page.read_text(encoding="utf-8"))
]


def preflab(*arguments, cwd, source=ROOT):
    """Run the command line of a source tree in a folder of its own."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("COV", "PYTEST"))}
    return subprocess.run(
        [sys.executable, "-m", "preflab", *arguments],
        cwd=cwd,
        env=kept | {"PYTHONPATH": str(source / "src"), "COLUMNS": "140"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def parse(command):
    """Check a `preflab` command line without running it; its names must be known too."""
    program, name, *arguments = shlex.split(command)
    assert program == "preflab"
    found = typer.main.get_command(app).commands[name]
    while hasattr(found, "commands"):  # a group of commands, such as bridge
        name, *arguments = arguments
        found = found.commands[name]
    asked = found.make_context(name, arguments).params
    if name == "run":
        registry.find("algorithm", asked["algorithm"], registry.load_algorithms())
        registry.find("env", asked["env"], registry.world_names())
    if name == "verify":
        registry.select_claims(asked["claims"] or [])
    if name == "train" and asked["method"] is not None:
        find_method(asked["method"])
    return asked


@pytest.mark.parametrize(("command", "printed"), COMMANDS)
def test_commands_are_understood(command, printed):
    if not printed.startswith("error:"):
        assert parse(command)  # every option was understood, and every name is known


@pytest.mark.parametrize(
    "command",
    [
        "preflab bridge train nash_mc",
        "preflab bridge trian dpo",
        "preflab verify --quik",
        "preflab verfy",
        "preflab run pr_lsvi Nowhere",
        "preflab verify nothing.x",
    ],
)
def test_a_wrong_command_is_noticed(command):
    with pytest.raises((Exception, SystemExit)):
        parse(command)


@pytest.mark.parametrize(("command", "printed"), [p for p in COMMANDS if p.values[1]])
def test_commands_print_what_the_page_shows(command, printed, tmp_path):
    here = ("--jobs", "0") if " verify " in command else ()  # in one process: quicker for a few cells
    done = preflab(*shlex.split(command)[1:], *here, cwd=tmp_path)
    said = done.stderr if printed.startswith("error:") else done.stdout
    assert done.returncode == (2 if printed.startswith("error:") else 0), done.stderr
    if "┃" in printed:  # a table: rounding errors and seconds are not repeatable, the rest is
        printed, said = (re.sub(r"[━┏┓┗┛┳┻╇└┘┴─┡┩]+", "", text) for text in (printed, said))
        printed, said = (re.sub(r"\d\S*e-\d+|\d+\.\d+", "#", text) for text in (printed, said))
    assert agrees(printed, said, 0.25), said


def test_the_bridges_page_names_every_method_and_parameter():
    page = (ROOT / "docs" / "bridge.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    for name, method in METHODS.items():
        (row,) = [line for line in rows if f"`{name}`" in line.split("|")[1]]
        named = set(re.findall(r"\w+", row.split("|")[3]))
        assert {*method.parameters, *method.sampler} <= named, name


def test_make_knows_every_target_that_a_page_names():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", makefile, re.M))
    named = set()
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        named |= set(re.findall(r"(?:^|`)make ([a-z]+)", text, re.M))
    assert {"verify", "test", "help"} <= named <= targets


# ---- links, names, paths ---------------------------------------------------------------------------------------


def anchors(text):
    """The anchors that a page's headings get."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page, text):
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        path = page.parent / file if file else page
        if not path.exists() or (anchor and anchor not in anchors(path.read_text(encoding="utf-8"))):
            broken.append(target)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    assert broken_links(page, page.read_text(encoding="utf-8")) == []


def test_a_broken_link_is_noticed():
    page = ROOT / "README.md"
    assert broken_links(
        page, "[a](docs/none.md) [b](docs/claims.md#nothing) [c](docs/claims.md#what-there-is)"
    ) == [
        "docs/none.md",
        "docs/claims.md#nothing",
    ]


def test_the_pages_name_the_worlds_that_are_registered_and_no_others():
    named = set(re.findall(r"preflab/\w+-v\d+", "".join(p.read_text(encoding="utf-8") for p in PAGES)))
    assert named - {"preflab/TwoDoors-v0"} == set(WORLDS)
    rows = re.findall(
        r"^\| `(preflab/\w+-v\d+)`", (ROOT / "docs" / "worlds.md").read_text(encoding="utf-8"), re.M
    )
    assert sorted(rows) == sorted([*WORLDS, *WORLDS])  # what the defaults give, and what it is


@pytest.mark.parametrize("page", [*PAGES, ROOT / "docs" / "build.py"], ids=name_of)
def test_no_page_knows_the_machine_that_it_was_written_on(page):
    text = page.read_text(encoding="utf-8")
    assert not re.findall(
        r"(?<![\w.])/(?:work|tmp|home|root|usr|opt|mnt|Users)\b|localhost|\d+\.\d+\.\d+\.\d+", text
    )


# ---- what a computer makes -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def build():
    spec = importlib.util.spec_from_file_location("docs_build", ROOT / "docs" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tables_are_up_to_date(build, capsys):
    """If this fails: python docs/build.py --tables"""
    assert build.main(["--check"]) == 0
    assert "up to date" in capsys.readouterr().out


def test_an_old_table_is_noticed_and_renewed(build, tmp_path, monkeypatch, capsys):
    for name in build.TABLES:
        shutil.copy(ROOT / "docs" / name, tmp_path)
    page = tmp_path / "claims.md"
    page.write_text(
        page.read_text(encoding="utf-8").replace("| identity | The", "| rate | The", 1), encoding="utf-8"
    )
    monkeypatch.setattr(build, "DOCS", tmp_path)
    assert build.main(["--check"]) == 1
    assert "out of date: claims.md" in capsys.readouterr().out
    assert build.main(["--tables"]) == 0
    assert page.read_text(encoding="utf-8") == (ROOT / "docs" / "claims.md").read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="markers"):
        build.with_tables("a page", ["rows"])


def test_the_figure_can_be_drawn_again(build, tmp_path):
    build.draw_regret(tmp_path / "regret.png", episodes=40, seeds=2)
    build.draw_run(tmp_path / "run.png")
    header = b"\x89PNG\r\n"
    for path in (tmp_path / "regret.png", tmp_path / "run.png", build.FIGURE, build.RUN_FIGURE):
        assert path.read_bytes().startswith(header)


# ---- the examples of CONTRIBUTING.md, in a copy of the sources -------------------------------------------------


def example(path):
    """The example file of that path: a python block whose first line is the path."""
    (code,) = [b.partition("\n")[2] for b in blocks(CONTRIBUTING, "python") if b.startswith(f"# {path}\n")]
    return code


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """The sources with the examples added, as CONTRIBUTING.md says."""
    folder = tmp_path_factory.mktemp("checkout")
    for room in ("envs", "algorithms", "theory", "llm_bridge", "src"):
        shutil.copytree(ROOT / room, folder / room, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "tests").mkdir()
    shutil.copy(ROOT / "tests" / "conftest.py", folder / "tests")
    shutil.copy(ROOT / "pyproject.toml", folder)
    for path in EXAMPLE_FILES:
        (folder / path).write_text(example(path), encoding="utf-8")
    worlds = folder / "envs" / "registration.py"
    begin, text = "WORLDS: dict[str, World] = {\n", worlds.read_text(encoding="utf-8")
    assert text.count(begin) == 1
    worlds.write_text(
        text.replace(begin, begin + example("envs/registration.py, in WORLDS")), encoding="utf-8"
    )
    return folder


def test_every_block_of_the_guide_is_used():
    first_lines = [b.partition("\n")[0] for b in blocks(CONTRIBUTING, "python")]
    assert sorted(first_lines) == sorted(
        f"# {p}" for p in (*EXAMPLE_FILES, "envs/registration.py, in WORLDS")
    )


def test_the_examples_pass_their_own_tests(checkout):
    """The closed form, Gymnasium's checker without a warning, save and load."""
    command = [sys.executable, "-m", "pytest", "tests", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("COV", "PYTEST"))}
    done = subprocess.run(
        command,
        cwd=checkout,
        env=kept | {"PYTHONPATH": str(checkout / "src")},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert "21 passed" in done.stdout


def test_the_examples_are_in_the_house_style(checkout):
    for action in (["check"], ["format", "--check"]):
        command = [sys.executable, "-m", "ruff", *action, "--no-cache", *EXAMPLE_FILES]
        done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stdout


def guide_command(start):
    """The arguments of the one command of the guide that begins like this."""
    (command,) = re.findall(rf"^preflab ({start} .+)$", CONTRIBUTING, re.M)
    return shlex.split(command)


def test_the_new_algorithm_runs_in_the_new_world(checkout, tmp_path):
    done = preflab(*guide_command("run"), cwd=tmp_path, source=checkout)
    assert done.returncode == 0, done.stderr
    assert "queries: 200" in done.stdout
    assert (tmp_path / "runs" / "two_doors" / "regret.svg").is_file()


def test_the_new_claim_is_verified_and_its_control_caught(checkout, tmp_path):
    done = preflab(*guide_command("verify"), "--jobs", "0", cwd=tmp_path, source=checkout)
    assert done.returncode == 0, done.stderr + done.stdout
    assert "1 claim: 1 verified; 1 of 1 controls caught." in done.stdout


def edited(checkout, path, old, new):
    """A context in which one file of the copy is different."""
    file = checkout / path

    @contextlib.contextmanager
    def context():
        text = file.read_text(encoding="utf-8")
        assert old in text
        file.write_text(text.replace(old, new), encoding="utf-8")
        try:
            yield
        finally:
            file.write_text(text, encoding="utf-8")

    return context()


@pytest.mark.parametrize(
    ("old", "new", "seeds", "code", "words"),
    [
        ("controls=(", "controls=() and (", 1, 2, "has no control"),
        ("runs(plan, flipped=True)", "runs(plan)", 20, 1, "control flipped was not caught"),
        ("explore_then_commit.finds", "other.finds", 1, 2, "must begin with explore_then_commit"),
        (":committed", ":commited", 1, 2, "defines no function commited"),
        ('return {"loss"', 'return {1: "", "loss"', 1, 1, "keys are strings"),
        ("two_doors()", "two_doors(p=1.5)", 1, 1, "contains a negative probability"),
    ],
)
def test_a_broken_example_is_refused(checkout, tmp_path, old, new, seeds, code, words):
    asked = ("verify", "explore_then_commit", "--seeds", str(seeds), "--jobs", "0")
    with edited(checkout, "theory/claims/explore_then_commit.py", old, new):
        done = preflab(*asked, cwd=tmp_path, source=checkout)
    assert done.returncode == code, done.stderr + done.stdout
    assert words in " ".join((done.stdout + done.stderr).split())


def test_an_algorithm_without_a_settings_dataclass_is_refused(checkout, tmp_path):
    with edited(checkout, "algorithms/explore_then_commit.py", "settings=Settings,", "settings=dict,"):
        done = preflab("run", "explore_then_commit", "TwoDoors", cwd=tmp_path, source=checkout)
    assert done.returncode != 0
    assert "settings must be a dataclass" in done.stderr


def test_the_worlds_of_this_process_are_untouched():
    assert "preflab/TwoDoors-v0" not in gymnasium.registry
