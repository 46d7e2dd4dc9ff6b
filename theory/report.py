"""Verdicts as one self-contained HTML page and as JSON. Both files appear by rename, so a reader sees a whole one.

The page asks the network for nothing: style inline, figures and formulas as SVG data URIs.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from .. import __version__
from .claim import Plan
from .runner import ClaimResult

PAGE, DATA = "report.html", "report.json"
LIBRARIES = ("numpy", "scipy", "numba", "gymnasium", "matplotlib")


def environment() -> dict[str, str]:
    """Versions and platform, as strings."""
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    return {
        "preflab": __version__,
        "python": platform.python_version(),
        **versions,
        "platform": platform.platform(),
        "processors": str(os.cpu_count()),
    }


def plan_words(plan: Plan) -> str:
    """The plan in words: "quick settings, 20 seeds"."""
    size = "quick" if plan.quick else "full"
    return f"{size} settings, {f'{plan.seeds} seeds' if plan.seeds else 'seeds as each claim asks'}"


def summary(results: Sequence[ClaimResult]) -> str:
    """One sentence: how many verdicts of each kind, how many controls caught."""
    verdicts = [result.judgement.verdict for result in results]
    parts = [
        f"{verdicts.count(verdict)} {verdict}"
        for verdict in ("verified", "refuted", "inconclusive")
        if verdict in verdicts
    ]
    controls = [control.caught for result in results for control in result.controls]
    claims = "1 claim" if len(results) == 1 else f"{len(results)} claims"
    return f"{claims}: {', '.join(parts)}; {sum(controls)} of {len(controls)} controls caught."


# ---- JSON ----------------------------------------------------------------------------------------------


def as_data(results: Sequence[ClaimResult], plan: Plan) -> dict[str, Any]:
    """The JSON document. Numbers that are not finite become null: JSON has no others."""
    return {
        "preflab": __version__,
        "ok": all(result.ok for result in results),
        "plan": {"quick": plan.quick, "seeds": plan.seeds},
        "environment": environment(),
        "claims": [_claim_data(result) for result in results],
    }


def _claim_data(result: ClaimResult) -> dict[str, Any]:
    claim, judgement = result.claim, result.judgement
    data = {
        "claim": claim.name,
        "kind": claim.kind,
        "verdict": judgement.verdict,
        "statistic": judgement.statistic,
        "threshold": judgement.threshold,
        "seeds": result.seeds,
        "seconds": result.seconds,
        "controls": [
            {
                "name": control.name,
                "caught": control.caught,
                "verdict": control.verdict,
                "statistic": control.statistic,
                "detail": control.detail,
            }
            for control in result.controls
        ],
        "title": claim.title,
        "statement": claim.statement,
        "assumptions": list(claim.assumptions),
        "source": claim.source,
        "detail": judgement.detail,
        "numbers": judgement.numbers,
        "cells": result.cells,
        "errors": list(result.errors),
    }
    return finite(data)


def finite(value: Any) -> Any:
    """JSON-able, with None for what is not finite; numpy's scalars and arrays become Python's."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


def to_json(data: Any) -> str:
    return json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


# ---- HTML ----------------------------------------------------------------------------------------------


def as_page(results: Sequence[ClaimResult], plan: Plan) -> str:
    """The report as one HTML text."""
    import jinja2

    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    page = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    page.filters["number"] = number
    page.filters["formulas"] = formulas
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return page.get_template("report.html.j2").render(
        title="What preflab found",
        summary=summary(results),
        made=f"preflab {__version__}, {plan_words(plan)}, {made}",
        claims=[_claim_view(result) for result in results],
        environment=environment(),
    )


def _claim_view(result: ClaimResult) -> dict[str, Any]:
    figure, problem = _figure(result)
    claim, judgement = result.claim, result.judgement
    return {
        "name": claim.name,
        "kind": claim.kind,
        "title": claim.title,
        "statement": claim.statement,
        "assumptions": claim.assumptions,
        "source": claim.source,
        "verdict": judgement.verdict,
        "statistic": judgement.statistic,
        "threshold": judgement.threshold,
        "detail": judgement.detail,
        "numbers": list(flat(judgement.numbers)),
        "controls": result.controls,
        "missed": sum(not control.caught for control in result.controls),
        "seeds": result.seeds,
        "cells": result.cells,
        "seconds": result.seconds,
        "errors": [*result.errors, *problem],
        "figure": figure,
    }


def _figure(result: ClaimResult) -> tuple[str, list[str]]:
    """The claim's figure as a data URI, or why there is none: a drawing that fails does not cost the report."""
    draw = result.claim.figure
    if draw is None or result.unfinished:
        return "", []
    from .figures import data_uri

    try:
        return data_uri(draw(result.outcomes, result.judgement)), []
    except Exception as error:
        return "", [f"the figure of {result.claim.name} failed: {type(error).__name__}: {error}"]


def flat(numbers: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested mappings as ("outer / inner", value)."""
    for name, value in numbers.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name} / ")
        else:
            yield f"{prefix}{name}", value


def number(value: Any) -> str:
    """Four significant digits; a long sequence is shortened."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else "–" if math.isnan(value) else str(value)
    if isinstance(value, (list, tuple)):
        return ", ".join([number(item) for item in value[:8]] + ["…"] * (len(value) > 8))
    return str(value)


def formulas(text: str) -> Any:
    """Text with $...$ as HTML: each formula a picture on its baseline, or its source where it cannot be set."""
    from markupsafe import Markup, escape

    parts = re.split(r"(\$[^$]+\$)", text)
    return Markup("").join(
        _formula(part) if part.startswith("$") and part != "$" else escape(part) for part in parts
    )


@lru_cache(maxsize=512)
def _formula(source: str) -> Any:
    from markupsafe import Markup

    from .figures import math_uri

    try:
        uri, height, depth = math_uri(source)
    except ValueError:
        return Markup("<code>{}</code>").format(source[1:-1])
    scale = 1.12  # the formulas' serif letters are smaller than the page's
    style = f"height:{scale * height:.3f}em;vertical-align:{-scale * depth:.3f}em"
    return Markup('<img class="math" src="{}" alt="{}" style="{}">').format(uri, source[1:-1], style)


# ---- files ---------------------------------------------------------------------------------------------


def write_text(path: Path, text: str) -> None:
    """The file appears whole, by rename."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_report(results: Sequence[ClaimResult], plan: Plan, folder: str | os.PathLike[str]) -> Path:
    """Write report.html and report.json into a folder. Returns the page's path."""
    folder = Path(folder)
    write_text(folder / DATA, to_json(as_data(results, plan)))
    write_text(folder / PAGE, as_page(results, plan))
    return folder / PAGE
