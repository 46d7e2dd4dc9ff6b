"""People compare sound reproduction: a contextual duelling world of 21,924 recorded answers.

40 trained listeners said which of two of 8 reproduction modes they prefer, on 4 pieces of music, before and after a
session in which they put words to what they hear, repeatedly. The pooled answers have no Condorcet winner, nor have
those of half of the listeners, so no reward explains them. Source and licence: data/SOUND_QUALITY.md.
"""

from __future__ import annotations

import io
from csv import DictReader
from functools import cache
from importlib.resources import files
from typing import Literal

import numpy as np

from .budget import Seed
from .features import FeatureMap
from .kernels import Array
from .mdp import FiniteMDP
from .option_table import OptionTable, parse_options
from .recorded import RecordedAnnotator

MODES = ("Mono", "PhantomMono", "Stereo", "WideStereo", "Matrix", "Upmix1", "Upmix2", "Original")
PIECES = ("Beethoven", "Rachmaninov", "SteelyDan", "Sting")
CONTEXT = "progmat"


@cache
def sound_quality() -> OptionTable:
    """The recorded answers: columns `rater`, `time`, `progmat` (piece of music), `repet`; options are `MODES`."""
    text = files(__package__).joinpath("data", "sound_quality.csv").read_text(encoding="utf-8")
    return parse_options(DictReader(io.StringIO(text)), MODES)


def borda(preferences: Array) -> Array:
    """The Borda score, mean over the other options j of P(i over j): (..., K, K) -> (..., K), in [0, 1]."""
    n = preferences.shape[-1]
    return (preferences.sum(axis=-1) - np.diagonal(preferences, axis1=-2, axis2=-1)) / (n - 1)


def condorcet_winner(preferences: Array) -> int | None:
    """The option that beats every other with probability above 1/2, None if there is none. preferences: (K, K)."""
    beats = preferences > 0.5
    np.fill_diagonal(beats, True)
    winners = np.flatnonzero(beats.all(axis=1))
    return int(winners[0]) if len(winners) else None


def sound_quality_world(initial: Literal["uniform", "empirical"] = "uniform") -> FiniteMDP:
    """One step: state = a piece of music (`PIECES`), action = a reproduction mode (`MODES`).

    initial: the law of the pieces, uniform or as often as they were asked about.
    The world has no reward of its own. `reward` is the population's Borda score in each context, for reports only:
    answers come from `sound_quality_annotator`, and no reward reproduces them. Features are one-hot (d = 32).
    """
    if initial not in ("uniform", "empirical"):
        raise ValueError(f"initial is {initial!r}; expected 'uniform' or 'empirical'")
    table, n, k = sound_quality(), len(PIECES), len(MODES)
    reward = borda(table.preferences(CONTEXT))
    asked = np.bincount(table.columns[CONTEXT], minlength=n)
    names = tuple(f"{piece}:{mode}" for piece in PIECES for mode in MODES)
    return FiniteMDP.dense(
        [np.ones((n, k, 1))],
        [reward],
        np.full(n, 1 / n) if initial == "uniform" else asked / asked.sum(),
        features=FeatureMap([np.eye(n * k).reshape(n, k, n * k)], names=names),
        theta=reward.ravel(),
        name="SoundQuality",
    )


def sound_quality_annotator(
    seed: Seed,
    *,
    listener: str | None = None,
    time: str | None = None,
    model: FiniteMDP | None = None,
    budget: int | None = None,
    keep_log: bool = True,
) -> RecordedAnnotator:
    """Draws recorded answers of the population, or of one listener ("04"), or of one time ("before", "after")."""
    chosen = {name: value for name, value in (("rater", listener), ("time", time)) if value is not None}
    return RecordedAnnotator(
        sound_quality_world() if model is None else model,
        seed,
        sound_quality().where(**chosen),
        context=CONTEXT,
        budget=budget,
        keep_log=keep_log,
    )
