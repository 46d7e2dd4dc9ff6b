"""What an episode of PR-LSVI costs, early and late, with and without queries, against its bare arithmetic.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_pr_lsvi.py

The world is the linear MDP of S = 50, A = 4, d = 20, H = 10. The floor is one compiled loop over the matrix-vector
products that an episode cannot do without (planning, two rank-one updates of the norms a step, exact evaluation).
"""

import statistics
import time

import numpy as np
from numba import njit
from preflab.algorithms.pr_lsvi import PRLSVI, Settings
from preflab.envs.annotators import BradleyTerry
from preflab.envs.linear_mdp import random_linear_mdp

S, A, D, H = 50, 4, 20, 10
MODEL = random_linear_mdp(S, A, D, H, seed=0)


def start(eps: float) -> PRLSVI:
    return PRLSVI(MODEL, BradleyTerry(MODEL, 0), Settings.scaled(MODEL, eps), seed=0)


@njit
def bare(phi, pair, cross, v, u, P, episodes):  # type: ignore[no-untyped-def]
    total = 0.0
    for _ in range(episodes):
        for h in range(P.shape[0]):
            total += np.dot(phi, pair)[0, 0]  # reward and value parameters on all features
            total += np.dot(cross, v)[0]  # the regression's right-hand side
            for _ in range(2):
                total += np.dot(phi, u)[0]  # one rank-one update of all norms
            for s in range(P.shape[1]):
                total += np.dot(P[h, s], v)  # exact evaluation
    return total


def floor(episodes: int) -> float:
    rng = np.random.default_rng(0)
    arrays = [rng.random(shape) for shape in ((S * A, D), (D, 2), (D, S), (S,), (D,), (H, S, S))]
    bare(*arrays, 1)
    begin = time.perf_counter()
    bare(*arrays, episodes)
    return time.perf_counter() - begin


def timed(run: PRLSVI, episodes: int) -> float:
    begin = time.perf_counter()
    run.advance(episodes)
    return time.perf_counter() - begin


def main() -> None:
    start(0.3).advance(50)  # compiles
    bare_seconds = min(floor(1000) for _ in range(5))
    print(f"bare products of 1,000 episodes: {bare_seconds:.3f} s")
    for eps in (0.3, 1.0, 3.0, 1e9):
        spent, queries = [], 0
        for _ in range(5):
            run = start(eps)
            spent.append(timed(run, 1000))
            queries = int(run.records["queried"].sum())
        median = statistics.median(spent)
        print(
            f"1,000 episodes, eps = {eps:g}: {median:.3f} s (best {min(spent):.3f}), {queries} queries, "
            f"ratio to bare products {median / bare_seconds:.1f}"
        )
    ratios = []
    for _ in range(5):
        run = start(1e9)
        run.advance(1000)
        early = timed(run, 1000)
        run.advance(7000)
        ratios.append(timed(run, 1000) / early)
    print(
        f"episodes 9,000-10,000 over 1,000-2,000, no query: median ratio {statistics.median(ratios):.3f} "
        f"({', '.join(f'{r:.2f}' for r in sorted(ratios))})"
    )
    run = start(0.0)
    marks = [timed(run, 1000) for _ in range(8)]
    print("every episode asks, seconds per 1,000 episodes: " + " ".join(f"{m:.2f}" for m in marks))


if __name__ == "__main__":
    main()
