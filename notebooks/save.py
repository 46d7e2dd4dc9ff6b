"""Run the lessons from a fresh kernel and save their outputs, without times, so that equal results are equal files.

python notebooks/save.py [NOTEBOOK ...]      all lessons when none is named
"""

import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent


def save(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook, timeout=300, record_timing=False, resources={"metadata": {"path": str(path.parent)}}
    ).execute()
    notebook.metadata["language_info"] = {"name": "python"}  # no version: it changes with the machine
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(nbformat.writes(notebook).rstrip("\n") + "\n", encoding="utf-8")
    os.replace(temporary, path)


if __name__ == "__main__":
    for lesson in map(Path, sys.argv[1:] or sorted(HERE.glob("*.ipynb"))):
        print(lesson.name, flush=True)
        save(lesson.resolve())
