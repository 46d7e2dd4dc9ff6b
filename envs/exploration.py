"""Classic worlds that defeat undirected exploration, each with its optimum where that has a closed form."""

from __future__ import annotations

from typing import Any

import numpy as np

from .mdp import FiniteMDP

Seed = int | np.random.SeedSequence | np.random.Generator


def _at_least(low: int, **sizes: int) -> None:
    for what, value in sizes.items():
        if value < low:
            raise ValueError(f"{what} is {value}; it must be at least {low}")


def _share(**values: float) -> None:
    for what, value in values.items():
        if not 0 <= value < 1:
            raise ValueError(f"{what} is {value}; it must lie in [0, 1)")


def river_swim(n: int = 6, horizon: int = 20) -> FiniteMDP:
    """RiverSwim (Strehl and Littman 2008; the constants of Osband, Russo and Van Roy 2013).

    n states in a row, start at the left bank. Action 0 swims left and succeeds. Action 1 swims right against the
    current: from the left bank it moves with probability 0.6; in the middle it moves with 0.35, stays with 0.6, is
    carried back with 0.05; on the right bank it stays with 0.6. Rewards: 0.005 for action 0 on the left bank, 1 for
    action 1 on the right bank. The optimum has no closed form.
    """
    _at_least(2, n=n)
    _at_least(1, horizon=horizon)
    P = np.zeros((n, 2, n))
    P[np.arange(n), 0, np.maximum(np.arange(n) - 1, 0)] = 1.0
    middle = np.arange(1, n - 1)
    P[middle, 1, middle - 1], P[middle, 1, middle], P[middle, 1, middle + 1] = 0.05, 0.6, 0.35
    P[0, 1, :2] = 0.4, 0.6
    P[-1, 1, -2:] = 0.4, 0.6
    reward = np.zeros((n, 2))
    reward[0, 0], reward[-1, 1] = 0.005, 1.0
    return FiniteMDP.dense(
        np.broadcast_to(P, (horizon, n, 2, n)),
        np.broadcast_to(reward, (horizon, n, 2)),
        name=f"RiverSwim(n={n}, horizon={horizon})",
    )


def deep_sea(size: int = 10, seed: Seed | None = 0, slip: float = 0.0, cost: float = 0.01) -> FiniteMDP:
    """DeepSea (Osband et al. 2020): only `size` steps to the right in a row find the treasure.

    Layer h is row h of the grid, its states are the columns; H = size. In each cell one of the two actions moves
    right, the other left; which one is drawn by `seed`, cell by cell (None: action 1 is right everywhere). A step to
    the right costs cost / size; with probability `slip` it moves left all the same; on the last row in the last
    column it earns 1. So rewards reach down to -cost / size, and without slips a random policy finds the treasure
    with probability 2^-size.
    """
    _at_least(1, size=size)
    _share(slip=slip)
    right = np.ones((size, size), dtype=np.int64)
    if seed is not None:
        right = np.random.default_rng(seed).integers(2, size=(size, size))
    h, column = np.indices((size, size))
    P = np.zeros((size, size, 2, size))
    reward = np.zeros((size, size, 2))
    back, on = np.maximum(column - 1, 0), np.minimum(column + 1, size - 1)
    P[h, column, 1 - right, back] = 1.0
    np.add.at(P, (h, column, right, on), 1.0 - slip)
    np.add.at(P, (h, column, right, back), slip)  # both may be the same cell
    reward[h, column, right] = -cost / size
    reward[-1, -1, right[-1, -1]] += 1.0
    return FiniteMDP.dense(P, reward, name=f"DeepSea(size={size})")


def deep_sea_optimum(size: int, slip: float = 0.0, cost: float = 0.01) -> float:
    """V*: on the diagonal V_h = max(0, (1 - slip) V_{h+1} - cost/size), off it 0; 1 - cost without slips."""
    stay = (1.0 - slip) ** np.arange(size)
    return max(0.0, float(stay[-1] - cost / size * stay.sum()))


def combination_lock(horizon: int = 8, n_actions: int = 4, seed: Seed = 0, slip: float = 0.0) -> FiniteMDP:
    """A lock of `horizon` dials: one right action a step, drawn by `seed`; a wrong one locks for the episode.

    State 0 = every dial right so far, state 1 = locked. The right action keeps state 0 with probability 1 - slip.
    Reward 1 for the right action at the last dial, else 0. A random policy opens it with probability
    n_actions^-horizon.
    """
    _at_least(1, horizon=horizon, n_actions=n_actions)
    _share(slip=slip)
    code = np.random.default_rng(seed).integers(n_actions, size=horizon)
    steps = np.arange(horizon)
    P = np.zeros((horizon, 2, n_actions, 2))
    P[..., 1] = 1.0
    P[steps, 0, code] = 1.0 - slip, slip
    reward = np.zeros((horizon, 2, n_actions))
    reward[-1, 0, code[-1]] = 1.0
    return FiniteMDP.dense(P, reward, name=f"CombinationLock(horizon={horizon}, n_actions={n_actions})")


def combination_lock_optimum(horizon: int, slip: float = 0.0) -> float:
    """V* = (1 - slip)^(horizon - 1): the last dial pays before it can slip."""
    return (1.0 - slip) ** (horizon - 1)


def toy_text(env_id: str = "FrozenLake-v1", horizon: int = 50, **kwargs: Any) -> FiniteMDP:
    """A Gymnasium toy-text environment that carries its table, as an exact model; kwargs go to `gymnasium.make`."""
    import gymnasium

    return FiniteMDP.from_gymnasium(gymnasium.make(env_id, **kwargs), horizon)
