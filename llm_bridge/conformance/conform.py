r"""`conform(loss, against="dpo", beta=0.1)`: is a trainer's expected gradient that of the objective it names?

Level 1, gradient identity. The trainer's loss is given the whole population as one batch and again in micro-batches, so
that its expected gradient is a number and not an estimate. With g that gradient and G the exact one of the target,

  cosine   <g, G> / |g| |G|             scale   s = <g, G> / |G|^2             error   |g - s G| / |g|

A positive constant factor s is no error, it is reported. Where the error is not rounding, the candidates of the
`catalogue` are compared with g in the same way, on the population and on the micro-batches at once; the one that agrees
is the cause. Where the population's gradient cannot tell two of them apart, the micro-batches one by one do.

Level 4, fixed point. At the target's known optimum the expected gradient is zero, and at the reference the negative
gradient points to where KL(optimum, policy) falls.

What this does not see: how a trainer samples, pads and tokenises, its optimiser, its distributed code. The loss is
called at two or three policies in float64; a trainer that casts to lower precision needs a larger tolerance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from ...envs.kernels import Array, Index
from .batch import TrainerLoss
from .catalogue import Candidate, Family, candidates, families
from .report import Check, Match, Report
from .targets import TARGETS, Setting, Target
from .world import CHUNKS, GROUP, ExactWorld, exact_world

if TYPE_CHECKING:
    from torch import Tensor

TOLERANCE = 1e-5
NEARLY = 0.01  # a relative error that rounding to eight bits can explain


class TrainerError(ValueError):
    """The trainer's loss could not be used: it raised, or gave no scalar tensor."""


def conform(
    loss: TrainerLoss,
    against: str = "dpo",
    *,
    name: str | None = None,
    tolerance: float = TOLERANCE,
    seed: int = 0,
    variance: bool = True,
    **parameters: float,
) -> Report:
    """Hold a trainer's loss to the target `against`, one of `TARGETS`; parameters are the target's.

    loss       batch -> scalar tensor: a `PairBatch` or a `SampleBatch` (see `batch`), whichever the target's kind is
    name       of the trainer in the report
    tolerance  of relative errors; 1e-5 for float64, 1e-3 for float32
    seed       of the world
    variance   whether the variance of policy gradients is measured where they pass
    """
    if against not in TARGETS:
        raise ValueError(f"there is no target {against!r}; there are {', '.join(TARGETS)}")
    if not 0 < tolerance < 0.1:
        raise ValueError(f"tolerance is {tolerance}; it must lie in (0, 0.1)")
    target = TARGETS[against]
    given = target.checked(parameters)
    bench = _bench(against, tuple(given.items()), seed)
    report = _Run(bench, _guarded(loss), tolerance)
    checks, cause_name, cause, nearest = report.all(variance)
    title = str(name or getattr(loss, "__name__", type(loss).__name__))
    return Report(title, against, given, tuple(checks), cause_name, cause, nearest)


def assert_conforms(loss: TrainerLoss, against: str = "dpo", **options: Any) -> Report:
    """For tests: AssertionError with the whole report where the trainer does not conform; arguments of `conform`."""
    report = conform(loss, against, **options)
    if not report.ok:
        raise AssertionError(str(report))
    return report


# ---- expected gradients --------------------------------------------------------------------------------------------


def _guarded(loss: TrainerLoss) -> TrainerLoss:
    def call(batch: Any) -> Tensor:
        import torch

        try:
            value = loss(batch)
        except Exception as error:
            raise TrainerError(f"the trainer's loss raised {type(error).__name__}: {error}") from error
        if not isinstance(value, torch.Tensor) or value.numel() != 1:
            got = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
            raise TrainerError(f"the trainer's loss gave {got}; it must give a scalar tensor")
        return value.reshape(())

    return call


@dataclass(frozen=True)
class Slope:
    value: float
    gradient: Array


def _slope(loss: Callable[[Any], Tensor], leaf: Tensor, batch: Callable[[Tensor], Any]) -> Slope:
    """Of loss(batch(x)) in x, at `leaf`."""
    import torch

    x = leaf.detach().clone().requires_grad_(True)
    value = loss(batch(x))
    if not value.requires_grad:
        return Slope(value.item(), np.zeros(x.numel()))
    (gradient,) = torch.autograd.grad(value, x, allow_unused=True)
    found = np.zeros(x.numel()) if gradient is None else gradient.numpy().reshape(-1)
    return Slope(value.item(), np.asarray(found, dtype=np.float64))


@dataclass(frozen=True, eq=False)
class _Place:
    """A policy: its parameters, the token log-probabilities of all responses (n, T), and the derivative of these in the
    parameters, (n T, size), so that a loss is differentiated in them alone."""

    name: str
    theta: Tensor
    tokens: Tensor
    jacobian: Array


@dataclass(frozen=True, eq=False)
class _Evidence:
    """whole: gradient on the population; mean: over the micro-batches; parts: each of them, one after another."""

    whole: Array
    mean: Array
    parts: Array

    @cached_property
    def joint(self) -> Array:
        return np.concatenate([self.whole, self.mean])


@dataclass(frozen=True, eq=False)
class _Bench:
    """A target in a world: batches at given parameters, exact gradients, and the evidence of every candidate."""

    world: ExactWorld
    target: Target
    parameters: tuple[tuple[str, float], ...]
    setting: Setting

    def _place(self, name: str, theta: Tensor) -> _Place:
        import torch

        speak = self.world.token_log_probabilities
        J = torch.autograd.functional.jacobian(speak, theta)
        return _Place(name, theta, speak(theta), J.numpy().reshape(-1, len(theta)))

    @cached_property
    def here(self) -> _Place:
        """The policy at which level 1 compares."""
        import torch

        w = self.world
        theta = w.of_counts(w.policy) if self.target.kind == "samples" else torch.as_tensor(w.start)
        return self._place("here", theta)

    @cached_property
    def reference(self) -> _Place:
        return self._place("reference", self.world.of_counts(self.world.reference))

    @cached_property
    def optimum(self) -> _Place:
        world = self.world
        assert self.setting.optimum is not None
        rows = self.setting.optimum.reshape(world.table.prompts, -1)
        return self._place("optimum", world.parameters(rows, world.start[world.table.size :]))

    def slope(self, loss: TrainerLoss, place: _Place, only: Index | None = None) -> Slope:
        """Of a trainer's loss at a policy, in the parameters, on the population or some of its rows (of its groups)."""
        found = _slope(loss, place.tokens, self.batch(place.name, only))
        return Slope(found.value, found.gradient @ place.jacobian)

    def counts_at(self, place: str) -> Index:
        """What the rows of a batch are drawn from."""
        w = self.world
        if self.target.kind == "previous":
            return w.previous
        best = w.reference if self.target.name == "kl" else w.optimum
        return {"here": w.policy, "reference": w.reference, "optimum": best}[place]

    @cached_property
    def paired(self) -> bool:
        return self.target.kind in ("pairs", "exploring")

    @cached_property
    def _pairs(self) -> tuple[Index, ...]:
        """Numbers of chosen and rejected, and for XPO of the one that the reference drew."""
        if self.target.kind == "exploring":
            return self.world.exploring_rows()
        return self.world.pair_rows(self.setting.general)

    @cached_property
    def order(self) -> Index:
        """Rows of the population by length, so that micro-batches differ in it."""
        w = self.world
        if self.paired:
            chosen, rejected = self._pairs[:2]
            return np.argsort(w.lengths(chosen) + w.lengths(rejected), kind="stable")
        rows = self.rows_at("here")
        return np.argsort(w.lengths(rows).sum(1), kind="stable")

    def rows_at(self, place: str) -> Index:
        counts = self.counts_at(place)
        return (
            self.world.rows_of(counts).reshape(-1, 1)
            if self.target.kind == "previous"
            else self.world.group_rows(counts)
        )

    def batch(self, place: str, only: Index | None = None) -> Callable[[Tensor], Any]:
        """Token log-probabilities (n, T) -> the population's batch, or that of some of its rows (of its groups)."""
        w, s = self.world, self.setting
        if self.paired:
            at = self.order[::-1] if only is None else only
            pairs = [numbers[at] for numbers in self._pairs]
            return lambda tokens: w.pair_batch(tokens, *pairs)
        rows = self.rows_at(place)
        rows = rows if only is None else rows[only]
        return lambda tokens: w.sample_batch(tokens, rows, s.reward, s.P)

    def evidence(self, loss: TrainerLoss) -> _Evidence:
        whole = self.slope(loss, self.here).gradient
        parts = [self.slope(loss, self.here, c).gradient for c in np.array_split(self.order, CHUNKS)]
        return _Evidence(whole, np.mean(parts, axis=0), np.concatenate(parts))

    def exact(self, place: _Place) -> Slope:
        """Value and gradient of the target itself, in all parameters."""
        table = self.world.table
        return _slope(self.setting.exact, place.theta, lambda x: table.log_probabilities(x[: table.size]))

    def distance(self, place: _Place) -> Slope:
        """KL(optimum, policy), the mean over prompts."""
        import torch

        table = self.world.table
        best = torch.as_tensor(self.setting.optimum)

        def kl(lp: Tensor) -> Tensor:
            return (best.exp() * (best - lp)).sum() / table.prompts

        return _slope(kl, place.theta, lambda x: table.log_probabilities(x[: table.size]))

    @cached_property
    def catalogue(self) -> list[tuple[Candidate, list[_Evidence]]]:
        found = candidates(self.target.name, dict(self.parameters))
        return [(c, [self.evidence(term) for term in c.terms]) for c in found]

    @property
    def size(self) -> float:
        return float(np.linalg.norm(self.exact_here.gradient))

    @cached_property
    def exact_here(self) -> Slope:
        return self.exact(self.here)


@lru_cache(maxsize=32)
def _bench(against: str, parameters: tuple[tuple[str, float], ...], seed: int) -> _Bench:
    world, target = exact_world(seed), TARGETS[against]
    return _Bench(world, target, parameters, target.build(world, **dict(parameters)))


def explain(gradient: Array, basis: Sequence[Array]) -> tuple[float, Array]:
    """The relative error of `gradient` in the span of `basis`, and the coefficients.

    The first must be positive; where it is not, the best is to leave the basis out, and the error is 1. It is inf where
    the basis vanishes.
    """
    B = np.stack(basis, axis=1)
    sizes = np.linalg.norm(B, axis=0)
    if not sizes.all():
        return math.inf, np.zeros(len(basis))
    x = np.linalg.lstsq(B / sizes, gradient, rcond=None)[0] / sizes
    if x[0] <= 0:
        return 1.0, x
    return float(np.linalg.norm(gradient - B @ x) / np.linalg.norm(gradient)), x


# ---- the checks ------------------------------------------------------------------------------------------------------


class _Run:
    """One trainer on one bench."""

    def __init__(self, bench: _Bench, loss: TrainerLoss, tolerance: float) -> None:
        self.bench, self.loss, self.tolerance = bench, loss, tolerance
        self.checks: list[Check] = []
        self.cause_name: str | None = None
        self.cause: str | None = None
        self.nearest: tuple[Match, ...] = ()

    def add(self, name: str, level: int, status: Any, text: str, **numbers: float) -> None:
        self.checks.append(Check(name, level, status, text, numbers))

    def all(self, variance: bool) -> tuple[list[Check], str | None, str | None, tuple[Match, ...]]:
        if self._sane():
            passed = self._gradient()
            self._micro_batches()
            if passed:
                self._value()
            else:
                self._name_the_cause()
            self._fixed_point()
            if variance and passed and self.bench.target.kind == "samples":
                self._variance()
        return self.checks, self.cause_name, self.cause, self.nearest

    def _blame(self, name: str, cause: str) -> None:
        self.cause_name, self.cause = name, cause

    def _sane(self) -> bool:
        b = self.bench
        first, again = (b.slope(self.loss, b.here) for _ in range(2))
        if not (math.isfinite(first.value) and np.isfinite(first.gradient).all()):
            self.add("finite", 1, "fail", "the loss or its gradient is not a finite number")
            self._blame("not_finite", "a division by zero tokens or by zero deviation, or the logarithm of 0")
            return False
        gap = np.linalg.norm(first.gradient - again.gradient)
        if gap > 1e-9 * np.linalg.norm(first.gradient) or abs(first.value - again.value) > 1e-9 * abs(
            first.value
        ):
            text = "two calls on one batch differ"
            self.add("deterministic", 1, "fail", text, gap=float(gap / np.linalg.norm(first.gradient)))
            self._blame("dropout", "dropout on: call eval(), or set the dropout of both models to 0")
            return False
        self.add("deterministic", 1, "pass", "two calls on one batch agree")
        return True

    @cached_property
    def evidence(self) -> _Evidence:
        return self.bench.evidence(self.loss)

    def _gradient(self) -> bool:
        G, e = self.bench.exact_here.gradient, self.evidence
        if np.linalg.norm(e.whole) <= 1e-12 * self.bench.size:
            self.add("gradient", 1, "fail", "the expected gradient is zero", size=0.0)
            return False
        error, (scale,) = explain(e.whole, [G])
        cosine = float(e.whole @ G / (np.linalg.norm(e.whole) * np.linalg.norm(G)))
        self.scale = float(scale)
        numbers = {"cosine": cosine, "error": error, "scale": self.scale}
        if error > self.tolerance:
            text = f"the expected gradient is not the objective's: cosine {cosine:.6f}"
            self.add("gradient", 1, "fail", text, **numbers)
            return False
        text = f"the expected gradient is the objective's (relative error {_small(error)})"
        if abs(self.scale - 1) > self.tolerance:
            text += f", times {self.scale:.6g}: a constant factor, which acts like a learning rate"
        self.add("gradient", 1, "pass", text, **numbers)
        return True

    def _micro_batches(self) -> None:
        e = self.evidence
        size = float(np.linalg.norm(e.whole))
        if size <= 1e-12 * self.bench.size:
            return
        gap = float(np.linalg.norm(e.mean - e.whole) / size)
        if gap <= self.tolerance:
            self.add("micro-batches", 1, "pass", "their mean is the whole batch's gradient", gap=gap)
            return
        text = f"the mean over {CHUNKS} micro-batches differs from the whole batch by {gap:.1e}"
        self.add("micro-batches", 1, "fail", text, gap=gap)
        if self.checks[-2].status == "pass":
            self._name_the_cause()

    def _name_the_cause(self) -> None:
        """Rank the catalogue by the joint evidence, ties by the micro-batches one by one."""
        e, found = self.evidence, []
        nothing = np.linalg.norm(e.whole) <= 1e-12 * self.bench.size
        for number, (candidate, terms) in enumerate(self.bench.catalogue):
            if candidate.kind == "right":
                continue
            if nothing:
                vanishes = np.linalg.norm(terms[0].whole) <= 1e-12 * self.bench.size
                error, x = (0.0, np.ones(1)) if vanishes and len(terms) == 1 else (math.inf, np.ones(1))
            else:
                error, x = explain(e.joint, [t.joint for t in terms])
            missed = error > self.tolerance
            fine = 0.0 if missed else explain(e.parts, [t.parts for t in terms])[0]
            found.append(((missed, len(terms), fine, error, number), candidate, x))
        found.sort(key=lambda row: row[0])
        self.nearest = tuple(Match(c.name, rank[3], float(x[0])) for rank, c, x in found[:4])
        (missed, terms_used, *_), best, x = found[0]
        if missed and not nothing and self._name_the_strength():
            return
        near = math.inf if nothing else explain(e.whole, [self.bench.exact_here.gradient])[0]
        if missed and near <= self.tolerance:
            self._blame(
                "batch_statistic",
                "on the whole batch the gradient is right, in its parts it is not: it is normalised by a statistic "
                "of the batch (advantages by their deviation?), so that it depends on how the batch is split",
            )
            return
        if missed and near < NEARLY:
            self.cause = (
                f"none of the catalogue's, but the gradient is right to {near:.1e}: rounding (bfloat16, float16; "
                "then take a larger tolerance), or a small fault"
            )
            return
        if missed:
            self.cause = (
                "none of the catalogue's: the loss descends something else, or has two faults at once"
            )
            return
        words = best.cause if terms_used == 1 else f"{best.cause}: {_weight(best, x)}"
        self._blame(
            best.name, f"descends another known objective: {words}" if best.kind == "objective" else words
        )
        if best.kind == "objective":
            self.checks = [
                Check(c.name, c.level, "other", c.text, c.numbers) if c.status == "fail" else c
                for c in self.checks
            ]

    def _name_the_strength(self) -> bool:
        """Whether the objective with another number than asked for has the trainer's gradient."""
        from scipy.optimize import minimize_scalar

        b, e = self.bench, self.evidence
        for family in families(b.target.name, dict(b.parameters)):

            def error(log_x: float, family: Family = family) -> float:
                found = b.slope(family.member(math.exp(log_x)), b.here).gradient
                return explain(e.whole, [found])[0]

            grid = math.log(family.asked) + np.linspace(-5, 5, 41)
            k = int(np.argmin([error(x) for x in grid]))
            near = (grid[max(k - 1, 0)], grid[min(k + 1, 40)])
            best = minimize_scalar(error, bounds=near, method="bounded", options={"xatol": 1e-11}).x
            x = math.exp(best)
            left, scale = explain(e.joint, [b.evidence(family.member(x)).joint])
            if left <= self.tolerance:
                self._blame(family.name, f"{family.cause} {x:.6g}, where {family.asked:g} is asked for")
                self.nearest = (Match(family.name, left, float(scale[0])), *self.nearest[:3])
                return True
        return False

    def _failed(self) -> str:
        known = [cand for cand, _ in self.bench.catalogue if cand.name == self.cause_name]
        return "other" if known and known[0].kind == "objective" else "fail"

    def _value(self) -> None:
        """Differences of values between two policies; a constant does no harm."""
        b = self.bench
        if b.target.kind == "samples":
            return  # a policy-gradient loss has no meaning as a value
        there = b.reference
        mine = [b.slope(self.loss, x).value for x in (b.here, there)]
        exact = [b.exact(x).value for x in (b.here, there)]
        rise, wanted = mine[0] - mine[1], self.scale * (exact[0] - exact[1])
        error = abs(rise - wanted) / max(abs(wanted), *(abs(self.scale * v) for v in exact))
        offset = mine[0] - self.scale * exact[0]
        if error <= self.tolerance:
            text = "the value rises as the objective's does"
            if abs(offset) > self.tolerance * max(1, abs(exact[0])):
                text += f"; it lies {offset:.6g} above it, a constant"
            self.add("value", 1, "pass", text, error=error, offset=offset)
        else:
            self.add(
                "value",
                1,
                "fail",
                f"the value rises by {rise:.6g}, the objective's by {wanted:.6g}",
                error=error,
            )
            self._blame("value", "the value that is returned is not the one whose gradient is returned")

    def _fixed_point(self) -> None:
        b = self.bench
        if b.setting.optimum is None:
            self.add(
                "fixed point",
                4,
                "note",
                "no minimum of the objective was found at these parameters, if it has one; nothing is checked",
            )
            return
        origin = b.here if b.target.name == "kl" else b.reference
        g = b.slope(self.loss, origin).gradient
        at_best = b.slope(self.loss, b.optimum).gradient
        size = float(np.linalg.norm(g))
        if size <= 1e-12 * b.size:
            self.add("fixed point", 4, self._failed(), "the expected gradient vanishes at the start already")
            return
        left = float(np.linalg.norm(at_best) / size)
        good = left <= self.tolerance
        text = f"at the known optimum the expected gradient is {_small(left)} of that at the start"
        self.add("fixed point", 4, "pass" if good else self._failed(), text, ratio=left)
        d = b.distance(origin).gradient
        cosine = float(g @ d / (size * np.linalg.norm(d)))
        text = f"from the start KL(optimum, policy) {'falls' if cosine > 0 else 'rises'} along the negative gradient"
        self.add("flow", 4, "pass" if cosine > 0 else self._failed(), text, cosine=cosine)

    def _variance(self) -> None:
        """Of the gradient of one group of the first prompt, against that of the plain loss."""
        b = self.bench
        right = candidates(b.target.name, dict(b.parameters))[0].terms[0]
        groups = len(b.rows_at("here")) // b.world.table.prompts

        def spread(loss: TrainerLoss) -> float:
            each = np.stack([b.slope(loss, b.here, np.array([k])).gradient for k in range(0, groups, 3)])
            return float(((each - each.mean(0)) ** 2).sum(1).mean())

        ratio = spread(self.loss) / (self.scale**2 * spread(right))
        text = f"one group of {GROUP} has {ratio:.3g} times the variance of the catalogue's own loss"
        if ratio > 1.5:
            text += ": unbiased, but noisier than need be"
            text += {"nash_md_pg": " (1/2 not subtracted from the preference?)"}.get(b.target.name, "")
        self.add("variance", 1, "note", text, ratio=ratio)


def _small(x: float) -> str:
    return f"{x:.1e}" if x > 1e-12 else "below 1e-12"


def _weight(best: Candidate, x: Array) -> str:
    if best.name == "label_smoothing":
        return f"it is {round(x[1] / x.sum(), 6) + 0.0:g}"
    return f"the second part's weight is {round(x[1] / x[0], 9):.6g}"
