"""Token trees of 10^7 leaves, and loading the shipped language world.

    python tests/benchmarks/bench_token_mdp.py

The floor of building a tree is the time to write its reward and its reference policy once (np.full of those bytes).
"""

import time
import tracemalloc

import numpy as np
from preflab.envs.language_world import load_language_world
from preflab.envs.token_mdp import TokenMDP


def seconds(function, repeats=3):
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - start)
    return best


def tree(k, horizon):
    def build():
        return TokenMDP.from_response_reward(
            lambda prompt, tokens: tokens[:, 0] * 1.0, horizon=horizon, vocabulary=k
        )

    world = build()
    pairs = sum(r.size for r in world.reward)
    tracemalloc.start()
    build()
    memory = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    floor = seconds(lambda: (np.full(pairs, 0.5), np.full(pairs, 0.5)))
    from_function = seconds(build, 1)
    leaves = world.leaf_rewards
    from_array = seconds(lambda: TokenMDP.from_response_reward(leaves, horizon=horizon, vocabulary=k), 1)
    along = seconds(lambda: world.leaf_rewards)
    print(f"k={k}, H={horizon}: {world.n_leaves:,} leaves")
    print(f"    memory at most {memory:.0f} MiB, of which {16 * pairs / 2**20:.0f} are kept")
    print(f"    from an array {from_array:.2f} s, {from_array / floor:.1f} x the floor of {floor:.3f} s")
    print(f"    from a function {from_function:.2f} s; returns of all leaves {along:.3f} s")


if __name__ == "__main__":
    print(f"load_language_world: {seconds(load_language_world, 10) * 1e3:.1f} ms")
    tree(4, 11)
    tree(10, 7)
