"""The training loop: rounds of (collect, then steps on what was collected), for every method of `methods`.

    settings = TrainSettings(steps=200)
    result = train(policy, "nash_md", prompts=prompts, judge=judge, settings=settings, folder="runs/first")
    result = train(policy, "dpo", records=read_records("pairs.jsonl"), settings=settings)

The policy's weights are trained where they are. Draws, labels and the order of rows are functions of the seed and of
the counters alone: N steps, a checkpoint and M steps are N + M steps, on a CPU and with one number of threads bit for
bit, and what is computed by one process and by several differs by rounding alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from ..policy import Scored, Tokens, TransformerPolicy
from . import checkpoints as ck
from . import run_folder
from .collect import ask_rewards, collect, sample_answers
from .judges import RewardJudge
from .methods import Method, find_method
from .rows import Rows, batch_of, batches_in_pass, joined, rows_of_records
from .settings import TrainSettings
from .setup import Setup, full, like, make_setup, whole_weights
from .step import TrainingStopped, update

if TYPE_CHECKING:
    from torch import Tensor

    from .judges import Judge
    from .records import Record

__all__ = ["Progress", "TrainResult", "TrainSettings", "TrainingStopped", "train"]

OnStep = Callable[[dict[str, Any]], None]


@dataclass
class Progress:
    """What changes: steps made, the round, the batches of it that are done, its rows, the averaged weights."""

    step: int = 0
    round: int = -1
    position: int = 0
    rows: Rows | None = None
    average: dict[str, Tensor] | None = None


@dataclass(frozen=True, eq=False)
class TrainResult:
    """policy, trained; reference; metrics, one row a step made by this call; average, the averaged weights by name."""

    policy: TransformerPolicy
    reference: Scored
    metrics: Sequence[Mapping[str, Any]]
    step: int
    folder: Path | None
    average: Mapping[str, Tensor] | None


def train(
    policy: TransformerPolicy,
    method: str | Method,
    *,
    prompts: Sequence[Tokens] | None = None,
    judge: Judge | None = None,
    records: Sequence[Record] | None = None,
    reference: Scored | None = None,
    settings: TrainSettings | None = None,
    parameters: Mapping[str, float] | None = None,
    folder: str | Path | None = None,
    resume: bool = False,
    decode: Callable[[Tokens], str] | None = None,
    on_step: OnStep | None = None,
    accelerator: Any = None,
) -> TrainResult:
    """Train the policy's weights; they are changed in place.

    method      a name of `METHODS`, or a `Method`; `parameters` are its beta, tau, ... where not the defaults
    prompts, judge   for methods that draw their own responses; records for those that are given comparisons
    reference   None = the policy as it is now: without its adapter where that is still zero, else a frozen copy
    folder      for run.json, metrics, samples, records and checkpoints; None = nothing is written
    resume      go on from the folder's last checkpoint, or begin where it has none. The policy must have the weights
                that the run began with, since the reference is made of them
    decode      token ids -> text, for samples.jsonl
    on_step     called with the metrics of each step, on the main process: a progress bar, a plot
    accelerator an `accelerate.Accelerator` to use; None = one made from the settings
    """
    method = find_method(method) if isinstance(method, str) else method
    settings = TrainSettings() if settings is None else settings
    values = method.checked({} if parameters is None else parameters)
    given = _checked_input(policy, method, settings, prompts, judge, records)
    path = None if folder is None else Path(folder)
    setup = make_setup(
        policy,
        method,
        values,
        settings,
        reference=reference,
        prompts=[] if prompts is None else prompts,
        judge=judge,
        folder=path,
        accelerator=accelerator,
    )
    try:
        progress = _begin(setup, given, path, resume, decode)
        metrics = _run(setup, progress, path, on_step)
        if path is not None:
            _save(setup, progress, path)
            _show(setup, progress.step, path, decode)
    finally:
        for tracker in setup.accelerator.trackers:
            tracker.finish()
        setup.accelerator.unwrap_model(setup.trained.model, keep_fp32_wrapper=False)
    return TrainResult(policy, setup.reference, metrics, progress.step, path, progress.average)


def _checked_input(
    policy: TransformerPolicy,
    method: Method,
    settings: TrainSettings,
    prompts: Sequence[Tokens] | None,
    judge: Judge | None,
    records: Sequence[Record] | None,
) -> Rows | None:
    """The rows of an offline method; ValueError at the door where something is missing, or does not fit the model."""
    if method.samples:
        if records is not None:
            raise ValueError(
                f"{method.name} draws its own responses and takes no records: give prompts and a judge, "
                "or take an offline method such as dpo"
            )
        if judge is None:
            raise ValueError(f"{method.name} asks a judge for {method.asks}: give judge=...")
        if prompts is None or not len(prompts):
            raise ValueError(
                f"{method.name} draws responses to prompts, and there are none: give prompts=..."
            )
        policy.check(prompts, horizon=settings.horizon)
        return None
    if records is None:
        raise ValueError(f"{method.name} learns from records of comparisons: give records=...")
    if judge is not None:
        raise ValueError(f"{method.name} learns from its records and asks no judge: leave the judge out")
    rows = rows_of_records(records)
    for name, column in zip(("chosen", "rejected"), rows.responses, strict=True):
        try:
            policy.check(rows.prompts, column)
        except ValueError as error:
            raise ValueError(f"records, {name}: {error}") from error
    return rows


# ---- beginning and going on ----------------------------------------------------------------------------------------


def _begin(
    setup: Setup,
    given: Rows | None,
    folder: Path | None,
    resume: bool,
    decode: Callable[[Tokens], str] | None,
) -> Progress:
    progress = Progress()
    if given is not None:
        progress.round, progress.rows = 0, given
    if "decay" in setup.method.sampler:
        progress.average = {name: p.detach().clone() for name, p in setup.weights.items()}
    if folder is None:
        return progress
    now = run_folder.about(setup, given)
    found = ck.last_checkpoint(folder / "checkpoints")
    if (folder / "run.json").exists():
        if not resume:
            raise ValueError(
                f"{folder} holds a run already: resume=True goes on with it, or take another folder"
            )
        run_folder.check_same_run(folder, now, setup)
    if found is not None:
        _restore(setup, progress, found)
    setup.accelerator.wait_for_everyone()  # all have looked at the folder before one writes into it
    if setup.accelerator.is_main_process:
        if found is None:
            run_folder.begin(folder, now)
        else:
            ck.write_json(folder / "run.json", now)
            run_folder.cut(folder / "metrics.jsonl", lambda row: row["step"] <= progress.step)
            run_folder.cut(folder / "samples.jsonl", lambda row: row["step"] == 0)
    setup.accelerator.init_trackers("tensorboard")
    if found is None:
        _show(setup, 0, folder, decode)
    return progress


def _restore(setup: Setup, progress: Progress, found: Path) -> None:
    import torch

    saved = ck.load_checkpoint(found, _tensors(setup, progress))
    with torch.no_grad():
        for name, x in _tensors(setup, progress).items():
            x.copy_(like(x, saved.weights[name]))
    ck.restore_optimiser(setup.bare_optimiser, setup.weights, saved.optimiser)
    state = saved.state
    progress.step, progress.round, progress.position = (state[k] for k in ("step", "round", "position"))
    if state["rows"] is not None:
        progress.rows = Rows.of_json(state["rows"])


def _tensors(setup: Setup, progress: Progress) -> dict[str, Tensor]:
    """What a checkpoint's weights are: the parameters, and their average where there is one."""
    average = {} if progress.average is None else progress.average
    return {**setup.weights, **{ck.AVERAGE + name: x for name, x in average.items()}}


def _save(setup: Setup, progress: Progress, folder: Path) -> None:
    # Weights in shards come together on all processes; one of them writes.
    weights = {name: full(x.detach()) for name, x in _tensors(setup, progress).items()}
    tensors = ck.optimiser_tensors(setup.bare_optimiser, setup.weights)
    if setup.accelerator.is_main_process:
        keeps = setup.method.samples and progress.rows is not None
        state = {
            "step": progress.step,
            "round": progress.round,
            "position": progress.position,
            "rows": progress.rows.as_json() if keeps and progress.rows is not None else None,
        }
        saved = ck.Checkpoint(weights, tensors, state)
        ck.save_checkpoint(folder / "checkpoints", progress.step, saved, setup.settings.keep)
    setup.accelerator.wait_for_everyone()


def _show(setup: Setup, step: int, folder: Path, decode: Callable[[Tokens], str] | None) -> None:
    """Answers to the first prompts, and what a judge of rewards says of them."""
    prompts = setup.prompts[: setup.settings.sample_prompts]
    if not len(prompts):
        return
    with whole_weights(setup):
        if not setup.accelerator.is_main_process:
            return
        completions = sample_answers(setup, prompts).completions
    rewards = None
    if isinstance(setup.judge, RewardJudge) or (setup.judge is not None and setup.method.asks == "rewards"):
        rewards = ask_rewards(setup.judge, prompts, completions).tolist()
    run_folder.write_samples(folder, setup, step, prompts, completions, rewards, decode)


# ---- the loop --------------------------------------------------------------------------------------------------------


def _run(
    setup: Setup, progress: Progress, folder: Path | None, on_step: OnStep | None
) -> list[Mapping[str, Any]]:
    settings = setup.settings
    found: list[Mapping[str, Any]] = []
    while progress.step < settings.steps:
        clock, seconds = perf_counter(), dict[str, float]()
        if _round_is_over(setup, progress):
            seconds = _next_round(setup, progress, folder)
        assert progress.rows is not None
        batch = batch_of(len(progress.rows), settings.batch, settings.seed, progress.round, progress.position)
        rows = progress.rows.take(batch)
        place = f"step {progress.step + 1}, round {progress.round}, rows {_some(batch.tolist())} of it"
        before = perf_counter()
        step = update(setup, rows, progress.step, place, progress.average)
        seconds["update"] = perf_counter() - before
        progress.step, progress.position = progress.step + 1, progress.position + 1
        row: dict[str, Any] = {
            "step": progress.step,
            "round": progress.round,
            "loss": step.loss,
            **_means(setup, rows),
            "gradient_norm": step.norm,
            "learning_rate": settings.rate(progress.step - 1),
            "tokens": rows.tokens(),
            "seconds": perf_counter() - clock,
            **{f"seconds_{name}": value for name, value in seconds.items()},
        }
        found.append(row)
        if setup.accelerator.is_main_process:
            if folder is not None:
                run_folder.append(folder / "metrics.jsonl", [row])
            if on_step is not None:
                on_step(row)
        if folder is not None:
            setup.accelerator.log({k: v for k, v in row.items() if k != "step"}, step=progress.step)
            every = settings.checkpoint_every
            if every and progress.step % every == 0 and progress.step < settings.steps:
                _save(setup, progress, folder)
    return found


def _round_is_over(setup: Setup, progress: Progress) -> bool:
    if progress.rows is None:
        return True
    if not setup.method.samples:
        return False
    epochs = 1 if setup.method.rounds == "online" else setup.settings.epochs
    return progress.position >= epochs * batches_in_pass(len(progress.rows), setup.settings.batch)


def _next_round(setup: Setup, progress: Progress, folder: Path | None) -> dict[str, float]:
    number = progress.round + 1
    try:
        fresh = collect(setup, number, progress.average)
    except ValueError as error:
        raise ValueError(f"round {number}, while it was collected: {error}") from error
    kept = progress.rows if setup.method.keep else None
    if folder is not None and setup.method.asks == "preferences" and setup.accelerator.is_main_process:
        run_folder.write_round(folder, number, fresh.rows)
    progress.rows = fresh.rows if kept is None else joined([kept, fresh.rows])
    progress.round, progress.position = number, 0
    return dict(fresh.seconds)


def _means(setup: Setup, rows: Rows) -> dict[str, float]:
    """Means over the batch of what is known without another forward pass."""
    numbers, found = rows.numbers, {}
    if "kl" in numbers:
        found["kl"] = float(numbers["kl"].mean())
    if "reward" in numbers:
        found["reward"] = float(numbers["reward"].mean())
    if "preference" in numbers and len(set(setup.method.draws[:2])) == 2:
        found["win_rate"] = float(numbers["preference"].mean())
    if setup.method.samples:
        found["length"] = sum(len(y) for y in rows.responses[0]) / len(rows)
    return found


def _some(numbers: Sequence[int], most: int = 8) -> str:
    shown = ", ".join(map(str, numbers[:most]))
    return shown if len(numbers) <= most else f"{shown}, ... ({len(numbers)} in all)"
