"""Annotators: they answer which of two trajectories is preferred, and count, log and limit the answers.

Every annotator is a law P(first preferred over second) with P(a, b) + P(b, a) = 1 (`probability`, exact) and a
stream of uniforms from which answers are drawn (`compare`): outcome 1 where the first is preferred, 0 where the
second is. One comparison consumes a fixed amount of the stream, so asking N and then M gives the same answers as
asking N + M at once, also through `checkpoint` and `restore`.

    BradleyTerry      P = sigma(r(first) - r(second))
    Thurstone         P = Phi_normal(r(first) - r(second))
    RegretPreference  as these, with the sum of optimal advantages in place of the return
    KernelAnnotator   any antisymmetric kernel, by matrix or by function
    LabelNoise        flips the answer of another annotator with a fixed probability
    Mixture           each comparison is answered by a user drawn from a population
    Replay            the answers of a log, for exactly the comparisons of that log
    PlackettLuce      ranks K trajectories (no annotator of pairs, but budgeted and counted like one)

`envs.recorded.RecordedAnnotator` draws answers that people gave.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .comparisons import NO_USER, ComparisonLog, pack, unpack
from .kernels import Array, CSRKernel, Index, Kernel, TreeKernel
from .links import LOGISTIC, PROBIT, Link, link
from .mdp import FiniteMDP, Layered, check_distribution
from .trajectories import Trajectories

Seed = int | np.random.SeedSequence | np.random.Generator
SYMMETRY_TOLERANCE = 1e-9


class BudgetExhausted(RuntimeError):
    """More was asked than the budget allows. Nothing was answered, drawn, counted or logged.

    asked: the size of the refused request. remaining: how many answers are left.
    """

    def __init__(self, asked: int, remaining: int, budget: int):
        super().__init__(asked, remaining, budget)
        self.asked, self.remaining, self.budget = asked, remaining, budget

    def __str__(self) -> str:
        return (
            f"{self.asked} answers asked but {self.remaining} of the budget of {self.budget} are left; "
            "nothing was answered"
        )


class ReplayMismatch(ValueError):
    """A replayed log was asked another comparison than it recorded."""


# ---- counting, budget and random stream ------------------------------------------------------------------------------


class Asked:
    """What is asked with a seed and a budget: `count` answers given so far, of at most `budget` (None: no limit)."""

    def __init__(self, seed: Seed, budget: int | None = None):
        if seed is None:
            raise TypeError("an annotator needs a seed: an int, a SeedSequence or a Generator")
        if budget is not None and budget < 0:
            raise ValueError(f"budget is {budget}; give a number >= 0, or None for no limit")
        self.rng = np.random.default_rng(seed)
        self.budget = budget
        self.count = 0

    @property
    def remaining(self) -> int | None:
        return None if self.budget is None else max(self.budget - self.count, 0)

    def _reserve(self, n: int) -> None:
        if self.budget is not None and self.count + n > self.budget:
            raise BudgetExhausted(n, max(self.budget - self.count, 0), self.budget)

    def checkpoint(self) -> dict[str, Any]:
        """All that an equally constructed object needs to go on with the same answers; JSON-able."""
        return {"kind": type(self).__name__, "count": self.count, "rng": _plain(self.rng.bit_generator.state)}

    def restore(self, saved: dict[str, Any]) -> None:
        """Take up the state of a checkpoint. The budget stays this object's own, so a run can be extended."""
        if saved.get("kind") != type(self).__name__:
            raise ValueError(f"the checkpoint is of {saved.get('kind')!r}, not of {type(self).__name__!r}")
        generator = self.rng.bit_generator
        if saved["rng"]["bit_generator"] != generator.state["bit_generator"]:
            raise ValueError(
                f"the checkpoint's generator is {saved['rng']['bit_generator']} but this one is "
                f"{generator.state['bit_generator']}; construct it with the same kind"
            )
        generator.state = saved["rng"]
        self.count = int(saved["count"])


def _plain(state: Any) -> Any:
    """A bit generator's state with its arrays as lists."""
    if isinstance(state, dict):
        return {key: _plain(value) for key, value in state.items()}
    return state.tolist() if isinstance(state, np.ndarray) else state


# ---- annotators of pairs ---------------------------------------------------------------------------------------------


class Annotator(Asked, ABC):
    """Answers comparisons of trajectories of one model.

    log      every answered comparison (None with keep_log=False)
    link     Phi where P(first) = Phi(difference of a score), else None
    kappa    sup 1 / Phi' over the attainable differences (of a noisy answer: of its law), None where unknown
    """

    link: Link | None = None

    def __init__(self, model: FiniteMDP, seed: Seed, *, budget: int | None = None, keep_log: bool = True):
        super().__init__(seed, budget)
        self.model = model
        horizon = model.horizon
        states, actions = list(model.sizes[:horizon]), [model.n_actions] * horizon
        self._limits = np.array(2 * (states + actions), dtype=np.uint64).reshape(2, 2, horizon)
        self.log = ComparisonLog(horizon) if keep_log else None

    @property
    def kappa(self) -> float | None:
        return None

    @abstractmethod
    def _probability(self, pairs: Index) -> Array:
        """P(first preferred) for checked pairs (n, 2, 2, H): (n,)."""

    def _draw(self, pairs: Index) -> tuple[NDArray[np.int8], Index | int]:
        """Outcomes and users. The law is evaluated before the stream is touched, so an error loses nothing."""
        p = self._probability(pairs)
        return (self.rng.random(len(pairs)) < p).astype(np.int8), NO_USER

    def probability(self, first: Trajectories, second: Trajectories) -> Array:
        """P(first[i] preferred over second[i]): (n,). Free: neither counted nor drawn."""
        return self._probability(self._pack(first, second))

    def compare(self, first: Trajectories, second: Trajectories) -> NDArray[np.int8]:
        """Answers (n,): 1 where first[i] is preferred, 0 where second[i] is. Raises `BudgetExhausted`."""
        pairs = self._pack(first, second)
        self._reserve(len(pairs))
        outcomes, users = self._draw(pairs)
        self._book(pairs, outcomes, users)
        return outcomes

    def _book(self, pairs: Index, outcomes: NDArray[np.int8], users: Index | int) -> None:
        self.count += len(pairs)
        if self.log is not None:
            self.log.append(pairs, outcomes, users)

    def _pack(self, first: Trajectories, second: Trajectories) -> Index:
        pairs = pack(first, second)
        if pairs.shape[3] != self._limits.shape[2]:
            raise ValueError(
                f"the trajectories have {pairs.shape[3]} steps but the model's horizon is {self._limits.shape[2]}"
            )
        bad = pairs.view(np.uint64) >= self._limits  # a negative index is a huge unsigned one
        if bad.any():
            i, side, what, h = (int(k) for k in np.argwhere(bad)[0])
            raise ValueError(
                f"{('first', 'second')[side]}.{('states', 'actions')[what]}[{i}, {h}] is {pairs[i, side, what, h]}; "
                f"layer {h} has {self._limits[side, what, h]}"
            )
        return pairs

    def checkpoint(self) -> dict[str, Any]:
        return super().checkpoint() | {"log": None if self.log is None else self.log.to_text()}

    def restore(self, saved: dict[str, Any]) -> None:
        log = None if saved.get("log") is None else ComparisonLog.from_text(saved["log"])
        if log is not None and log.horizon != self._limits.shape[2]:
            raise ValueError(
                f"the checkpoint compares trajectories of {log.horizon} steps, this model's have {self.model.horizon}"
            )
        super().restore(saved)
        self.log = log


# ---- preferences by a score: Bradley-Terry, Thurstone, regret --------------------------------------------------------


class LinkAnnotator(Annotator):
    """P(first) = Phi(r(first) - r(second)), r(tau) = sum_h r_h(s_h, a_h), Phi = `link`.

    reward: layered (S_h, A), or a parameter theta (dim,) of the model's features; None = the model's own reward.
    kappa = Phi.kappa(R), R = `radius` = the largest minus the smallest attainable return.
    """

    def __init__(
        self,
        model: FiniteMDP,
        seed: Seed,
        *,
        link: Link | str = LOGISTIC,
        reward: Layered | Array | None = None,
        budget: int | None = None,
        keep_log: bool = True,
    ):
        super().__init__(model, seed, budget=budget, keep_log=keep_log)
        self.link = _link(link)
        self.reward = _layers(model, reward)
        self._flat = np.concatenate([np.ravel(r) for r in self.reward])
        sizes = np.array([r.size for r in self.reward], dtype=np.int64)
        self._offsets = np.cumsum(sizes) - sizes
        self._actions = model.n_actions

    def _probability(self, pairs: Index) -> Array:
        cells = pairs[:, :, 0] * self._actions + pairs[:, :, 1] + self._offsets
        total = self._flat[cells].sum(axis=2)
        return self.link.value(total[:, 0] - total[:, 1])  # type: ignore[union-attr]

    @cached_property
    def radius(self) -> float:
        """The largest difference of two attainable returns."""
        low, high = reward_range(self.model, self.reward)
        return high - low

    @property
    def kappa(self) -> float | None:
        return self.link.kappa(self.radius)  # type: ignore[union-attr]


class BradleyTerry(LinkAnnotator):
    """P(first) = sigma(r(first) - r(second)) with the logistic sigma."""

    def __init__(self, model: FiniteMDP, seed: Seed, **rest: Any):
        super().__init__(model, seed, link=LOGISTIC, **rest)


class Thurstone(LinkAnnotator):
    """P(first) = Phi(r(first) - r(second)) with the standard normal Phi (case V, unit variance of the difference)."""

    def __init__(self, model: FiniteMDP, seed: Seed, **rest: Any):
        super().__init__(model, seed, link=PROBIT, **rest)


class RegretPreference(LinkAnnotator):
    """People who prefer the smaller regret: the score is sum_h A*_h(s_h, a_h), A* = Q* - V*, the optimal advantage.

    With deterministic transitions the score is r(tau) - V*(s_0), so trajectories of one start compare as by return.
    The advantage of an action that is not available is set to 0: no trajectory holds one.
    """

    def __init__(self, model: FiniteMDP, seed: Seed, **rest: Any):
        super().__init__(model, seed, reward=optimal_advantage(model, rest.pop("reward", None)), **rest)


# ---- preferences without a score -------------------------------------------------------------------------------------

PairFunction = Callable[[Trajectories, Trajectories], ArrayLike]


def response_number(model: FiniteMDP) -> Callable[[Trajectories], Index]:
    """The number of (s_0, a_0, ..., a_{H-1}): s_0 * A^H + sum_h a_h A^(H-1-h). With H = 1: s * A + a.

    It names a trajectory where transitions are deterministic; a tree's prefixes that end early have several.
    """
    powers = model.n_actions ** np.arange(model.horizon - 1, -1, -1, dtype=np.int64)
    return lambda tau: tau.states[:, 0] * (powers[0] * model.n_actions) + tau.actions @ powers


class KernelAnnotator(Annotator):
    """Any antisymmetric preference, cyclic ones included.

    kernel      a matrix P (n, n) over trajectories' numbers with P + P^T = 1, or a function of a batch
                (first, second) -> (n,) probabilities; with a `link`, of antisymmetric scores g, P = Phi(g)
    identify    Trajectories -> (n,) numbers of the matrix's rows; default `response_number(model)`
    names       of the rows, for messages
    A function is asked in both orders each time, and an answer that is not antisymmetric raises.
    """

    def __init__(
        self,
        model: FiniteMDP,
        seed: Seed,
        kernel: ArrayLike | PairFunction,
        *,
        identify: Callable[[Trajectories], Index] | None = None,
        link: Link | str | None = None,
        names: Sequence[str] | None = None,
        budget: int | None = None,
        keep_log: bool = True,
    ):
        super().__init__(model, seed, budget=budget, keep_log=keep_log)
        self.link = None if link is None else _link(link)
        self._identify = identify or response_number(model)
        self._function: PairFunction | None = None
        if callable(kernel):
            self._function = kernel
        else:
            scores = np.asarray(kernel, dtype=np.float64)
            if scores.ndim != 2 or scores.shape[0] != scores.shape[1]:
                raise ValueError(f"the preference matrix has shape {scores.shape}; expected (n, n)")
            self.matrix = scores if self.link is None else self.link.value(scores)
            check_preference_matrix(self.matrix, names)

    def _probability(self, pairs: Index) -> Array:
        first, second = unpack(pairs)
        if self._function is not None:
            forth, back = self._ask(first, second), self._ask(second, first)
            bad = ~((forth >= 0) & (back >= 0) & (np.abs(forth + back - 1) <= SYMMETRY_TOLERANCE))
            if bad.any():
                i = int(np.flatnonzero(bad)[0])
                raise ValueError(
                    f"pair {i}: the kernel gives P(first, second) = {forth[i]:.10g} and P(second, first) = "
                    f"{back[i]:.10g}; probabilities must sum to 1 (antisymmetric scores to 0)"
                )
            return forth
        i, j = self._identify(first), self._identify(second)
        n = len(self.matrix)
        outside = (i < 0) | (i >= n) | (j < 0) | (j >= n)
        if outside.any():
            k = int(np.flatnonzero(outside)[0])
            raise ValueError(
                f"pair {k} has the numbers ({i[k]}, {j[k]}) but the preference matrix has {n} rows"
            )
        return self.matrix[i, j]

    def _ask(self, first: Trajectories, second: Trajectories) -> Array:
        given = np.asarray(self._function(first, second), dtype=np.float64)  # type: ignore[misc]
        if given.shape != (len(first),):
            raise ValueError(f"the kernel returned shape {given.shape}; expected ({len(first)},)")
        return given if self.link is None else self.link.value(given)


def check_preference_matrix(P: Array, names: Sequence[str] | None = None) -> None:
    """Raise, with the cell named, unless P (n, n) is a preference matrix: P >= 0 and P + P^T = 1."""
    bad = ~((P >= 0) & (np.abs(P + P.T - 1) <= SYMMETRY_TOLERANCE))
    if bad.any():
        i, j = (int(k) for k in np.argwhere(bad)[0])
        a, b = (i, j) if names is None else (repr(names[i]), repr(names[j]))
        raise ValueError(
            f"P[{a}, {b}] = {P[i, j]:.10g} and P[{b}, {a}] = {P[j, i]:.10g}: both must be in [0, 1] and sum to 1"
        )


# ---- annotators made of annotators -----------------------------------------------------------------------------------


def _bare(part: Annotator) -> Annotator:
    if part.budget is not None:
        raise ValueError(
            "an inner annotator has a budget; give the budget to the outermost one, which is asked"
        )
    return part


class LabelNoise(Annotator):
    """The answers of `base`, each flipped with probability `flip` in [0, 1/2]: P = (1 - flip) p + flip (1 - p).

    Only this annotator is asked, counts and logs; `base` lends its law. kappa is that of the noisy law,
    base.kappa / (1 - 2 flip), infinite at flip = 1/2, where answers say nothing.
    """

    def __init__(
        self, base: Annotator, seed: Seed, flip: float, *, budget: int | None = None, keep_log: bool = True
    ):
        super().__init__(_bare(base).model, seed, budget=budget, keep_log=keep_log)
        if not 0 <= flip <= 0.5:
            raise ValueError(f"flip is {flip}; the probability of a flipped label must be in [0, 1/2]")
        self.base, self.flip = base, float(flip)
        self.link = base.link if flip == 0 else None

    def _probability(self, pairs: Index) -> Array:
        p = self.base._probability(pairs)
        return (1 - self.flip) * p + self.flip * (1 - p)

    @property
    def kappa(self) -> float | None:
        if self.base.kappa is None:
            return None
        return self.base.kappa / (1 - 2 * self.flip) if self.flip < 0.5 else float("inf")


class Mixture(Annotator):
    """A population: each comparison is answered by user k, drawn with probability weights[k] (default: equal).

    probability(first, second) is the average over users; with user=k, that user's. compare(..., user=k) asks user
    k; the log says who answered. Naming a user does not change which uniforms the later comparisons get.
    """

    def __init__(
        self,
        users: Sequence[Annotator],
        seed: Seed,
        weights: ArrayLike | None = None,
        *,
        budget: int | None = None,
        keep_log: bool = True,
    ):
        if not users:
            raise ValueError("a mixture needs at least one user")
        for k, user in enumerate(users):
            if not np.array_equal(_bare(user)._limits, users[0]._limits):
                raise ValueError(f"user {k} annotates a model of other layers or actions than user 0")
        super().__init__(users[0].model, seed, budget=budget, keep_log=keep_log)
        self.users = tuple(users)
        n = len(users)
        self.weights = np.full(n, 1 / n) if weights is None else np.asarray(weights, dtype=np.float64)
        if self.weights.shape != (n,):
            raise ValueError(f"weights has shape {self.weights.shape}; expected ({n},)")
        check_distribution(self.weights, "weights")
        self._cdf = np.cumsum(self.weights) / self.weights.sum()

    def _user(self, user: int | str) -> int:
        if not 0 <= int(user) < len(self.users):
            raise ValueError(f"user {user} is not one of 0..{len(self.users) - 1}")
        return int(user)

    def _probability(self, pairs: Index) -> Array:
        return self.weights @ np.stack([user._probability(pairs) for user in self.users])

    def probability(self, first: Trajectories, second: Trajectories, user: int | None = None) -> Array:
        pairs = self._pack(first, second)
        return self._probability(pairs) if user is None else self.users[self._user(user)]._probability(pairs)

    def compare(self, first: Trajectories, second: Trajectories, user: int | None = None) -> NDArray[np.int8]:
        pairs = self._pack(first, second)
        self._reserve(len(pairs))
        outcomes, users = self._draw(pairs, None if user is None else self._user(user))
        self._book(pairs, outcomes, users)
        return outcomes

    def _draw(self, pairs: Index, user: int | None = None) -> tuple[NDArray[np.int8], Index | int]:
        before = self.rng.bit_generator.state
        u = self.rng.random((len(pairs), 2))
        users = np.searchsorted(self._cdf, u[:, 0], side="right") if user is None else np.full(len(u), user)
        outcomes = np.empty(len(pairs), dtype=np.int8)
        try:
            for k in np.unique(users):
                mine = users == k
                outcomes[mine] = u[mine, 1] < self.users[k]._probability(pairs[mine])
        except Exception:
            self.rng.bit_generator.state = before  # who answers is drawn before the law is known
            raise
        return outcomes, users


class Replay(Annotator):
    """The recorded answers of a log, to the same comparisons in the same order; any other raises `ReplayMismatch`.

    Its budget is the length of the log. It has answers and no law, so `probability` raises.
    """

    def __init__(self, model: FiniteMDP, log: ComparisonLog):
        super().__init__(model, 0, budget=len(log))
        if log.horizon != model.horizon:
            raise ValueError(
                f"the log compares {log.horizon} steps but the model's horizon is {model.horizon}"
            )
        self._record = log

    def _probability(self, pairs: Index) -> Array:
        raise TypeError("a replayed log has answers, not probabilities")

    def _draw(self, pairs: Index) -> tuple[NDArray[np.int8], Index | int]:
        asked = slice(self.count, self.count + len(pairs))
        differs = (pairs != self._record.pairs[asked]).any(axis=(2, 3))
        if differs.any():
            i, side = (int(k) for k in np.argwhere(differs)[0])
            want, got = self._record.pairs[self.count + i, side], pairs[i, side]
            raise ReplayMismatch(
                f"comparison {self.count + i}: the {('first', 'second')[side]} trajectory asked is states "
                f"{got[0].tolist()}, actions {got[1].tolist()}, but the log recorded states {want[0].tolist()}, "
                f"actions {want[1].tolist()}; a replay answers the recorded comparisons in their order"
            )
        return self._record.outcomes[asked].copy(), self._record.users[asked].astype(np.int64)


class PlackettLuce(Asked):
    """Ranks K trajectories: P(order) = prod_k exp(r(order_k)) / sum_{j >= k} exp(r(order_j)). K = 2: Bradley-Terry.

    A ranking counts as one answer. reward: as for `LinkAnnotator`.
    """

    def __init__(
        self,
        model: FiniteMDP,
        seed: Seed,
        *,
        reward: Layered | Array | None = None,
        budget: int | None = None,
    ):
        super().__init__(seed, budget)
        self.model = model.replace(reward=_layers(model, reward), theta=None)

    def rank(self, trajectories: Trajectories) -> Index:
        """Indices (K,) from the most to the least preferred, by adding Gumbel noise to the returns and sorting."""
        returns = self.model.returns(trajectories)
        self._reserve(1)
        self.count += 1
        return np.argsort(-(returns + self.rng.gumbel(size=len(returns))), kind="stable")

    def log_probability(self, trajectories: Trajectories, order: Index) -> float:
        """log P(order), order a permutation of 0..K-1."""
        if not np.array_equal(np.sort(order), np.arange(len(trajectories))):
            raise ValueError(
                f"order {np.asarray(order).tolist()} is not a permutation of 0..{len(trajectories) - 1}"
            )
        scores = self.model.returns(trajectories)[np.asarray(order)]
        tails = np.logaddexp.accumulate(scores[::-1])[::-1]
        return float((scores - tails).sum())


# ---- attainable returns ----------------------------------------------------------------------------------------------


def reward_range(model: FiniteMDP, reward: Layered | Array | None = None) -> tuple[float, float]:
    """The smallest and the largest return of any trajectory of positive probability, exactly, by max-plus induction.

    A trajectory starts in the support of the initial law, takes available actions, and follows successors of
    positive probability; the largest difference of two returns is therefore high - low.
    """
    layers = _layers(model, reward)
    low, high = (sign * _largest_return(model, [sign * r for r in layers]) for sign in (-1.0, 1.0))
    return low, high


def optimal_advantage(model: FiniteMDP, reward: Layered | Array | None = None) -> list[Array]:
    """A*_h(s, a) = Q*_h(s, a) - V*_h(s), (S_h, A), at most 0; 0 where an action is not available."""
    layers, advantages = _layers(model, reward), []
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


def _layers(model: FiniteMDP, reward: Layered | Array | None) -> list[Array]:
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
    return list(model.replace(reward=reward, theta=None).reward)


_link = link  # the constructors have an argument of that name
