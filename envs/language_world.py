"""The shipped world of a real language model: loaded from one small file, without the model and without pickles."""

from __future__ import annotations

import io
import json
import os
import zipfile
import zlib
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .features import FeatureMap
from .kernels import TreeKernel
from .token_mdp import TokenMDP, ended_mask, prompt_law

FORMAT = 1
SHIPPED = "smollm2_world.npz"


def load_language_world(
    path: str | os.PathLike[str] | None = None, *, reward: Literal["linear", "gold"] = "linear"
) -> TokenMDP:
    """SmolLM2-135M-Instruct answering eight questions in at most five tokens, as a token MDP.

    path    a file of `save_language_world`; None = the shipped one
    reward  "linear": r = <phi, theta>, the projection of the gold reward on readable features (`features.names`);
            "gold": the judge's sentiment of the whole text in [0, 1], paid at its end

    The world keeps the other reward: `world.gold` over leaves, `world.with_gold_reward()`. `world.provenance` says
    which model, judge, questions, features and versions made it, and how well the linear reward fits.
    """
    if reward not in ("linear", "gold"):
        raise ValueError(f"reward is {reward!r}; expected 'linear' or 'gold'")
    with _open(path) as archive:
        if "format" not in archive or "meta" not in archive:
            raise ValueError(f"{_name(path)} is not a language world: it has no 'format' and 'meta'")
        version = int(archive["format"])
        if version > FORMAT:
            raise ValueError(
                f"{_name(path)} has format {version}, newer than {FORMAT}, the latest that this preflab reads: "
                "upgrade preflab"
            )
        try:
            meta = json.loads(archive["meta"].tobytes().decode())
            prompts, k, horizon = meta["prompts"], int(meta["k"]), int(meta["horizon"])
            features = FeatureMap(
                [archive[f"phi_{h}"] for h in range(horizon)], names=tuple(meta["feature_names"])
            )
            theta = archive["theta"]
            kernel = TreeKernel(len(prompts), k, horizon)
            world = TokenMDP(
                kernel=kernel,
                reward=features.rewards(theta),
                initial=prompt_law(len(prompts)),
                action_mask=ended_mask(kernel),
                features=features,
                theta=theta,
                reference=[archive[f"reference_{h}"] for h in range(horizon)],
                vocabulary=tuple(meta["vocabulary"]),
                tokens=[archive[f"tokens_{h}"] for h in range(horizon)],
                prompts=tuple(prompts),
                gold=archive["gold"],
                provenance=meta["provenance"],
                name=meta["name"],
            )
        except (KeyError, json.JSONDecodeError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(f"{_name(path)} is damaged: {error}") from error
    return world if reward == "linear" else world.with_gold_reward()


def save_language_world(world: TokenMDP, path: str | os.PathLike[str]) -> None:
    """Write a world with features, theta and gold to one file; it appears by rename, whole or not at all."""
    if world.features is None or world.theta is None or world.gold is None or world.tokens is None:
        raise ValueError("a language world has features, theta, a gold reward and per-prefix tokens")
    assert world.reference is not None
    meta = {
        "name": world.name,
        "prompts": world.prompts,
        "k": world.branching,
        "horizon": world.horizon,
        "vocabulary": world.vocabulary,
        "feature_names": world.features.names,
        "provenance": world.provenance,
    }
    arrays: dict[str, Any] = {
        "format": np.array(FORMAT),
        "meta": np.frombuffer(json.dumps(meta, ensure_ascii=False).encode(), dtype=np.uint8),
        "theta": world.theta,
        "gold": world.gold,
    }
    for h in range(world.horizon):
        arrays[f"phi_{h}"] = world.features.phi[h]
        arrays[f"reference_{h}"] = world.reference[h]
        arrays[f"tokens_{h}"] = world.tokens[h].astype(np.int32)
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def _name(path: str | os.PathLike[str] | None) -> str:
    return SHIPPED if path is None else os.fspath(path)


def _open(path: str | os.PathLike[str] | None) -> Any:
    source = files(__package__).joinpath("data", SHIPPED) if path is None else Path(path)
    if not source.is_file():
        raise FileNotFoundError(
            f"{_name(path)} is not there; `python -m preflab.envs.language_model --out FILE` builds such a file"
        )
    try:
        archive = np.load(io.BytesIO(source.read_bytes()), allow_pickle=False)
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{_name(path)} is damaged or not an .npz file: {error}") from error
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise ValueError(f"{_name(path)} is a bare array, not a language world")
    return archive
