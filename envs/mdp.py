"""FiniteMDP: a finite-horizon, layered, exactly known model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
import scipy.sparse as sp

from .features import FeatureMap
from .kernels import Array, CSRKernel, DenseKernel, Index, Kernel, TreeKernel
from .trajectories import Trajectories

# A layered quantity x is indexed x[h] for h = 0, ..., H-1; it is one array (H, ...) where all layers have one size.
Layered = Sequence[np.ndarray] | np.ndarray


def check_distribution(p: Array, what: str) -> None:
    """Raise, with the place named, unless every row of p (..., n) is a probability vector."""
    rows, lowest = np.atleast_1d(p.sum(-1)), np.atleast_1d(p.min(-1))
    bad = ~((lowest >= 0) & (np.abs(rows - 1) <= 1e-9))
    if bad.any():
        place = tuple(int(i) for i in np.argwhere(bad)[0]) if p.ndim > 1 else ()
        i = place if place else (0,)
        raise ValueError(
            f"{what}{list(place) if place else ''} is not a probability vector: "
            f"sum {rows[i]:.10g}, smallest entry {lowest[i]:.6g}"
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class FiniteMDP:
    """A layered finite-horizon MDP, known exactly.

    kernel        P_h(s'|s,a), dense, sparse or tree (`envs.kernels`)
    reward        r[h]: (S_h, A), the expected reward; any finite range, though the theory wants [0, 1]
    initial       rho: (S_0,), the law of the first state (for a token MDP: of the prompt)
    action_mask   mask[h]: (S_h, A) bool, False where an action is not available; None = everything is
    features      phi and how it adds up over a trajectory, where the reward is (or is modelled as) linear
    theta         the reward parameter, with r[h] = <phi_h, theta_h> to 1e-9; None where the reward is not linear
    """

    kernel: Kernel
    reward: Layered
    initial: Array
    action_mask: Layered | None = None
    features: FeatureMap | None = None
    theta: Array | None = None
    name: str = "FiniteMDP"

    def __post_init__(self) -> None:
        sizes, n_actions = self.kernel.sizes, self.kernel.n_actions
        for field in ("reward", "action_mask"):
            given = getattr(self, field)
            if given is None:
                continue
            dtype = np.float64 if field == "reward" else np.bool_
            layers: list[np.ndarray] = [np.asarray(x, dtype=dtype) for x in given]
            if len(layers) != self.horizon:
                raise ValueError(f"{field} has {len(layers)} layers but the horizon is {self.horizon}")
            for h, x in enumerate(layers):
                if x.shape != (sizes[h], n_actions):
                    raise ValueError(f"{field}[h={h}] has shape {x.shape}; expected {(sizes[h], n_actions)}")
                if field == "reward" and not np.isfinite(x).all():
                    s, a = np.argwhere(~np.isfinite(x))[0]
                    raise ValueError(f"reward[h={h}, s={s}, a={a}] is {x[s, a]}; rewards must be finite")
                if field == "action_mask" and not x.any(axis=1).all():
                    s = np.flatnonzero(~x.any(axis=1))[0]
                    raise ValueError(f"action_mask[h={h}, s={s}] leaves an empty action set")
            object.__setattr__(self, field, self._stack(layers))
        initial = np.asarray(self.initial, dtype=np.float64)
        if initial.shape != (sizes[0],):
            raise ValueError(f"initial has shape {initial.shape}; expected ({sizes[0]},)")
        check_distribution(initial, "initial")
        object.__setattr__(self, "initial", initial)
        if self.features is not None:
            for h, phi in enumerate(self.features.phi):
                if phi.shape[:2] != (sizes[h], n_actions):
                    raise ValueError(
                        f"phi[h={h}] has shape {phi.shape}; expected ({sizes[h]}, {n_actions}, d)"
                    )
            if self.features.horizon != self.horizon:
                raise ValueError(f"phi has {self.features.horizon} layers but the horizon is {self.horizon}")
        if self.theta is not None:
            if self.features is None:
                raise ValueError("theta is given without features")
            object.__setattr__(self, "theta", np.asarray(self.theta, dtype=np.float64).reshape(-1))
            for h, linear in enumerate(self.features.rewards(self.theta)):
                gap = np.abs(linear - self.reward[h])
                if gap.max() > 1e-9:
                    s, a = np.unravel_index(gap.argmax(), gap.shape)
                    raise ValueError(
                        f"reward[h={h}, s={s}, a={a}] differs from <phi, theta> by {gap.max():.3g}"
                    )

    # ---- construction ------------------------------------------------------------------------------------------

    @classmethod
    def dense(cls, P: Any, reward: Any, initial: Any = 0, **rest: Any) -> Self:
        """P: (H, S, A, S) or H arrays (S_h, A, S_{h+1}); reward: (H, S, A) or layered; initial: law or a state."""
        kernel = DenseKernel(P)
        return cls(kernel=kernel, reward=reward, initial=_initial(initial, kernel), **rest)

    @classmethod
    def sparse(
        cls, P: Sequence[sp.csr_array], n_actions: int, reward: Any, initial: Any = 0, **rest: Any
    ) -> Self:
        """P: H CSR matrices (S_h * A, S_{h+1}) with row s * A + a."""
        kernel = CSRKernel(P, n_actions)
        return cls(kernel=kernel, reward=reward, initial=_initial(initial, kernel), **rest)

    @classmethod
    def tree(
        cls, roots: int, branching: int, horizon: int, reward: Any, initial: Any = None, **rest: Any
    ) -> Self:
        """The prefix tree of `TreeKernel`; initial defaults to the uniform law over the roots (states 1..roots)."""
        kernel = TreeKernel(roots, branching, horizon)
        if initial is None:
            initial = np.concatenate([[0.0], np.full(roots, 1.0 / roots)])
        return cls(kernel=kernel, reward=reward, initial=_initial(initial, kernel), **rest)

    @classmethod
    def from_gymnasium(cls, env: Any, horizon: int, **rest: Any) -> FiniteMDP:
        """Any toy-text environment that carries its table `env.unwrapped.P[s][a] = [(p, s', r, terminated), ...]`.

        A terminated transition leads to an absorbing state with reward 0 (appended as the last state). Rewards are
        the expectations E[r | s, a]; the initial law is `initial_state_distrib` where the environment has one.
        """
        if horizon < 1:
            raise ValueError(f"horizon is {horizon}; it must be at least 1")
        base = env.unwrapped
        table = getattr(base, "P", None)
        if not isinstance(table, dict):
            raise TypeError(
                f"{base} carries no transition table `P[s][a]`; build the model with FiniteMDP.dense"
            )
        if getattr(base, "fickle_passenger", False):
            raise ValueError(
                "a fickle passenger changes the destination outside the table; use the plain Taxi"
            )
        n_states, n_actions = len(table), len(table[0])
        rows, columns, mass = [], [], []
        reward = np.zeros((n_states + 1, n_actions))
        for s, by_action in table.items():
            for a, outcomes in by_action.items():
                for p, successor, r, terminated in outcomes:
                    rows.append(s * n_actions + a)
                    columns.append(n_states if terminated else successor)
                    mass.append(p)
                    reward[s, a] += p * r
        rows += [n_states * n_actions + a for a in range(n_actions)]
        columns += [n_states] * n_actions
        mass += [1.0] * n_actions
        matrix = sp.csr_array((mass, (rows, columns)), shape=((n_states + 1) * n_actions, n_states + 1))
        law = np.zeros(n_states + 1)
        if hasattr(base, "initial_state_distrib"):
            law[:n_states] = base.initial_state_distrib
        else:
            law[int(env.reset(seed=0)[0])] = 1.0
        rest.setdefault("name", env.spec.id if env.spec else type(base).__name__)
        rewards = np.broadcast_to(reward, (horizon, *reward.shape))
        return FiniteMDP.sparse([matrix] * horizon, n_actions, rewards, law, **rest)

    # ---- shapes ------------------------------------------------------------------------------------------------

    @property
    def horizon(self) -> int:
        return len(self.kernel.sizes) - 1

    @property
    def n_actions(self) -> int:
        return self.kernel.n_actions

    @property
    def sizes(self) -> tuple[int, ...]:
        """S_0, ..., S_H (layer H carries no action; its value is 0)."""
        return self.kernel.sizes

    @cached_property
    def uniform(self) -> bool:
        """All layers have one size, so that layered quantities are single arrays."""
        return len(set(self.sizes)) == 1

    def _stack(self, layers: Sequence[np.ndarray]) -> Layered:
        return np.stack(layers) if self.uniform and not isinstance(layers, np.ndarray) else tuple(layers)

    def layered(self, layers: Sequence[np.ndarray]) -> Layered:
        """H layers as one array (H, ...) where the model is uniform, else as a tuple."""
        return self._stack(list(layers))

    # ---- other representations of the same model -----------------------------------------------------------------

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed (checked again)."""
        return dataclasses.replace(self, **changes)

    def plain(self, **changes: Any) -> FiniteMDP:
        """The same model without what a subclass knows besides, with some fields changed (checked again)."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(FiniteMDP)}
        return FiniteMDP(**(fields | changes))

    def to_dense(self) -> FiniteMDP:
        return self.plain(kernel=DenseKernel([self.kernel.dense(h) for h in range(self.horizon)]))

    def to_sparse(self) -> FiniteMDP:
        layers = (self.kernel.dense(h) for h in range(self.horizon))
        matrices = [sp.csr_array(p.reshape(-1, p.shape[2])) for p in layers]
        return self.plain(kernel=CSRKernel(matrices, self.n_actions))

    # ---- sampling ------------------------------------------------------------------------------------------------

    def rollout(
        self, policy: Layered, n: int, rng: np.random.Generator, start: Index | None = None
    ) -> Trajectories:
        """n trajectories. policy[h]: (S_h,) integer actions or (S_h, A) probabilities. start: (n,) first states."""
        states = np.empty((n, self.horizon), dtype=np.int64)
        actions = np.empty((n, self.horizon), dtype=np.int64)
        s = rng.choice(self.sizes[0], size=n, p=self.initial) if start is None else np.asarray(start)
        for h in range(self.horizon):
            pi = policy[h]
            if pi.ndim == 1:
                a = pi[s].astype(np.int64)
            else:
                cdf = np.cumsum(pi[s], axis=1)
                a = (cdf <= rng.random((n, 1)) * cdf[:, -1:]).sum(axis=1)
            states[:, h], actions[:, h] = s, a
            s = self.kernel.sample(h, s, a, rng.random(n))
        return Trajectories(states, actions)

    def returns(self, trajectories: Trajectories) -> Array:
        """r(tau) = sum_h r_h(s_h, a_h): (n,)."""
        s, a = trajectories.states, trajectories.actions
        return np.sum([self.reward[h][s[:, h], a[:, h]] for h in range(self.horizon)], axis=0)


def _initial(given: Any, kernel: Kernel) -> Array:
    """A state's index becomes a point mass; a law passes through."""
    if np.ndim(given) == 0:
        if not 0 <= int(given) < kernel.sizes[0]:
            raise ValueError(f"initial state {given} is not in 0..{kernel.sizes[0] - 1}")
        law = np.zeros(kernel.sizes[0])
        law[int(given)] = 1.0
        return law
    return np.asarray(given, dtype=np.float64)
