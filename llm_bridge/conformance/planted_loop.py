"""Known bugs of training loops, planted in the package's own, each with the cause that must be named first.

What is broken is broken in the loop itself: one of its functions is another one while `train` runs. Nothing here uses
the exact runs and the diagnosis of `runs` and `invariance`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ..policy import frozen_copy
from .models import ModelWorld
from .ours_loop import LoopTrainer
from .planted_whole import PlantedWhole, planter

if TYPE_CHECKING:
    from torch import Tensor

    from ..training.methods import Columns
    from ..training.rows import Rows
    from ..training.setup import Setup
    from .runs import Task

_FOUND: dict[str, PlantedWhole] = {}
_plant = planter(_FOUND)


@contextmanager
def _swapped(module: Any, **functions: Any) -> Iterator[None]:
    kept = {name: getattr(module, name) for name in functions}
    for name, function in functions.items():
        setattr(module, name, function)
    try:
        yield
    finally:
        for name, function in kept.items():
            setattr(module, name, function)


class _Loop(LoopTrainer):
    """Options and functions of the loop that a bug needs, and no more."""

    roles: ClassVar[tuple[str, ...]] = ("policy",)
    options: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    exact: ClassVar[tuple[str, ...]] = ()
    sample: Any = None
    rewards: Any = None

    def log_probabilities(  # type: ignore[override]
        self, prompts: Any, completions: Any, role: str, side: Any = "right"
    ) -> Any:
        return super().log_probabilities(prompts, completions, role, side)

    def train(  # type: ignore[override]
        self, task: Task, seed: int, micro_batch: Any = None, reference: str = "live", resume: bool = False
    ) -> None:
        with ExitStack() as stack:
            for part in self.broken():
                stack.enter_context(part)
            super().train(task, seed, micro_batch, reference, resume)

    def broken(self) -> Sequence[Any]:
        return ()


# ---- micro-batches ---------------------------------------------------------------------------------------------------


class _Micro(_Loop):
    options: ClassVar[Mapping[str, tuple[Any, ...]]] = {"micro_batch": (None, 5)}

    def pieces(self, found: list[tuple[Rows, Any]]) -> list[tuple[Rows, Any]]:
        raise NotImplementedError

    def broken(self) -> Sequence[Any]:
        from ..training import step

        right = step.micro_batches

        def wrong(setup: Setup, rows: Rows, weight: Any) -> Any:
            return iter(self.pieces(list(right(setup, rows, weight))))

        return [_swapped(step, micro_batches=wrong)]


@_plant(6, "micro_added", "huggingface/transformers 34191")
class AddsGradientsOfMicroBatches(_Micro):
    """The loss is not divided by the number of accumulation steps."""

    def pieces(self, found: Any) -> Any:
        return [(rows, weight * len(found)) for rows, weight in found]


@_plant(6, "micro_divided")
class DividesByAccumulationTwice(_Micro):
    """By the trainer, and by the engine below it."""

    def pieces(self, found: Any) -> Any:
        return [(rows, weight / len(found)) for rows, weight in found]


@_plant(6, "micro_means")
class AveragesMicroBatches(_Micro):
    def pieces(self, found: Any) -> Any:
        return [(rows, np.full(len(rows), 1 / len(rows) / len(found))) for rows, _ in found]


@_plant(6, "micro_means_added")
class AddsAveragesOfMicroBatches(_Micro):
    def pieces(self, found: Any) -> Any:
        return [(rows, np.full(len(rows), 1 / len(rows))) for rows, _ in found]


@_plant(6, "micro_last")
class ClearsGradientsBetweenMicroBatches(_Micro):
    def pieces(self, found: Any) -> Any:
        return found[-1:]


@_plant(6, "micro_dropped")
class DropsTheLastMicroBatch(_Micro):
    def pieces(self, found: Any) -> Any:
        return [piece for piece in found if len(piece[0]) == len(found[0][0])]


@_plant(6, "micro_batch", "huggingface/transformers 34191")
class NormalisesByTheTokensOfMicroBatches(_Micro):
    def pieces(self, found: Any) -> Any:
        tokens = [rows.tokens() for rows, _ in found]
        return [
            (rows, np.full(len(rows), 2.0 / n / len(found)))
            for (rows, _), n in zip(found, tokens, strict=True)
        ]


@_plant(6, "micro_steps")
class StepsAfterEveryMicroBatch(_Loop):
    options: ClassVar[Mapping[str, tuple[Any, ...]]] = {"micro_batch": (None, 5)}

    def broken(self) -> Sequence[Any]:
        from ..training import loop

        right = loop.update

        def wrong(setup: Setup, rows: Rows, *rest: Any) -> Any:
            size = setup.settings.micro_batch or len(rows)
            for first in range(0, len(rows), size):
                found = right(setup, rows.take(np.arange(first, min(first + size, len(rows)))), *rest)
            return found

        return [_swapped(loop, update=wrong)]


# ---- rows, and the reference -----------------------------------------------------------------------------------------


@_plant(6, "order")
class ReferenceOfTheNextRow(_Loop):
    """Two loaders, one of which is a row ahead."""

    def broken(self) -> Sequence[Any]:
        from ..training import step

        right = step.score

        def wrong(*given: Any) -> Any:
            return np.roll(right(*given), 1, axis=0)

        return [_swapped(step, score=wrong)]


@_plant(6, "not_repeatable", "huggingface/trl 3234")
class TrainsWithDropoutOn(_Loop):
    def broken(self) -> Sequence[Any]:
        from .. import policy

        return [_swapped(policy, _without_dropout=lambda model: nullcontext())]


class _Known(_Loop):
    options: ClassVar[Mapping[str, tuple[Any, ...]]] = {"reference": ("live", "precomputed")}


@_plant(6, "precomputed_is_policy", "huggingface/trl 2423")
class PrecomputesThePolicy(_Known):
    """The numbers are made with the adapter on."""

    def records(self, task: Task, reference: str) -> Any:
        kept = self.reference
        self.reference = self.policy
        try:
            return super().records(task, reference)
        finally:
            self.reference = kept


@_plant(6, "precomputed_is_base", "huggingface/trl 4723")
class PrecomputesTheBase(_Known):
    def records(self, task: Task, reference: str) -> Any:
        kept = self.reference
        self.reference = self.of(self.world.model("base"))
        try:
            return super().records(task, reference)
        finally:
            self.reference = kept


@_plant(6, "precomputed")
class PrecomputesForRowsInAnotherOrder(_Known):
    """The data are shuffled after the reference's numbers were noted."""

    def records(self, task: Task, reference: str) -> Any:
        found = super().records(task, reference)
        numbers = [r.ref_logp for r in found]
        return [replace(r, ref_logp=n) for r, n in zip(found, numbers[1:] + numbers[:1], strict=True)]


@_plant(6, "reference_moves", "huggingface/trl 2423")
class ReferenceSharesTheWeights(_Loop):
    """Alike before training, so that only training shows it."""

    start = "reference"
    roles: ClassVar[tuple[str, ...]] = ("policy", "reference")

    def __init__(self, world: ModelWorld) -> None:
        super().__init__(world)
        self.reference = self.policy


# ---- resuming --------------------------------------------------------------------------------------------------------


class _Resumes(_Loop):
    options: ClassVar[Mapping[str, tuple[Any, ...]]] = {"resume": (False, True)}

    def after_restoring(self, change: Callable[[Any, Any], None]) -> Any:
        from ..training import loop

        right = loop._restore

        def wrong(setup: Any, progress: Any, found: Any) -> None:
            right(setup, progress, found)
            change(setup, progress)

        return _swapped(loop, _restore=wrong)


@_plant(6, "resume_optimiser")
class LosesTheOptimiser(_Resumes):
    def broken(self) -> Sequence[Any]:
        from ..training import checkpoints

        return [_swapped(checkpoints, restore_optimiser=lambda *given: None)]


@_plant(6, "resume_data")
class RepeatsTheDataOnResume(_Resumes):
    def broken(self) -> Sequence[Any]:
        def change(setup: Any, progress: Any) -> None:
            progress.position = 0

        return [self.after_restoring(change)]


@_plant(6, "resume_restarts")
class CountsStepsFromZeroOnResume(_Resumes):
    def broken(self) -> Sequence[Any]:
        def change(setup: Any, progress: Any) -> None:
            progress.step = progress.position = 0

        return [self.after_restoring(change)]


@_plant(6, "resume_weights")
class LosesTheWeightsOnResume(_Resumes):
    def broken(self) -> Sequence[Any]:
        import torch

        first = {name: p.detach().clone() for name, p in self.policy.model.named_parameters()}

        def change(setup: Any, progress: Any) -> None:
            with torch.no_grad():
                for name, p in setup.weights.items():
                    p.copy_(first[name])

        return [self.after_restoring(change)]


@_plant(6, "resume_schedule")
class RestartsTheScheduleOnResume(_Resumes):
    """The scheduler counts its own calls."""

    def broken(self) -> Sequence[Any]:
        from ..training.settings import TrainSettings

        right, begun = TrainSettings.rate, [0]

        def change(setup: Any, progress: Any) -> None:
            begun[0] = progress.step

        def wrong(settings: Any, step: int) -> float:
            return right(settings, max(0, step - begun[0]))

        return [self.after_restoring(change), _swapped(TrainSettings, rate=wrong)]


@_plant(6, "resume_reference")
class MakesTheReferenceAnewOnResume(_Resumes):
    def broken(self) -> Sequence[Any]:
        def change(setup: Any, progress: Any) -> None:
            object.__setattr__(setup, "reference", frozen_copy(setup.policy))
            self.reference = setup.reference

        return [self.after_restoring(change)]


@_plant(6, "not_exact")
class KeepsMomentsInLowPrecision(_Resumes):
    exact: ClassVar[tuple[str, ...]] = ("resume",)

    def broken(self) -> Sequence[Any]:
        from ..training import checkpoints

        right = checkpoints.optimiser_tensors

        def wrong(*given: Any) -> Any:
            return {name: x.float() if x.ndim else x for name, x in right(*given).items()}

        return [_swapped(checkpoints, optimiser_tensors=wrong)]


# ---- what is learnt --------------------------------------------------------------------------------------------------


@_plant(5, "labels_exchanged")
class LearnsFromTheLosers(_Loop):
    def records(self, task: Task, reference: str) -> Any:
        return [replace(r, chosen=r.rejected, rejected=r.chosen) for r in super().records(task, reference)]


class _Views(_Loop):
    """Scores of another kind, of policy and reference."""

    def view(self, values: Tensor, mask: Tensor, completions: Any) -> Tensor:
        raise NotImplementedError

    def broken(self) -> Sequence[Any]:
        from ..training import step

        def wrong(setup: Setup, rows: Rows, weight: Any) -> Columns:
            return self.columns(setup, rows, weight)

        return [_swapped(step, columns_of=wrong)]

    def columns(self, setup: Setup, rows: Rows, weight: Any) -> Columns:
        import torch

        from ..training.methods import Columns

        scored = rows.responses[: setup.method.scored]

        def scores(policy: Any) -> Tensor:
            found = []
            for column in scored:
                values, mask = policy.token_log_probabilities(rows.prompts, column)
                found.append(self.view(values, mask, column))
            return torch.stack(found, 1)

        with torch.no_grad():
            reference = scores(setup.reference)
        policy = scores(replace(setup.trained, micro_batch=1000))
        zero = np.zeros(len(rows))
        given = [rows.numbers.get(name, zero) for name in ("wins", "advantage")]
        wins, reward, share = (torch.as_tensor(x).to(policy) for x in (*given, weight))
        return Columns(policy, reference, reference, wins, reward, share)


@_plant(5, "token_mean", "huggingface/trl 1677")
class LearnsFromTokenMeans(_Views):
    def view(self, values: Tensor, mask: Tensor, completions: Any) -> Tensor:
        return values.sum(1) / mask.sum(1)


@_plant(5, "no_end", "huggingface/trl 6357")
class LearnsWithoutTheEnd(_Views):
    def view(self, values: Tensor, mask: Tensor, completions: Any) -> Tensor:
        import torch

        last = mask.sum(1) - 1
        ended = torch.tensor([y[-1] == self.world.end for y in completions])
        return values.sum(1) - values.gather(1, last[:, None])[:, 0] * ended


@_plant(5, "no_first")
class LearnsWithoutTheFirstToken(_Views):
    def view(self, values: Tensor, mask: Tensor, completions: Any) -> Tensor:
        return values[:, 1:].sum(1)


@_plant(5, "reference_is_policy", "huggingface/trl 2423")
class LearnsAgainstItself(_Loop):
    def anchor(self, task: Task, reference: str) -> Any:
        return self.policy


@_plant(5, "reference_is_start")
class LearnsAgainstItsStart(_Loop):
    """The reference that was given is not used: the trainer takes a copy of the policy."""

    def anchor(self, task: Task, reference: str) -> Any:
        return frozen_copy(self.policy)


@_plant(5, "reference_is_base", "huggingface/trl 4723")
class LearnsAgainstTheBase(_Loop):
    def anchor(self, task: Task, reference: str) -> Any:
        return self.of(self.world.model("base"))


@_plant(5, "no_reference", "linkedin/Liger-Kernel 387")
class LearnsWithoutReference(_Loop):
    def anchor(self, task: Task, reference: str) -> Any:
        class Nothing:
            def log_probabilities(self, prompts: Any, completions: Any) -> Tensor:
                import torch

                return torch.zeros(len(prompts), dtype=torch.float64)

        return Nothing()


class _Told(_Loop):
    """Another task is run than the one that was given."""

    def told(self, task: Task) -> Task:
        raise NotImplementedError

    def train(self, task: Task, seed: int) -> None:  # type: ignore[override]
        super().train(self.told(task), seed)


@_plant(5, "beta_other")
class LearnsWithTheDefaultBeta(_Told):
    def told(self, task: Task) -> Task:
        return replace(task, parameters={"beta": 0.1})


@_plant(5, "pace")
class LearnsWithADecayThatNobodyAskedFor(_Told):
    """A scheduler's default."""

    def told(self, task: Task) -> Task:
        return replace(task, schedule="linear")


@_plant(5, "pace")
class LearnsTwiceAsFast(_Told):
    def told(self, task: Task) -> Task:
        return replace(task, learning_rate=2 * task.learning_rate)


@_plant(5, "dpo_instead", "modelscope/ms-swift 10167")
class LearnsByAnotherLoss(_Told):
    """The option for the loss is not read."""

    against = "ipo"
    method = "dpo"

    def told(self, task: Task) -> Task:
        return replace(task, parameters={"beta": task.parameters["tau"]})


@_plant(5, "nothing_trained")
class TrainsACopy(_Loop):
    def train(self, task: Task, seed: int) -> None:  # type: ignore[override]
        other = type(self)(self.world)
        LoopTrainer.train(other, task, seed, None, "live", False)


@_plant(5, "seed_ignored")
class TrainsFromAFixedSeed(_Loop):
    against = "kl_policy_gradient"

    def train(self, task: Task, seed: int) -> None:  # type: ignore[override]
        super().train(task, 42)


# ---- on-policy objectives --------------------------------------------------------------------------------------------


class _Method(_Loop):
    """Another loss of the same columns, or other players."""

    against = "kl_policy_gradient"

    def changed(self, method: Any) -> Any:
        raise NotImplementedError

    def train(self, task: Task, seed: int) -> None:  # type: ignore[override]
        from ..training import find_method

        self.method = self.changed(
            find_method(task.objective)
        )  # the loop takes methods as well as their names
        super().train(task, seed)


class _Gradient(_Method):
    def advantage(self, c: Columns, beta: float) -> Tensor:
        raise NotImplementedError

    def changed(self, method: Any) -> Any:
        def loss(c: Columns, *, beta: float) -> Tensor:
            return -(c.weight * self.advantage(c, beta) * c.policy[:, 0]).sum()

        return replace(method, loss=loss)


@_plant(5, "kl_none", "allenai/open-instruct 534")
class LearnsWithK1AsALoss(_Gradient):
    def changed(self, method: Any) -> Any:
        def loss(c: Columns, *, beta: float) -> Tensor:
            kl = c.policy[:, 0] - c.reference[:, 0]
            return (c.weight * (beta * kl - c.reward * c.policy[:, 0])).sum()

        return replace(method, loss=loss)


@_plant(5, "kl_joint", "huggingface/trl 2277")
class LearnsWithTheKlInTheGraph(_Gradient):
    def advantage(self, c: Columns, beta: float) -> Tensor:
        return c.reward - beta * (c.policy - c.reference)[:, 0]


@_plant(5, "labels_exchanged")
class MinimisesTheReward(_Gradient):
    def advantage(self, c: Columns, beta: float) -> Tensor:
        return -c.reward - beta * (c.policy - c.reference)[:, 0].detach()


class _Tokens(_Views):
    """Columns of tokens (m, T), for losses that need them."""

    against = "kl_policy_gradient"

    def train(self, task: Task, seed: int) -> None:  # type: ignore[override]
        from ..training import find_method

        right = find_method(task.objective)

        def loss(c: Columns, *, beta: float) -> Tensor:
            policy, reference = c.policy[:, :, 0], c.reference[:, :, 0]
            return (c.weight * self.row(policy, reference, c.reward, beta)).sum()

        def columns(setup: Setup, rows: Rows, weight: Any) -> Any:
            if len(rows) == 0:
                raise AssertionError
            found = super(_Tokens, self).columns(setup, rows, weight)
            return replace(
                found, policy=found.policy.transpose(1, 2), reference=found.reference.transpose(1, 2)
            )

        def asked(c: Columns, *, beta: float) -> Tensor:
            return right.value(c, {"beta": beta}) if c.policy.ndim == 2 else loss(c, beta=beta)

        self.columns = columns  # type: ignore[method-assign]
        self.method = replace(right, loss=asked)  # type: ignore[assignment]
        super().train(task, seed)

    def view(self, values: Tensor, mask: Tensor, completions: Any) -> Tensor:
        return values

    def row(self, policy: Tensor, reference: Tensor, reward: Tensor, beta: float) -> Tensor:
        raise NotImplementedError


@_plant(5, "kl_frozen", "huggingface/trl 3556")
class LearnsWithTheKlOfTokens(_Tokens):
    def row(self, policy: Tensor, reference: Tensor, reward: Tensor, beta: float) -> Tensor:
        ratio = (policy - reference).detach()
        return ((beta * ratio - reward[:, None]) * policy).sum(1)


@_plant(5, "kl_k3", "huggingface/trl 3025")
class LearnsWithK3AsALoss(_Tokens):
    def row(self, policy: Tensor, reference: Tensor, reward: Tensor, beta: float) -> Tensor:
        back = reference - policy
        return beta * (back.exp() - 1 - back).sum(1) - reward * policy.sum(1)


@_plant(5, "mixture_swapped")
class PlaysAgainstTheSwappedMixture(_Told):
    against = "nash_md"
    parameters: ClassVar[Mapping[str, float]] = {"share": 0.1}

    def told(self, task: Task) -> Task:
        return replace(task, parameters={**task.parameters, "share": 1 - task.parameters["share"]})


@_plant(5, "opponent_is_policy")
class PlaysAgainstItself(_Method):
    against = "nash_md"
    parameters: ClassVar[Mapping[str, float]] = {"share": 0.7}

    def changed(self, method: Any) -> Any:
        return replace(method, draws=("policy", "policy"))


@_plant(5, "opponent_is_reference")
class PlaysAgainstTheReference(_Method):
    against = "nash_md"
    parameters: ClassVar[Mapping[str, float]] = {"share": 0.1}

    def changed(self, method: Any) -> Any:
        return replace(method, draws=("policy", "reference"))


@_plant(5, "previous_missing")
class ForgetsTheRoundsPolicy(_Method):
    against = "inpo"

    def changed(self, method: Any) -> Any:
        right = method.loss

        def loss(c: Columns, **given: float) -> Tensor:
            return right(replace(c, previous=c.reference), **given)

        return replace(method, loss=loss)


@_plant(2, "stale_weights")
class SamplesWithStaleWeights(_Loop):
    """Weights are not sent to the engine that samples."""

    def sample(self, prompts: Any, horizon: int, seed: int, role: str) -> Any:  # type: ignore[override]
        kept = self.policy
        self.policy = self.of(self.world.model("policy"))
        try:
            return LoopTrainer.sample(self, prompts, horizon, seed, role, True)
        finally:
            self.policy = kept


PLANTED_LOOP: Mapping[str, PlantedWhole] = MappingProxyType(_FOUND)
