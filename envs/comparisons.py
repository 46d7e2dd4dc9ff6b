"""Logs of answered comparisons: what was shown, what was answered, by whom; saved without pickles.

A batch of n comparisons is one integer array, `pairs` (n, 2, 2, H):

    pairs[i, 0] the first trajectory of comparison i, pairs[i, 1] the second
    pairs[i, j, 0] its H states, pairs[i, j, 1] its H actions

An outcome is 1 where the first was preferred and 0 where the second was: a label, never a signed number.
"""

from __future__ import annotations

import base64
import io
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from .kernels import Index
from .trajectories import Trajectories

FORMAT = 1
NO_USER = -1


def pack(first: Trajectories, second: Trajectories) -> Index:
    """The comparisons of first[i] with second[i] as one array (n, 2, 2, H)."""
    n, horizon = first.states.shape
    if second.states.shape != (n, horizon):
        raise ValueError(
            f"first holds {n} trajectories of {horizon} steps but second {len(second.states)} of "
            f"{second.states.shape[1]}; comparisons pair them one by one"
        )
    flat = np.concatenate((first.states, first.actions, second.states, second.actions), axis=1)
    return flat.reshape(n, 2, 2, horizon)


def unpack(pairs: Index) -> tuple[Trajectories, Trajectories]:
    """The inverse of `pack`."""
    return Trajectories(pairs[:, 0, 0], pairs[:, 0, 1]), Trajectories(pairs[:, 1, 0], pairs[:, 1, 1])


def replace_file(path: str | os.PathLike[str], write: Callable[[IO[bytes]], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it: no reader ever sees half a file."""
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def check_outcomes(outcomes: NDArray[np.int8], what: str = "comparison") -> None:
    """Outcomes are labels 0 and 1; a signed coding (-1, +1) is refused, not reinterpreted."""
    bad = np.flatnonzero((outcomes != 0) & (outcomes != 1))
    if len(bad):
        raise ValueError(
            f"{what} {bad[0]}: outcome must be 1 (first preferred) or 0 (second), got {outcomes[bad[0]]}"
        )


class ComparisonLog:
    """A growing log. Appending one comparison costs O(H), amortised.

    pairs (n, 2, 2, H) int32, outcomes (n,) int8 in {0, 1}, users (n,) int32 (-1 where no user is known).
    """

    def __init__(self, horizon: int):
        if horizon < 1:
            raise ValueError(f"horizon is {horizon}; it must be at least 1")
        self.horizon = horizon
        self._n = 0
        self._pairs = np.empty((16, 2, 2, horizon), dtype=np.int32)
        self._outcomes = np.empty(16, dtype=np.int8)
        self._users = np.empty(16, dtype=np.int32)

    def __len__(self) -> int:
        return self._n

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ComparisonLog) and all(
            np.array_equal(mine, theirs) for mine, theirs in zip(self._arrays(), other._arrays(), strict=True)
        )

    __hash__ = None  # type: ignore[assignment]

    def _arrays(self) -> Iterator[np.ndarray]:
        return iter((self.pairs, self.outcomes, self.users))

    @property
    def pairs(self) -> NDArray[np.int32]:
        return self._pairs[: self._n]

    @property
    def outcomes(self) -> NDArray[np.int8]:
        return self._outcomes[: self._n]

    @property
    def users(self) -> NDArray[np.int32]:
        return self._users[: self._n]

    @property
    def first(self) -> Trajectories:
        return unpack(self.pairs)[0]

    @property
    def second(self) -> Trajectories:
        return unpack(self.pairs)[1]

    def append(self, pairs: Index, outcomes: NDArray[np.int8], users: Index | int = NO_USER) -> None:
        end = self._n + len(pairs)
        if end > len(self._outcomes):
            self._grow(end)
        self._pairs[self._n : end] = pairs
        self._outcomes[self._n : end] = outcomes
        self._users[self._n : end] = users
        self._n = end

    def _grow(self, needed: int) -> None:
        capacity = max(needed, 2 * len(self._outcomes))
        for name in ("_pairs", "_outcomes", "_users"):
            old = getattr(self, name)
            new = np.empty((capacity, *old.shape[1:]), dtype=old.dtype)
            new[: self._n] = old[: self._n]
            setattr(self, name, new)

    # ---- files -------------------------------------------------------------------------------------------------

    def _write(self, file: IO[bytes]) -> None:
        np.savez_compressed(file, format=FORMAT, pairs=self.pairs, outcomes=self.outcomes, users=self.users)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write an .npz (no pickle); the file appears whole, by rename, or not at all."""
        replace_file(path, self._write)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ComparisonLog:
        with open(path, "rb") as file:
            return cls._read(file, str(path))

    def to_text(self) -> str:
        """The file's bytes as base64, to travel inside JSON."""
        buffer = io.BytesIO()
        self._write(buffer)
        return base64.b64encode(buffer.getvalue()).decode("ascii")

    @classmethod
    def from_text(cls, text: str) -> ComparisonLog:
        return cls._read(io.BytesIO(base64.b64decode(text)), "the text")

    @classmethod
    def _read(cls, file: IO[bytes], where: str) -> ComparisonLog:
        try:
            with np.load(file, allow_pickle=False) as data:
                version = int(data["format"])
                if version > FORMAT:
                    raise ValueError(f"it has format {version}; this version of preflab reads up to {FORMAT}")
                pairs, outcomes, users = data["pairs"], data["outcomes"], data["users"]
        except (KeyError, ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(f"{where} is not a readable comparison log: {error}") from error
        n = len(outcomes)
        if pairs.ndim != 4 or pairs.shape[:3] != (n, 2, 2) or users.shape != (n,) or outcomes.ndim != 1:
            raise ValueError(
                f"{where} holds pairs {pairs.shape}, outcomes {outcomes.shape} and users {users.shape}; "
                "expected (n, 2, 2, H), (n,) and (n,)"
            )
        check_outcomes(outcomes, f"{where}: comparison")
        log = cls(pairs.shape[3])
        log.append(pairs, outcomes, users)
        return log
