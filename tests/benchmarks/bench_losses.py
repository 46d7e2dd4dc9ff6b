"""Exact populations on a token tree of 10^5 leaves, in one run with the floor of the same work.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_losses.py

For DPO (Bradley-Terry, 5.6e5 pairs), IPO and INPO (all 1.2e10 pairs, by a preference of low rank) on the 111,111
responses of ten tokens and five steps: seconds to the optimum from the reference, the largest |log pi - log pi*| to
the closed form, the gradient in the tree's own parameters, and evaluations of loss and gradient that the time would buy
(the floor of one iteration). Wanted: 1e-10 in under a minute.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "src"))
from preflab.algorithms.dpo import dpo_loss, dpo_solution
from preflab.algorithms.inpo import INPO
from preflab.algorithms.ipo import product_loss
from preflab.algorithms.optimisation import Pairs, PrefixTree, SoftmaxTable, fit, gather
from preflab.algorithms.planning.games import softmax
from preflab.envs import random_token_mdp
from preflab.envs.structured_games import LowRankGame
from scipy.special import expit

BETA, TAU = 0.5, 0.2


def report(
    name: str,
    loss: Callable[[Any], Any],
    tree: PrefixTree,
    log_start: np.ndarray,
    closed: np.ndarray,
    importance: np.ndarray,
) -> None:
    start = time.perf_counter()
    found = fit(loss, tree, log_start, importance=importance, tolerance=1e-15)
    seconds = time.perf_counter() - start
    table = SoftmaxTable(tree.responses)
    theta = table.start(log_start).requires_grad_(True)
    once = time.perf_counter()
    torch.autograd.grad(loss(table.log_probabilities(theta)), theta)
    once = time.perf_counter() - once
    error = np.abs(tree.log_probabilities(found.theta).numpy() - closed).max()
    print(
        f"{name}: {seconds:.1f} s, {found.iterations} iterations, {seconds / once:.0f} evaluations' time; "
        f"largest |log pi - log pi*| {error:.0e}, gradient on the tree {found.gradient:.0e}"
    )


def main() -> None:
    world = random_token_mdp(10, 5, seed=1, concentration=3.0)
    tree, rng = PrefixTree(world.kernel), np.random.default_rng(0)
    n, log_reference, rewards = tree.responses, world.leaf_log_probabilities(), 5 * world.leaf_rewards
    print(f"{n} responses, {tree.size} parameters")

    y = np.concatenate(
        [rng.integers(n, size=(4 * n, 2)), np.column_stack([np.arange(n - 1), np.arange(1, n)])]
    )
    y = y[y[:, 0] != y[:, 1]]
    pairs = Pairs(y, expit(rewards[y[:, 0]] - rewards[y[:, 1]]), np.ones(len(y)))
    p, w = pairs.tensors()
    anchor = gather(torch.as_tensor(log_reference), pairs)
    report(
        f"DPO, {len(pairs)} pairs",
        lambda lp: dpo_loss(gather(lp, pairs), anchor, p, w, beta=BETA),
        tree,
        log_reference,
        dpo_solution(rewards, log_reference, BETA)[1],
        pairs.importance(n),
    )

    U = rng.uniform(-1, 1, size=(n, 4))
    C = np.triu(rng.uniform(-0.04, 0.04, size=(4, 4)), 1)
    game = LowRankGame(U, C - C.T, reference=np.exp(log_reference))
    mu = torch.tensor(game.reference)
    wins = game.wins(game.reference)
    report(
        "IPO, all pairs",
        lambda lp: product_loss(
            lp - torch.as_tensor(log_reference), mu, torch.as_tensor(wins), 1 / (2 * TAU)
        ),
        tree,
        log_reference,
        softmax(log_reference + wins / TAU)[1],
        game.reference,
    )

    run = INPO(game, TAU, 1.0).advance(3)
    anchor_t = TAU * game.log_reference + (1 - TAU) * run.log_policy
    law, wins_t = torch.as_tensor(run.policy), torch.as_tensor(game.wins(run.policy))
    report(
        "INPO, the fourth step, all pairs",
        lambda lp: product_loss(lp - torch.as_tensor(anchor_t), law, wins_t, 1 / 2),
        tree,
        run.log_policy,
        INPO(game, TAU, 1.0).advance(4).log_policy,
        run.policy,
    )


if __name__ == "__main__":
    main()
