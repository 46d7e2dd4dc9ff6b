"""Checkpoints: weights and optimiser as safetensors, counters and the round's rows as JSON, never a pickle.

    checkpoints/step_000120/weights.safetensors    the trainable weights, and "average:WEIGHT" where there is an average
                            optimiser.safetensors  its tensors, "WEIGHT:NAME"
                            state.json             counters, and the rows of the round that is under way
    checkpoints/last.json                          names the last good one

A folder is written aside and renamed, then last.json is, so that whatever is killed whenever leaves a whole checkpoint.
Random numbers are functions of the seed and the counters, so that the counters are all there is to keep.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...envs.comparisons import replace_file
from .setup import full, like

if TYPE_CHECKING:
    from torch import Tensor

AVERAGE = "average:"


@dataclass(frozen=True, eq=False)
class Checkpoint:
    weights: Mapping[str, Tensor]
    optimiser: Mapping[str, Tensor]
    state: Mapping[str, Any]


def save_checkpoint(folder: Path, step: int, checkpoint: Checkpoint, keep: int) -> Path:
    """Into folder/step_STEP; all but the last `keep` are deleted afterwards."""
    from safetensors.torch import save_file

    target, aside = folder / f"step_{step:06d}", folder / f".step_{step:06d}.tmp"
    for old in folder.glob(".step_*.tmp"):
        shutil.rmtree(old)
    aside.mkdir(parents=True)
    save_file(_apart(checkpoint.weights), aside / "weights.safetensors")
    save_file(_apart(checkpoint.optimiser), aside / "optimiser.safetensors")
    (aside / "state.json").write_text(json.dumps(checkpoint.state), encoding="utf-8")
    if target.exists():  # of a run that was killed after this rename and before the next one
        shutil.rmtree(target)
    aside.rename(target)
    write_json(folder / "last.json", {"step": step, "folder": target.name})
    for old in _folders(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def last_checkpoint(folder: Path) -> Path | None:
    """The folder that last.json names; None where none was finished yet."""
    pointer = folder / "last.json"
    if not pointer.is_file():
        return None
    name = read_json(pointer).get("folder")
    if not isinstance(name, str) or not re.fullmatch(r"step_\d{6,}", name):
        raise ValueError(f"{pointer} names the folder {name!r}; expected step_NUMBER")
    return folder / name


def load_checkpoint(folder: Path, expected: Mapping[str, Tensor]) -> Checkpoint:
    """ValueError that names the first weight in which the model differs from the checkpoint's.

    expected  the model's trainable weights, and those of the average
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    parts = []
    for name in ("weights", "optimiser"):
        path = folder / f"{name}.safetensors"
        if not path.is_file():
            pickles = sorted(p.name for p in folder.glob("*") if p.suffix in {".bin", ".pt", ".pth", ".pkl"})
            held = f"; it holds {', '.join(pickles)}, and pickles are never loaded" if pickles else ""
            raise FileNotFoundError(f"{folder} has no {path.name}{held}: take another checkpoint")
        try:
            parts.append(load_file(path))
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}): take another checkpoint") from error
    weights, optimiser = parts
    for name in [*expected, *weights]:
        ours, theirs = expected.get(name), weights.get(name)
        if ours is None or theirs is None:
            who, other = ("checkpoint", "model") if ours is None else ("model", "checkpoint")
            raise ValueError(
                f"the {who} has a weight {name!r} and the {other} has none: {folder} is of another architecture"
            )
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            raise ValueError(
                f"{name} is {tuple(ours.shape)} {ours.dtype} in the model and {tuple(theirs.shape)} {theirs.dtype} in "
                f"{folder}, which is of another architecture or number format"
            )
    return Checkpoint(weights, optimiser, read_json(folder / "state.json"))


# ---- the optimiser as tensors --------------------------------------------------------------------------------------


def optimiser_tensors(optimiser: Any, weights: Mapping[str, Any]) -> dict[str, Tensor]:
    """Its state, "WEIGHT:NAME"; numbers become tensors of one element."""
    import torch

    return {
        f"{name}:{key}": full(torch.as_tensor(value))
        for name, p in weights.items()
        for key, value in optimiser.state.get(p, {}).items()
        if value is not None
    }


def restore_optimiser(optimiser: Any, weights: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for number, (name, p) in enumerate(weights.items()):
        own = {
            k.removeprefix(f"{name}:"): like(p, v) if v.shape == p.shape else v
            for k, v in tensors.items()
            if k.startswith(f"{name}:")
        }
        if own:
            state[number] = own
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})


# ---- JSON ------------------------------------------------------------------------------------------------------------


def write_json(path: Path, data: Any) -> None:
    replace_file(path, lambda file: file.write(json.dumps(data, indent=1).encode() + b"\n"))


def read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged ({error}): delete it, or take another folder") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}; expected an object")
    return found


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, each with memory of its own, as safetensors wants them."""
    return {name: x.detach().to("cpu", copy=True).contiguous() for name, x in tensors.items()}


def _folders(folder: Path) -> list[Path]:
    found = [p for p in folder.iterdir() if re.fullmatch(r"step_\d{6,}", p.name)]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step_")))
