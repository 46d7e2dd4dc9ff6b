"""Several judges of one text, and their majority: intransitive preferences on the language-model world.

The texts are the 8 x 1365 answers of the shipped world (`language_world`), and four judges score each of them:

    sentiment    VADER, the world's gold reward: the more positive the better
    real words   the share of English words
    readability  Flesch's reading ease
    length       the number of characters: the longer the better, the bias of judges that is best known

(`judge_scores` says how each score is made, and makes them again.) A judge prefers the text with the higher score and
is torn between equal ones. Each judge alone ranks the texts; together they need not:

    P(y > y' | x) = the share of the judges that prefer y, ties half       `judged_game(prompt)`
    P(y > y' | x) = 1, 1/2 or 0 as this share is above, at or below 1/2    `judged_game(prompt, strict=True)`

and `judged_annotator` answers so about the world's trajectories.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from .annotators import KernelAnnotator
from .budget import Seed
from .kernels import Array, Index
from .language_world import load_language_world
from .option_table import nearest
from .preference_games import PreferenceGame
from .token_mdp import TokenMDP
from .trajectories import Trajectories

FORMAT = 1
SHIPPED = "smollm2_judges.npz"
SCORED = ("real words", "readability", "length")  # in the shipped file; the sentiment is in the world's
JUDGES = ("sentiment", *SCORED)
DIGITS = 6  # scores are rounded to these: equal ones are ties whatever the last bit says


@dataclass(frozen=True, eq=False)
class JudgedGame:
    """The answers to one prompt as a game.

    game    its reference is the world's law of the answers; response i is ...
    leaves  ... leaf leaves[i] of the world, (n,): the answers that the reference can write
    scores  (n, judges) of the answers, in the order of `judges`
    texts   of the answers, opening included; two ways to write one text are two responses
    """

    game: PreferenceGame
    leaves: Index
    scores: Array
    judges: tuple[str, ...]
    texts: tuple[str, ...]


def load_scores(path: str | os.PathLike[str] | None = None) -> dict[str, Array]:
    """The scores of the world's leaves by each judge of `SCORED`, (n_leaves,); None = the shipped file."""
    archive = _open(path)
    table = archive["scores"]
    return {name: table[:, i].copy() for i, name in enumerate(SCORED)}


def provenance(path: str | os.PathLike[str] | None = None) -> dict[str, Any]:
    """What the file says about itself: the judges, the packages' versions, the SHA-256 of the texts, the date."""
    return dict(json.loads(_open(path)["meta"].tobytes().decode()))


def majority(scores: Array, *, strict: bool = False) -> Array:
    """P (n, n) from scores (n, judges): the share of the judges that prefer i to j, ties half.

    strict  1, 1/2 or 0 in its place, as the share is above, at or below 1/2
    """
    scores = np.asarray(scores, dtype=np.float64)
    if scores.ndim != 2 or not scores.size or not np.isfinite(scores).all():
        raise ValueError(
            f"scores has shape {scores.shape}; expected finite numbers (n, judges), a column a judge"
        )
    balance = np.zeros((len(scores),) * 2)  # judges for minus judges against: whole numbers
    for s in scores.T:
        balance += np.sign(s[:, None] - s)
    return 0.5 + 0.5 * (np.sign(balance) if strict else balance / scores.shape[1])


def judged_game(
    prompt: int | str,
    judges: Sequence[str] = JUDGES,
    *,
    strict: bool = False,
    merge: bool = False,
    world: TokenMDP | None = None,
    scores: Mapping[str, Array] | None = None,
) -> JudgedGame:
    """The answers to one prompt of the world, compared by a majority over judges.

    prompt  its number or its text ("The food was")
    judges  some of `JUDGES`, each at most once
    strict  the decision of the majority in place of its share
    merge   answers that no judge tells apart become one response, with their total probability, represented by the
            likeliest: the same preferences between fewer responses
    world, scores  None = the shipped ones (leaves without probability under the reference are left out)
    """
    model = _world() if world is None else world
    judges, columns = _columns(judges, model, scores)
    if isinstance(prompt, str):
        if prompt not in model.prompts:
            raise ValueError(f"prompt {prompt!r} {nearest(prompt, model.prompts)}")
        prompt = model.prompts.index(prompt)
    if not 0 <= prompt < model.roots:
        raise ValueError(f"prompt is {prompt}; the world's are numbered from 0 to {model.roots - 1}")
    probability = model.leaf_probabilities()
    leaves = np.flatnonzero((model.leaf_prompts == prompt) & (probability > 0))
    mu = probability[leaves]
    table = columns[leaves]
    if merge:
        likeliest = np.argsort(-mu, kind="stable")
        _, first, which = np.unique(table[likeliest], axis=0, return_index=True, return_inverse=True)
        mu = np.bincount(which.reshape(-1), weights=mu[likeliest])
        leaves, table = leaves[likeliest[first]], table[likeliest[first]]
    name = f"Judges({model.prompts[prompt]!r}, {', '.join(judges)}{', strict' if strict else ''})"
    game = PreferenceGame(majority(table, strict=strict), mu / mu.sum(), name=name)
    return JudgedGame(game, leaves, table, judges, tuple(model.text(model.trajectories(leaves))))


def judged_annotator(
    seed: Seed,
    judges: Sequence[str] = JUDGES,
    *,
    strict: bool = False,
    world: TokenMDP | None = None,
    scores: Mapping[str, Array] | None = None,
    **options: Any,
) -> KernelAnnotator:
    """The same majority as an annotator of the world's trajectories; both of a pair must answer one prompt.

    options  of `KernelAnnotator`: budget, keep_log
    """
    model = _world() if world is None else world
    _, columns = _columns(judges, model, scores)

    def preference(first: Trajectories, second: Trajectories) -> Array:
        a, b = model.leaves(first), model.leaves(second)
        other = np.flatnonzero(model.leaf_prompts[a] != model.leaf_prompts[b])
        if len(other):
            x, y = (model.prompts[model.leaf_prompts[leaf[other[0]]]] for leaf in (a, b))
            raise ValueError(f"pair {other[0]} compares answers to two prompts, {x!r} and {y!r}")
        balance = np.sign(columns[a] - columns[b]).sum(axis=1)
        return np.asarray(0.5 + 0.5 * (np.sign(balance) if strict else balance / columns.shape[1]))

    return KernelAnnotator(model, seed, preference, **options)


def _columns(
    judges: Sequence[str], world: TokenMDP, scores: Mapping[str, Array] | None
) -> tuple[tuple[str, ...], Array]:
    """The judges, checked, and the scores of all leaves by each, (n_leaves, judges)."""
    known, judges = _scores() if scores is None else scores, tuple(judges)
    if not judges or len(set(judges)) < len(judges):
        raise ValueError(f"judges are {judges}; at least one is needed, and each at most once")
    for name in judges:
        if name not in known:
            raise ValueError(f"judge {name!r} {nearest(name, known)}")
        if len(known[name]) != world.n_leaves:
            raise ValueError(
                f"judge {name!r} has {len(known[name])} scores for {world.n_leaves} leaves of the world"
            )
    return judges, np.column_stack([np.round(known[name], DIGITS) for name in judges])


@cache
def _world() -> TokenMDP:
    return load_language_world()


@cache
def _scores() -> dict[str, Array]:
    gold = _world().gold
    assert gold is not None
    return {"sentiment": gold} | load_scores()


def _open(path: str | os.PathLike[str] | None) -> Any:
    name = SHIPPED if path is None else os.fspath(path)
    source = files(__package__).joinpath("data", SHIPPED) if path is None else Path(path)
    if not source.is_file():
        raise FileNotFoundError(
            f"{name} is not there; `python -m preflab.envs.judge_scores --out FILE` makes such a file"
        )
    try:
        archive = np.load(io.BytesIO(source.read_bytes()), allow_pickle=False)
        version, table = int(archive["format"]), archive["scores"]
    except Exception as error:
        raise ValueError(f"{name} is damaged or has no judges' scores: {error}") from error
    if version > FORMAT:
        raise ValueError(
            f"{name} has format {version}, newer than {FORMAT}, the latest known here: upgrade preflab"
        )
    if table.ndim != 2 or table.shape[1] != len(SCORED):
        raise ValueError(f"{name} has scores of shape {table.shape}; expected (leaves, {len(SCORED)})")
    return archive
