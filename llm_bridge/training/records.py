"""Comparisons as records, and the files that hold them.

`read_records` takes TRL's preference formats, and token ids as they are:

    {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}                       texts
    {"chosen": "The sky is blue.", "rejected": "The sky is green."}                           their prompt is shared
    {"prompt": [{"role": "user", "content": "..."}], "chosen": [{...}], "rejected": [{...}]}  conversations, likewise
    {"prompt": [504, 6376, 314], "chosen": [4461, 30, 2], "rejected": [5013, 30, 2]}          token ids

in files .jsonl, .json (one list) and .parquet, in a `datasets.Dataset`, and in a folder saved by it. Four more columns
may stand beside them: p_chosen, ref_logp, query_id, round (`Record`). `read_prompts` reads the column prompt alone, and
also .txt, a prompt a line.

Whatever is wrong is named with the file, the line or row, the column, and the remedy. A column that is not read is
named in a warning. How texts become ids, and what happens at the boundary between prompt and completion: `chat`.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from .chat import Boundary, Encoder, Ids
from .row_files import Row, Source, listed, read_rows, short, source_name, write_rows

Equal = Literal["refuse", "keep", "drop"]
TEXTS = ("prompt", "chosen", "rejected")
COLUMNS = (*TEXTS, "p_chosen", "ref_logp", "query_id", "round")


@dataclass(frozen=True)
class Record:
    """One comparison: token ids of a prompt and of two completions.

    p_chosen  the probability that `chosen` is preferred (1.0: a plain label)
    ref_logp  log-probabilities of chosen and rejected under the reference policy, where they are known
    query_id  whose question this was; round  the round in which it was asked
    """

    prompt: Ids
    chosen: Ids
    rejected: Ids
    p_chosen: float = 1.0
    ref_logp: tuple[float, float] | None = None
    query_id: str | None = None
    round: int = 0


# ---- reading -------------------------------------------------------------------------------------------------------


def read_records(
    source: Source,
    tokenizer: Any = None,
    *,
    end_ids: Sequence[int] | None = None,
    append_end: bool = True,
    boundary: Boundary = "refuse",
    context: int | None = None,
    equal: Equal = "refuse",
    ignore: Sequence[str] = (),
) -> list[Record]:
    """The comparisons of a file, a `datasets.Dataset`, or a folder saved by it.

    tokenizer  needed where the source holds texts; end_ids, append_end, boundary: of `chat.Encoder`. Token ids are
               taken as they are
    context    the most tokens that prompt and completion may have together
    equal      what to do where chosen and rejected are one response, and p_chosen does not say that this is a tie:
               "refuse", "keep" or "drop" the row
    ignore     columns that need not be warned of
    """
    if equal not in get_args(Equal):
        raise ValueError(f"equal is {equal!r}; it is one of {', '.join(get_args(Equal))}")
    encoder = None if tokenizer is None else Encoder(tokenizer, end_ids, append_end, boundary)
    found, seen = [], set(COLUMNS)
    for where, row in read_rows(source):
        seen |= row.keys()
        record = _record(where, row, encoder)
        _check_lengths(where, record, context)
        if record.chosen == record.rejected and record.p_chosen != 0.5:
            if equal == "refuse":
                raise ValueError(
                    f"{where}: chosen and rejected are the same response, and p_chosen is {record.p_chosen}: remove "
                    "the row, say p_chosen = 0.5, or take equal='keep' or 'drop'"
                )
            if equal == "drop":
                continue
        found.append(record)
    _warn_of(source, seen.difference(COLUMNS, ignore))
    if not found:
        raise ValueError(f"{source_name(source)}: no comparison is left, all had equal responses")
    return found


def read_prompts(
    source: Source,
    tokenizer: Any = None,
    *,
    chat: bool = False,
    context: int | None = None,
    ignore: Sequence[str] = (),
) -> list[Ids]:
    """The prompts of a file (.jsonl, .json, .parquet, .txt), a `datasets.Dataset` or a folder saved by it.

    chat     a text is what a user says: it is put into the tokenizer's chat template
    context  the most tokens that a prompt may have: the model's context less the horizon
    ignore   columns that need not be warned of
    """
    encoder = None if tokenizer is None else Encoder(tokenizer)
    found, seen = [], set(COLUMNS)
    for where, row in read_rows(source):
        seen |= row.keys()
        if "prompt" not in row:
            raise ValueError(f"{where}: there is no column prompt; it has {listed(row)}")
        prompt = row["prompt"]
        if chat and isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        with placed(f"{where}, column prompt"):
            ids = _prompt(prompt, _kind(prompt), encoder)
            if context is not None and len(ids) > context:
                raise ValueError(f"it has {len(ids)} tokens; the context has room for {context}: shorten it")
        found.append(ids)
    _warn_of(source, seen.difference(COLUMNS, ignore))
    return found


@contextmanager
def placed(where: str) -> Iterator[None]:
    """ValueErrors inside are told where they happened."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _warn_of(source: Source, unread: set[str]) -> None:
    if unread:
        warnings.warn(
            f"{source_name(source)}: columns that are not read: {', '.join(sorted(unread))} (known are "
            f"{', '.join(COLUMNS)}; ignore=[...] takes note of the others)",
            stacklevel=3,
        )


def _record(where: str, row: Row, encoder: Encoder | None) -> Record:
    for name in ("chosen", "rejected"):
        if name not in row:
            hint = ""
            if {"completion", "label"} <= row.keys():
                hint = ": this is the unpaired format, and a comparison needs chosen and rejected"
            raise ValueError(f"{where}: there is no column {name}; it has {listed(row)}{hint}")
    kinds = {}
    for name in TEXTS:
        if name in row:
            with placed(f"{where}, column {name}"):
                kinds[name] = _kind(row[name])
    if len(set(kinds.values())) > 1:
        mixed = ", ".join(f"{name} is {kind}" for name, kind in kinds.items())
        raise ValueError(f"{where}: {mixed}; give all of them alike")
    return Record(*_texts(where, row, kinds["chosen"], encoder), **_numbers(where, row))


# ---- texts ---------------------------------------------------------------------------------------------------------

IDS, TEXT, MESSAGES = "token ids", "a text", "a conversation"


def _kind(value: Any) -> str:
    if isinstance(value, str):
        return TEXT
    if isinstance(value, list | tuple):
        if value and all(isinstance(entry, Mapping) for entry in value):
            for number, message in enumerate(value):
                if not isinstance(message.get("role"), str):
                    raise ValueError(
                        f"message {number} has no role; a message is {{'role': ..., 'content': ...}}"
                    )
            return MESSAGES
        if all(_whole(entry) for entry in value):
            return IDS
    raise ValueError(f"{short(value)} is none of a text, a list of messages, and a list of token ids >= 0")


def _whole(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and x >= 0


def _needed(kind: str, encoder: Encoder | None) -> Encoder:
    if encoder is None:
        raise ValueError(f"it is {kind}: give tokenizer=..., or token ids")
    return encoder


def _prompt(prompt: Any, kind: str, encoder: Encoder | None) -> Ids:
    ids = tuple(prompt) if kind == IDS else _needed(kind, encoder).prompt(prompt)
    if not ids:
        raise ValueError("it is empty; a model needs a token to start from, such as its first one")
    return ids


def _texts(where: str, row: Row, kind: str, encoder: Encoder | None) -> tuple[Ids, Ids, Ids]:
    if "prompt" not in row:
        with placed(where):
            if kind == IDS:
                raise ValueError(f"there is no column prompt, which token ids need; it has {listed(row)}")
            if row["chosen"] == row["rejected"]:
                raise ValueError("chosen and rejected are equal, so that their shared prompt is not known")
            return _needed(kind, encoder).shared(row["chosen"], row["rejected"])
    with placed(f"{where}, column prompt"):
        prompt = _prompt(row["prompt"], kind, encoder)
    both = []
    for name in ("chosen", "rejected"):
        with placed(f"{where}, column {name}"):
            if kind == IDS:
                both.append(tuple(row[name]))
            else:
                both.append(_needed(kind, encoder).completion(row["prompt"], row[name]))
    return prompt, both[0], both[1]


def _check_lengths(where: str, record: Record, context: int | None) -> None:
    for name in ("chosen", "rejected"):
        completion = getattr(record, name)
        if not completion:
            raise ValueError(
                f"{where}, column {name}: it is empty; a response has at least its end token: remove the row, or let "
                "it be the end token alone"
            )
        if context is not None and len(record.prompt) + len(completion) > context:
            raise ValueError(
                f"{where}: the prompt has {len(record.prompt)} tokens and {name} {len(completion)}; together they "
                f"exceed the context of {context}: shorten the prompt, or remove the row"
            )


# ---- numbers -------------------------------------------------------------------------------------------------------


def _numbers(where: str, row: Row) -> dict[str, Any]:
    """p_chosen, ref_logp, query_id and round, as far as they are there."""
    checks = {"p_chosen": _probability, "ref_logp": _pair, "query_id": _label, "round": _count}
    found = {}
    for name, check in checks.items():
        if name in row:
            with placed(f"{where}, column {name}"):
                found[name] = check(row[name])
    return found


def _real(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)


def _probability(p: Any) -> float:
    if not _real(p) or not 0 <= p <= 1:
        raise ValueError(f"{short(p)} is no probability; it lies in [0, 1]")
    return float(p)


def _pair(pair: Any) -> tuple[float, float]:
    if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(_real(v) for v in pair):
        raise ValueError(
            f"{short(pair)}: give two finite numbers, the log-probabilities of chosen and rejected under the reference"
        )
    return float(pair[0]), float(pair[1])


def _label(name: Any) -> str:
    if isinstance(name, bool) or not isinstance(name, str | int):
        raise ValueError(f"{short(name)}: give a text or a whole number")
    return str(name)


def _count(number: Any) -> int:
    if not _whole(number):
        raise ValueError(f"{short(number)}: give a whole number >= 0")
    return int(number)


# ---- writing -------------------------------------------------------------------------------------------------------


def write_records(path: str | os.PathLike[str], records: Iterable[Record], tokenizer: Any = None) -> None:
    """Write .jsonl, .json or .parquet; the file appears whole, by rename.

    tokenizer  None: token ids, which read back as they are. With a tokenizer: texts, special tokens as they are spelt;
               ValueError where `read_records(path, tokenizer, append_end=False)` would read back other ids
    """
    encoder = None if tokenizer is None else Encoder(tokenizer, append_end=False)
    write_rows(path, [_row(f"record {i}", record, encoder) for i, record in enumerate(records)])


def _row(where: str, record: Record, encoder: Encoder | None) -> Row:
    row = {name: value for name, value in asdict(record).items() if value is not None}
    with placed(where):
        if record.ref_logp is not None:
            row["ref_logp"] = list(_pair(record.ref_logp))
        if encoder is not None:
            return row | spelt(record, encoder)
    return row | {name: list(row[name]) for name in TEXTS}


def spelt(record: Record, encoder: Encoder) -> dict[str, str]:
    """Prompt, chosen and rejected as texts, of which the encoder makes the same ids again; else ValueError."""
    front = encoder.text("")
    known = record.prompt[: len(front)] == front
    prompt = encoder.spell(record.prompt[len(front) :] if known else record.prompt)
    texts = {"prompt": prompt}
    for name in ("chosen", "rejected"):
        ids = getattr(record, name)
        texts[name] = encoder.spell(ids)
        if encoder.text(prompt) != record.prompt or encoder.completion(prompt, texts[name]) != ids:
            raise ValueError(
                f"the text {prompt + texts[name]!r} has other token ids than prompt and {name}: write token ids"
            )
    return texts
