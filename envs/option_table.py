"""Recorded comparisons of named options: a CSV or JSONL file in which people said which of two options they prefer.

Columns: `rater`, any context columns, `option_a`, `option_b`, `outcome` (`a`, `b` or `tie`; empty or `NA` =
missing). Comparison k is the k-th row after the header (CSV) or the k-th line (JSONL), counted from 1.
"""

from __future__ import annotations

import csv
import dataclasses
import difflib
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from .comparisons import replace_file
from .kernels import Array, Index

# Outcomes are labels. A_PREFERRED and B_PREFERRED are those of an annotator (1: first, 0: second).
B_PREFERRED, A_PREFERRED, TIE, MISSING = 0, 1, 2, -1
WORDS = {"b": B_PREFERRED, "a": A_PREFERRED, "tie": TIE, "": MISSING, "NA": MISSING}
SPELLED = {B_PREFERRED: "b", A_PREFERRED: "a", TIE: "tie", MISSING: ""}
FIXED = ("rater", "option_a", "option_b", "outcome")

Ties = Literal["half", "drop", "error"]


def nearest(name: str, known: Iterable[str]) -> str:
    """The tail of an error about an unknown name: the known ones, and the one that may have been meant."""
    known = [str(k) for k in known]
    close = difflib.get_close_matches(str(name), known, n=1)
    return f"is not one of {', '.join(known)}" + (f"; did you mean {close[0]!r}?" if close else "")


@dataclass(frozen=True, eq=False)
class OptionTable:
    """n recorded comparisons.

    options   names; a, b (n,) index them
    outcomes  (n,) int8: 1 = a preferred, 0 = b preferred, 2 = tie, -1 = missing
    levels    the names in each other column: `rater` and the context columns, in the file's order
    columns   for each of those, (n,) indices into its levels
    """

    options: tuple[str, ...]
    a: Index
    b: Index
    outcomes: NDArray[np.int8]
    levels: Mapping[str, tuple[str, ...]]
    columns: Mapping[str, Index]

    def __len__(self) -> int:
        return len(self.outcomes)

    @property
    def raters(self) -> tuple[str, ...]:
        return self.levels["rater"]

    def where(self, **chosen: str) -> OptionTable:
        """The comparisons with the given values, as in `table.where(rater="04", time="before")`."""
        keep = np.ones(len(self), dtype=bool)
        for column, value in chosen.items():
            if column not in self.levels:
                raise ValueError(f"column {column!r} {nearest(column, self.levels)}")
            if str(value) not in self.levels[column]:
                raise ValueError(f"{column} {str(value)!r} {nearest(value, self.levels[column])}")
            keep &= self.columns[column] == self.levels[column].index(str(value))
        rows = np.flatnonzero(keep)
        return dataclasses.replace(
            self,
            a=self.a[rows],
            b=self.b[rows],
            outcomes=self.outcomes[rows],
            columns={name: codes[rows] for name, codes in self.columns.items()},
        )

    def wins(self, context: str | None = None, ties: Ties = "error") -> Array:
        """W[c, i, j], how often option i was preferred to option j in context c: (C, K, K).

        context: the column that names contexts, None = all comparisons in one (C = 1).
        ties: "half" counts one as half a win for each, "drop" leaves it out, "error" raises. Missing answers are
        always left out. W[c, i, j] + W[c, j, i] is the number of answers that count.
        """
        if ties not in ("half", "drop", "error"):
            raise ValueError(f"ties is {ties!r}; expected 'half', 'drop' or 'error'")
        if context is not None and context not in self.levels:
            raise ValueError(f"column {context!r} {nearest(context, self.levels)}")
        tied = self.outcomes == TIE
        if ties == "error" and tied.any():
            k = int(np.flatnonzero(tied)[0])
            raise ValueError(
                f"{int(tied.sum())} of {len(self)} comparisons are ties, the first at index {k} "
                f"({self.options[self.a[k]]!r} and {self.options[self.b[k]]!r}); choose ties='half' or ties='drop'"
            )
        n, codes = len(self.options), self.columns.get(context or "", np.zeros(len(self), dtype=np.int64))
        W = np.zeros((1 if context is None else len(self.levels[context]), n, n))
        for label, winner, loser in ((A_PREFERRED, self.a, self.b), (B_PREFERRED, self.b, self.a)):
            rows = self.outcomes == label
            np.add.at(W, (codes[rows], winner[rows], loser[rows]), 1.0)
            if ties == "half":
                np.add.at(W, (codes[tied], winner[tied], loser[tied]), 0.5)
        return W

    def preferences(self, context: str | None = None, ties: Ties = "error") -> Array:
        """P[c, i, j], the recorded frequency of i over j: (C, K, K); 1/2 for i = j, NaN where none is recorded."""
        W = self.wins(context, ties)
        total = W + W.transpose(0, 2, 1)
        P = np.full(W.shape, np.nan)
        np.divide(W, total, out=P, where=total > 0)
        P[:, np.arange(W.shape[1]), np.arange(W.shape[1])] = 0.5
        return P

    # ---- files -------------------------------------------------------------------------------------------------

    def rows(self) -> list[dict[str, str]]:
        contexts = [name for name in self.levels if name != "rater"]
        return [
            {"rater": self.raters[self.columns["rater"][k]]}
            | {name: self.levels[name][self.columns[name][k]] for name in contexts}
            | {
                "option_a": self.options[self.a[k]],
                "option_b": self.options[self.b[k]],
                "outcome": SPELLED[int(self.outcomes[k])],
            }
            for k in range(len(self))
        ]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write .csv or .jsonl; the file appears whole, by rename."""
        suffix, text = Path(path).suffix, io.StringIO(newline="")
        if suffix == ".csv":
            header = ["rater", *(name for name in self.levels if name != "rater"), *FIXED[1:]]
            writer = csv.DictWriter(text, header, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows())
        elif suffix == ".jsonl":
            text.writelines(json.dumps(row) + "\n" for row in self.rows())
        else:
            raise ValueError(f"{path} ends in {suffix!r}; expected .csv or .jsonl")
        replace_file(path, lambda file: file.write(text.getvalue().encode()))


def read_options(path: str | os.PathLike[str], options: Sequence[str] | None = None) -> OptionTable:
    """Read a .csv or .jsonl file. options: the allowed names in their order; None = those found, sorted."""
    suffix, text = Path(path).suffix, Path(path).read_text(encoding="utf-8")
    if suffix == ".jsonl":
        return parse_options(_json_rows(text), options)
    if suffix != ".csv":
        raise ValueError(f"{path} ends in {suffix!r}; expected .csv or .jsonl")
    return parse_options(csv.DictReader(io.StringIO(text), restkey="", restval="<absent>"), options)


def _json_rows(text: str) -> Iterable[dict[str, str]]:
    for k, line in enumerate(text.splitlines(), 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"comparison {k}: not a JSON object: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"comparison {k}: not a JSON object: {line[:60]}")
        yield {key: "" if value is None else str(value) for key, value in row.items()}


def parse_options(rows: Iterable[Mapping[str, str]], options: Sequence[str] | None = None) -> OptionTable:
    """Validate rows, each a mapping of column names to text. An error names the comparison, counted from 1."""
    table = list(rows)
    names = list(table[0]) if table else list(FIXED)
    for column in FIXED:
        if column not in names:
            raise ValueError(f"there is no column {column!r}; the columns are {', '.join(names)}")
    known = (
        sorted({row.get(side, "") for row in table for side in FIXED[1:3]}) if options is None else options
    )
    index = {name: i for i, name in enumerate(known)}
    for k, row in enumerate(table, 1):
        if list(row) != names or "<absent>" in row.values():
            raise ValueError(f"comparison {k}: expected the columns {', '.join(names)}, each with a value")
        for side in ("option_a", "option_b"):
            if row[side] not in index:
                raise ValueError(f"comparison {k}: option {row[side]!r} {nearest(row[side], known)}")
        if row["option_a"] == row["option_b"]:
            raise ValueError(f"comparison {k}: option {row['option_a']!r} is compared with itself")
        if row["outcome"] not in WORDS:
            raise ValueError(f"comparison {k}: outcome must be a, b or tie, got {row['outcome']!r}")
    levels = {name: tuple(sorted({row[name] for row in table})) for name in names if name not in FIXED[1:]}
    return OptionTable(
        options=tuple(known),
        a=np.array([index[row["option_a"]] for row in table], dtype=np.int64),
        b=np.array([index[row["option_b"]] for row in table], dtype=np.int64),
        outcomes=np.array([WORDS[row["outcome"]] for row in table], dtype=np.int8),
        levels=levels,
        columns={name: _codes([row[name] for row in table], level) for name, level in levels.items()},
    )


def _codes(values: Sequence[str], levels: tuple[str, ...]) -> Index:
    index = {level: i for i, level in enumerate(levels)}
    return np.array([index[value] for value in values], dtype=np.int64)
