"""The page of a training run: `preflab report DIR` on a folder that `preflab bridge train` (or `train`) wrote.

It reads run.json, metrics.jsonl, samples.jsonl, and, where they are, asked.json, lattice.json, lattice_steps.jsonl and
evaluation.json, also of a run that has not finished, and computes nothing but means. The page asks the network for
nothing: style inline, figures as SVG data URIs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from .. import __version__
from ..envs.kernels import Array
from ..theory import figures
from ..theory.report import DATA, PAGE, environment, finite, flat, number, to_json, write_text

RUN, METRICS, SAMPLES, ASKED = "run.json", "metrics.jsonl", "samples.jsonl", "asked.json"
EXACT, EXACT_STEPS, DRAWN = "lattice.json", "lattice_steps.jsonl", "evaluation.json"

# name, how it is written, what it says
EXACT_ROWS = (
    ("value", "value", "the judge's reward, averaged over the policy's responses"),
    ("kl", "KL to the start", "KL(policy, model at the start) of whole responses, in nats"),
    ("win_rate", "win rate", "P(policy's response preferred to one of the model at the start)"),
    (
        "exploitability",
        "exploitability",
        "what the best response wins against the policy beyond 1/2; 0 at an equilibrium",
    ),
    (
        "distance",
        "distance to the optimum",
        "KL(policy, optimum of this method's objective on the lattice), in nats",
    ),
    ("entropy", "entropy", "of the responses, in nats"),
    ("covered", "covered", "share of the policy's own texts (all its tokens) that lie on the lattice"),
)
DRAWN_ROWS = (
    ("reward", "reward"),
    ("win_rate", "win rate against the start"),
    ("kl", "KL to the start, estimated"),
    ("length", "tokens a completion"),
    ("ended", "ended by themselves"),
)


@dataclass(frozen=True)
class RunFolder:
    """What a folder holds; what is not there is empty."""

    folder: Path
    about: Mapping[str, Any]
    asked: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]
    samples: Sequence[Mapping[str, Any]]
    exact: Mapping[str, Any]
    exact_steps: Sequence[Mapping[str, Any]]
    drawn: Mapping[str, Any]

    @property
    def steps(self) -> int:
        return int(self.metrics[-1]["step"]) if self.metrics else 0

    @property
    def planned(self) -> int:
        return int(self.about["settings"]["steps"])

    @property
    def finished(self) -> bool:
        return self.steps >= self.planned

    @property
    def now(self) -> Mapping[str, Any]:
        """Exact numbers at the end, or at the last look that the run took so far."""
        last = self.exact_steps[-1] if self.exact_steps else {}
        return self.exact.get("after") or last


def is_run_folder(folder: str | Path) -> bool:
    """A folder of a training run has a run.json that names a method; `preflab run` writes one that does not."""
    path = Path(folder) / RUN
    return path.is_file() and "method" in _object(path)


def read_run(folder: str | Path) -> RunFolder:
    """ValueError where a file is damaged; a last line that is half written is left out."""
    path = Path(folder)
    if not (path / RUN).is_file():
        raise ValueError(f"{path} holds no {RUN}: it is no folder of a training run")
    about = _object(path / RUN)
    if "method" not in about or "steps" not in about.get("settings", {}):
        raise ValueError(f"{path / RUN} is not of a training run: it names no method and no steps")
    return RunFolder(
        folder=path,
        about=about,
        asked=_object(path / ASKED, missing=True),
        metrics=_lines(path / METRICS),
        samples=_lines(path / SAMPLES),
        exact=_object(path / EXACT, missing=True),
        exact_steps=_lines(path / EXACT_STEPS),
        drawn=_object(path / DRAWN, missing=True),
    )


def _object(path: Path, missing: bool = False) -> dict[str, Any]:
    if missing and not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged: it holds no object")
    return found


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    text, found = path.read_text(encoding="utf-8"), []
    lines = text.split("\n")
    for i, line in enumerate(lines):
        last = i + 1 == len(lines)
        if last:  # the end of a whole file is an empty line; a half-written one is being written
            continue
        try:
            row = json.loads(line)
            row["step"] + 0
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path}, line {i + 1} is damaged: {line[:60]!r}") from None
        found.append(row)
    return found


# ---- JSON ------------------------------------------------------------------------------------------------------------


def as_data(run: RunFolder) -> dict[str, Any]:
    """The JSON document. Numbers that are not finite become null."""
    return finite(
        {
            "preflab": __version__,
            "finished": run.finished,
            "steps": run.steps,
            "run": run.about,
            "asked": run.asked,
            "summary": summary(run),
            "exact": run.exact,
            "exact_steps": run.exact_steps,
            "drawn": run.drawn,
            "seconds": sum(float(row.get("seconds", 0.0)) for row in run.metrics),
            "metrics": run.metrics,
            "samples": _pairs(run),
            "environment": environment(),
        }
    )


def summary(run: RunFolder) -> str:
    """One sentence: how far the run is, and what the exact numbers say."""
    parts = [f"{run.steps} of {run.planned} steps"]
    before, now = run.exact.get("before", {}), run.now
    for name, word in (("value", "value"), ("win_rate", "win rate against the start")):
        if before.get(name) is not None and now.get(name) is not None:
            parts.append(f"exact {word} on the lattice {before[name]:.3f} → {now[name]:.3f}")
    if now.get("kl") is not None:
        parts.append(f"KL {now['kl']:.3f} nats")
    return ", ".join(parts) + "."


def _pairs(run: RunFolder) -> list[dict[str, Any]]:
    """Prompts with the completion at the start and the last one: samples.jsonl; where a method of records has none, the
    first of the drawn completions."""
    first, end, last = _samples(run)
    pairs = []
    for i, row in enumerate(first):
        later = end[i] if i < len(end) else {}
        pairs.append(
            {
                "prompt": _said(row, "prompt_text", "prompt"),
                "before": _said(row, "text", "completion"),
                "after": _said(later, "text", "completion") if later else None,
                "reward_before": row.get("reward"),
                "reward_after": later.get("reward"),
                "step": last,
            }
        )
    return pairs


def _samples(run: RunFolder) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]], int]:
    """The answers at the start, the last ones, and the step of the latter, 0 = there are none."""
    first = [row for row in run.samples if row["step"] == 0]
    last = max((row["step"] for row in run.samples), default=0)
    if first:
        return first, [row for row in run.samples if row["step"] == last] if last else [], last
    sides = []
    for side in ("before", "after"):
        drawn = run.drawn.get(side, {})
        rewards = drawn.get("rewards")
        shown = drawn.get("shown", [])
        sides.append(
            [row | ({} if rewards is None else {"reward": rewards[i][0]}) for i, row in enumerate(shown)]
        )
    return sides[0], sides[1], run.steps if sides[1] else 0


def _said(row: Mapping[str, Any], text: str, ids: str) -> str:
    return str(row[text]) if text in row else " ".join(map(str, row.get(ids, [])))


# ---- figures ---------------------------------------------------------------------------------------------------------


def curves(run: RunFolder) -> Any:
    """Reward or win rate, KL, loss and gradient norm over the steps: thin, each step's; thick, a moving mean."""
    import matplotlib
    from matplotlib.figure import Figure

    metrics = run.metrics
    judged = "reward" if any("reward" in row for row in metrics) else "win_rate"
    names = {
        "reward": "the judge's reward",
        "win_rate": "wins against the opponent",
        "kl": "log pi/ref of the samples (nats)",
        "loss": "loss",
        "gradient_norm": "norm of the gradient",
    }
    shown = [name for name in (judged, "kl", "loss", "gradient_norm") if any(name in row for row in metrics)]
    with matplotlib.rc_context(figures.STYLE):
        rows = (len(shown) + 1) // 2
        figure = Figure(figsize=(9.6, 2.9 * rows), layout="constrained")
        grid = np.ravel(figure.subplots(rows, 2, squeeze=False))
        for axes in grid[len(shown) :]:
            axes.set_axis_off()
        for axes, name, colour in zip(grid, shown, figures.COLOURS, strict=False):
            x, y = _column(metrics, "step"), _column(metrics, name)
            axes.plot(x, y, color=colour, linewidth=0.8, alpha=0.45)
            axes.plot(x, moving_mean(y), color=colour)
            axes.set(title=names[name])
            axes.xaxis.get_major_locator().set_params(integer=True)
        if "kl" in shown and run.exact_steps:
            x, y = _column(run.exact_steps, "step"), _column(run.exact_steps, "kl")
            axes = grid[shown.index("kl")]
            axes.plot(
                [0, *x],
                [0, *y],
                color=figures.INK,
                linestyle="--",
                linewidth=1.2,
                label="exact, on the lattice",
            )
            axes.legend(loc="best")
        for axes in grid[max(0, len(shown) - 2) : len(shown)]:
            axes.set_xlabel("step")
    return figure


def reward_against_kl(run: RunFolder) -> Any:
    """What was gained for how much KL: exactly on the lattice with its frontier; and of the batches as they came, or,
    where the judge was asked for preferences alone, the exact win rate over the steps."""
    import matplotlib
    from matplotlib.figure import Figure

    gained = "value" if any("value" in row for row in run.exact_steps) else "win_rate"
    exact = [row for row in run.exact_steps if row.get(gained) is not None]
    batches = _with_reward(run)
    wins = [row for row in exact if row.get("win_rate") is not None and gained == "value" and not batches]
    panels = [name for name, there in (("exact", exact), ("batches", batches), ("wins", wins)) if there]
    with matplotlib.rc_context(figures.STYLE):
        figure = Figure(figsize=(4.9 * max(len(panels), 1), 3.9), layout="constrained")
        grid = np.ravel(figure.subplots(1, max(len(panels), 1), squeeze=False))
        for axes, name in zip(grid, panels, strict=True):
            if name == "exact":
                _draw_exact(axes, run, exact, gained)
            elif name == "wins":
                _draw_wins(axes, run, wins)
            else:
                x, y = _column(batches, "kl"), _column(batches, "reward")
                axes.scatter(x, y, c=_column(batches, "step"), cmap="viridis", s=14, alpha=0.7, linewidths=0)
                axes.plot(moving_mean(x), moving_mean(y), color=figures.COLOURS[0], label="moving mean")
                axes.set(title="Of the batches", xlabel="log pi/ref, mean of the samples", ylabel="reward")
                axes.legend(loc="best")
    return figure


def _with_reward(run: RunFolder) -> list[Mapping[str, Any]]:
    """The steps whose batches have a reward and a KL to draw it against."""
    return [row for row in run.metrics if row.get("reward") is not None and row.get("kl") is not None]


def _draw_wins(axes: Any, run: RunFolder, rows: Sequence[Mapping[str, Any]]) -> None:
    x, y = ([start, *_column(rows, name)] for start, name in ((0.0, "step"), (0.5, "win_rate")))
    axes.plot(x, y, color=figures.COLOURS[0], marker="o", markersize=4, label="the run")
    best = (run.exact.get("optimum") or {}).get("win_rate")
    if best is not None:
        axes.axhline(best, color=figures.COLOURS[1], linestyle="--", label="the method's optimum")
    axes.set(title="Exactly, over the steps", xlabel="step", ylabel="win rate against the start")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(loc="best")


def _draw_exact(axes: Any, run: RunFolder, rows: Sequence[Mapping[str, Any]], gained: str) -> None:
    before, optimum = run.exact.get("before", {}), run.exact.get("optimum") or {}
    path = [(0.0, before.get(gained)), *((row["kl"], row[gained]) for row in rows)]
    x, y = np.array([point for point in path if point[1] is not None], dtype=np.float64).T
    blue, red = figures.COLOURS[:2]
    ends = [x.max()]
    if optimum.get(gained) is not None and optimum.get("kl") is not None:
        axes.plot(
            optimum["kl"],
            optimum[gained],
            "*",
            color=red,
            markersize=13,
            label="the method's optimum",
            zorder=4,
        )
        ends.append(optimum["kl"])
    if gained == "value" and run.exact.get("frontier"):
        far, most = np.array(run.exact["frontier"], dtype=np.float64).T
        near = far <= 1.3 * max(ends) + 0.05
        axes.plot(
            far[near], most[near], color=figures.INK, linewidth=1.1, label="frontier: no policy lies above"
        )
    axes.plot(x, y, color=blue, marker="o", markersize=4, label="the run")
    axes.plot(x[0], y[0], "s", color=blue, markersize=8, label="start")
    words = "value: the judge's reward" if gained == "value" else "win rate against the start"
    axes.set(title="Exactly, on the lattice", xlabel="KL to the start (nats)", ylabel=words)
    axes.legend(loc="best")


def _column(rows: Sequence[Mapping[str, Any]], name: str) -> Array:
    found = [row.get(name) for row in rows]
    return np.array([math.nan if x is None else float(x) for x in found])


def moving_mean(values: ArrayLike, window: int | None = None) -> Array:
    """The mean of the last `window` values that are numbers; None = a tenth of all, at least 1."""
    x = np.asarray(values, dtype=np.float64)
    window = max(1, len(x) // 10) if window is None else window
    there = np.isfinite(x)
    total, count = (np.concatenate([[0.0], np.cumsum(v)]) for v in (np.where(there, x, 0.0), there))
    last = np.arange(1, len(x) + 1)
    first = np.maximum(last - window, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((total[last] - total[first]) / (count[last] - count[first]))


# ---- HTML ------------------------------------------------------------------------------------------------------------


def as_page(run: RunFolder) -> str:
    """The page as one HTML text."""
    import jinja2

    from .. import theory

    folders = [Path(__file__).parent / "templates", Path(theory.__file__).parent / "templates"]
    page = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folders), autoescape=True, undefined=jinja2.StrictUndefined
    )
    page.filters["number"] = number
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    model = run.asked.get("model", run.about.get("model", "a model"))
    return page.get_template("run.html.j2").render(
        title=f"{run.about['method']} on {model}",
        finished=run.finished,
        summary=summary(run),
        made=f"preflab {__version__}, {made}; {_minutes(run)}",
        exact=_exact_view(run),
        drawn=_drawn_view(run),
        curves=figures.data_uri(curves(run)) if run.metrics else "",
        plane=figures.data_uri(reward_against_kl(run)) if _has_plane(run) else "",
        batches=bool(_with_reward(run)),
        pairs=_pairs(run),
        settings=_settings_view(run),
        environment=environment(),
    )


def _minutes(run: RunFolder) -> str:
    seconds = sum(float(row.get("seconds", 0.0)) for row in run.metrics)
    tokens = sum(int(row.get("tokens", 0)) for row in run.metrics)
    return f"{seconds / 60:.1f} minutes of steps, {tokens:,} tokens of responses"


def _has_plane(run: RunFolder) -> bool:
    exact = any(row.get("value") is not None or row.get("win_rate") is not None for row in run.exact_steps)
    return exact or bool(_with_reward(run))


def _exact_view(run: RunFolder) -> dict[str, Any] | None:
    exact = run.exact
    if not exact:
        return None
    before, now, optimum = exact.get("before", {}), run.now, exact.get("optimum") or {}
    rows = [
        {
            "name": words,
            "meaning": meaning,
            "numbers": [_shown(side.get(name)) for side in (before, now, optimum)],
        }
        for name, words, meaning in EXACT_ROWS
        if before.get(name) is not None
    ]
    likeliest = exact.get("likeliest", {})
    texts = []
    for x, best in enumerate(exact.get("best") or [{}] * len(likeliest.get("before", []))):
        entry = {"best": best, "before": likeliest["before"][x]}
        entry["after"] = likeliest["after"][x] if "after" in likeliest else None
        texts.append(entry)
    return {
        "k": exact.get("k"),
        "horizon": exact.get("horizon"),
        "prompts": len(exact.get("prompts", [])),
        "responses": exact.get("responses"),
        "judge": exact.get("judge"),
        "optimum": optimum.get("name"),
        "after": "after" if exact.get("after") else f"after step {now['step']}" if now else "not yet",
        "rows": rows,
        "texts": texts,
    }


def _drawn_view(run: RunFolder) -> dict[str, Any] | None:
    drawn = run.drawn
    if not drawn:
        return None
    before, after = drawn.get("before", {}), drawn.get("after", {})
    rows = [
        {"name": words, "numbers": [_with_error(side, name) for side in (before, after)]}
        for name, words in DRAWN_ROWS
        if name in before
    ]
    return {
        "samples": before.get("samples"),
        "horizon": before.get("horizon"),
        "rows": rows,
        "difference": _with_error(
            {"reward": drawn["difference"]["reward"], "reward_error": drawn["difference"]["error"]}, "reward"
        )
        if "difference" in drawn
        else None,
    }


def _with_error(side: Mapping[str, Any], name: str) -> str:
    value, error = side.get(name), side.get(f"{name}_error")
    return _shown(value) + ("" if error is None or value is None else f" ± {error:.2g}")


def _shown(value: Any) -> str:
    return "–" if value is None else f"{value:.4f}" if abs(value) < 1000 else number(float(value))


def _settings_view(run: RunFolder) -> list[tuple[str, Any]]:
    about = {name: x for name, x in run.about.items() if name not in ("settings", "parameters", "preflab")}
    parts = {"parameters": run.about.get("parameters", {}), "asked": run.asked, "run": about}
    return [*flat(parts), *flat({"settings": run.about["settings"]})]


def write_run_report(folder: str | Path) -> Path:
    """Write report.html and report.json into a run's folder. Returns the page's path."""
    run = read_run(folder)
    write_text(run.folder / DATA, to_json(as_data(run)))
    write_text(run.folder / PAGE, as_page(run))
    return run.folder / PAGE
