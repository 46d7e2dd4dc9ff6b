"""The lessons as they ship: whole, run from top to bottom, and printing the code that is there now.

Whether they still run is the business of `make notebooks`; `python notebooks/save.py` runs and saves them.
"""

import inspect
import re
import textwrap
from pathlib import Path

import nbformat
import pytest
from preflab.algorithms import pr_lsvi
from preflab.algorithms.dpo import dpo_loss
from preflab.algorithms.nash_md import NashMD
from preflab.algorithms.nash_md_pg import nash_md_pg_loss
from preflab.algorithms.self_play import mixture
from preflab.llm_bridge.conformance.laws import noise_floor

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# Paths of somebody's machine: of this checkout, of an environment, and absolute ones on Linux, macOS and Windows.
MACHINE = re.compile(
    re.escape(str(ROOT))
    + r"|site-packages|\.venv|(?<![\w.:/])/(?:home|root|tmp|usr|opt|var|mnt|Users|private)/|\b[A-Z]:\\+Users"
)


def read(path):
    return nbformat.read(path, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook):
    return [output for cell in code_cells(notebook) for output in cell.outputs]


def markdown(notebook):
    """What code cells put into the page as Markdown."""
    found = [output.get("data", {}).get("text/markdown") for output in outputs(notebook)]
    return [text for text in found if text is not None]


def texts(notebook):
    """All that a reader can see, but for the pixels of figures."""
    yield from (cell.source for cell in notebook.cells)
    for output in outputs(notebook):
        yield output.get("text", "")
        yield from (value for kind, value in output.get("data", {}).items() if kind.startswith("text/"))


def problems(notebook):
    """What keeps a notebook from shipping, in words."""
    found = []
    try:
        nbformat.validate(notebook)
    except nbformat.ValidationError as error:
        found.append(f"not valid: {error}")
    cells = code_cells(notebook)
    if [cell.execution_count for cell in cells] != list(range(1, len(cells) + 1)):
        found.append("its code cells were not run once, from top to bottom, in a fresh kernel")
    if any(output.output_type == "error" for output in outputs(notebook)):
        found.append("a cell ended in an error")
    if any(output.get("name") == "stderr" for output in outputs(notebook)):
        found.append("a cell wrote to stderr")
    if any(MACHINE.search(text) for text in texts(notebook)):
        found.append("it names a path of the machine that ran it")
    if any("sys.path" in cell.source for cell in cells):
        found.append("it touches sys.path")
    if any("execution" in cell.metadata for cell in notebook.cells):
        found.append("it keeps the times of its execution")
    if notebook.metadata.get("kernelspec", {}).get("name") != "python3":
        found.append("its kernel is not python3")
    return found


def test_there_is_a_lesson():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_lesson_is_whole(path):
    assert problems(read(path)) == []
    assert path.read_text(encoding="utf-8").endswith("\n")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_figures_and_assertions_are_there(path):
    notebook = read(path)
    shown = sum(cell.source.count("show(figure") for cell in code_cells(notebook)[1:])
    images = [o for o in outputs(notebook) if "image/png" in o.get("data", {})]
    assert len(images) >= max(shown, 1)
    assert (
        sum(len(re.findall(r"^ *(?:assert |np\.testing)", c.source, re.M)) for c in code_cells(notebook))
        >= 20
    )


PRINTED = {
    "01_pr_lsvi": [
        *(
            getattr(pr_lsvi.PRLSVI, name)
            for name in (
                "_episode",
                "_perturb",
                "_comparator",
                "_query",
                "_learn_reward",
                "_count",
                "_learn_transitions",
            )
        ),
        pr_lsvi.interpolate.py_func,
        pr_lsvi._plan.py_func,
        pr_lsvi.disagreement,
    ],
    "04_nash_learning": [NashMD._next, mixture],
    "05_dpo_family_exact": [dpo_loss],
    "08_from_table_to_transformer": [dpo_loss, nash_md_pg_loss],
    "09_is_my_trainer_right": [noise_floor],
}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_lesson_prints_the_code_as_it_is(path):
    printed = "\n".join(text for text in markdown(read(path)) if "```python" in text)
    for function in PRINTED[path.stem]:
        source = textwrap.dedent(inspect.getsource(function))
        assert source in printed, f"{function.__name__} has changed: python notebooks/save.py"


ERROR = nbformat.v4.new_output("error", ename="E", evalue="", traceback=[])


def broken(change):
    notebook = nbformat.v4.new_notebook(
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    )
    output = nbformat.v4.new_output("stream", name="stdout", text="regret 3.1 of /episodes/ and (a/b)")
    notebook.cells = [nbformat.v4.new_code_cell("print(1)", execution_count=1, outputs=[output])]
    change(notebook, notebook.cells[0], output)
    return problems(notebook)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda n, c, o: n.cells.append(nbformat.v4.new_code_cell("2")), "top to bottom"),
        (lambda n, c, o: c.update(execution_count=7), "top to bottom"),
        (lambda n, c, o: c.outputs.append(ERROR), "error"),
        (lambda n, c, o: o.update(name="stderr"), "stderr"),
        (lambda n, c, o: o.update(text="see /home/someone/x.py"), "path"),
        (lambda n, c, o: o.update(text=r"see C:\Users\someone"), "path"),
        (lambda n, c, o: c.update(source="import sys; sys.path.append('src')"), "sys.path"),
        (lambda n, c, o: c.metadata.update(execution={}), "times"),
        (lambda n, c, o: n.metadata.update(kernelspec={"name": "mine", "display_name": "mine"}), "kernel"),
        (lambda n, c, o: c.update(surprise=1), "valid"),
    ],
)
def test_what_is_broken_is_found(change, word):
    (found,) = broken(change)
    assert word in found


def test_a_sound_notebook_has_no_problems():
    assert broken(lambda n, c, o: None) == []
