"""What there is by name: claims, algorithms, worlds; and the nearest names to a wrong one.

A module of `theory/claims` exposes `CLAIMS: tuple[Claim, ...]`, named "module.statement"; a module of `algorithms`
exposes `ALGORITHM: AlgorithmSpec` or `LOSS: LossSpec`; a world is a Gymnasium id under "preflab/". Modules that begin
with an underscore (examples, self-tests) are not listed, and run when named.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any

from .. import algorithms as _algorithms
from ..algorithms.spec import AlgorithmSpec, LossSpec
from . import claims as _claims
from .claim import Claim


class UnknownName(ValueError):
    """A name that does not exist, with the nearest that do."""

    def __init__(self, what: str, name: str, known: Iterable[str], remedy: str = "") -> None:
        self.suggestions = nearest(name, known)
        hint = f"; did you mean {' or '.join(self.suggestions)}?" if self.suggestions else "."
        super().__init__(f"there is no {what} {name!r}{hint}{' ' + remedy if remedy else ''}")


def nearest(name: str, known: Iterable[str], n: int = 3) -> list[str]:
    """The known names most like `name`; what follows a '.' or '/' counts as a name too."""
    options: dict[str, str] = {}
    for full in known:
        for part in (full, full.rpartition(".")[2], full.rpartition("/")[2], full.partition("-v")[0]):
            options.setdefault(part.lower(), full)
    close = difflib.get_close_matches(name.lower(), options, n=2 * n, cutoff=0.6)
    tail = name.lower().replace("/", ".").rpartition(".")[2]
    close += difflib.get_close_matches(tail, options, n=n, cutoff=0.7)
    return list(dict.fromkeys(options[match] for match in close))[:n]


def _modules(package: ModuleType) -> list[str]:
    return sorted(m.name for m in pkgutil.iter_modules(package.__path__) if not m.ispkg)


def _claims_of(paper: str) -> tuple[Claim, ...]:
    module = importlib.import_module(f".{paper}", _claims.__name__)
    claims = tuple(getattr(module, "CLAIMS", ()))
    for claim in claims:
        if claim.paper != paper:
            raise ValueError(
                f"claim {claim.name} stands in claims/{paper}.py; its name must begin with {paper}."
            )
    names = [claim.name for claim in claims]
    if len(set(names)) < len(names):
        raise ValueError(f"claims/{paper}.py names two claims alike: {names}")
    return claims


def load_claims() -> dict[str, Claim]:
    """Every listed claim by name, papers in alphabetical order, each paper's in its own order."""
    papers = [name for name in _modules(_claims) if not name.startswith("_")]
    return {claim.name: claim for paper in papers for claim in _claims_of(paper)}


def select_claims(names: Sequence[str] = ()) -> list[Claim]:
    """The claims of the given papers and statements, each once, in the order asked; all listed ones for no name."""
    if not names:
        return list(load_claims().values())
    papers = _modules(_claims)
    chosen: dict[str, Claim] = {}
    for name in names:
        paper, dot, _ = name.partition(".")
        claims = {claim.name: claim for claim in _claims_of(paper)} if paper in papers else {}
        picked = [claims[name]] if name in claims else list(claims.values()) if claims and not dot else []
        if not picked:
            known = claims or load_claims()
            listed = [*known, *dict.fromkeys(claim.paper for claim in known.values())]
            raise UnknownName("claim", name, listed, "See: preflab list claims")
        chosen |= {claim.name: claim for claim in picked}
    return list(chosen.values())


def _of_algorithms(attribute: str) -> dict[str, Any]:
    """The given attribute of every algorithm module that has it, by its name."""
    found = {}
    for name in _modules(_algorithms):
        spec = getattr(importlib.import_module(f".{name}", _algorithms.__name__), attribute, None)
        if spec is not None:
            found[spec.name] = spec
    return found


def load_algorithms() -> dict[str, AlgorithmSpec]:
    """Every algorithm module's ALGORITHM by name."""
    return _of_algorithms("ALGORITHM")


def load_losses() -> dict[str, LossSpec]:
    """Every algorithm module's LOSS by name."""
    return _of_algorithms("LOSS")


def world_names() -> list[str]:
    """The registered worlds: Gymnasium ids under preflab/."""
    import gymnasium

    from ..envs.registration import register_all

    register_all()
    return sorted(name for name in gymnasium.registry if name.startswith("preflab/"))


def find(what: str, name: str, known: Mapping[str, object] | Sequence[str]) -> str:
    """`name` where it is known (worlds also without "preflab/" and "-v0"); else UnknownName."""
    for full in (name, f"preflab/{name}", f"preflab/{name}-v0"):
        if full in known:
            return full
    raise UnknownName(what, name, known, f"See: preflab list {what}s")
