"""Figures of reports and lessons: log-log curves with fitted exponents, and cost fronts with error bars.

Colours are Okabe and Ito's, told apart by colour-blind readers too; markers and line styles differ as well. Figures are
made without pyplot, so nothing stays open. matplotlib is imported when a figure is drawn.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from .statistics import Slope

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
INK, GRID = "#222222", "#DDDDDD"
STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "figure.dpi": 110,
    "svg.hashsalt": "preflab",
}


@dataclass(frozen=True)
class Curve:
    """A quantity over x, one row a seed: x (n,), Y (seeds, n); with its fitted exponent, if there is one."""

    label: str
    x: ArrayLike
    Y: ArrayLike
    slope: Slope | None = None


@dataclass(frozen=True)
class Front:
    """A method's two costs over its knob: cost (seeds, n) and regret (seeds, n), one column a setting of the knob."""

    label: str
    cost: ArrayLike
    regret: ArrayLike


def mean_and_error(Y: ArrayLike, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """The mean over seeds (axis 0) and the half-width of its t interval; 0 for a single seed."""
    Y = np.atleast_2d(np.asarray(Y, dtype=np.float64))
    if len(Y) < 2:
        return Y[0], np.zeros(Y.shape[1])
    return Y.mean(0), -special.stdtrit(len(Y) - 1, (1 - level) / 2) * Y.std(0, ddof=1) / np.sqrt(len(Y))


def canvas(width: float = 6.4, height: float = 4.2) -> tuple[Any, Any]:
    """An empty (Figure, Axes) in the house style."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        return figure, figure.add_subplot()


def loglog(
    curves: Sequence[Curve],
    *,
    x: str,
    y: str,
    title: str = "",
    reference: float | None = None,
) -> Any:
    """Curves in log-log axes: mean over seeds with its 95 % band, and dashed the power law fitted over its window.

    reference   an exponent drawn as a grey guide through the first curve's middle
    """
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure, axes = canvas()
        axes.set(xscale="log", yscale="log", xlabel=x, ylabel=y, title=title)
        for i, curve in enumerate(curves):
            xs = np.asarray(curve.x, dtype=np.float64)
            mean, error = mean_and_error(curve.Y)
            shown = mean > 0
            colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
            label = curve.label
            if curve.slope is not None:
                s = curve.slope
                label += f"  (slope {s.estimate:.2f} [{s.low:.2f}, {s.high:.2f}])"
            every = max(1, int(shown.sum()) // 12)
            axes.plot(
                xs[shown],
                mean[shown],
                color=colour,
                marker=marker,
                markevery=every,
                markersize=5,
                label=label,
            )
            floor = np.where(mean - error > 0, mean - error, mean / 3)
            axes.fill_between(
                xs[shown], floor[shown], (mean + error)[shown], color=colour, alpha=0.18, linewidth=0
            )
            if curve.slope is not None:
                low, high = curve.slope.window
                ends = np.array([max(low, xs.min()), min(high, xs.max())])
                fitted = np.exp(curve.slope.intercept) * ends**curve.slope.estimate
                axes.plot(ends, fitted, color=INK, linestyle="--", linewidth=1.1, zorder=3)
        if reference is not None and curves:
            xs = np.asarray(curves[0].x, dtype=np.float64)
            mean, _ = mean_and_error(curves[0].Y)
            middle = len(xs) // 2
            guide = 1.9 * mean[middle] * (xs / xs[middle]) ** reference
            axes.plot(xs, guide, color="#888888", linestyle=":", label=f"slope {reference:g}")
        axes.legend(loc="best")
        _plain_ticks(axes)
        return figure


def _plain_ticks(axes: Any) -> None:
    """Log axes that span less than two decades: labels at 1, 2 and 5 times the powers of ten, 200 for 2 x 10^2."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
        if 0 < low < high < 100 * low:
            axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
            axis.set_minor_formatter(NullFormatter())


def front(methods: Sequence[Front], *, x: str, y: str, title: str = "", log: bool = True) -> Any:
    """Regret against cost (labels), one point a setting of the knob: means with 95 % error bars both ways."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure, axes = canvas()
        for i, method in enumerate(methods):
            cost, cost_error = mean_and_error(method.cost)
            regret, regret_error = mean_and_error(method.regret)
            order = np.argsort(cost)
            axes.errorbar(
                cost[order],
                regret[order],
                xerr=cost_error[order],
                yerr=regret_error[order],
                color=COLOURS[i % len(COLOURS)],
                marker=MARKERS[i % len(MARKERS)],
                linestyle=("-", "--", "-.", ":")[i % 4],
                markersize=6,
                capsize=2.5,
                elinewidth=1,
                label=method.label,
            )
        axes.set(xlabel=x, ylabel=y, title=title)
        if log:
            axes.set(xscale="log", yscale="log")
            _plain_ticks(axes)
        axes.legend(loc="best")
        return figure


def frequencies(rows: Sequence[tuple[str, int, int]], promised: float, *, x: str, title: str = "") -> Any:
    """Observed frequencies (label, successes, n) with their Clopper-Pearson intervals against a promised one."""
    import matplotlib

    from .statistics import clopper_pearson

    with matplotlib.rc_context(STYLE):
        figure, axes = canvas(height=1.3 + 0.45 * len(rows))
        for i, (_, successes, n) in enumerate(rows):
            interval = clopper_pearson(successes, n)
            axes.plot([interval.low, interval.high], [i, i], color=COLOURS[0], linewidth=3, alpha=0.45)
            axes.plot(interval.estimate, i, MARKERS[0], color=COLOURS[0])
        axes.axvline(promised, color=COLOURS[1], linestyle="--", label=f"promised: at least {promised:.3g}")
        axes.set(xlabel=x, title=title, xlim=(-0.02, 1.02), ylim=(-0.7, len(rows) - 0.3))
        axes.set_yticks(range(len(rows)), [f"{label} ({k}/{n})" for label, k, n in rows])
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1))
        return figure


def paired(differences: ArrayLike, *, x: str, title: str = "") -> Any:
    """Paired differences, one dot a seed, in ascending order, with their mean and its 95 % interval."""
    import matplotlib

    d = np.sort(np.asarray(differences, dtype=np.float64).ravel())
    mean, error = (float(part[0]) for part in mean_and_error(d[:, None]))
    with matplotlib.rc_context(STYLE):
        figure, axes = canvas(height=3.4)
        axes.axvline(0, color=INK, linewidth=1)
        axes.axvspan(mean - error, mean + error, color=COLOURS[0], alpha=0.18, linewidth=0)
        axes.axvline(mean, color=COLOURS[0], label=f"mean {mean:.3g} ± {error:.2g}")
        axes.plot(d, np.arange(1, len(d) + 1), MARKERS[0], color=COLOURS[0], markersize=5)
        axes.set(xlabel=x, ylabel="seeds, in order of difference", title=title)
        axes.yaxis.get_major_locator().set_params(integer=True)
        axes.legend(loc="best")
        return figure


# ---- into a page ---------------------------------------------------------------------------------------


def data_uri(figure: Any) -> str:
    """A figure as an SVG data URI: letters as paths, and no date, so that equal figures are equal text."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return _svg_uri(buffer.getvalue())


def math_uri(formula: str, size: float = 12.0) -> tuple[str, float, float]:
    """A formula, "$...$", as (SVG data URI, height, depth below the baseline), both in em.

    ValueError for LaTeX that matplotlib cannot set.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontProperties
    from matplotlib.mathtext import MathTextParser

    with matplotlib.rc_context({"mathtext.fontset": "stix", "svg.hashsalt": "preflab"}):
        font = FontProperties(size=size)
        parsed: Any = MathTextParser("path").parse(formula, dpi=72, prop=font)
        width, height, depth = parsed[0], parsed[1], parsed[2]
        pad = 0.5  # points, so that nothing is cut off
        width, height, depth = width + 2 * pad, height + 2 * pad, depth + pad
        figure = Figure(figsize=(width / 72, height / 72))
        figure.text(pad / width, depth / height, formula, fontproperties=font, color=INK)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _svg_uri(buffer.getvalue()), height / size, depth / size


def _svg_uri(svg: bytes) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg).decode("ascii")
