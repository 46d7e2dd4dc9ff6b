"""One run of one algorithm in one world, that can be killed and continued: `preflab run`.

A folder holds run.json (what was asked), run.npz (the algorithm's own checkpoint, saved every few seconds),
episodes.csv (one row an episode) and regret.svg. A run of N episodes that was stopped anywhere and started again with
the same folder ends with the same bits as one that was not.
"""

from __future__ import annotations

import csv
import dataclasses
import inspect
import io
import json
import os
import time
import types
import typing
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..algorithms.spec import AlgorithmSpec, Run
from .registry import UnknownName
from .report import finite, to_json, write_text

ASKED, CHECKPOINT, TABLE, FIGURE = "run.json", "run.npz", "episodes.csv", "regret.svg"
SAVE_SECONDS = 5.0
CHUNK = 50  # episodes between two looks at the clock


def parse_pairs(pairs: Sequence[str]) -> dict[str, Any]:
    """["eps=0.1", "transitions=known"] -> values: JSON where it is JSON (numbers, true, null), else the text."""
    values: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key:
            raise ValueError(f"--set {pair!r} is not of the form key=value")
        if key in values:
            raise ValueError(f"--set {key} is given twice")
        try:
            values[key] = json.loads(text)
        except json.JSONDecodeError:
            values[key] = text
    return values


def make_settings(spec: AlgorithmSpec, model: Any, given: Mapping[str, Any]) -> Any:
    """The algorithm's settings dataclass from a preset (the spec's first, or given["preset"]) and changed fields."""
    changes = dict(given)
    factory: Callable[..., Any] = spec.settings
    if spec.presets:
        preset = str(changes.pop("preset", next(iter(spec.presets))))
        if preset not in spec.presets:
            raise UnknownName("preset", preset, spec.presets, f"{spec.name} has: {', '.join(spec.presets)}.")
        factory = spec.presets[preset]
    hints, required = _keywords(factory, spec, skip_model=bool(spec.presets))
    for key, value in changes.items():
        if key not in hints:
            known = [*hints, *(["preset"] if spec.presets else [])]
            raise UnknownName("setting", key, known, f"{spec.name} has: {', '.join(known)}.")
        if not _fits(value, hints[key]):
            raise ValueError(f"setting {key} is {value!r}; expected {_words(hints[key])}")
    if missing := [name for name in required if name not in changes]:
        raise ValueError(f"{spec.name} needs {', '.join(f'--set {name}=VALUE' for name in missing)}")
    return factory(model, **changes) if spec.presets else factory(**changes)


def _keywords(factory: Any, spec: AlgorithmSpec, skip_model: bool) -> tuple[dict[str, Any], list[str]]:
    """(name -> type hint) of what can be set from a command line, and the names without a default."""
    parameters = list(inspect.signature(factory).parameters.values())[int(skip_model) :]
    hints = typing.get_type_hints(factory if inspect.isroutine(factory) else factory.__init__)
    found = {p.name: hints.get(p.name, str) for p in parameters if p.kind is not p.VAR_KEYWORD}
    required = [p.name for p in parameters if p.name in found and p.default is p.empty]
    if len(found) < len(parameters):  # **changes: any field
        fields = typing.get_type_hints(spec.settings)
        found = {name: fields[name] for name in spec.setting_names} | found
    return {name: hint for name, hint in found.items() if _is_plain(hint)}, required


def _options(hint: Any) -> tuple[Any, ...]:
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if union else (hint,)


def _is_plain(hint: Any) -> bool:
    plain = (int, float, str, bool, type(None))
    return all(part in plain or typing.get_origin(part) is typing.Literal for part in _options(hint))


def _fits(value: Any, hint: Any) -> bool:
    for part in _options(hint):
        if typing.get_origin(part) is typing.Literal:
            if value in typing.get_args(part):
                return True
        elif type(value) is part or (part is float and type(value) is int):
            return True
    return False


def _words(hint: Any) -> str:
    names = {int: "an integer", float: "a number", str: "a text", bool: "true or false", type(None): "null"}
    words = []
    for part in _options(hint):
        literal = typing.get_origin(part) is typing.Literal
        words += [repr(value) for value in typing.get_args(part)] if literal else [names[part]]
    return " or ".join(words)


def make_model(world: str, options: Mapping[str, Any]) -> Any:
    """The exact model behind a registered world."""
    import gymnasium

    try:
        env = gymnasium.make(world, disable_env_checker=True, **options)
    except (TypeError, AssertionError) as error:
        raise ValueError(f"{world} cannot be made with {dict(options)}: {error}") from None
    return env.unwrapped.model  # type: ignore[attr-defined]


@dataclasses.dataclass(frozen=True)
class Asked:
    """What identifies a run; kept in run.json so that a folder continues only the run that it holds."""

    algorithm: str
    world: str
    world_options: dict[str, Any]
    settings: dict[str, Any]
    seed: int

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """In words, where a run.json differs from this."""
        mine = _flat(json.loads(json.dumps(dataclasses.asdict(self))))
        theirs = _flat(other)
        keys = sorted(mine.keys() | theirs.keys())
        return [
            f"{k}: {theirs.get(k)} there, {mine.get(k)} asked" for k in keys if mine.get(k) != theirs.get(k)
        ]


def _flat(data: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        flat |= {f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value}
    return flat


def start_run(
    spec: AlgorithmSpec, world: str, given: Mapping[str, Any], seed: int, folder: Path | None
) -> tuple[Asked, Run, int]:
    """(what was asked, the run, episodes that it already has): a new one, or the folder's own continued.

    given   settings, and options of the world under "env.NAME"
    The learner and its world draw from `seed`; the annotator (Bradley-Terry on the model's reward) from a stream of its
    own, derived from it.
    """
    from ..envs.annotators import BradleyTerry

    options = {key.removeprefix("env."): value for key, value in given.items() if key.startswith("env.")}
    model = make_model(world, options)
    settings = make_settings(spec, model, {k: v for k, v in given.items() if not k.startswith("env.")})
    annotator = BradleyTerry(model, np.random.SeedSequence([seed, 1]))
    asked = Asked(spec.name, world, options, dataclasses.asdict(settings), seed)
    if folder is None:
        return asked, spec.start(model, annotator, settings, seed), 0
    if (folder / ASKED).exists():
        try:
            held = json.loads((folder / ASKED).read_text(encoding="utf-8"))["asked"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{folder / ASKED} is not readable; choose another folder with --out") from None
        if differences := asked.differences(held):
            raise ValueError(
                f"{folder} holds another run ({'; '.join(differences)}); choose another folder with --out"
            )
        if (folder / CHECKPOINT).exists():
            try:
                run = spec.load(folder / CHECKPOINT, model, annotator)
            except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
                raise ValueError(
                    f"{folder / CHECKPOINT} cannot be continued ({error}); move it away, or choose another --out"
                ) from None
            return asked, run, episodes_of(run)
    write_text(folder / ASKED, to_json({"asked": dataclasses.asdict(asked)}))
    return asked, spec.start(model, annotator, settings, seed), 0


def columns(run: Run) -> dict[str, np.ndarray]:
    """The records by name; a structured array and a mapping of arrays look alike from here on."""
    records: Any = run.records
    names = records.dtype.names if isinstance(records, np.ndarray) else records.keys()
    return {name: np.asarray(records[name]) for name in names}


def episodes_of(run: Run) -> int:
    return len(next(iter(columns(run).values())))


def advance(
    run: Run,
    episodes: int,
    folder: Path | None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Bring the run to `episodes` in all, with a checkpoint every few seconds and at the end.

    Killed or interrupted in between, the folder keeps the last checkpoint: a few seconds of work are lost.
    """
    done = episodes_of(run)
    saved_at, saved = time.monotonic(), done
    progress(done, episodes)
    while done < episodes:
        run.advance(min(CHUNK, episodes - done))
        done = min(done + CHUNK, episodes)
        if folder is not None and time.monotonic() - saved_at >= SAVE_SECONDS:
            run.save(folder / CHECKPOINT)
            saved_at, saved = time.monotonic(), done
        progress(done, episodes)
    if folder is not None and saved < done:
        run.save(folder / CHECKPOINT)


def summarise(run: Run) -> dict[str, Any]:
    """Totals of a run: episodes, exact cumulative regret, queries, and regret an episode at the end."""
    data = columns(run)
    regret = data["regret"].astype(np.float64)
    tail = regret[-max(1, len(regret) // 10) :]
    numbers: dict[str, Any] = {"episodes": len(regret), "regret": float(regret.sum())}
    if "queried" in data:
        numbers["queries"] = int(data["queried"].sum())
    return numbers | {"regret_per_episode_at_the_end": float(tail.mean()) if len(tail) else float("nan")}


def write_run(asked: Asked, run: Run, folder: Path) -> dict[str, Any]:
    """run.json with the totals, episodes.csv and regret.svg. Returns the totals."""
    totals = summarise(run)
    write_text(folder / ASKED, to_json(finite({"asked": dataclasses.asdict(asked), "totals": totals})))
    data = columns(run)
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["episode", *data])
    rows.writerows(zip(range(1, totals["episodes"] + 1), *(x.tolist() for x in data.values()), strict=True))
    write_text(folder / TABLE, text.getvalue())
    _draw(asked, data, folder / FIGURE)
    return totals


def _draw(asked: Asked, data: Mapping[str, np.ndarray], path: Path) -> None:
    import matplotlib

    from . import figures

    episodes = np.arange(1, len(data["regret"]) + 1)
    shown = np.unique(np.geomspace(1, max(len(episodes), 1), 400).astype(int))[: len(episodes)] - 1
    with matplotlib.rc_context(figures.STYLE):
        figure, axes = figures.canvas()
        axes.plot(episodes[shown], np.cumsum(data["regret"])[shown], color=figures.COLOURS[0], label="regret")
        if "queried" in data:
            queries = np.cumsum(data["queried"].astype(np.int64))[shown]
            axes.plot(episodes[shown], queries, "--", color=figures.COLOURS[1], label="queries")
        axes.set(xlabel="episodes", ylabel="cumulative", title=f"{asked.algorithm} in {asked.world}")
        axes.legend(loc="best")
        temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            figure.savefig(temporary, format="svg", metadata={"Date": None})
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
