"""What the commands share: consoles, progress, errors that end in one sentence, exit codes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130


def make_console(stderr: bool = False) -> Console:
    """A console that, where no terminal says how wide it is, does not fold tables at 80 columns."""
    console = Console(stderr=stderr, highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = 140
    return console


@contextmanager
def reported(resume: Callable[[], str] = lambda: "") -> Iterator[None]:
    """Errors that the user can mend end in one sentence and exit code 2; Ctrl-C says how to go on."""
    from .theory.store import StoreError

    try:
        yield
    except (ValueError, StoreError, OSError) as error:
        make_console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(USAGE) from None
    except KeyboardInterrupt:
        make_console(stderr=True).print(f"\n[bold]interrupted.[/] {escape(resume())}", soft_wrap=True)
        raise typer.Exit(INTERRUPTED) from None


def single_threaded() -> None:
    """One thread a process, before numpy is imported: the cells fill the cores, and bits do not depend on threads."""
    for library in ("OMP", "OPENBLAS", "MKL", "NUMBA"):
        os.environ.setdefault(f"{library}_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[..., None]]:
    """A bar on the terminal: done, left, time; without a terminal a line at each tenth."""
    console = make_console(stderr=True)
    if not console.is_terminal:
        tenths = {-1}

        def line(done: int, total: int, *_: Any) -> None:
            tenth = 10 * done // max(total, 1)
            if tenth > max(tenths):
                tenths.add(tenth)
                console.print(f"{what}: {done} of {total} done, {total - done} left")

        yield line
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    parts = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[left]} left,"),
        TimeElapsedColumn(),
        TextColumn("gone,"),
        TimeRemainingColumn(),
        TextColumn("to go"),
    )
    with Progress(*parts, console=console, speed_estimate_period=600) as bar:
        task = bar.add_task(what, total=None, left="")

        def advance(done: int, total: int, *_: Any) -> None:
            bar.update(task, completed=done, total=total, left=total - done)

        yield advance
