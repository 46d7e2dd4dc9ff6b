"""Running claims: cells on local processes or on Ray, each stored as it finishes, then judged.

Cells are pure, so neither their order nor the number of workers changes a number. Each worker uses one
thread (BLAS and numba included), which is also what makes its bits independent of the machine's load.
Workers ignore Ctrl-C: the parent stops them, having kept every finished cell; when the parent dies they end
by themselves.
"""

from __future__ import annotations

import importlib
import json
import math
import multiprocessing
import os
import secrets
import signal
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Literal

from .cells import Cell, canonical, decode
from .claim import Claim, Judgement, Outcome, Plan, Verdict
from .store import Store

_LIBRARIES = ("OMP", "OPENBLAS", "MKL", "VECLIB", "NUMBA")
ONE_THREAD = {
    f"{library}_{'MAXIMUM' if library == 'VECLIB' else 'NUM'}_THREADS": "1" for library in _LIBRARIES
} | {"OMP_WAIT_POLICY": "PASSIVE"}

Backend = Literal["local", "ray"]
Progress = Callable[[int, int, Cell | None], None]  # (done, total, the cell that just finished)


def no_progress(done: int, total: int, cell: Cell | None) -> None:
    """The progress callback that shows nothing."""


@dataclass(frozen=True)
class Ended:
    """How a cell ended: with a result, or with the text of its error."""

    cell: Cell
    result: Mapping[str, Any] | None
    seconds: float = 0.0
    error: str = ""


# ---- running cells -------------------------------------------------------------------------------------


def run_cells(
    cells: Iterable[Cell],
    store: Store,
    *,
    jobs: int | None = None,
    backend: Backend = "local",
    progress: Progress = no_progress,
) -> dict[Cell, str]:
    """Finish all cells that the store lacks. Returns the failures: cell -> error text (failures are not
    stored).

    jobs  worker processes; None = one a CPU; 0 = in this process, for debugging
    Two processes with one store share the work: each starts at its own place in the list and asks the store
    before each cell whether the other one has finished it.
    """
    if jobs is not None and jobs < 0:
        raise ValueError(f"jobs is {jobs}; give the number of worker processes, or 0 for this process")
    wanted = list(dict.fromkeys(cells))
    todo = store.missing(wanted)
    total, done = len(wanted), len(wanted) - len(todo)
    progress(done, total, None)
    if not todo:
        return {}
    start = secrets.randbelow(len(todo))
    todo = todo[start:] + todo[:start]
    finished_elsewhere: list[Cell] = []

    def pending() -> Iterator[Cell]:
        for cell in todo:
            if cell in store:
                finished_elsewhere.append(cell)
            else:
                yield cell

    jobs = min(jobs if jobs is not None else os.cpu_count() or 1, len(todo))
    failures: dict[Cell, str] = {}
    with closing(_BACKENDS[backend](pending(), jobs)) as endings:  # closing it stops the workers
        for completed, ended in enumerate(endings, start=1):
            if ended.result is None:
                failures[ended.cell] = ended.error
            else:
                store.put(ended.cell, ended.result, ended.seconds)
            progress(done + completed + len(finished_elsewhere), total, ended.cell)
    progress(total, total, None)
    return failures


def _run_local(cells: Iterator[Cell], jobs: int) -> Generator[Ended, None, None]:
    return _run_here(cells) if jobs == 0 else _run_pool(cells, jobs)


def run_one(cell: Cell) -> Ended:
    """Run a cell and time it; an exception becomes the text of its error."""
    begun = time.perf_counter()
    try:
        result = cell.run()
    except Exception:
        return Ended(cell, None, time.perf_counter() - begun, traceback.format_exc(limit=-6))
    return Ended(cell, result, time.perf_counter() - begun)


def _run_here(cells: Iterator[Cell]) -> Generator[Ended, None, None]:
    for cell in cells:
        yield run_one(cell)


@dataclass
class _Worker:
    process: Any
    pipe: Connection
    cell: Cell


def _run_pool(cells: Iterator[Cell], jobs: int) -> Generator[Ended, None, None]:
    """Worker processes that are handed one cell at a time; one that dies costs its cell and is replaced."""
    context = multiprocessing.get_context("spawn")
    busy: list[_Worker] = []
    processes: list[Any] = []

    def hire(cell: Cell) -> None:
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs,), daemon=True)
        with _inherited_by_workers():
            process.start()
        theirs.close()
        processes.append(process)
        busy.append(_Worker(process, ours, cell))
        ours.send_bytes(_order(cell))

    try:
        for cell in islice(cells, jobs):
            hire(cell)
        while busy:
            ready = set(wait([worker.pipe for worker in busy]))
            for worker in [worker for worker in busy if worker.pipe in ready]:
                cell = worker.cell
                busy.remove(worker)
                try:
                    answer = decode(json.loads(worker.pipe.recv_bytes()))
                except (EOFError, OSError):
                    worker.pipe.close()
                    worker.process.join()
                    code = worker.process.exitcode
                    for following in islice(cells, 1):
                        hire(following)
                    died = f"its worker process died (exit code {code}; -9: out of memory?)"
                    yield Ended(cell, None, 0.0, died)
                    continue
                for following in islice(cells, 1):
                    worker.cell = following
                    worker.pipe.send_bytes(_order(following))
                    busy.append(worker)
                    break
                else:
                    worker.pipe.close()  # no cell is left: the worker ends
                yield Ended(cell, answer["result"], answer["seconds"], answer["error"])
    except BaseException:
        for process in processes:
            process.terminate()
        raise
    finally:
        for worker in busy:
            worker.pipe.close()
        for process in processes:
            process.join()


def _order(cell: Cell) -> bytes:
    return canonical([cell.function, cell.parameters, cell.seed, cell.key]).encode()


def _die_with(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)


def serve(pipe: Connection) -> None:
    """A worker's life: cells in, results out, until the parent closes the pipe or dies."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_die_with, args=(parent,), daemon=True).start()
    while True:
        try:
            function, parameters, seed, key = decode(json.loads(pipe.recv_bytes()))
        except (EOFError, OSError):
            return
        cell = Cell(function, parameters, seed)
        ended = run_one(cell)
        if cell.key != key:
            ended = Ended(cell, None, 0.0, "the code changed while the run was under way; run again")
        answer = {"result": ended.result, "seconds": ended.seconds, "error": ended.error}
        pipe.send_bytes(canonical(answer).encode())


def _run_ray(cells: Iterator[Cell], jobs: int) -> Generator[Ended, None, None]:
    """The same on Ray: on the cluster that RAY_ADDRESS names, or a local one with `jobs` CPUs."""
    try:
        ray = importlib.import_module("ray")
    except ImportError:
        raise ValueError(
            "the ray backend needs the package ray: pip install ray, or use --backend local"
        ) from None
    started = not ray.is_initialized()
    if started:
        size = {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": max(jobs, 1)}
        ray.init(runtime_env={"env_vars": ONE_THREAD}, include_dashboard=False, log_to_driver=False, **size)
    try:
        remote = ray.remote(num_cpus=1, max_retries=0)(run_one)
        flying: dict[Any, Cell] = {}
        for cell in cells:
            flying[remote.remote(cell)] = cell
            if len(flying) >= max(jobs, 1):
                yield from _landed(ray, flying)
        while flying:
            yield from _landed(ray, flying)
    finally:
        if started:
            ray.shutdown()


def _landed(ray: Any, flying: dict[Any, Cell]) -> Iterator[Ended]:
    ready, _ = ray.wait(list(flying), num_returns=1)
    for reference in ready:
        cell = flying.pop(reference)
        try:
            yield ray.get(reference)
        except ray.exceptions.RayError as error:
            yield Ended(cell, None, 0.0, f"the Ray worker failed: {error}")


_BACKENDS: dict[str, Callable[[Iterator[Cell], int], Generator[Ended, None, None]]] = {
    "local": _run_local,
    "ray": _run_ray,
}


@contextmanager
def _inherited_by_workers() -> Iterator[None]:
    """What a process started here inherits: one thread for each numerical library, and Ctrl-C ignored."""
    before = {name: os.environ.get(name) for name in ONE_THREAD}
    in_main_thread = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN) if in_main_thread else None
    os.environ.update(ONE_THREAD)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        if in_main_thread:
            signal.signal(signal.SIGINT, handler)


# ---- running claims ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ControlResult:
    """What the claim's judge said about a control. Caught: judged, and not verified."""

    name: str
    description: str
    caught: bool
    verdict: Verdict | None  # None: its cells or the judge failed
    detail: str
    statistic: float


@dataclass(frozen=True)
class ClaimResult:
    """A claim's verdict with all that the report shows."""

    claim: Claim
    judgement: Judgement
    controls: tuple[ControlResult, ...]
    outcomes: tuple[Outcome, ...] = field(repr=False)
    seeds: int
    cells: int
    seconds: float
    errors: tuple[str, ...] = ()
    unfinished: int = 0  # cells of the claim itself that failed or were not run

    @property
    def ok(self) -> bool:
        return self.judgement.verdict == "verified" and all(control.caught for control in self.controls)


def expand(claims: Iterable[Claim], plan: Plan) -> list[Cell]:
    """All cells that the claims and their controls need, each once."""
    makers = (
        make for claim in claims for make in (claim.cells, *(control.cells for control in claim.controls))
    )
    return list(dict.fromkeys(cell for make in makers for cell in make(plan)))


def run_claims(
    claims: Sequence[Claim],
    plan: Plan,
    store: Store,
    *,
    jobs: int | None = None,
    backend: Backend = "local",
    progress: Progress = no_progress,
) -> list[ClaimResult]:
    """Finish the claims' cells, then judge each claim and its controls."""
    failures = run_cells(expand(claims, plan), store, jobs=jobs, backend=backend, progress=progress)
    return judge_claims(claims, plan, store, failures)


def judge_claims(
    claims: Sequence[Claim], plan: Plan, store: Store, failures: Mapping[Cell, str] | None = None
) -> list[ClaimResult]:
    """Verdicts from what the store holds. With unfinished cells a claim is inconclusive, a control not caught."""
    return [_judge_claim(claim, plan, store, failures or {}) for claim in claims]


def _judge_claim(claim: Claim, plan: Plan, store: Store, failures: Mapping[Cell, str]) -> ClaimResult:
    seconds: dict[Cell, float] = {}
    errors: dict[str, None] = {}  # an ordered set

    def judged(cells: Sequence[Cell]) -> tuple[Judgement | None, str, tuple[Outcome, ...]]:
        outcomes = []
        for cell in cells:
            if (found := store.get(cell)) is not None:
                outcomes.append(Outcome(cell, found.result))
                seconds[cell] = found.seconds
            elif cell in failures:
                errors[f"cell {cell} failed:\n{failures[cell].strip()}"] = None
        if len(outcomes) < len(cells):
            failed = sum(cell in failures for cell in cells)
            left = len(cells) - len(outcomes) - failed
            words = [f"{failed} of {len(cells)} cells failed"] if failed else []
            words += [f"{left} of {len(cells)} cells are not finished"] if left else []
            return None, " and ".join(words), tuple(outcomes)
        try:
            return claim.judge(outcomes), "", tuple(outcomes)
        except Exception as error:
            errors[f"the judge of {claim.name} failed:\n{traceback.format_exc(limit=-6).strip()}"] = None
            return None, f"the judge failed: {type(error).__name__}: {error}", tuple(outcomes)

    cells = claim.cells(plan)
    judgement, why, outcomes = judged(cells)
    if judgement is None:
        judgement = Judgement("inconclusive", math.nan, math.nan, why)
    controls = []
    for control in claim.controls:
        verdict, why, _ = judged(control.cells(plan))
        controls.append(
            ControlResult(
                control.name,
                control.description,
                verdict is not None and verdict.verdict != "verified",
                verdict.verdict if verdict is not None else None,
                verdict.detail if verdict is not None else why,
                verdict.statistic if verdict is not None else math.nan,
            )
        )
    return ClaimResult(
        claim,
        judgement,
        tuple(controls),
        outcomes,
        seeds=len({cell.seed for cell in cells}),
        cells=len(seconds),
        seconds=sum(seconds.values()),
        errors=tuple(errors),
        unfinished=len(cells) - len(outcomes),
    )
