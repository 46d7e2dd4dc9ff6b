"""Preference games against the floor and peers, in one run.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_games.py

prints, for medians over repetitions:
    newton     the regularised equilibrium of a 100 x 100 game, wanted <= 1 ms
    large      the same for 4,096 responses, wanted: seconds
    low rank   a million responses without their matrix: the regularised and a Nash equilibrium, wanted: seconds, and a
               step of Nash-MD / its product
    lp         a Nash equilibrium of a 100 x 100 game / scipy's HiGHS on the textbook program, wanted <= 1
    steps      a step of Nash-MD, INPO, SPPO and optimistic MWU / the bare product with P, wanted <= 1.2
    nashpy     the linear program of Nashpy, which solves one for either player
    openspiel  magnetic mirror descent of OpenSpiel to the same regularised equilibrium (uniform reference), against
               Newton's method and as many steps of mirror-prox

The peers run where they are installed (`pip install nashpy open_spiel`); else a line says that they are not.
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
from preflab.algorithms.oomd_sea import OptimisticMWU
from preflab.algorithms.planning import exploitability, mirror_prox, nash, regularised_nash
from preflab.algorithms.sppo import SPPO
from preflab.envs import PreferenceGame, random_game
from preflab.envs.structured_games import random_low_rank_game


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


def newton(n: int = 100, games: int = 5) -> None:
    for tau in (1.0, 0.1, 0.02, 0.01, 0.001):
        seconds, steps, worst = [], [], 0.0
        for seed in range(games):
            game = random_game(n, seed)
            found = regularised_nash(game, tau)
            steps.append(found.iterations)
            worst = max(worst, found.exploitability)
            seconds += medians(31, lambda game=game, tau=tau: regularised_nash(game, tau))
        assert worst < 1e-18
        print(
            f"newton n={n} tau={tau:g}: {median(seconds) * 1e3:.2f} ms (largest of {games} games "
            f"{max(seconds) * 1e3:.2f}), {median(steps):g} steps, exploitability {worst:.0e}"
        )


def large(n: int = 4096) -> None:
    game = random_game(n, 0)
    for tau in (0.1, 0.01):
        start = time.perf_counter()
        found = regularised_nash(game, tau)
        seconds = time.perf_counter() - start
        print(f"newton n={n} tau={tau:g}: {seconds:.1f} s, {found.iterations} steps")


def low_rank(n: int = 10**6) -> None:
    for rank in (4, 8):
        start = time.perf_counter()
        game = random_low_rank_game(n, rank, 0)
        print(f"low rank n={n} k={rank}: made and checked in {time.perf_counter() - start:.2f} s", end="")
        for tau in (0.1, 0.001):
            start = time.perf_counter()
            found = regularised_nash(game, tau)
            print(
                f"; tau={tau:g} {time.perf_counter() - start:.2f} s, {found.iterations} steps, "
                f"exploitability {found.exploitability:.0e}",
                end="",
            )
        start = time.perf_counter()
        vertex = nash(game)
        print(
            f"; Nash {time.perf_counter() - start:.2f} s, exploitability {vertex.exploitability:.0e}", end=""
        )
        run = NashMD(game, 0.1, 1.0)
        bare, step = medians(5, lambda game=game: game.wins(game.reference), lambda run=run: run.advance(1))
        print(f"; a product {bare * 1e3:.0f} ms, a step of Nash-MD {step * 1e3:.0f} ms")


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
    for n, count in ((128, 400), (512, 100), (1024, 50), (2048, 20), (4096, 8)):
        game = random_game(n, 0)
        pi = game.reference

        def floor(game: PreferenceGame = game, pi: np.ndarray = pi, count: int = count) -> None:
            for _ in range(count):
                game.P @ pi

        learners = [NashMD(game, 0.1, 1.0), INPO(game, 0.1, 1.0), SPPO(game, 0.1), OptimisticMWU(game, 0.1)]
        bare, *times = medians(
            15, floor, *(lambda run=run, count=count: run.advance(count) for run in learners)
        )
        shown = ", ".join(
            f"{type(run).__name__} {seconds / bare:.2f}" for run, seconds in zip(learners, times, strict=True)
        )
        print(f"steps n={n}: product {bare / count * 1e6:.1f} us; ratios: {shown}")


def against_nashpy(n: int = 100) -> None:
    try:
        import nashpy
    except ImportError:
        print("nashpy: not installed")
        return
    for seed in range(3):
        game = random_game(n, seed)
        A = game.P - 0.5
        theirs = nashpy.Game(A, -A)
        law = np.maximum(theirs.linear_program()[0], 0)
        ours, other = medians(5, lambda game=game: nash(game), theirs.linear_program)
        print(
            f"nashpy n={n} seed={seed}: ours {ours * 1e3:.1f} ms, Nashpy {other * 1e3:.1f} ms for both players; ratio "
            f"{ours / other:.2f}; exploitability {nash(game).exploitability:.0e} and "
            f"{exploitability(game, law / law.sum()):.0e}"
        )


def against_openspiel(n: int = 100, tau: float = 0.1, iterations: int = 200) -> None:
    try:
        import pyspiel
        from open_spiel.python.algorithms.mmd_dilated import MMDDilatedEnt
    except ImportError:
        print("openspiel: not installed")
        return
    game = random_game(n, 0)
    A = game.P - 0.5
    theirs = pyspiel.convert_to_turn_based(pyspiel.create_matrix_game(A, -A))
    run = MMDDilatedEnt(theirs, alpha=tau)
    start = time.perf_counter()
    for _ in range(iterations):
        run.update_sequences()
    mmd = time.perf_counter() - start
    played = run.get_policies().action_probabilities(theirs.new_initial_state())
    law = np.array([played[i] for i in range(n)])
    newton, prox = medians(
        5,
        lambda: regularised_nash(game, tau),
        lambda: mirror_prox(game, tau, iterations=iterations, step=1.9),
    )
    found = [
        regularised_nash(game, tau).exploitability,
        mirror_prox(game, tau, iterations=iterations, step=1.9).exploitability,
        exploitability(game, law / law.sum(), tau),
    ]
    print(
        f"openspiel n={n} tau={tau:g}: MMD {iterations} steps {mmd * 1e3:.0f} ms, exploitability {found[2]:.0e}; "
        f"mirror-prox {iterations} steps {prox * 1e3:.1f} ms, {found[1]:.0e}; Newton {newton * 1e3:.2f} ms, "
        f"{found[0]:.0e}"
    )


if __name__ == "__main__":
    newton()
    large()
    low_rank()
    lp()
    steps()
    against_nashpy()
    against_openspiel()
