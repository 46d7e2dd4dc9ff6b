"""Every way to install the project gives the same modules and data, and a checkout needs no install."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name == "nt", reason="links need a POSIX file system")]

ROOT = Path(__file__).resolve().parents[1]
NOT_SOURCE = shutil.ignore_patterns(
    ".*", "build", "dist", "reports", "__pycache__", "*.egg-info", "*.pyc", "*.nbi", "*.nbc"
)
# What an installation holds: modules, files that are not code, version and entry points.
INVENTORY = """
import importlib.metadata, json, pathlib, pkgutil, preflab
rooms = [pathlib.Path(p) for p in preflab.__path__]
import preflab.envs, preflab.algorithms, preflab.theory, preflab.llm_bridge
packages = {p.__name__: pathlib.Path(p.__file__).parent for p in
            (preflab, preflab.envs, preflab.algorithms, preflab.theory, preflab.llm_bridge)}
inner = set(packages.values())
data = set()
for name, folder in packages.items():
    for path in folder.rglob("*"):
        own = not any(other in path.parents for other in inner - {folder} if folder in other.parents)
        if own and path.is_file() and path.suffix not in {".py", ".pyc", ".nbi", ".nbc"}:
            data.add(name.replace(".", "/") + "/" + path.relative_to(folder).as_posix())
dist = importlib.metadata.distribution("preflab")
print(json.dumps({
    "modules": sorted(m.name for m in pkgutil.walk_packages(preflab.__path__, "preflab.")),
    "data": sorted(data),
    "version": dist.version,
    "entry points": sorted(f"{e.group}: {e.name} = {e.value}" for e in dist.entry_points),
    "at": str(pathlib.Path(preflab.envs.__file__).parents[1]),
}))
"""


def run(*command: object, cwd: Path) -> str:
    quiet = {
        name: value for name, value in os.environ.items() if not name.startswith(("COV", "PYTEST", "PYTHON"))
    }
    quiet["PIP_DISABLE_PIP_VERSION_CHECK"] = "1"
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=quiet,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources without anything that an earlier build left behind."""
    return shutil.copytree(ROOT, tmp_path_factory.mktemp("source") / "preflab", ignore=NOT_SOURCE)


@pytest.fixture(scope="module")
def dependencies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of links to what this environment has installed, preflab itself left out."""
    folder = tmp_path_factory.mktemp("dependencies")
    for path in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for item in Path(path).iterdir():
            if "preflab" not in item.name.lower() and item.suffix != ".pth":
                (folder / item.name).symlink_to(item)
    return folder


def fresh(folder: Path, dependencies: Path) -> Path:
    """The interpreter of a new virtual environment that can import the dependencies and nothing else."""
    venv.create(folder, with_pip=False, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(f"{dependencies}\n")
    return folder / "bin" / "python"


def install(interpreter: Path, *what: object, cwd: Path) -> None:
    """pip without a network: each requirement has to be met by what is there."""
    run(interpreter, "-m", "pip", "install", "--no-index", "--no-build-isolation", *what, cwd=cwd)


@pytest.fixture(scope="module")
def archives(
    checkout: Path, dependencies: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """The source archive and the wheel that `python -m build` makes from it."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, checkout, cwd=folder)
    (source,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return source, wheel


@pytest.fixture(scope="module")
def plain(
    checkout: Path, dependencies: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, object], Path]:
    """The inventory of `pip install .` and the interpreter that has it."""
    folder = tmp_path_factory.mktemp("plain")
    copy = shutil.copytree(checkout, folder / "copy")
    interpreter = fresh(folder / "env", dependencies)
    install(interpreter, ".", cwd=copy)
    return json.loads(run(interpreter, "-c", INVENTORY, cwd=folder)), interpreter


def test_a_plain_install_holds_every_module_and_every_data_file(plain, checkout):
    found, _ = plain
    rooms = {
        "preflab": "src/preflab",
        **{f"preflab/{r}": r for r in ("envs", "algorithms", "theory", "llm_bridge")},
    }
    files = {
        f"{package}/{path.relative_to(checkout / folder).as_posix()}"
        for package, folder in rooms.items()
        for path in (checkout / folder).rglob("*")
        if path.is_file()
    }
    code = {
        f.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for f in files if f.endswith(".py")
    }
    assert set(found["modules"]) == code - {"preflab"}
    assert set(found["data"]) == {f for f in files if not f.endswith(".py")}


def test_a_plain_install_puts_one_name_into_site_packages(plain):
    found, interpreter = plain
    (site,) = interpreter.parents[1].glob("lib/python*/site-packages")
    assert Path(found["at"]) == site / "preflab"
    assert {path.name.partition("-")[0] for path in site.iterdir()} == {"preflab", "dependencies.pth"}


def test_the_command_line_starts(plain, tmp_path):
    found, interpreter = plain
    assert found["version"] in run(interpreter.with_name("preflab"), "--version", cwd=tmp_path)


@pytest.mark.parametrize("how", ["editable", "sdist", "wheel"])
def test_every_way_to_install_gives_the_same(how, plain, checkout, archives, dependencies, tmp_path):
    copy = shutil.copytree(checkout, tmp_path / "copy")
    what = {"editable": ("-e", "."), "sdist": archives[:1], "wheel": archives[1:]}[how]
    interpreter = fresh(tmp_path / "env", dependencies)
    install(interpreter, *what, cwd=copy)
    found = json.loads(run(interpreter, "-c", INVENTORY, cwd=tmp_path))
    assert (Path(found["at"]) == copy) == (how == "editable")
    assert {**found, "at": ""} == {**plain[0], "at": ""}


def test_the_archives_carry_licence_and_notice_and_the_sources_their_tests(archives):
    source, wheel = archives
    with zipfile.ZipFile(wheel) as archive:
        inside = [name for name in archive.namelist() if ".dist-info/licenses/" in name]
    assert {name.rpartition("/")[2] for name in inside} >= {"LICENSE", "NOTICE"}
    with tarfile.open(source) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {
        "LICENSE",
        "NOTICE",
        "Makefile",
        "constraints.txt",
        "tests/conftest.py",
        "tests/test_house.py",
    } <= names


def test_a_bare_checkout_runs_under_pytest(checkout, dependencies, tmp_path):
    copy = shutil.copytree(checkout, tmp_path / "copy")
    (copy / "tests" / "test_where.py").write_text(
        "import preflab.envs, preflab.algorithms.planning\n\n\n"
        "def test_where():\n"
        f"    assert preflab.envs.__file__.startswith({str(copy)!r})\n"
        f"    assert preflab.algorithms.planning.__file__.startswith({str(copy)!r})\n"
    )
    interpreter = fresh(tmp_path / "env", dependencies)
    said = run(interpreter, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_where.py", cwd=copy)
    assert "1 passed" in said
