"""Preference games against the floor and a peer, in one run.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_games.py

prints, for medians over repetitions:
    newton   the regularised equilibrium of a 100 x 100 game, wanted <= 1 ms at moderate temperatures
    lp       a Nash equilibrium of a 100 x 100 game / scipy's HiGHS on the textbook program, wanted <= 1
    steps    a step of Nash-MD, INPO and SPPO / the bare product with P, wanted <= 1.2 at 2,048 responses
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from scipy.optimize import linprog

sys.path.insert(0, str(Path(__file__).parents[2] / "src"))
from preflab.algorithms.inpo import INPO
from preflab.algorithms.nash_md import NashMD
from preflab.algorithms.planning import exploitability, nash, regularised_nash
from preflab.algorithms.sppo import SPPO
from preflab.envs import PreferenceGame, random_game


def medians(repetitions: int, *work: Callable[[], Any]) -> list[float]:
    """Seconds of each, measured in turns, so that a busy machine is busy for all; one warm-up each."""
    for f in work:
        f()
    seconds: list[list[float]] = [[] for _ in work]
    for _ in range(repetitions):
        for f, record in zip(work, seconds, strict=True):
            start = time.perf_counter()
            f()
            record.append(time.perf_counter() - start)
    return [median(record) for record in seconds]


def newton(n: int = 100) -> None:
    game = random_game(n, 0)
    for tau in (1.0, 0.1, 0.02, 0.01, 0.001):
        found = regularised_nash(game, tau)
        assert found.exploitability < 1e-18
        (seconds,) = medians(31, lambda tau=tau: regularised_nash(game, tau))
        print(
            f"newton n={n} tau={tau:g}: {seconds * 1e3:.2f} ms, {found.iterations} steps, "
            f"exploitability {found.exploitability:.0e}"
        )


def large(n: int = 4096) -> None:
    game = random_game(n, 0)
    for tau in (0.1, 0.01):
        start = time.perf_counter()
        found = regularised_nash(game, tau)
        seconds = time.perf_counter() - start
        print(f"newton n={n} tau={tau:g}: {seconds:.1f} s, {found.iterations} steps")


def textbook(game: PreferenceGame) -> np.ndarray:
    """max v with P^T x >= v, sum x = 1, x >= 0."""
    n = len(game)
    A = np.hstack([-game.P.T, np.ones((n, 1))])
    cost = np.append(np.zeros(n), -1.0)
    total = np.append(np.ones(n), 0.0)[None]
    bounds = [(0, None)] * n + [(None, None)]
    return linprog(cost, A_ub=A, b_ub=np.zeros(n), A_eq=total, b_eq=[1.0], bounds=bounds).x[:n]


def lp(n: int = 100) -> None:
    for seed in range(3):
        game = random_game(n, seed)
        found = nash(game)
        law = np.maximum(textbook(game), 0)
        ours, theirs = medians(9, lambda game=game: nash(game), lambda game=game: textbook(game))
        print(
            f"lp n={n} seed={seed}: {ours * 1e3:.1f} ms, HiGHS alone {theirs * 1e3:.1f} ms; ratio "
            f"{ours / theirs:.2f}; exploitability {found.exploitability:.0e} and "
            f"{exploitability(game, law / law.sum()):.0e}"
        )


def steps() -> None:
    for n, count in ((128, 400), (512, 100), (2048, 20)):
        game = random_game(n, 0)
        pi = game.reference

        def floor(game: PreferenceGame = game, pi: np.ndarray = pi, count: int = count) -> None:
            for _ in range(count):
                game.P @ pi

        learners = [NashMD(game, 0.1, 1.0), INPO(game, 0.1, 1.0), SPPO(game, 0.1)]
        bare, *times = medians(
            15, floor, *(lambda run=run, count=count: run.advance(count) for run in learners)
        )
        shown = ", ".join(
            f"{type(run).__name__} {seconds / bare:.2f}" for run, seconds in zip(learners, times, strict=True)
        )
        print(f"steps n={n}: product {bare / count * 1e6:.1f} us; ratios: {shown}")


if __name__ == "__main__":
    newton()
    large()
    lp()
    steps()
