"""Cells: the unit of work of an experiment. A cell is pure: same key, same bits.

A cell names a function of a module inside `preflab.theory`, its parameters and its seed:

    Cell("claims.pr_lsvi:regret_run", {"T": 4000, "eps": 0.1}, seed=3)

runs `preflab.theory.claims.pr_lsvi.regret_run(seed=3, T=4000, eps=0.1)`, which returns a dict of numbers,
strings, lists or numpy arrays. The key is a hash of all that the result may depend on: function, parameters,
seed, the source of `preflab.envs`, `preflab.algorithms` and `preflab.theory.claims` (data files too), and
the versions of the numerical libraries. Edited code therefore never meets the results of the code before the
edit.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import json
import math
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

ROOT = __name__.rpartition(".")[0]  # preflab.theory
_FUNCTION = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


# ---- JSON with every float -----------------------------------------------------------------------------


def encode(value: Any, place: str = "result") -> Any:
    """The JSON-able form of numbers, strings, None, lists, tuples, dicts with string keys, numpy arrays and
    scalars.

    Floats keep all their bits (repr round-trips); NaN and the infinities, which JSON lacks, become
    {"$float": "nan"}.
    """
    if isinstance(value, (np.generic, np.ndarray)):
        value = value.tolist()
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"$float": str(value)}
    if isinstance(value, (list, tuple)):
        return [encode(item, f"{place}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str) or key.startswith("$"):
                raise TypeError(f"{place} has the key {key!r}; keys are strings that do not begin with '$'")
        return {key: encode(item, f"{place}[{key!r}]") for key, item in value.items()}
    raise TypeError(
        f"{place} is a {type(value).__name__}; use numbers, strings, lists, dicts and numpy arrays of these"
    )


def decode(value: Any) -> Any:
    """The inverse of `encode`, with lists for arrays and tuples."""
    if isinstance(value, list):
        return [decode(item) for item in value]
    if isinstance(value, dict):
        if value.keys() == {"$float"}:
            return _NON_FINITE[value["$float"]]
        return {key: decode(item) for key, item in value.items()}
    return value


def canonical(value: Any, place: str = "value") -> str:
    """One text for equal values: sorted keys, no blanks, non-finite floats encoded."""
    return json.dumps(encode(value, place), sort_keys=True, separators=(",", ":"), allow_nan=False)


# ---- what a result depends on besides its parameters ---------------------------------------------------


@lru_cache(maxsize=1)
def code_fingerprint() -> str:
    """sha256 over the source and data of the rooms that a cell computes with, and the libraries' versions."""
    digest = hashlib.sha256()
    rooms = [importlib.import_module(f"..{room}", ROOT) for room in ("envs", "algorithms")]
    rooms.append(importlib.import_module(".claims", ROOT))
    for room in rooms:
        folder = Path(str(room.__file__)).parent
        for path in sorted(folder.rglob("*")):
            if path.is_file() and (path.suffix == ".py" or path.parent.name == "data"):
                digest.update(f"{room.__name__}/{path.relative_to(folder).as_posix()}\0".encode())
                digest.update(hashlib.sha256(path.read_bytes()).digest())
    digest.update(f"python {sys.version_info[:2]}\0".encode())
    for library in ("numpy", "scipy", "numba", "torch"):
        digest.update(f"{library} {importlib.metadata.version(library)}\0".encode())
    return digest.hexdigest()


@lru_cache(maxsize=256)
def resolve(name: str) -> Callable[..., Mapping[str, Any]]:
    """The function "module:function" of `preflab.theory`; nothing outside that package can be named."""
    if not isinstance(name, str) or not _FUNCTION.fullmatch(name):
        raise ValueError(f"cell function {name!r} is not of the form 'claims.module:function'")
    module_name, _, function_name = name.partition(":")
    full = f"{ROOT}.{module_name}"
    try:
        module = importlib.import_module(full)
    except ModuleNotFoundError as error:
        if error.name and full.startswith(error.name):
            raise ValueError(f"cell function {name!r}: there is no module {full}") from None
        raise
    function = getattr(module, function_name, None)
    if not callable(function) or getattr(function, "__module__", None) != full:
        raise ValueError(f"cell function {name!r}: {full} defines no function {function_name}")
    return function


# ---- the cell ------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Cell:
    """function(seed=seed, **parameters) within `preflab.theory`. Cells with equal keys are equal."""

    function: str
    parameters: Mapping[str, Any]
    seed: int = 0
    key: str = field(init=False, repr=False)

    def __post_init__(self) -> None:
        resolve(self.function)
        if isinstance(self.seed, bool) or not isinstance(self.seed, (int, np.integer)) or self.seed < 0:
            raise ValueError(f"cell {self.function}: seed is {self.seed!r}; it must be an integer >= 0")
        if "seed" in self.parameters:
            raise ValueError(f"cell {self.function}: give the seed as the cell's seed, not as a parameter")
        # A round trip makes the parameters what a worker process, or a later run, will read.
        text = canonical(dict(self.parameters), f"parameters of {self.function}")
        object.__setattr__(self, "parameters", decode(json.loads(text)))
        object.__setattr__(self, "seed", int(self.seed))
        identity = "\0".join((self.function, text, str(self.seed), code_fingerprint()))
        object.__setattr__(self, "key", hashlib.sha256(identity.encode()).hexdigest())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Cell) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    def __str__(self) -> str:
        shown = ", ".join(f"{k}={v!r}" for k, v in sorted(self.parameters.items()))
        return f"{self.function}({shown}{', ' if shown else ''}seed={self.seed})"

    def run(self) -> dict[str, Any]:
        """The result, as it will be read from the store: lists for arrays, Python numbers for numpy's."""
        result = resolve(self.function)(seed=self.seed, **self.parameters)
        if not isinstance(result, Mapping):
            raise TypeError(f"{self.function} returned a {type(result).__name__}; a cell returns a dict")
        return decode(encode(result, f"result of {self.function}"))
