"""House rules: what an import costs, which room may import which, whether pyproject.toml tells the truth."""

import ast
import doctest
import importlib
import importlib.metadata
import json
import pkgutil
import re
import subprocess
import sys
import tomllib
from itertools import chain
from pathlib import Path

import pytest

import preflab

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
FOLDERS = {p: ROOT / f for p, f in PROJECT["tool"]["setuptools"]["package-dir"].items()}
# From left to right: a room imports from itself and from those before it.
ROOMS = ("preflab.envs", "preflab.algorithms", "preflab.theory", "preflab.llm_bridge", "preflab")
HEAVY = {"torch", "transformers", "cvxpy", "matplotlib"}


def python(code: str) -> subprocess.CompletedProcess[str]:
    """`code` in a fresh interpreter that turns warnings into errors."""
    command = [
        sys.executable,
        "-W",
        "error",
        "-c",
        f"import sys; sys.path.insert(0, {str(ROOT / 'src')!r})\n{code}",
    ]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def loaded_after(statement: str) -> set[str]:
    """The top-level modules in sys.modules after `statement`."""
    done = python(f"{statement}\nprint(*{{name.partition('.')[0] for name in sys.modules}})")
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def modules() -> list[str]:
    return sorted(m.name for m in pkgutil.walk_packages(preflab.__path__, "preflab."))


def room_of(module: str) -> str | None:
    """The room that a dotted name lies in, None if it is not of this project."""
    return next((r for r in ROOMS if module == r or module.startswith(r + ".")), None)


def imported(source: str, module: str, is_package: bool) -> list[tuple[int, str]]:
    """(line, absolute name) of everything that `source` imports, at any depth."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, name.name) for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            parts = module.split(".") if node.level else []
            parts = parts[: len(parts) - node.level + is_package] if node.level else parts
            base = ".".join(parts + ([node.module] if node.module else []))
            found += [(node.lineno, f"{base}.{name.name}") for name in node.names]
    return found


def against_the_arrow(source: str, module: str, is_package: bool = False) -> list[str]:
    """The imports of `source` that point from its room to one on its right."""
    here = ROOMS.index(room_of(module))
    return [
        f"{module}, line {line}: {name}"
        for line, name in imported(source, module, is_package)
        if (room := room_of(name)) and ROOMS.index(room) > here and name != "preflab.__version__"
    ]


def sources() -> list[tuple[str, Path]]:
    """(module name, file) of every module of the project, from the folders and not from the import system."""
    nested = {f for p, f in FOLDERS.items() if p != "preflab"}
    found = []
    for package, folder in FOLDERS.items():
        for path in folder.rglob("*.py"):
            if package == "preflab" and any(f in path.parents for f in nested):
                continue
            parts = path.relative_to(folder).with_suffix("").parts
            found.append((".".join((package, *(p for p in parts if p != "__init__"))), path))
    return sorted(found)


def test_importing_the_root_package_loads_nothing_heavy():
    assert not loaded_after("import preflab") & {
        *HEAVY,
        "numpy",
        "scipy",
        "numba",
        "gymnasium",
        "typer",
        "rich",
    }


def test_importing_the_worlds_loads_no_compiler():
    assert not loaded_after("import preflab.envs") & {*HEAVY, "numba"}


def test_importing_every_room_and_the_command_line_loads_nothing_heavy():
    rooms = ", ".join(ROOMS)
    assert not loaded_after(f"import {rooms}, preflab.cli") & HEAVY


def test_the_check_of_loaded_modules_sees_an_import():
    assert "matplotlib" in loaded_after("import preflab, matplotlib")


def test_imports_point_to_the_left():
    files = sources()
    assert len(files) >= len(modules())
    wrong = [
        line
        for module, path in files
        for line in against_the_arrow(path.read_text(encoding="utf-8"), module, path.name == "__init__.py")
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("module", "package", "source"),
    [
        ("preflab.envs.mdp", False, "from ..algorithms import planning"),
        ("preflab.envs", True, "from ..theory import store"),
        ("preflab.algorithms.planning", True, "from ...theory.claims import pr_lsvi"),
        ("preflab.algorithms.planning.exact", False, "def f():\n    import preflab.llm_bridge.lattice"),
        ("preflab.theory.store", False, "if True:\n    from preflab import cli"),
        ("preflab.theory.store", False, "from .. import llm_bridge"),
    ],
)
def test_an_import_to_the_right_is_caught(module, package, source):
    assert len(against_the_arrow(source, module, package)) == 1


@pytest.mark.parametrize(
    ("module", "package", "source"),
    [
        ("preflab.algorithms.planning", True, "from ...envs import FiniteMDP"),
        (
            "preflab.theory.claims.pr_lsvi",
            False,
            "from ...algorithms import x\nfrom ..claim import Claim",
        ),
        ("preflab.theory.report", False, "from .. import __version__\nimport numpy.linalg"),
        ("preflab.cli", False, "from .llm_bridge import lattice\nimport preflab.theory"),
        ("preflab.theory.report", False, "from .. import envs"),
    ],
)
def test_an_import_to_the_left_passes(module, package, source):
    assert against_the_arrow(source, module, package) == []


def test_the_package_list_is_the_folders_with_an_init_file():
    found = {module for module, path in sources() if path.name == "__init__.py"}
    listed = PROJECT["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(found)
    assert len(listed) == len(set(listed))


@pytest.mark.parametrize("room", [room.partition(".")[2] for room in ROOMS[:-1]])
def test_a_room_refuses_to_be_imported_under_another_name(room):
    done = python(f"sys.path.insert(0, {str(ROOT)!r})\nimport {room}")
    assert done.returncode != 0
    assert f"import preflab.{room}" in done.stderr


def test_the_version_is_the_same_everywhere():
    version = PROJECT["project"]["version"]
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert preflab.__version__ == version
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(r"^## \[(.+?)\]", changelog, re.M)[1] == version


def distribution() -> importlib.metadata.Distribution:
    try:
        return importlib.metadata.distribution("preflab")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("a bare checkout: preflab is not installed, so it has no metadata")


def test_the_installed_version_is_the_imported_one():
    assert distribution().version == preflab.__version__


def test_gymnasium_makes_a_world_by_the_name_of_its_module():
    done = python(
        "import gymnasium; print(gymnasium.make('preflab.envs:preflab/TokenMDP-v0').reset(seed=0)[0])"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout
    assert done.stderr == ""


def test_the_pins_are_exact_and_cover_what_is_asked_for():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    asked = chain(PROJECT["project"]["dependencies"], *PROJECT["project"]["optional-dependencies"].values())
    names = {canonical(re.match(r"[\w-]+", line)[0]) for line in asked} - {"preflab"}
    assert names <= {canonical(name) for name in pins}
    assert all(re.fullmatch(r"[\w.]+", version) for version in pins.values())


def canonical(name: str) -> str:
    return name.lower().replace("_", "-")


@pytest.mark.parametrize(
    ("taken", "rooms", "code"),
    [(19, ("envs",), 0), (18, ("envs",), 1), (18, (), 0), (20, ("envs", "theory"), 1)],
)
def test_the_floor_of_branch_coverage_holds_room_by_room(tmp_path, taken, rooms, code):
    files = {
        name: {"summary": {"covered_branches": taken // 2, "num_branches": 10}}
        for name in ("envs/a", "envs/b")
    }
    files["envs/b"]["summary"]["covered_branches"] += taken % 2
    (tmp_path / "report.json").write_text(json.dumps({"files": files}))
    command = [sys.executable, ROOT / "tools" / "branch_coverage.py", tmp_path / "report.json", "95", *rooms]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == code
    assert f"{taken:5d} of    20" in done.stdout


@pytest.mark.parametrize("name", ["preflab", *modules()])
def test_examples_in_docstrings_run(name):
    if name.endswith("__main__"):
        return
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert result.failed == 0
