"""Lay the rooms out as one package of symbolic links, `.types/preflab`, for tools that read folders only.

Type checkers do not know pyproject.toml's package-dir table. Nothing that is built depends on these links.
"""

import shutil
import tomllib
from pathlib import Path

root = Path(__file__).resolve().parents[1]
links = root / ".types"
folders = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
shutil.rmtree(links, ignore_errors=True)
for package, folder in sorted(folders.items()):  # a package comes before those inside it
    target = links.joinpath(*package.split("."))
    if any(other.startswith(package + ".") for other in folders):
        target.mkdir(parents=True)
        for child in (root / folder).iterdir():
            (target / child.name).symlink_to(child)
    else:
        target.symlink_to(root / folder)
