"""What an answer costs, against the floor of the same work in the same run.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_annotators.py

The floor of one comparison: two bare reward look-ups of H steps, one logistic function, one uniform. The floor of a
batch: the same on arrays. What is left is checking the pair, counting and logging it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
from scipy.special import expit

sys.path.insert(0, str(Path(__file__).parents[2] / "src"))
from preflab.envs import FiniteMDP
from preflab.envs.annotators import BradleyTerry, Thurstone
from preflab.envs.attainable import reward_range
from preflab.envs.populations import LabelNoise, Mixture
from preflab.envs.sound_quality import MODES, PIECES, sound_quality_annotator
from preflab.envs.trajectories import Trajectories

S, A, H = 50, 4, 10


def seconds(work: Callable[[], object], calls: int, repeats: int = 7) -> float:
    """Median over repeats of the mean time of a call."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        for _ in range(calls):
            work()
        times.append((time.perf_counter() - begin) / calls)
    return median(times)


def main() -> None:
    rng = np.random.default_rng(0)
    model = FiniteMDP.dense(rng.dirichlet(np.ones(S), (H, S, A)), rng.random((H, S, A)) / H)
    policy = np.full((H, S, A), 1 / A)
    steps = np.arange(H)

    def floor(first: Trajectories, second: Trajectories) -> np.ndarray:
        r = np.asarray(model.reward)
        x = r[steps, first.states, first.actions].sum(1) - r[steps, second.states, second.actions].sum(1)
        return (rng.random(len(x)) < expit(x)).astype(np.int8)

    bt = BradleyTerry(model, 0)
    users = [BradleyTerry(model, k) for k in range(5)]
    asked = {"bradley_terry": bt, "thurstone": Thurstone(model, 0), "noise": LabelNoise(bt, 0, 0.1)}
    asked["mixture of 5"] = Mixture(users, 0)
    for n, calls in ((1, 3000), (100_000, 2)):
        first, second = model.rollout(policy, n, rng), model.rollout(policy, n, rng)
        bare = seconds(lambda f=first, s=second: floor(f, s), calls)
        print(f"n = {n}: floor {1e6 * bare / n:8.3f} us a comparison")
        for name, who in asked.items():
            took = seconds(lambda w=who, f=first, s=second: w.compare(f, s), calls)
            print(f"  {name:<15} {1e6 * took / n:8.3f} us   {took / bare:5.2f} times the floor")
    people = sound_quality_annotator(0)
    for n, calls in ((1, 3000), (100_000, 2)):
        c, (i, j) = rng.integers(len(PIECES), size=(n, 1)), rng.integers(len(MODES), size=(2, n, 1))
        first, second = Trajectories(c, i), Trajectories(c, j)
        took = seconds(lambda f=first, s=second: people.compare(f, s), calls)
        print(f"recorded listeners, n = {n}: {1e6 * took / n:8.3f} us a comparison")
    print(f"reward_range of S={S}, A={A}, H={H}: {1e3 * seconds(lambda: reward_range(model), 20):.2f} ms")


if __name__ == "__main__":
    main()
