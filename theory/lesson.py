"""What the notebooks show with: figures as PNG, tables, and the source of the code that runs. Needs IPython."""

from __future__ import annotations

import inspect
import io
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np


def panels(columns: int = 1, width: float = 9.6, height: float = 3.8, **options: Any) -> tuple[Any, Any]:
    """A figure with `columns` axes side by side, in the house style."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    from . import figures

    rcParams.update(figures.STYLE)
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, np.atleast_1d(figure.subplots(1, columns, **options))


def show(figure: Any, alt: str) -> None:
    """Put a figure into the page as PNG; `alt` says what it shows to those who cannot see it."""
    from IPython.display import Image, display

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    display(Image(buffer.getvalue(), width=int(90 * figure.get_figwidth()), alt=alt))


def code(*functions: Any) -> None:
    """The source of the functions that run here, not a copy of it."""
    from IPython.display import Markdown, display

    source = [textwrap.dedent(inspect.getsource(getattr(f, "py_func", f))) for f in functions]
    display(Markdown("```python\n" + "\n".join(source) + "```"))


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A table; texts that a language model wrote are kept from being read as markup."""
    from IPython.display import Markdown, display

    def cell(x: object) -> str:
        return "".join("\\" + c if c in "|*_`<>[]\\" else c for c in x) if isinstance(x, str) else f"{x}"

    lines = [header, ["---"] * len(header), *([cell(x) for x in row] for row in rows)]
    display(Markdown("\n".join("| " + " | ".join(line) + " |" for line in lines)))
