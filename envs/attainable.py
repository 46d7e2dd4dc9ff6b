"""Exact facts of a model that annotators rest on: attainable returns and optimal advantages, by one backward pass."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .kernels import Array, CSRKernel, Kernel, TreeKernel
from .mdp import FiniteMDP, Layered


def reward_range(model: FiniteMDP, reward: Layered | Array | None = None) -> tuple[float, float]:
    """The smallest and the largest return of any trajectory of positive probability, exactly, by max-plus induction.

    A trajectory starts in the support of the initial law, takes available actions, and follows successors of
    positive probability; the largest difference of two returns is therefore high - low.
    """
    layers = reward_layers(model, reward)
    low, high = (sign * _largest_return(model, [sign * r for r in layers]) for sign in (-1.0, 1.0))
    return low, high


def optimal_advantage(model: FiniteMDP, reward: Layered | Array | None = None) -> list[Array]:
    """A*_h(s, a) = Q*_h(s, a) - V*_h(s), (S_h, A), at most 0; 0 where an action is not available."""
    layers, advantages = reward_layers(model, reward), []
    v = np.zeros(model.sizes[-1])
    for h in reversed(range(model.horizon)):
        q = _available(model, h, layers[h] + model.kernel.expect(h, v), -np.inf)
        v = q.max(axis=1)
        advantages.append(_available(model, h, q - v[:, None], 0.0))
    return advantages[::-1]


def _largest_return(model: FiniteMDP, reward: Sequence[Array]) -> float:
    v = np.zeros(model.sizes[-1])
    for h in reversed(range(model.horizon)):
        v = _available(model, h, reward[h] + _best_successor(model.kernel, h, v), -np.inf).max(axis=1)
    return float(v[model.initial > 0].max())


def _best_successor(kernel: Kernel, h: int, v: Array) -> Array:
    """max of v over the support of P_h(. | s, a): (S_h, A)."""
    if isinstance(kernel, TreeKernel):
        return kernel.expect(h, v)  # deterministic: the expectation is the successor's value
    if isinstance(kernel, CSRKernel):
        m = kernel.matrices[h]
        return np.maximum.reduceat(v[m.indices], m.indptr[:-1]).reshape(-1, kernel.n_actions)
    return np.where(kernel.dense(h) > 0, v, -np.inf).max(axis=2)


def _available(model: FiniteMDP, h: int, x: Array, other: float) -> Array:
    return x if model.action_mask is None else np.where(model.action_mask[h], x, other)


def reward_layers(model: FiniteMDP, reward: Layered | Array | None) -> list[Array]:
    """A reward given as None (the model's), as layers (S_h, A), or as a parameter theta (dim,) of its features."""
    if reward is None:
        return list(model.reward)
    if isinstance(reward, np.ndarray) and reward.ndim == 1 and reward.dtype != object:
        if model.features is None:
            raise ValueError("the reward is given as a parameter theta but the model has no features")
        if len(reward) != model.features.dim:
            raise ValueError(
                f"theta has {len(reward)} entries; the model's features have {model.features.dim}"
            )
        return model.features.rewards(reward)
    return list(model.plain(reward=reward, theta=None).reward)
