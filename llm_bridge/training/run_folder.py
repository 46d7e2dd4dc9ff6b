"""The files of a run that others read: run.json, metrics.jsonl, samples.jsonl, records/round_NUMBER.jsonl.

Only the main process writes. Lines are appended as they come; a run that goes on from a checkpoint first cuts off what
came after it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...envs.comparisons import replace_file
from ..policy import Tokens
from .checkpoints import read_json, write_json
from .rows import Rows
from .setup import Setup, class_name, full

# What must be equal where a run goes on; settings are compared one by one.
_SAME = ("method", "parameters", "model", "judge", "weights", "start", "data")


def about(setup: Setup, rows: Rows | None) -> dict[str, Any]:
    """run.json; rows are the records of an offline method."""
    from ... import __version__

    data = _plain(setup.prompts) if rows is None else rows.as_json()
    every = list(setup.policy.model.parameters())
    return {
        "preflab": __version__,
        "method": setup.method.name,
        "parameters": dict(setup.parameters),
        "settings": setup.settings.as_dict(),
        "model": class_name(setup.policy.model),
        "judge": None if setup.judge is None else getattr(setup.judge, "name", type(setup.judge).__name__),
        "device": str(setup.accelerator.device),
        "processes": setup.accelerator.num_processes,
        "weights": {
            "trainable": sum(p.numel() for p in setup.weights.values()),
            "total": sum(p.numel() for p in every),
        },
        "start": fingerprint(setup.weights),
        "data": {
            "rows": len(setup.prompts) if rows is None else len(rows),
            "sha256": hashlib.sha256(json.dumps(data).encode()).hexdigest(),
        },
    }


def fingerprint(weights: Mapping[str, Any]) -> str:
    """sha256 of the bytes of the weights, name by name."""
    import torch

    digest = hashlib.sha256()
    for name, p in weights.items():
        digest.update(f"{name} {tuple(p.shape)} {p.dtype}".encode())
        digest.update(full(p.detach()).cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_same_run(folder: Path, now: Mapping[str, Any], setup: Setup) -> None:
    """ValueError that names the first thing in which the run of the folder is another one."""
    earlier = read_json(folder / "run.json")
    for name in _SAME:
        if earlier.get(name) != now[name]:
            why = {
                "start": "the model's weights are not those that the run began with: load the same model again",
                "data": "the prompts or records are not those that the run began with",
            }.get(
                name,
                f"the run in this folder has {name} = {earlier.get(name)!r}, and now it is {now[name]!r}",
            )
            raise ValueError(f"{folder}: {why}; or take another folder")
    setup.settings.check_continues(earlier["settings"])


def begin(folder: Path, now: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "run.json", now)
    for name in ("metrics.jsonl", "samples.jsonl"):
        replace_file(folder / name, lambda file: None)


def cut(path: Path, keep: Callable[[Mapping[str, Any]], bool]) -> None:
    """Leave the lines of which `keep` is true; half a line, at the end of a file, goes too."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    whole = [line for line in lines if line.endswith("\n")]
    kept = "".join(line for line in whole if keep(json.loads(line)))
    replace_file(path, lambda file: file.write(kept.encode()))


def append(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))


def write_samples(
    folder: Path,
    setup: Setup,
    step: int,
    prompts: Sequence[Tokens],
    completions: Sequence[Tokens],
    rewards: Sequence[float] | None,
    decode: Callable[[Tokens], str] | None,
) -> None:
    rows = []
    for i, (x, y) in enumerate(zip(prompts, completions, strict=True)):
        row: dict[str, Any] = {"step": step, "prompt": _plain(x), "completion": _plain(y)}
        if decode is not None:
            row |= {"prompt_text": decode(x), "text": decode(y)}
        if rewards is not None:
            row["reward"] = float(rewards[i])
        rows.append(row)
    append(folder / "samples.jsonl", rows)


def write_round(folder: Path, number: int, rows: Rows) -> None:
    """The comparisons of a round as records: the response that won, or is likelier to, is the chosen one."""
    from .records import Record, write_records

    reference, records = rows.numbers.get("reference"), []
    both = reference is not None and reference.shape[1] >= 2
    for i, p in enumerate(rows.numbers["wins"]):
        first = p >= 0.5
        pair = [tuple(int(t) for t in rows.responses[k][i]) for k in (0, 1)]
        ref = None if not both or reference is None else [float(v) for v in reference[i, :2]]
        chosen, rejected = pair if first else pair[::-1]
        records.append(
            Record(
                prompt=tuple(int(t) for t in rows.prompts[i]),
                chosen=chosen,
                rejected=rejected,
                p_chosen=float(p if first else 1 - p),
                ref_logp=None if ref is None else ((ref[0], ref[1]) if first else (ref[1], ref[0])),
                round=number,
            )
        )
    (folder / "records").mkdir(exist_ok=True)
    write_records(folder / "records" / f"round_{number:04d}.jsonl", records)


def _plain(x: Any) -> Any:
    """Nested sequences of whole numbers as lists."""
    return [_plain(v) for v in x] if isinstance(x, list | tuple | np.ndarray) else int(x)
