"""A training run with exact numbers beside it: on a lattice of a few prompts, before, on the way and after.

`train_watched` is `train` and, around it:

    lattice.json          before and after: value, KL, entropy, win rate, exploitability, distance to the optimum, on
                          the lattice of the first prompts; the optimum's numbers; the frontier of KL and value there
    lattice_steps.jsonl   the same numbers every few steps
    lattice/              the lattice itself, layer by layer, so that a run that goes on need not read it again
    evaluation.json       the judge's opinion of drawn completions before and after, with standard errors

The lattice is that of the model at the start, so a run that goes on has to be given the model it began with, as `train`
asks anyway.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...envs.kernels import Array
from ...theory.report import finite, to_json, write_text
from ..lattice import MEMORY, Lattice, LatticePolicy, lattice
from ..policy import Scored, TokenPolicy, Tokens, TransformerPolicy
from .judges import Judge, RewardJudge
from .loop import TrainResult, train
from .rows import uniforms
from .settings import TrainSettings
from .summary import (
    JudgedLattice,
    best_responses,
    frontier,
    judge_lattice,
    likeliest,
    measured,
    policy_numbers,
)

EXACT, STEPS, DRAWN, LAYERS = "lattice.json", "lattice_steps.jsonl", "evaluation.json", "lattice"
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Watch:
    """What is watched.

    k, horizon  of the lattice; prompts: the first so many are on it
    every       steps between two looks at the lattice; 0 = only before and after
    samples     completions drawn for each of these prompts before and after; 0 = none
    batch       prefixes of the lattice read in one call of the model; memory: bytes for its tables
    """

    k: int = 3
    horizon: int = 4
    prompts: int = 8
    every: int = 5
    samples: int = 8
    batch: int = 64
    memory: int = MEMORY

    def __post_init__(self) -> None:
        for name, least in (
            ("k", 1),
            ("horizon", 1),
            ("prompts", 1),
            ("every", 0),
            ("samples", 0),
            ("batch", 1),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"watch: {name} is {getattr(self, name)}; it must be at least {least}")


@dataclass(frozen=True)
class Texts:
    """How token ids are shown: decode, the string of each token, tokens that are no text, the prompts' texts.
    All may be left out, and then ids are shown."""

    decode: Callable[[Tokens], str] | None = None
    pieces: Sequence[str] | None = None
    banned: Sequence[int] = ()
    prompts: Sequence[str] | None = None


def train_watched(
    policy: TransformerPolicy,
    method: str,
    *,
    folder: str | Path,
    judge: Judge | None = None,
    prompts: Sequence[Tokens] | None = None,
    records: Sequence[Any] | None = None,
    settings: TrainSettings,
    parameters: Mapping[str, float] | None = None,
    watch: Watch,
    texts: Texts | None = None,
    resume: bool = False,
    on_step: Callable[[dict[str, Any]], None] | None = None,
    progress: Callable[[str], Progress] = lambda what: lambda done, total: None,
) -> TrainResult:
    """`train`, watched. The arguments are its own; in addition

    judge     also where the method learns from records: then it is asked about the lattice alone
    progress  (what) -> (done, total) -> None, for the lattice and the judge
    """
    from .methods import find_method

    found, path, shown = find_method(method), Path(folder), texts or Texts()
    values = found.checked({} if parameters is None else parameters)
    watched = _watched_prompts(prompts, records, watch.prompts)
    path.mkdir(parents=True, exist_ok=True)
    judged = _judged(policy, watched, watch, shown, judge, method, values, path, progress)
    _begin(path, judged, watch, resume)
    drawn = _drawn(policy, policy, watched, judge, settings, watch, shown)
    _write_drawn(path, "before", drawn)

    def look(row: dict[str, Any]) -> None:
        if watch.every and row["step"] % watch.every == 0 and row["step"] < settings.steps:
            _note(path, row["step"], _now(judged, policy, watch)[0])
        if on_step is not None:
            on_step(row)

    result = train(
        policy,
        found,
        prompts=prompts,
        records=records,
        judge=judge if found.samples else None,
        settings=settings,
        parameters=parameters,
        folder=path,
        resume=resume,
        decode=shown.decode,
        on_step=look,
    )
    after, law = _now(judged, policy, watch)
    _note(path, result.step, after)
    _finish(path, judged, after, law)
    _write_drawn(path, "after", _drawn(policy, result.reference, watched, judge, settings, watch, shown))
    return result


def _watched_prompts(
    prompts: Sequence[Tokens] | None, records: Sequence[Any] | None, most: int
) -> list[tuple[int, ...]]:
    every = [r.prompt for r in records or ()] if prompts is None else prompts
    distinct = dict.fromkeys(tuple(int(t) for t in x) for x in every)
    return list(distinct)[:most]


def _judged(
    policy: TransformerPolicy,
    prompts: Sequence[Tokens],
    watch: Watch,
    texts: Texts,
    judge: Judge | None,
    method: str,
    parameters: Mapping[str, float],
    folder: Path,
    progress: Callable[[str], Progress],
) -> JudgedLattice:
    world: Lattice = lattice(
        policy,
        prompts,
        watch.k,
        watch.horizon,
        banned=texts.banned,
        pieces=texts.pieces,
        texts=None if texts.prompts is None else texts.prompts[: len(prompts)],
        batch=watch.batch,
        memory=watch.memory,
        progress=progress("prefixes of the lattice"),
        save=folder / LAYERS,
        name="the lattice of the run",
    )
    return judge_lattice(world, judge, method, parameters, progress=progress("answers of the judge"))


def _now(judged: JudgedLattice, policy: TransformerPolicy, watch: Watch) -> tuple[dict[str, Any], Array]:
    return measured(judged, LatticePolicy(policy, judged.lattice, watch.batch))


# ---- files -----------------------------------------------------------------------------------------------------------


def _begin(folder: Path, judged: JudgedLattice, watch: Watch, resume: bool) -> None:
    """lattice.json with what is known before the first step, or as it was where a run goes on; the steps cut to it."""
    if resume and (folder / EXACT).is_file():
        return
    world = judged.world
    optimum = None
    if judged.optimum is not None:
        optimum = {"name": judged.optimum.name, **judged.numbers(judged.optimum.law)}
    data = {
        "k": world.branching,
        "horizon": world.horizon,
        "prompts": list(world.prompts),
        "responses": world.n_leaves,
        "judge": judged.judge,
        "watch": asdict(watch),
        "before": policy_numbers(judged),
        "optimum": optimum,
        "frontier": frontier(judged),
        "best": best_responses(judged),
        "likeliest": {"before": likeliest(judged, judged.law())},
    }
    _write(folder / EXACT, data)
    (folder / STEPS).unlink(missing_ok=True)


def _finish(folder: Path, judged: JudgedLattice, after: Mapping[str, Any], law: Array) -> None:
    data = read(folder / EXACT)
    data["after"] = dict(after)
    data["best"] = best_responses(judged, law)
    data["likeliest"]["after"] = likeliest(judged, law)
    _write(folder / EXACT, data)


def _note(folder: Path, step: int, numbers: Mapping[str, Any]) -> None:
    """One line for a step; lines from this step on, which a run left that was stopped later than its checkpoint, go."""
    path = folder / STEPS
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] < step]
    row = {"step": step} | {name: x for name, x in numbers.items() if name != "by_prompt"}
    write_text(path, "".join(line + "\n" for line in [*kept, json.dumps(finite(row))]))


def _write_drawn(folder: Path, when: str, numbers: Mapping[str, Any] | None) -> None:
    if numbers is None:
        return
    path = folder / DRAWN
    data = read(path) if path.is_file() else {}
    if when == "before" and data:
        return
    data[when] = dict(numbers)
    first, second = (data.get(side, {}).get("rewards") for side in ("before", "after"))
    if first is not None and second is not None:
        mean, error = stratified(np.array(second) - np.array(first))
        data["difference"] = {"reward": mean, "error": error}
    _write(path, data)


def read(path: Path) -> dict[str, Any]:
    """A JSON object of a run folder; ValueError where it is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): delete it") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no JSON object: delete it")
    return found


def _write(path: Path, data: Mapping[str, Any]) -> None:
    write_text(path, to_json(finite(data)))


# ---- drawn completions -----------------------------------------------------------------------------------------------


def _drawn(
    policy: TransformerPolicy,
    reference: Scored,
    prompts: Sequence[Tokens],
    judge: Judge | None,
    settings: TrainSettings,
    watch: Watch,
    texts: Texts,
) -> dict[str, Any] | None:
    """Completions of the training's horizon, each from the same uniforms before and after, and what the judge says.

    The first one of each prompt is kept for the reader.
    """
    import torch

    if not watch.samples:
        return None
    many = [x for x in prompts for _ in range(watch.samples)]
    u = torch.as_tensor(uniforms(settings.seed, "watched", 0, (len(many), settings.horizon)))
    samples = policy.sample(many, settings.horizon, uniforms=u)
    shape = len(prompts), watch.samples
    with torch.no_grad():
        log_ref = reference.log_probabilities(many, samples.completions)
    ratio = (samples.log_probabilities.double() - log_ref.double()).cpu().numpy().reshape(shape)
    found: dict[str, Any] = {
        "samples": len(many),
        "horizon": settings.horizon,
        "length": float(np.mean([len(y) for y in samples.completions])),
        "ended": float(samples.ended.double().mean()),
        **_mean("kl", ratio),
    }
    if isinstance(judge, RewardJudge):
        rewards = np.asarray(judge.rewards(many, samples.completions), dtype=np.float64).reshape(shape)
        found |= _mean("reward", rewards) | {"rewards": rewards.tolist()}
    if judge is not None and isinstance(reference, TokenPolicy):
        v = torch.as_tensor(uniforms(settings.seed, "watched reference", 0, u.shape))
        others = reference.sample(many, settings.horizon, uniforms=v).completions
        wins = np.asarray(judge.preferences(many, samples.completions, others), dtype=np.float64)
        found |= _mean("win_rate", wins.reshape(shape))
    first = samples.completions[:: watch.samples]
    return found | {
        "shown": [_shown(x, y, i, texts) for i, (x, y) in enumerate(zip(prompts, first, strict=True))]
    }


def _shown(prompt: Tokens, completion: Tokens, number: int, texts: Texts) -> dict[str, Any]:
    row: dict[str, Any] = {"prompt": [int(t) for t in prompt], "completion": [int(t) for t in completion]}
    if texts.decode is not None:
        row |= {"prompt_text": texts.decode(prompt), "text": texts.decode(completion)}
    if texts.prompts is not None:
        row["prompt_text"] = texts.prompts[number]
    return row


def _mean(name: str, values: Array) -> dict[str, float]:
    mean, error = stratified(values)
    return {name: mean, f"{name}_error": error}


def stratified(values: Array) -> tuple[float, float]:
    """The mean over prompts of the means over samples, (prompts, samples), and its standard error for these prompts."""
    prompts, n = values.shape
    variance = values.var(axis=1, ddof=1).sum() / n if n > 1 else np.nan
    return float(values.mean()), float(np.sqrt(variance) / prompts)
