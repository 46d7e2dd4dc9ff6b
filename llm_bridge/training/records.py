"""Comparisons as records, and their files."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...envs.comparisons import replace_file


@dataclass(frozen=True)
class Record:
    """One comparison: token ids of a prompt and of two completions.

    p_chosen  the probability that `chosen` is preferred (1.0: a plain label)
    ref_logp  log-probabilities of chosen and rejected under the reference policy, where they are known
    query_id  whose question this was; round  the round in which it was asked
    """

    prompt: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]
    p_chosen: float = 1.0
    ref_logp: tuple[float, float] | None = None
    query_id: str | None = None
    round: int = 0


def write_records(path: str | os.PathLike[str], records: Sequence[Record], tokenizer: Any = None) -> None:
    """JSON lines of token ids; the file appears whole, by rename."""
    lines = "".join(json.dumps(vars(record), allow_nan=False) + "\n" for record in records)
    replace_file(path, lambda file: file.write(lines.encode()))


def read_records(path: str | os.PathLike[str], tokenizer: Any = None) -> list[Record]:
    """The records of a file of JSON lines of token ids."""
    found = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        ids = {name: tuple(row[name]) for name in ("prompt", "chosen", "rejected")}
        ref = row.get("ref_logp")
        found.append(Record(**{**row, **ids, "ref_logp": None if ref is None else tuple(ref)}))
    return found
