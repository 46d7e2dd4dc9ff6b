"""What the notebooks show with."""

from __future__ import annotations

import pytest
from preflab.theory import lesson

shown: list = []


@pytest.fixture(autouse=True)
def display(monkeypatch):
    import IPython.display

    shown.clear()
    monkeypatch.setattr(IPython.display, "display", shown.append)


def test_a_table_keeps_texts_from_being_markup():
    lesson.table(["text", "n"], [["a|b_c*", 3], ["<i>", 0.5]])
    assert shown[0].data.splitlines() == [
        "| text | n |",
        "| --- | --- |",
        "| a\\|b\\_c\\* | 3 |",
        "| \\<i\\> | 0.5 |",
    ]


def test_code_is_the_source_that_runs():
    class Compiled:
        py_func = staticmethod(test_a_table_keeps_texts_from_being_markup)

    lesson.code(lesson.panels, Compiled)
    assert shown[0].data.startswith("```python\ndef panels(")
    assert "def test_a_table_keeps" in shown[0].data


def test_figures_are_png_with_a_description():
    figure, axes = lesson.panels(2, width=4, height=2)
    assert len(axes) == 2
    lesson.show(figure, "two empty panels")
    assert shown[0].data[:4] == b"\x89PNG"
    assert shown[0].alt == "two empty panels"
