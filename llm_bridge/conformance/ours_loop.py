"""The package's own training loop as a whole trainer, for the levels that train (5 and 6)."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ..policy import Scored, precompute
from .models import ModelWorld
from .ours_whole import AdapterTrainer, PolicyTrainer

if TYPE_CHECKING:
    from ..training.judges import Judge
    from ..training.records import Record
    from ..training.settings import TrainSettings
    from .runs import Task


class _Interrupted(Exception):
    pass


class LoopTrainer(PolicyTrainer):
    """`training.train` on the world's policy, with a frozen copy of the world's reference."""

    roles: ClassVar[tuple[str, ...]] = ("policy", "reference")
    options: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **PolicyTrainer.options,
        "micro_batch": (None, 5),
        "reference": ("live", "precomputed"),
        "resume": (False, True),
    }
    exact: ClassVar[tuple[str, ...]] = ("resume",)
    against = "dpo"
    parameters: ClassVar[Mapping[str, float]] = {}
    method: str | None = None  # of `training.METHODS`, where its name is not the objective's

    def train(self, task: Task, seed: int, micro_batch: int | None, reference: str, resume: bool) -> None:
        settings = self.settings(task, seed, micro_batch)
        if not resume:
            self.run(task, settings, reference, None, None)
            return
        with tempfile.TemporaryDirectory() as folder:
            with suppress(_Interrupted):
                self.run(task, settings, reference, Path(folder), task.steps // 2)
            self.__init__(self.world)  # type: ignore[misc]  # as another process would find it
            self.run(task, settings, reference, Path(folder), None)

    def settings(self, task: Task, seed: int, micro_batch: int | None) -> TrainSettings:
        from ..training import TrainSettings

        return TrainSettings(
            steps=task.steps,
            batch=task.batch,
            micro_batch=micro_batch,
            round_batches=task.round_steps,
            horizon=max(1, task.horizon),
            optimiser=task.optimiser,
            learning_rate=task.learning_rate,
            schedule=task.schedule,
            seed=seed,
            device="cpu",
            checkpoint_every=max(1, task.steps // 2),
            log_with=None,
        )

    def run(
        self, task: Task, settings: TrainSettings, reference: str, folder: Path | None, stop: int | None
    ) -> None:
        """Training to the end, or until the step after `stop`, whose checkpoint there is."""
        from ..training import train

        def interrupt(row: Mapping[str, Any]) -> None:
            if stop is not None and row["step"] > stop:
                raise _Interrupted

        given: dict[str, Any] = {"prompts": [list(x) for x in task.prompts], "judge": self.judge(task)}
        if task.comparisons:
            given = {"records": self.records(task, reference)}
        train(
            self.policy,
            self.method or task.objective,
            reference=self.anchor(task, reference),
            settings=settings,
            parameters=task.parameters,
            folder=folder,
            resume=folder is not None,
            on_step=interrupt,
            **given,
        )

    def judge(self, task: Task) -> Judge | None:
        from ..training.judges import PreferenceJudge, RewardJudge

        if task.reward is not None:
            return RewardJudge("the task's", task.reward)
        return None if task.preference is None else PreferenceJudge("the task's", task.preference)

    def records(self, task: Task, reference: str) -> list[Record]:
        from ..training.records import Record

        rows = task.comparisons
        known: Sequence[Any] = [None] * len(rows)
        if reference == "precomputed":
            prompts = [r.prompt for r in rows]
            both = [
                self.log_probabilities(prompts, side, "reference", "right").tolist()
                for side in ([r.chosen for r in rows], [r.rejected for r in rows])
            ]
            known = list(zip(*both, strict=True))
        return [
            Record(r.prompt, r.chosen, r.rejected, ref_logp=logp) for r, logp in zip(rows, known, strict=True)
        ]

    def anchor(self, task: Task, reference: str) -> Scored:
        if reference == "live" or task.comparisons or task.objective == "nash_md":
            return self.reference  # the numbers stand beside the comparisons; a mixture has to be drawn from
        every = [(x, y) for x in self.world.prompts for y in self.world.completions]
        return precompute(self.reference, [x for x, _ in every], [y for _, y in every])


def loop_trainer(objective: str, adapter: bool = False, **parameters: float) -> type[LoopTrainer]:
    """The loop with another method; with `adapter` the reference is the policy with its adapter off."""

    class Loop(LoopTrainer):
        against = objective

        def __init__(self, world: ModelWorld) -> None:
            if adapter:
                AdapterTrainer.__init__(self, world)  # type: ignore[arg-type]
            else:
                super().__init__(world)

    Loop.parameters = dict(parameters)
    Loop.__name__ = f"loop_{objective}" + ("_adapter" if adapter else "")
    return Loop
