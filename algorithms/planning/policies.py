"""Policies and reward overrides: what the solvers accept, checked at the door with the place named.

A policy is layered: pi[h] is (S_h,) integer actions (deterministic) or (S_h, A) probabilities (stochastic);
one policy may mix the two over h. Where all layers have one size it may be an array (H, S) or (H, S, A).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...envs import FiniteMDP
from ...envs.mdp import Layered

ROW_SUM_TOLERANCE = 1e-9


def _first(bad: NDArray[np.bool_]) -> tuple[int, ...]:
    return tuple(int(i) for i in np.argwhere(bad)[0])


def _place(what: str, index: Sequence[int], h: int | None) -> str:
    """'policy[h=2, s=5, a=1]'; index is (s,) or (s, a), with h in front where a stack was checked at once."""
    names = ("h", "s", "a") if h is None else ("s", "a")
    head = [] if h is None else [f"h={h}"]
    return f"{what}[{', '.join(head + [f'{n}={i}' for n, i in zip(names, index, strict=False)])}]"


def _check_actions(a: np.ndarray, mask: np.ndarray | None, n_actions: int, what: str, h: int | None) -> None:
    if a.size and (a.min() < 0 or a.max() >= n_actions):
        i = _first((a < 0) | (a >= n_actions))
        raise ValueError(f"{_place(what, i, h)} is action {a[i]}; actions are 0..{n_actions - 1}")
    if mask is not None:
        legal = np.take_along_axis(mask, a[..., None], axis=-1)[..., 0]
        if not legal.all():
            i = _first(~legal)
            raise ValueError(f"{_place(what, i, h)} is action {a[i]}, which is unavailable there")


def _check_laws(p: np.ndarray, mask: np.ndarray | None, what: str, h: int | None) -> None:
    total = p.sum(-1)
    # NaN compares false, hence the negations
    if not (p.min() >= 0 and np.abs(total - 1).max() <= ROW_SUM_TOLERANCE):
        i = _first(~((p.min(-1) >= 0) & (np.abs(total - 1) <= ROW_SUM_TOLERANCE)))
        raise ValueError(
            f"{_place(what, i, h)} is not a probability vector: "
            f"sum {total[i]:.10g}, smallest entry {p[i].min():.6g}"
        )
    if mask is not None and (p[~mask] > 0).any():
        i = _first(~mask & (p > 0))
        raise ValueError(
            f"{_place(what, i, h)} gives mass {p[i]:.6g} to an unavailable action; use `restrict`"
        )


def check_policy(model: FiniteMDP, policy: Layered, what: str = "policy") -> Layered:
    """The policy with its layers as arrays (int64 actions or float64 laws), or ValueError/TypeError."""
    if len(policy) != model.horizon:
        raise ValueError(f"{what} has {len(policy)} layers but the horizon is {model.horizon}")
    n_actions, sizes, masks = model.n_actions, model.sizes, model.action_mask
    stacked = isinstance(policy, np.ndarray) and isinstance(masks, np.ndarray | None) and model.uniform
    blocks = [policy] if stacked else list(policy)
    checked = []
    for i, given in enumerate(blocks):
        p = np.asarray(given)
        h = None if stacked else i
        mask = masks if stacked else (None if masks is None else masks[i])
        base = (model.horizon, sizes[0]) if stacked else (sizes[i],)
        if p.shape == base:
            if p.dtype.kind not in "iu":
                raise TypeError(
                    f"{what}{'' if h is None else f'[h={h}]'} has one entry per state but dtype {p.dtype}; "
                    "actions must be integers (probabilities have shape (S_h, A))"
                )
            p = p.astype(np.int64, copy=False)
            _check_actions(p, mask, n_actions, what, h)  # type: ignore[arg-type]
        elif p.shape == (*base, n_actions):
            p = p.astype(np.float64, copy=False)
            _check_laws(p, mask, what, h)  # type: ignore[arg-type]
        else:
            raise ValueError(
                f"{what}{'' if h is None else f'[h={h}]'} has shape {p.shape}; "
                f"expected {base} integer actions or {(*base, n_actions)} probabilities"
            )
        checked.append(p)
    return checked[0] if stacked else checked


def check_reward(model: FiniteMDP, reward: Any | None) -> Layered:
    """The reward to plan for: the model's own, or an override with the same shapes and finite entries."""
    if reward is None:
        return model.reward
    if len(reward) != model.horizon:
        raise ValueError(f"reward has {len(reward)} layers but the horizon is {model.horizon}")
    layers: Layered = [np.asarray(r, dtype=np.float64) for r in reward]
    for h, r in enumerate(layers):
        if r.shape != (model.sizes[h], model.n_actions):
            expected = (model.sizes[h], model.n_actions)
            raise ValueError(f"reward[h={h}] has shape {r.shape}; expected {expected}")
        if not np.isfinite(r).all():
            s, a = _first(~np.isfinite(r))
            raise ValueError(f"reward[h={h}, s={s}, a={a}] is {r[s, a]}; rewards must be finite")
    return layers


def layer_mask(model: FiniteMDP, h: int) -> np.ndarray | None:
    return None if model.action_mask is None else model.action_mask[h]


def layer_probabilities(pi: np.ndarray, n_actions: int) -> np.ndarray:
    """One layer of a policy as (S_h, A) probabilities."""
    if pi.ndim == 2:
        return pi
    p = np.zeros((len(pi), n_actions))
    p[np.arange(len(pi)), pi] = 1.0
    return p


def probabilities(model: FiniteMDP, policy: Layered, what: str = "policy") -> Layered:
    """Any policy as layered (S_h, A) probabilities; stacked (H, S, A) where the model is uniform."""
    policy = check_policy(model, policy, what)
    if isinstance(policy, np.ndarray) and policy.ndim == 3:
        return policy
    return model.layered([layer_probabilities(pi, model.n_actions) for pi in policy])


def uniform_policy(model: FiniteMDP) -> Layered:
    """The uniform law over the available actions, layered (S_h, A)."""
    ones = [np.ones((n, model.n_actions)) for n in model.sizes[:-1]]
    return restrict(model, ones)


def restrict(model: FiniteMDP, weights: Layered) -> Layered:
    """Non-negative weights (S_h, A), set to zero on unavailable actions and normalised: a stochastic policy.

    ValueError where no available action has a positive weight.
    """
    layers = []
    for h, given in enumerate(weights):
        w, mask = np.asarray(given, dtype=np.float64), layer_mask(model, h)
        w = w if mask is None else np.where(mask, w, 0.0)
        total = w.sum(-1, keepdims=True)
        if not ((total > 0).all() and (w >= 0).all()):
            s = _first(~((total[:, 0] > 0) & (w >= 0).all(-1)))[0]
            raise ValueError(f"weights[h={h}, s={s}] = {w[s]} has no law over the available actions")
        layers.append(w / total)
    return model.layered(layers)


def greedy(Q: Layered, mask: Layered | None = None) -> Layered:
    """argmax_a Q_h(s, a) over the available actions, layered (S_h,) int64. Ties go to the lowest action."""
    if isinstance(Q, np.ndarray) and isinstance(mask, np.ndarray | None):
        return (Q if mask is None else np.where(mask, Q, -np.inf)).argmax(-1)
    return tuple((q if mask is None else np.where(mask[h], q, -np.inf)).argmax(-1) for h, q in enumerate(Q))
