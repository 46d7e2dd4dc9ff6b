"""The batched simulator against Gymnasium's vector classes and against the bare work that it cannot avoid, in one run.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_simulator.py

prints million environment steps a second (medians) on a FrozenLake-size table at 16,384 lanes, wanted >= 15, and:
    floor      one uniform of NumPy's generator and two gathers from tables in the cache, per lane and step
    gymnasium  SyncVectorEnv of Gymnasium's own FrozenLake, and one bare FrozenLake environment without any wrapper
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import gymnasium
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2] / "src"))
from preflab.envs import BatchedSimulator, FiniteMDPEnv, random_linear_mdp, random_token_mdp
from preflab.envs.exploration import toy_text

LANES, STEPS = 16_384, 50


def rates(repetitions: int, **work: tuple[int, Callable[[], None]]) -> dict[str, float]:
    """Million steps a second of each, measured in turns, so that a busy machine is busy for all; one warm-up each."""
    for _, f in work.values():
        f()
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(repetitions):
        for name, (_, f) in work.items():
            start = time.perf_counter()
            f()
            seconds[name].append(time.perf_counter() - start)
    return {name: steps / median(seconds[name]) / 1e6 for name, (steps, _) in work.items()}


def lanes(model, lanes=LANES, steps=STEPS) -> tuple[int, Callable[[], None]]:
    sim = BatchedSimulator(model, lanes, 0)
    actions = np.random.default_rng(0).integers(model.n_actions, size=(steps, lanes))
    if model.action_mask is not None:
        actions[:] = model.n_actions - 1  # the end action, open everywhere

    def work() -> None:
        for a in actions:
            sim.step(a)

    return lanes * steps, work


def floor(model) -> tuple[int, Callable[[], None]]:
    rng = np.random.default_rng(0)
    successor = rng.integers(model.sizes[0], size=model.sizes[0] * model.n_actions)
    reward = rng.random(len(successor))
    row, u = rng.integers(len(successor), size=LANES), np.empty(LANES)

    def work() -> None:
        for _ in range(STEPS):
            rng.random(out=u)
            successor.take(row)
            reward.take(row)

    return LANES * STEPS, work


def vector(n=16) -> tuple[int, Callable[[], None]]:
    env = gymnasium.make_vec("FrozenLake-v1", n, vectorization_mode="sync")
    env.reset(seed=0)
    actions = np.random.default_rng(0).integers(4, size=(100, n))

    def work() -> None:
        for a in actions:
            env.step(a)

    return n * 100, work


def single(env) -> tuple[int, Callable[[], None]]:
    env.reset(seed=0)
    actions = np.random.default_rng(0).integers(4, size=1000).tolist()

    def work() -> None:
        for a in actions:
            if env.step(a)[2]:
                env.reset()

    return 1000, work


def main() -> None:
    lake = toy_text("FrozenLake-v1", horizon=50)
    found = rates(
        9,
        batched=lanes(lake),
        floor=floor(lake),
        gymnasium_sync=vector(),
        gymnasium_single=single(gymnasium.make("FrozenLake-v1").unwrapped),
        preflab_single=single(FiniteMDPEnv(lake)),
        wide_rows=lanes(random_linear_mdp(50, 4, 20, 10, 0)),
        token_tree=lanes(random_token_mdp(vocabulary=4, horizon=5)),
    )
    for name, rate in found.items():
        print(f"{name:18s} {rate:9.3f} M steps/s   batched is {found['batched'] / rate:8.2f} x")


if __name__ == "__main__":
    main()
