"""Timings of the estimation package against the floor of the same work, measured in the same run.

    python tests/benchmarks/bench_estimation.py

prints one line a case: milliseconds (or microseconds), the floor, and their ratio. One BLAS thread is assumed
(OMP_NUM_THREADS=1).
"""

import time

import numpy as np
from preflab.algorithms.estimation import Gram, OnlinePreferenceMLE, fit_preferences
from preflab.algorithms.estimation.linear_algebra import cholesky_update, solve_factored
from preflab.envs.links import LINKS


def best(work, repeats=15):
    """Seconds of the fastest of `repeats` calls, after one that warms up."""
    work()
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def fits(q=1000, d=40):
    rng = np.random.default_rng(0)
    D = rng.normal(size=(q, d)) / np.sqrt(d)
    theta = 3 * rng.normal(size=d)
    for link in LINKS.values():
        won = rng.random(q) < link.value(D @ theta)
        for settings in ({}, {"radius": 10.0}, {"ridge": 1.0}):
            fit = fit_preferences(D, won, link=link, **settings)
            spent = best(
                lambda won=won, link=link, settings=settings: fit_preferences(D, won, link=link, **settings)
            )
            floor = best(lambda: D.T @ D) * (fit.iterations + 1)
            print(
                f"MLE {link.name:9s} q={q} d={d} {settings!s:18s} {fit.iterations} iterations "
                f"{1e3 * spent:6.2f} ms   X^T X as often: {1e3 * floor:5.2f} ms   ratio {spent / floor:4.1f}"
            )


def stream(d=20, q=4000):
    rng = np.random.default_rng(1)
    D = rng.normal(size=(q, d)) / np.sqrt(d)
    won = rng.random(q) < 0.5
    for growth in (0.05, 0.25):
        online, marks = OnlinePreferenceMLE(d, radius=2.0, growth=growth), {}
        begin = time.perf_counter()
        for t in range(q):
            online.add(D[t], bool(won[t]))
            marks[t + 1] = time.perf_counter() - begin
        early, late = (1e6 * (marks[2 * n] - marks[n]) / n for n in (500, 2000))
        print(
            f"online MLE d={d} growth={growth}: {early:5.0f} us a comparison at 500-1000, {late:5.0f} us at "
            f"2000-4000   ratio {late / early:4.2f}   ({online.refits} refits)"
        )


def kernels():
    for d in (20, 100):
        gram, x, n = Gram(d), np.random.default_rng(d).normal(size=d), 2000
        A = gram.matrix

        def updates(gram=gram, x=x, n=n):
            for _ in range(n):
                cholesky_update(gram.factor, x)

        def solves(gram=gram, x=x, n=n):
            for _ in range(n):
                solve_factored(gram.factor, x)

        def fresh(A=A, n=n):
            for _ in range(n // 10):
                np.linalg.cholesky(A)

        update, solve, factorise = best(updates, 5) / n, best(solves, 5) / n, best(fresh, 5) / (n // 10)
        print(
            f"d={d:3d}: rank-one update {1e6 * update:5.2f} us, solve {1e6 * solve:5.2f} us; a fresh factorisation "
            f"{1e6 * factorise:6.1f} us   ratio {update / factorise:4.2f}"
        )


if __name__ == "__main__":
    fits()
    stream()
    kernels()
