"""Rows: what a round has collected. Prompts, one or more responses to each, and the numbers that go with them."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ...envs.kernels import Array, Index
from ..policy import Tokens

if TYPE_CHECKING:
    from .records import Record


@dataclass(frozen=True, eq=False)
class Rows:
    """n rows of R responses.

    prompts    n token sequences
    responses  R lists of n token sequences
    numbers    by name, (n,) or (n, R') float64:
               wins       that the first response beats the second, or its label
               reward     of the first response; advantage, less its baseline
               reference, previous   log-probabilities of the scored responses; absent where a step computes them
               kl         log pi_t/ref of the first response, where pi_t drew it
    """

    prompts: Sequence[Tokens]
    responses: Sequence[Sequence[Tokens]]
    numbers: Mapping[str, Array]

    def __len__(self) -> int:
        return len(self.prompts)

    def take(self, index: Index) -> Rows:
        at = [int(i) for i in index]
        return Rows(
            [self.prompts[i] for i in at],
            [[column[i] for i in at] for column in self.responses],
            {name: values[index] for name, values in self.numbers.items()},
        )

    def tokens(self) -> int:
        """Of all responses together."""
        return sum(len(y) for column in self.responses for y in column)

    def as_json(self) -> dict[str, Any]:
        """Lists and numbers; floats are written so that they read back bit for bit."""
        return {
            "prompts": [_ids(x) for x in self.prompts],
            "responses": [[_ids(y) for y in column] for column in self.responses],
            "numbers": {name: values.tolist() for name, values in self.numbers.items()},
        }

    @classmethod
    def of_json(cls, data: Mapping[str, Any]) -> Rows:
        numbers = {name: np.asarray(values, dtype=np.float64) for name, values in data["numbers"].items()}
        return cls(data["prompts"], data["responses"], numbers)


def joined(parts: Iterable[Rows]) -> Rows:
    """One after the other; all have the same columns."""
    parts = [part for part in parts if len(part)]
    return Rows(
        [x for part in parts for x in part.prompts],
        [[y for part in parts for y in part.responses[k]] for k in range(len(parts[0].responses))],
        {name: np.concatenate([part.numbers[name] for part in parts]) for name in parts[0].numbers},
    )


def rows_of_records(records: Sequence[Record]) -> Rows:
    """Comparisons as rows: the first response is the chosen one, which wins with probability p_chosen."""
    if not len(records):
        raise ValueError("there are no records to train on")
    numbers = {"wins": np.array([r.p_chosen for r in records], dtype=np.float64)}
    bad = ~((numbers["wins"] >= 0) & (numbers["wins"] <= 1))
    if bad.any():
        i = int(bad.argmax())
        raise ValueError(f"record {i} has p_chosen = {numbers['wins'][i]}; a probability lies in [0, 1]")
    known = [r.ref_logp for r in records if r.ref_logp is not None]
    if known and len(known) < len(records):
        i = next(i for i, r in enumerate(records) if r.ref_logp is None)
        raise ValueError(f"record {i} has no ref_logp and others have: give it to all records, or to none")
    if known:
        numbers["reference"] = np.array(known, dtype=np.float64)
        if not np.isfinite(numbers["reference"]).all():
            i = int(np.argwhere(~np.isfinite(numbers["reference"]))[0, 0])
            raise ValueError(f"record {i} has ref_logp = {records[i].ref_logp}; both must be finite")
    return Rows(
        [r.prompt for r in records], [[r.chosen for r in records], [r.rejected for r in records]], numbers
    )


# ---- randomness and order ------------------------------------------------------------------------------------------


def uniforms(seed: int, what: str, number: int, shape: tuple[int, ...]) -> Array:
    """Uniforms in [0, 1) that depend on these arguments alone, so that a run is resumed by its counters."""
    words = [seed, zlib.crc32(what.encode()), number]
    return np.random.default_rng(np.random.SeedSequence(words)).random(shape)


def order(seed: int, what: str, number: int, n: int) -> Index:
    """A permutation of 0, ..., n-1 that depends on these arguments alone."""
    words = [seed, zlib.crc32(what.encode()), number]
    return np.random.default_rng(np.random.SeedSequence(words)).permutation(n)


def shuffled(seed: int, what: str, n: int, first: int, count: int) -> Index:
    """Entries first, ..., first + count - 1 of the endless sequence of permutations of n."""
    epochs = range(first // n, (first + count - 1) // n + 1)
    line = np.concatenate([order(seed, what, e, n) for e in epochs])
    start = first - epochs.start * n
    return line[start : start + count]


def batch_of(n: int, batch: int, seed: int, round_number: int, position: int) -> Index:
    """The rows of batch number `position` of a round: passes over n rows, each in an order of its own.

    The last batch of a pass holds what is left, which may be fewer rows.
    """
    in_pass = batches_in_pass(n, batch)
    number, within = divmod(position, in_pass)
    shuffle = order(seed, f"batches of round {round_number}", number, n)
    return shuffle[within * batch : (within + 1) * batch]


def batches_in_pass(n: int, batch: int) -> int:
    return -(-n // batch)


def _ids(tokens: Tokens) -> list[int]:
    return [int(t) for t in tokens]
